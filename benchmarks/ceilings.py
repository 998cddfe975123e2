"""What the machine can do at most, measured: multiply-adds in registers, and a copy of memory.

And how far its threads are from each other: the time that a line of the cache takes to another thread and back. On a
virtual machine it changes, as the processors behind it do.

    python benchmarks/ceilings.py

Also builds the C++ beside the benchmarks, once, into build/.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from common import ROOT, interleave, seconds_per_call

FLAGS = ["-std=c++20", "-O3", "-fno-math-errno", "-ffp-contract=fast"]  # contraction makes a multiply-add of a * b + c
CALL = 1e-3  # seconds that a timed call into C++ takes at least: ctypes takes a microsecond
COPIED = 1 << 28  # bytes, beyond the caches
TRIPS = 20_000
# The loops that bound a type: it may be computed in another one.
COMPUTED_IN = {"float16": ("float32",), "bfloat16": ("bfloat16", "float32")}


class NotBuilt(Exception):
    """There is no ninja or no compiler, or it refused."""


def native(
    name: str, sources: Sequence[str | Path], flags: Sequence[str] = (), libraries: Sequence[str] = ()
) -> ctypes.CDLL:
    """Compiles and loads a library, linked with others. Its functions release Python's lock."""
    from torch.utils.cpp_extension import load

    # The `ninja` package puts its program beside python: not on PATH unless the venv is activated.
    path = os.environ.get("PATH", os.defpath)
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), path])
    folder = ROOT / "build" / "benchmarks" / f"torch-{torch.__version__}" / name
    folder.mkdir(parents=True, exist_ok=True)
    try:
        library = load(
            name=name,
            sources=[str(ROOT / source) for source in sources],
            extra_cflags=[*FLAGS, *flags],
            extra_ldflags=list(libraries),
            extra_include_paths=[str(ROOT / "csrc")],
            build_directory=str(folder),
            is_python_module=False,
        )
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        raise NotBuilt(f"cannot build {name}: {error}") from error
    finally:
        os.environ["PATH"] = path
    return ctypes.CDLL(library)


def long_enough(run: Callable[[int], object]) -> tuple[int, Callable[[], object]]:
    """A number of repetitions that takes CALL seconds, and the call of `run` with it."""
    times = 1
    while seconds_per_call(partial(run, times), 1) < CALL:
        times *= 2
    return times, partial(run, times)


class Loop(NamedTuple):
    """A loop of fma.cpp."""

    isa: str
    dtype: str
    flops: int  # of a round
    run: Callable[[int], None]  # that many rounds


@cache
def loops() -> list[Loop]:
    """Those that run on this machine, narrow vectors first."""
    library = native("fma", ["benchmarks/fma.cpp"])
    library.loop_isa.restype = library.loop_dtype.restype = ctypes.c_char_p
    library.loop_runs_here.restype = ctypes.c_bool
    found, index = [], 0
    while isa := library.loop_isa(index):
        if library.loop_runs_here(index):
            run = (lambda i: lambda rounds: library.loop_run(i, ctypes.c_int64(rounds)))(index)
            found.append(Loop(isa.decode(), library.loop_dtype(index).decode(), library.loop_flops(index), run))
        index += 1
    return found


def peak(dtype: str, threads: int, budget: float = 0.2) -> tuple[float, Loop]:
    """FLOP/s of the fastest loop for a type, on that many threads at once."""
    candidates = [loop for loop in loops() if loop.dtype in COMPUTED_IN.get(dtype, (dtype,))]
    rounds, calls = [], []
    with ThreadPoolExecutor(threads) as pool:
        for loop in candidates:
            times, _ = long_enough(loop.run)
            rounds.append(times * 10)  # starting threads takes time too
            calls.append(lambda run=loop.run, many=[times * 10] * threads: list(pool.map(run, many)))
        seconds = interleave(calls, budget)
    rates = [threads * loop.flops * n / s for loop, n, s in zip(candidates, rounds, seconds)]
    best = max(range(len(rates)), key=rates.__getitem__)
    return rates[best], candidates[best]


def round_trip() -> float:
    """Seconds from one thread to another and back."""
    run = partial(native("fma", ["benchmarks/fma.cpp"]).round_trips, ctypes.c_int64(TRIPS))
    return interleave([run], 0.05)[0] / TRIPS


def measure(dtype: str) -> dict | None:
    """FLOP/s and bytes/s (read and written) of torch's number of threads, and the loop that had the most FLOP/s.

    And with more than one thread, the seconds of a round trip.

    None, and a complaint, where the loops cannot be built.
    """
    try:
        flops, loop = peak(dtype, torch.get_num_threads())
    except NotBuilt as error:
        print(f"no ceilings, and so no shares of them: {error}", file=sys.stderr)
        return None
    source = torch.ones(COPIED, dtype=torch.uint8)
    copy = partial(torch.zeros_like(source).copy_, source)
    trip = {"round_trip": round_trip()} if torch.get_num_threads() > 1 else {}
    bytes_per_second = 2 * COPIED / interleave([copy], 0.3)[0]
    return {"flops": flops, "loop": f"{loop.isa} {loop.dtype}", "bytes": bytes_per_second} | trip


def highest(measured: Sequence[dict]) -> dict:
    """Of measurements at different times: a shared machine hides some of what it can do at any one.

    Of round trips the longest, which tells whether the threads were far apart at one of them.
    """
    trips = [c["round_trip"] for c in measured if "round_trip" in c]
    best = max(measured, key=lambda c: c["flops"]) | {"bytes": max(c["bytes"] for c in measured)}
    return best | ({"round_trip": max(trips)} if trips else {})


def roof_seconds(flops: float, moved: float, ceilings: dict) -> float:
    """The time below which neither ceiling lets a computation come."""
    return max(flops / ceilings["flops"], moved / ceilings["bytes"])


def describe_ceilings(ceilings: dict) -> str:
    flops, moved = ceilings["flops"] / 1e9, ceilings["bytes"] / 1e9
    trip = f", {ceilings['round_trip'] * 1e9:.0f} ns to another thread and back" if "round_trip" in ceilings else ""
    return f"{flops:.0f} GFLOP/s ({ceilings['loop']} multiply-adds in registers), {moved:.0f} GB/s (a copy){trip}"


if __name__ == "__main__":
    for name in ("float32", "float64", "bfloat16"):
        if measured := measure(name):
            print(f"{name}, {torch.get_num_threads()} threads: {describe_ceilings(measured)}")
