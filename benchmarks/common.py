"""What the benchmarks share: the timing, the check against float64, tables, and the record of a run."""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import math
import os
import platform
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

import myconv

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
INSTRUCTION_SETS = re.compile(r"avx|amx|fma$|f16c$|asimd|sve|bf16|i8mm")  # of the flags in /proc/cpuinfo
ERROR_FLOOR = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}


# --- the command line -------------------------------------------------------------------------------------------------


def make_parser(description: str, budget: float, per: str = "a measurement") -> argparse.ArgumentParser:
    """With the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=budget, help=f"seconds for {per} (default: {budget:g})")
    parser.add_argument("--record", action="store_true", help="write a record to benchmarks/results/")
    parser.add_argument("--json", metavar="OUT", help="write the record to this file instead")
    parser.add_argument("--plain", action="store_true", help="plain text: no rich, no progress bar")
    return parser


def stop(message: str) -> NoReturn:
    """Exit status 2: 1 is for wrong results."""
    print(message, file=sys.stderr)
    raise SystemExit(2)


def require(*packages: str, otherwise: str = "") -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        stop(f"{missing[0]} is not installed: run pip install '.[bench]'{otherwise}")


def start(arguments: argparse.Namespace, threads: int | None) -> None:
    if not arguments.plain:
        require("rich", otherwise=", or pass --plain")
    if threads:
        torch.set_num_threads(threads)


# --- measuring --------------------------------------------------------------------------------------------------------


def seconds_per_call(call: Callable[[], object], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times


def interleave(
    calls: Sequence[Callable[[], object]],
    budget: float,
    bundle: float = 2e-3,
    least: int = 8,
    most: int = 400,
) -> list[float]:
    """Times calls in turn, in random order.

    A shared machine only ever slows a call down, and slows all of them alike: the lower quartile of calls made in turn
    is what repeats. Short calls are timed in bundles; their random length keeps clear of resonance with the scheduler.

    Args:
        calls: what to time. Each is called twice before the first measurement.
        budget: seconds for all of them together.
        bundle: the longest bundle, in seconds.
        least, most: limits to the number of rounds, whatever the budget.

    Returns:
        the lower quartile of the seconds per call, for each call.
    """
    for call in calls:
        call()
    longest = max(1e-7, *(seconds_per_call(call, 1) for call in calls))
    length = max(1, int(bundle / longest))
    samples = [[] for _ in calls]
    rounds, end = 0, time.perf_counter() + budget
    while rounds < least or (rounds < most and time.perf_counter() < end):
        for i in random.sample(range(len(calls)), len(calls)):
            samples[i].append(seconds_per_call(calls[i], random.randint((length + 1) // 2, length)))
        rounds += 1
    return [sorted(times)[rounds // 4] for times in samples]


def relative_error(got: Tensor, exact: Tensor) -> float:
    """The relative L2 distance; infinite if the shapes differ."""
    if got.shape != exact.shape:
        return math.inf
    return ((got.double() - exact).norm() / exact.norm().clamp_min(1e-300)).item()


def check(ours, theirs, exact, dtype: torch.dtype) -> tuple[float, str | None]:
    """Compares tensors, or tuples of them, with their float64 counterparts.

    Returns:
        the largest relative error of ours, and what is wrong: an error above both the type's floor and twice torch's.
    """
    ours, theirs, exact = ((r,) if isinstance(r, Tensor) else r for r in (ours, theirs, exact))
    pairs = [(relative_error(mine, e), relative_error(other, e)) for mine, other, e in zip(ours, theirs, exact)]
    for error, others in pairs:
        if not error <= max(ERROR_FLOOR[dtype], 2 * others):  # also true of nan
            return error, f"wrong: relative error {error:.1e}, torch's {others:.1e}"
    return max(error for error, _ in pairs), None


def geomean(ratios: Sequence[float]) -> float:
    """The geometric mean; a failed row (0) counts as 0.001."""
    return math.exp(sum(math.log(max(ratio, 1e-3)) for ratio in ratios) / len(ratios))


# --- printing ---------------------------------------------------------------------------------------------------------


def progress(items: Sequence, plain: bool) -> Iterator:
    """The items, under a progress bar. It is drawn between the items: nothing else runs while one is measured."""
    if plain:
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(items, "measuring", console=Console(stderr=True), transient=True, auto_refresh=False)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], plain: bool) -> None:
    """Columns whose name ends in a space are set flush left, the others flush right."""
    rows = list(rows)
    print(f"\n{title}")
    if plain:
        widths = [max(map(len, cells)) for cells in zip(columns, *rows)]
        for row in [columns, *rows]:
            cells = zip(columns, row, widths)
            print("  ".join(c.ljust(w) if name[-1] == " " else c.rjust(w) for name, c, w in cells).rstrip())
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    for name in columns:
        table.add_column(name.strip(), justify="left" if name[-1] == " " else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    Console(width=None if sys.stdout.isatty() else 180).print(table)


# --- the record -------------------------------------------------------------------------------------------------------


def machine() -> dict:
    """The processor, without anything that names this one machine."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        info = ""
    fields = dict(re.findall(r"^(.+?)\s*: (.*)$", info, re.MULTILINE))
    flags = (fields.get("flags") or fields.get("Features", "")).split()
    return {
        "cpu": fields.get("model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "flags": sorted(filter(INSTRUCTION_SETS.match, flags)),
        "myconv_isas": myconv._C.isas(),
    }


def operating_system() -> str:
    kernel = re.match(r"[\d.]*", platform.release())[0]
    try:
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        name = ""
    return f"{platform.system()} {kernel} {platform.machine()} {name}".strip()


def commit() -> tuple[str | None, bool | None]:
    """The git commit of the myconv in use, and whether the tree differs from it in anything but results.

    (None, None) where that is not known: no git, or an installed myconv that is not this tree's.
    """

    def git(*arguments: str) -> str:
        return subprocess.check_output(["git", "-C", ROOT, *arguments], text=True, stderr=subprocess.DEVNULL).strip()

    if Path(myconv.__file__).resolve().parents[1] != ROOT:
        return None, None
    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--", ".", ":!benchmarks/results"))
    except (OSError, subprocess.CalledProcessError):
        return None, None


def describe(benchmark: str) -> dict:
    """All of a record but its rows: where, when and with what the numbers were made."""
    onednn = re.search(r"(?:MKL-DNN|oneDNN) v(\S+)", torch.__config__.show())
    revision, dirty = commit()
    return {
        "benchmark": benchmark,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": revision,
        "dirty": dirty,
        # Folders are cut: they are nobody's business.
        "command": ["python", f"benchmarks/{benchmark}.py", *(re.sub(r"[^=]*/", "", a) for a in sys.argv[1:])],
        "threads": torch.get_num_threads(),
        "isa": myconv._C.isa(),
        "machine": machine(),
        "os": operating_system(),
        "python": platform.python_version(),
        "myconv": myconv.__version__,
        "compiler": myconv._build.COMPILER,
        "torch": torch.__version__,
        "onednn": onednn[1] if onednn else None,
        "torch_parallel_info": torch.__config__.parallel_info().strip().splitlines(),
    }


def output_path(record: dict, suffix: str, json_path: str | None, wanted: bool) -> Path | None:
    """Where to write the record, or None. Settled before anything is measured, so that a refusal costs nothing."""
    if json_path:
        return Path(json_path)
    if not wanted:
        return None
    name = f"{slug(record['machine']['cpu'])}-{record['machine']['cores']}-cores"
    return new_result(f"{name}-{(record['commit'] or 'unknown')[:7]}-{suffix}.json")


def slug(name: str) -> str:
    """The name of a processor, as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\(\w+\)|@.*", "", name).lower()).strip("-")


def new_result(name: str) -> Path:
    path = RESULTS / name
    if path.exists():
        stop(f"{path.relative_to(ROOT)} exists: remove it, or name another file with --json")
    return path


def save_record(path: Path, record: dict, rows: Sequence[dict]) -> None:
    """One line for each row: such files compare well. Whoever stops the program meanwhile leaves the old file whole."""
    head = json.dumps(record, indent=1).removesuffix("\n}")
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(f'{head},\n "rows": [\n{lines}\n ]\n}}\n')
    unfinished.replace(path)


def write_record(path: Path | None, record: dict, rows: Sequence[dict]) -> None:
    if path is not None:
        save_record(path, record, rows)
        print(f"wrote {path}")


def exit_status(rows: Sequence[dict]) -> int:
    """1 if a row is wrong or failed, and says so."""
    failed = [row["failed"] for row in rows if row["failed"]]
    if failed:
        print(f"{len(failed)} of {len(rows)} rows are wrong or failed, the first: {failed[0]}", file=sys.stderr)
    return 1 if failed else 0
