"""The checks of gpu.py: right results first, then what holds of streams, graphs, devices, autograd and TF32.

A check is a function of a Bench and a Clock that returns what it found: "checks" of "of" were made until the time was
up, "failures" says what was wrong, anything else is for the record.

    python benchmarks/gpu_checks.py        # each kernel once and little else: what compute-sanitizer watches
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from gpu_build import Skip, find_tool, run_command
from torch import Tensor

import myconv

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
import checking  # noqa: E402
from cases import BATCH, BY_NAME, CASES, CORE, DIRECTIONS, INVARIANCE, PARTS, Case, make_tensors, torch_conv  # noqa: E402

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
LAYOUTS = ("contiguous", "channels_last")
MOST_FAILURES = 20  # of a check: after an illegal access everything fails
MATRIX_ROWS: tuple[str, ...] = ()  # rows that compute float32 on matrix units when torch allows TF32
SOME = [
    BY_NAME[name]
    for name in "stride_2 depthwise groups_2 1x1 reflect_2d length_16 video_3x3x3 transposed_stride_2".split()
]


@dataclass
class Clock:
    """A deadline, in time.monotonic's seconds."""

    end: float

    def left(self) -> float:
        return self.end - time.monotonic()

    def part(self, share: float) -> Clock:
        return Clock(time.monotonic() + share * max(self.left(), 0))


@dataclass
class Bench:
    """What is common to all stages. `rows` and `stages` are the record's; `save` writes it as it is."""

    device: str
    quick: bool
    batch: int
    rows: list[dict]
    stages: list[dict]
    save: Callable[[], None]

    def some(self, cases: Sequence[Case]) -> Sequence[Case]:
        return cases[::24] if self.quick else cases


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def sweep(jobs: Sequence[tuple[str, Callable[[], object]]], clock: Clock, device: str) -> dict:
    """Runs the named jobs, in an order that makes any beginning of it representative, until the time is up."""
    done, failures = 0, []
    for name, job in random.Random(0).sample(jobs, len(jobs)):
        if clock.left() <= 0 or len(failures) == MOST_FAILURES:
            break
        checking.facts.clear()
        try:
            job()
            synchronize(device)
        except Exception as exception:
            about = " ".join(f"{key}={value}" for key, value in checking.facts.items())
            failures.append(f"{name} {about}: {type(exception).__name__}: {exception}"[:500])
        done += 1
    return {"checks": done, "of": len(jobs), "failures": failures}


@contextmanager
def deterministic_poison() -> Iterator[None]:
    """torch.empty gives NaN. The allocators are poisoned besides, by checking.poison and checking.set_junk_fill."""
    checking.set_junk_fill(True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        checking.set_junk_fill(False)


# --- values -----------------------------------------------------------------------------------------------------------


def parity(bench: Bench, clock: Clock) -> dict:
    """Every row that takes a case, in both layouts: to the bit on small integers, to the tests' table on others."""
    jobs: list[tuple[str, Callable[[], object]]] = []
    for dtype in FLOATS:
        for direction in DIRECTIONS:
            for integers, cases in ((True, CASES), (False, CORE)):
                for case in bench.some(cases):
                    name = f"{case.name} {direction} {dtype} {'integers' if integers else 'reals'}"
                    jobs.append((name, partial(checking.check_rows, case, direction, dtype, 0, integers, bench.device)))
    for dtype in INTEGERS:
        for case in bench.some(CORE):
            if dtype == torch.int64 or not case.transposed:  # as in torch
                jobs.append((f"{case.name} {dtype}", partial(checking.check_integers, case, dtype, 0, bench.device)))
    with deterministic_poison():
        checking.poison(1 << 16, bench.device)
        assert torch.empty(1 << 14, device=bench.device).isnan().all(), "fresh memory is not poisoned"
        return sweep(jobs, clock, bench.device)


def autograd(bench: Bench, clock: Clock) -> dict:
    """Whole calls and their gradients, and derivatives by differences, to second order."""

    def gradients(case: Case, dtype: torch.dtype, layout: str) -> None:
        tensors = make_tensors(case, dtype, layout, device=bench.device)
        checking.check_parity(partial(checking.our_conv, case), partial(torch_conv, case), tensors)

    def differences(case: Case, check: Callable) -> None:
        tensors = make_tensors(case.with_batch(1), torch.float64, device=bench.device)
        arguments = [None if t is None else t.requires_grad_() for t in tensors[:3]]
        assert check(partial(checking.our_conv, case), arguments, fast_mode=True)

    jobs: list[tuple[str, Callable[[], object]]] = [
        (f"{case.name} {dtype} {layout}", partial(gradients, case, dtype, layout))
        for case in bench.some(CORE)
        for dtype in FLOATS
        for layout in LAYOUTS
    ]
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        jobs += [(f"{check.__name__} {case.name}", partial(differences, case, check)) for case in bench.some(SOME)]
    return sweep(jobs, clock, bench.device)


def autocast(bench: Bench, clock: Clock) -> dict:
    """The output is that of the rounded arguments in the lower type; gradients are float32."""

    def check(case: Case, low: torch.dtype) -> None:
        leaves = [t.requires_grad_() for t in make_tensors(case, device=bench.device)[:3] if t is not None]
        with torch.autocast(bench.device, low):
            y = checking.our_conv(case, *leaves, *[None] * (3 - len(leaves)))
        assert y.dtype == low
        rounded = [leaf.detach().cpu().to(low).double() for leaf in leaves]
        checking.assert_accurate(y.cpu(), torch_conv(case, *rounded, *[None] * (3 - len(rounded))))
        gradients = torch.autograd.grad(y.float().square().sum(), leaves)
        assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients)

    jobs = [
        (f"{case.name} {low}", partial(check, case, low))
        for case in bench.some(SOME)
        for low in (torch.bfloat16, torch.float16)
    ]
    return sweep(jobs, clock, bench.device)


# --- the same bits ----------------------------------------------------------------------------------------------------


def repeat(bench: Bench, clock: Clock) -> dict:
    """Every row gives the same bits three times, whatever was in memory."""

    def check(case: Case, direction: str, layout: str, dtype: torch.dtype) -> None:
        for run, x, y in checking.every_kernel(case, direction, layout, 0, dtype, bench.device):
            first = run(x, y)
            for _ in range(2):
                checking.poison(first.nbytes, bench.device)
                assert torch.equal(run(x, y), first), "other bits in another run"

    return sweep(same_bits_jobs(bench, check, DIRECTIONS), clock, bench.device)


def batch(bench: Bench, clock: Clock) -> dict:
    """A sample has the same bits in every batch and at every place in it: forward and backward_input."""

    def check(case: Case, direction: str, layout: str, dtype: torch.dtype) -> None:
        for run, x, y in checking.every_kernel(case, direction, layout, 0, dtype, bench.device):
            whole = run(x, y)
            for part in PARTS:
                with checking.noting(samples=part):
                    assert torch.equal(run(x[part], y[part]), whole[part]), "other bits in another batch"
            turned = run(torch.roll(x, 3, 0), torch.roll(y, 3, 0))
            assert torch.equal(torch.roll(turned, -3, 0), whole), f"other bits at another place of {BATCH}"

    return sweep(same_bits_jobs(bench, check, DIRECTIONS[:2]), clock, bench.device)


def same_bits_jobs(bench: Bench, check: Callable, directions: Sequence[str]) -> list[tuple[str, Callable]]:
    return [
        (f"{case.name} {direction} {layout} {dtype}", partial(check, case, direction, layout, dtype))
        for case in bench.some(INVARIANCE)
        for direction in directions
        for layout in LAYOUTS
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    ]


# --- CUDA -------------------------------------------------------------------------------------------------------------


def spin(seconds: float) -> None:
    """Keeps the current stream busy for about so long."""
    torch.cuda._sleep(int(seconds * cycles_per_second()))


def cycles_per_second(known: dict[int, float] = {}) -> float:  # noqa: B006
    """Of torch.cuda._sleep, measured once for each device."""
    device = torch.cuda.current_device()
    if device not in known:
        cycles = 20_000_000
        torch.cuda._sleep(cycles)  # the first one loads the kernel
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.cuda._sleep(cycles)
        end.record()
        end.synchronize()
        known[device] = cycles / start.elapsed_time(end) * 1e3
    return known[device]


def operator_calls(case: Case, device: str, dtype: torch.dtype = torch.float32, seed: int = 0):
    """(direction, call, operands) of the three operators: the call reads its operands anew each time."""
    for direction in DIRECTIONS:
        operands = checking.convolution_roles(case, make_tensors(case, dtype, seed=seed, device=device))
        x, w, b, y = operands
        bias = checking.bias_for(case, direction, b)
        yield direction, partial(checking.run_operator, direction, x, w, bias, y, case.problem), operands


def streams(bench: Bench, clock: Clock) -> dict:
    """A kernel runs on the current stream, behind what is there, and the call does not wait for it."""

    def on_a_busy_stream(case: Case) -> None:
        for direction, call, _ in operator_calls(case, bench.device):
            expected = call()
            torch.cuda.synchronize()
            side, other = torch.cuda.Stream(), torch.cuda.Stream()
            with checking.noting(direction=direction), torch.cuda.stream(side):
                call()  # whatever happens once on a stream
                checking.poison(expected.nbytes, bench.device)
                side.synchronize()
                spin(0.3)
                result = call()
                assert not side.query(), "the call waited for the stream"
                with torch.cuda.stream(other):
                    early = result.clone()
                    other.synchronize()
                assert not side.query(), "the stream was not busy for long enough to tell"
                assert not torch.equal(early, expected), "the result was there before its stream came to it"
                side.synchronize()
                assert torch.equal(result, expected), "the result is wrong on this stream"

    def behind_its_inputs(case: Case) -> None:
        for direction, call, operands in operator_calls(case, bench.device):
            expected = [fresh() for other, fresh, _ in operator_calls(case, bench.device, seed=1) if other == direction]
            news = checking.convolution_roles(case, make_tensors(case, seed=1, device=bench.device))
            torch.cuda.synchronize()
            side = torch.cuda.Stream()
            with checking.noting(direction=direction), torch.cuda.stream(side):
                spin(0.05)
                overwrite(operands, news)
                result = call()
            side.synchronize()
            assert torch.equal(result, expected[0]), "the kernel did not wait for its inputs"

    def gradients(case: Case) -> None:
        tensors = make_tensors(case, device=bench.device)
        conv = partial(checking.our_conv, case)
        expected = checking.with_gradients(conv, tensors)
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            spin(0.05)
            results = checking.with_gradients(conv, tensors)
        side.synchronize()
        assert all(map(torch.equal, results, expected)), "the backward pass is wrong on a side stream"

    checks = (on_a_busy_stream, behind_its_inputs, gradients)
    jobs = [(f"{check.__name__} {case.name}", partial(check, case)) for check in checks for case in SOME[:4]]
    return sweep(jobs, clock, bench.device)


def overwrite(operands: Sequence[Tensor | None], news: Sequence[Tensor | None]) -> None:
    for old, new in zip(operands, news, strict=True):
        if old is not None:
            old.copy_(new)


def graph(bench: Bench, clock: Clock) -> dict:
    """A captured call, replayed on other values, gives the bits of an ordinary call."""

    def capture(case: Case, call: Callable[[], list[Tensor]], operands: Sequence[Tensor | None]) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                call()
        torch.cuda.current_stream().wait_stream(side)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            results = call()
        for seed in (1, 2):
            news = checking.convolution_roles(case, make_tensors(case, seed=seed, device=bench.device))
            with torch.no_grad():
                overwrite(operands, news)
            captured.replay()
            assert all(map(torch.equal, results, call())), "a replay gives other bits than a call"

    def operators(case: Case) -> None:
        for direction, call, operands in operator_calls(case, bench.device):
            with checking.noting(direction=direction):
                capture(case, lambda call=call: [call()], operands)

    def training(case: Case) -> None:
        tensors = make_tensors(case, device=bench.device)
        operands = checking.convolution_roles(case, tensors)
        capture(case, partial(checking.with_gradients, partial(checking.our_conv, case), tensors), operands)

    checks = (operators, training)
    jobs = [(f"{check.__name__} {case.name}", partial(check, case)) for check in checks for case in SOME]
    return sweep(jobs, clock, bench.device)


def devices(bench: Bench, clock: Clock) -> dict:
    """Tensors on the second device, while the first is the current one."""
    if torch.cuda.device_count() < 2:
        raise Skip("one device")

    def check(case: Case) -> None:
        there = list(operator_calls(case, "cuda:1"))
        for (direction, call, _), (_, on_cpu, _) in zip(there, operator_calls(case, "cpu"), strict=True):
            with checking.noting(direction=direction), torch.cuda.device(0):
                result = call()
                assert result.device == torch.device("cuda:1") and torch.cuda.current_device() == 0
                checking.assert_accurate(result.cpu(), on_cpu().double())

    return sweep([(case.name, partial(check, case)) for case in SOME], clock, "cuda:1")


def set_conv_precision(value: str) -> None:
    torch.backends.cudnn.conv.fp32_precision = value


def set_allow_tf32(value: bool) -> None:
    torch.backends.cudnn.allow_tf32 = value


TF32_SETTINGS: dict[str, Callable[[], None]] = {
    "allow_tf32 = False": partial(set_allow_tf32, False),
    "allow_tf32 = True": partial(set_allow_tf32, True),
    "conv.fp32_precision = 'ieee'": partial(set_conv_precision, "ieee"),
    "conv.fp32_precision = 'tf32'": partial(set_conv_precision, "tf32"),
}


def tf32(bench: Bench, clock: Clock) -> dict:
    """float32 results do not depend on torch's TF32 settings, but in MATRIX_ROWS. Records cuDNN's error beside ours."""
    channels, size = (8, 8) if bench.quick else (64, 28)
    case = Case("tf32", "conv2d", (4, channels, size, size), channels, 3, padding=1)
    x, w, b, y = make_tensors(case)
    exact = {
        d: checking.reference_operator(d, x, w, checking.bias_for(case, d, b), y, case.problem) for d in DIRECTIONS
    }
    on_device = [t.to(bench.device) for t in (x, w, b, y)]
    ieee: dict[tuple[str, str, str], Tensor] = {}
    table: list[dict] = []

    def relative(result: Tensor, direction: str) -> float:
        return ((result.cpu().double() - exact[direction]).norm() / exact[direction].norm()).item()

    def check(setting: str) -> None:
        TF32_SETTINGS[setting]()
        x, w, b, y = on_device
        for direction in DIRECTIONS:
            bias = checking.bias_for(case, direction, b)
            theirs = checking.torch_operator(direction, x, w, bias, y, case.problem)
            line = {"setting": setting, "direction": direction, "cudnn": relative(theirs, direction)}
            for row, isa in checking.kernels(direction, case.problem, (x, w, y), "contiguous"):
                with checking.forced(direction, row, isa):
                    ours = checking.run_operator(direction, x, w, bias, y, case.problem)
                    line[row] = relative(ours, direction)
                    if setting.endswith(("False", "'ieee'")) or row not in MATRIX_ROWS:
                        checking.assert_accurate(ours.cpu(), exact[direction])
                        first = ieee.setdefault((direction, row, isa), ours)
                        assert torch.equal(ours, first), "the setting changed the bits"
            table.append(line)

    try:
        # In the order of the table: the first one is what the others are held to.
        found = [sweep([(setting, partial(check, setting))], clock, bench.device) for setting in TF32_SETTINGS]
    finally:
        set_allow_tf32(False)
    sums = {key: sum(f[key] for f in found) for key in ("checks", "of")}
    return {**sums, "failures": [text for f in found for text in f["failures"]], "relative errors": table}


# --- compute-sanitizer ------------------------------------------------------------------------------------------------

SANITIZER_TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
FOUND = 77  # the exit status that says that the tool found something


def sanitizer(bench: Bench, clock: Clock) -> dict:
    """Each kernel under compute-sanitizer, in a process of its own, each tensor in an allocation of its own."""
    program = find_tool("compute-sanitizer")
    if program is None:
        raise Skip("compute-sanitizer is not installed")
    results, failures = {}, []
    for count, tool in enumerate(SANITIZER_TOOLS):
        seconds = clock.left() / (len(SANITIZER_TOOLS) - count)
        command = [program, "--tool", tool, "--error-exitcode", str(FOUND), sys.executable, str(Path(__file__))]
        status, output = run_command(command, seconds, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        last = output.strip().splitlines()[-1:] or [""]
        results[tool] = {0: "nothing found", None: "stopped: out of time"}.get(status, f"status {status}: {last[0]}")
        if status == FOUND:
            failures.append(f"{tool}:\n{output[:3000]}")
    ran = sum(result == "nothing found" for result in results.values()) + len(failures)
    if not ran and not any("out of time" in result for result in results.values()):
        raise Skip(f"compute-sanitizer does not work here: {results}"[:500])
    return {"checks": ran, "of": len(SANITIZER_TOOLS), "failures": failures, "tools": results}


def run_each_kernel_once(device: str) -> None:
    for case in SOME:
        for dtype in (*FLOATS, torch.int64):
            for direction, call, operands in operator_calls(case, device, dtype):
                x, w, _, y = operands
                for row, isa in checking.kernels(direction, case.problem, (x, w, y), "contiguous"):
                    with checking.forced(direction, row, isa):
                        call().cpu()


if __name__ == "__main__":
    run_each_kernel_once("cuda" if "cuda" in myconv._C.devices() and torch.cuda.is_available() else "cpu")
