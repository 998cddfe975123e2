"""The measurements of gpu.py: the machine's ceilings, and the layers of layers.json against torch's convolutions.

On CUDA each call is timed by events, with the stream kept busy while Python prepares it, so that a time is the
device's, and with the L2 cache overwritten before it. On the CPU it is common.interleave that measures.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path

import torch
from ceilings import roof_seconds
from common import check, geomean, interleave, print_table, relative_error
from gpu_checks import Bench, Clock, spin, synchronize
from run import DIRECTIONS as PASSES
from run import LAYOUTS, as_case, bytes_moved, chosen_algorithms, make_call
from torch import Tensor

import myconv

from cases import CHANNELS_LAST, Case, Tensors, lay_out, make_tensors  # isort: skip

# name -> (dtype, whether torch may use TF32)
PRECISIONS = {
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "bfloat16": (torch.bfloat16, False),
    "float16": (torch.float16, False),
}
SLOW = 0.25  # seconds: a call that takes longer is measured once
ROW_BUDGET = 0.3  # seconds for the rounds of a row
MOST_ROUNDS = 30
CHECKED = 2  # samples of which results are compared with float64
WHOLE_BATCH_ERROR = 3e-2  # to torch's result in the same type: far above rounding, far below a wrong result
MEMORY_SHARE = 0.2  # of the free memory, for the tensors of a row
SAVE_EVERY = 10.0  # seconds


def set_tf32(allowed: bool) -> None:
    torch.backends.cudnn.allow_tf32 = allowed
    torch.backends.cuda.matmul.allow_tf32 = allowed


# --- timing -----------------------------------------------------------------------------------------------------------


class CudaTimer:
    """Seconds on the device of single calls."""

    def __init__(self) -> None:
        size = max(2 * torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size, 1 << 26)
        self.flushed = torch.empty(size, dtype=torch.uint8, device="cuda")

    def first(self, call: Callable[[], object]) -> tuple[float, tuple[Tensor, ...]]:
        """The wall clock's seconds of one call, and its results."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        results = as_tuple(call())
        torch.cuda.synchronize()
        return time.perf_counter() - start, results

    def interleave(self, calls: Sequence[Callable[[], object]], budget: float) -> list[float]:
        """The lower quartile of each call, made in turn, in random order."""
        host = []
        for call in calls:
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            host.append(time.perf_counter() - start)
        samples: list[list[float]] = [[] for _ in calls]
        torch.cuda.synchronize()
        end = time.perf_counter() + budget
        while len(samples[0]) < 4 or (len(samples[0]) < MOST_ROUNDS and time.perf_counter() < end):
            pairs: dict[int, tuple] = {}
            for i in random.sample(range(len(calls)), len(calls)):
                pairs[i] = tuple(torch.cuda.Event(enable_timing=True) for _ in range(2))
                self.flushed.zero_()
                spin(min(2 * host[i] + 2e-5, 5e-3))  # the device must not wait for Python between the events
                pairs[i][0].record()
                calls[i]()
                pairs[i][1].record()
            torch.cuda.synchronize()
            for i, (before, after) in pairs.items():
                samples[i].append(before.elapsed_time(after) * 1e-3)
        return [sorted(times)[len(times) // 4] for times in samples]


class CpuTimer:
    def first(self, call: Callable[[], object]) -> tuple[float, tuple[Tensor, ...]]:
        start = time.perf_counter()
        results = as_tuple(call())
        return time.perf_counter() - start, results

    def interleave(self, calls: Sequence[Callable[[], object]], budget: float) -> list[float]:
        return interleave(calls, budget / 10, least=4)


def timer_for(device: str) -> CudaTimer | CpuTimer:
    return CpuTimer() if device == "cpu" else CudaTimer()


# --- ceilings ---------------------------------------------------------------------------------------------------------


def ceilings(bench: Bench, clock: Clock) -> dict:
    """Measured: FLOP/s of a large matrix product in each precision, and bytes/s of a large copy, read and written."""
    on_cpu = bench.device == "cpu"
    n, copied = (256, 1 << 22) if on_cpu else (8192, 1 << 31)
    timer = timer_for(bench.device)
    found = {}
    for name, (dtype, tf32) in PRECISIONS.items():
        set_tf32(tf32)
        a, b = (torch.randn(n, n, device=bench.device).to(dtype) for _ in range(2))
        product = partial(torch.mm, a, b)
        timer.first(product)
        found[name] = 2 * n**3 / timer.interleave([product], ROW_BUDGET)[0]
    set_tf32(False)
    source = torch.randn(copied // 4, device=bench.device)
    copy = partial(torch.empty_like(source).copy_, source)
    timer.first(copy)
    found["bytes"] = 2 * copied / timer.interleave([copy], ROW_BUDGET)[0]
    return {"per second": found}


# --- the layers -------------------------------------------------------------------------------------------------------


def choose_layers(quick: bool) -> list[dict]:
    """The quick layers, one of each category in turn, so that a part of the list has all kinds."""
    layers = [layer for layer in json.loads(Path(__file__).with_name("layers.json").read_text()) if layer["quick"]]
    if quick:
        layers = sorted(layers, key=lambda layer: layer["flops"])[:2]
    categories = defaultdict(list)
    for layer in layers:
        categories[layer["category"]].append(layer)
    order = random.Random(0)
    columns = [order.sample(group, len(group)) for _, group in sorted(categories.items())]
    return [layer for turn in zip_longest(*columns) for layer in turn if layer is not None]


def jobs(quick: bool) -> Iterator[tuple[dict, str, str, str]]:
    """(layer, precision, layout, pass): each combination over a layer of each category, then the next layers."""
    layers = choose_layers(quick)
    categories = len({layer["category"] for layer in layers})
    precisions = ["float32", "bfloat16"] if quick else list(PRECISIONS)
    combinations = [(p, layout, what) for p in precisions for layout in LAYOUTS for what in ("forward", "backward")]
    random.Random(0).shuffle(combinations)
    for first in range(0, len(layers), categories):
        for combination in combinations:
            for layer in layers[first : first + categories]:
                if combination[1] == "nchw" or len(layer["input"]) in CHANNELS_LAST:
                    yield layer, *combination
        if quick:
            return


def free_memory(device: str) -> int:
    return 1 << 30 if device == "cpu" else torch.cuda.mem_get_info()[0]


def with_training_batch(case: Case, batch: int, device: str) -> Case:
    """The batch asked for, or the largest half of it, fourth ... whose tensors fit."""
    per_sample = 8 * sum(map(math.prod, (case.input[1:], case.output_shape[1:])))  # x, y and their gradients, float32
    while batch > 1 and batch * per_sample > MEMORY_SHARE * free_memory(device):
        batch //= 2
    return case.with_batch(batch)


def random_tensors(case: Case, dtype: torch.dtype, layout: str, device: str) -> Tensors:
    """Made on the device: what make_tensors does on the CPU takes seconds for a training batch."""
    template = make_tensors(case.with_batch(1), dtype, layout, device=device)

    def enlarged(small: Tensor, shape: tuple[int, ...]) -> Tensor:
        return lay_out(torch.randn(shape, device=device).to(dtype), layout)

    x, gy = enlarged(template.x, case.input), enlarged(template.gy, case.output_shape)
    return Tensors(x, template.w, template.b, gy)


def first_samples(tensors: Tensors, count: int) -> Tensors:
    return Tensors(tensors.x[:count], tensors.w, tensors.b, tensors.gy[:count])


def errors(case: Case, tensors: Tensors, what: str, dtype: torch.dtype) -> tuple[float, float, str | None]:
    """Ours and torch's relative error on the first samples, and what is wrong.

    cuDNN does not tune for them: it keeps a plan for each size, and what is timed has another batch.
    """
    tuned, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    few = Tensors(*(None if t is None else t.detach() for t in first_samples(tensors, CHECKED)))
    wide = Tensors(*(None if t is None else t.double() for t in few))
    torchs = getattr(torch.nn.functional, case.op)
    ours, theirs, exact = (
        as_tuple(make_call(case, function, given, what)())
        for function, given in ((getattr(myconv.functional, case.op), few), (torchs, few), (torchs, wide))
    )
    torch.backends.cudnn.benchmark = tuned
    error, failed = check(ours, theirs, exact, dtype)
    return error, max(map(relative_error, theirs, exact)), failed


def as_tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def measure(bench: Bench, timer: CudaTimer | CpuTimer, job: tuple, peak: dict[str, float]) -> dict:
    layer, precision, layout, what = job
    dtype, tf32 = PRECISIONS[precision]
    set_tf32(tf32)
    case = as_case(layer)
    case = with_training_batch(case, bench.batch, bench.device)
    tensors = random_tensors(case, dtype, LAYOUTS[layout], bench.device)
    flops = layer["flops"] * case.input[0] // layer["input"][0] * len(PASSES[what])
    moved = bytes_moved(tensors, what)
    functions = [getattr(library, case.op) for library in (myconv.functional, torch.nn.functional)]
    with torch.set_grad_enabled(what != "forward"):
        error, torch_error, failed = errors(case, tensors, what, dtype)
        ours, theirs = (make_call(case, function, tensors, what) for function in functions)
        ours_s, results = timer.first(ours)
        for result, other in zip(results, timer.first(theirs)[1], strict=True):
            if not relative_error(result, other.double()) <= WHOLE_BATCH_ERROR:
                failed = failed or "the whole batch differs from torch's"
        del results, result, other
        slow = ours_s > SLOW
        if slow:
            (torch_s,) = timer.interleave([theirs], ROW_BUDGET)
        else:
            ours_s, torch_s = timer.interleave([ours, theirs], ROW_BUDGET)
    floor = roof_seconds(flops, moved, {"flops": peak[precision], "bytes": peak["bytes"]}) if peak else 0.0
    return {
        "batch": case.input[0],
        "flops": flops,
        "bytes": moved,
        "ours_ms": ours_s * 1e3,
        "torch_ms": torch_s * 1e3,
        "ratio": 0.0 if failed else torch_s / ours_s,
        "share": floor / ours_s,
        "torch_share": floor / torch_s,
        "error": error if math.isfinite(error) else None,
        "torch_error": torch_error if math.isfinite(torch_error) else None,
        "once": slow,
        "algorithms": chosen_algorithms(case, what, first_samples(tensors, 1)),
        "failed": failed,
    }


def benchmark(bench: Bench, clock: Clock, peak: dict[str, float], autotune: bool) -> dict:
    """The layers until the time is up. cuDNN's plans are kept for a process: `autotune` must not change within one."""
    torch.backends.cudnn.benchmark = autotune
    timer, all_jobs, saved, done = timer_for(bench.device), list(jobs(bench.quick)), time.monotonic(), 0
    longest = 0.0
    failures = []
    for job in all_jobs:
        if clock.left() < longest:  # no row may take the time of what comes after
            break
        start = time.monotonic()
        layer, precision, layout, what = job
        row = {
            "id": layer["id"],
            "category": layer["category"],
            "autotune": autotune,
            "precision": precision,
            "layout": layout,
            "pass": what,
        }
        try:
            row |= measure(bench, timer, job, peak)
        except Exception as exception:
            row |= {"ratio": 0.0, "failed": f"{type(exception).__name__}: {exception}".splitlines()[0][:200]}
        bench.rows.append(row)
        done += 1
        if row["failed"]:
            failures.append(f"{row['id']} {precision} {layout} {what}: {row['failed']}")
            synchronize(bench.device)  # raises if the device is lost, which ends the stage
        if bench.device != "cpu" and torch.cuda.mem_get_info()[0] < torch.cuda.memory_reserved():
            torch.cuda.empty_cache()
        longest = max(longest, time.monotonic() - start)
        if time.monotonic() - saved > SAVE_EVERY:
            bench.save()
            saved = time.monotonic()
    set_tf32(False)
    return {"checks": done, "of": len(all_jobs), "failures": failures}


def print_summary(rows: Sequence[dict]) -> None:
    """Geometric means for each precision, layout and pass, then the worst rows."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["precision"], row["layout"], row["pass"], "yes" if row["autotune"] else "no"].append(row)

    def cells(group: list[dict]) -> list[str]:
        ratios = [row["ratio"] for row in group]
        shares = [row["share"] for row in group if row.get("share")]
        share = f"{geomean(shares):.3f}" if shares else ""
        return [f"{len(ratios)}", f"{geomean(ratios):.3f}", f"{min(ratios):.3f}", f"{max(ratios):.3f}", share]

    columns = ["precision ", "layout ", "pass ", "autotune ", "rows", "geomean", "min", "max", "share of ceiling"]
    title = "torch's time / ours; the share is of the measured ceilings"
    print_table(title, columns, [[*names, *cells(group)] for names, group in sorted(groups.items())], plain=True)
    worst = sorted(rows, key=lambda row: row["ratio"])[:10]
    lines = [
        [
            f"{row['ratio']:.3f}",
            *(f"{row[key]:.3f}" if key in row else "" for key in ("ours_ms", "torch_ms")),
            *(row[key] for key in ("precision", "layout", "pass", "id")),
            row["failed"] or " + ".join(dict.fromkeys(row["algorithms"].values())),
        ]
        for row in worst
    ]
    columns = ["ratio", "ours ms", "torch ms", "precision ", "layout ", "pass ", "layer ", "algorithm "]
    print_table(f"the worst {len(worst)} of {len(rows)} rows", columns, lines, plain=True)
