"""Time whole networks with torch's convolutions and with ours: eager, random weights.

    python benchmarks/models.py
    python benchmarks/models.py --model mobilenet_v2 --batch 1 --layout nhwc
    python benchmarks/models.py --step training --size 128 --batch 8

A step is a forward pass (default); training: forward, backward and SGD; or penalty: the same with the gradient of a
gradient (WGAN-GP's penalty, Gulrajani et al. 2017) besides. A ratio is torch's time divided by ours: above 1, the
network is faster with myconv. Everything but the convolutions is the same on both sides. Outputs, or the gradients of
all parameters together, are first compared with float64. With gradients, the peak is what a step of a fresh process
adds to the memory that is resident before it.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
from common import (
    check,
    describe,
    exit_status,
    geomean,
    interleave,
    make_parser,
    output_path,
    print_table,
    progress,
    start,
    write_record,
)
from networks import NETWORKS, randomize
from torch import Tensor, nn

import myconv

LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__, 3.0)
    parser.add_argument("--model", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="default: all")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8], help="batch sizes (default: 1 8)")
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="default: both")
    parser.add_argument("--step", choices=STEPS, default="forward", help="default: forward")
    parser.add_argument("--size", type=int, default=224, help="pixels of a side (default: 224)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: as torch chooses)")
    return parser.parse_args()


@torch.no_grad()
def forward(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def gradients(model: nn.Module, x: Tensor, penalty: bool) -> Tensor:
    """Leaves gradients in the parameters, and returns them as one vector."""
    model.zero_grad()
    x = x.detach().requires_grad_(penalty)
    y = model(x)
    loss = y.logsumexp(1).mean() - y[:, 0].mean()
    if penalty:
        (gx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        loss = loss + (gx.flatten(1).norm(dim=1) - 1).square().mean()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def training(model: nn.Module, x: Tensor, penalty: bool = False) -> Tensor:
    result = gradients(model, x, penalty)
    with torch.no_grad():  # SGD, at a rate at which weights stay what they are
        for p in model.parameters():
            p.sub_(p.grad, alpha=1e-12)
    return result


STEPS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "forward": forward,
    "training": training,
    "penalty": partial(training, penalty=True),
}


def make(name: str, batch: int, layout: str, size: int, step: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = randomize(NETWORKS[name]()).to(memory_format=LAYOUTS[layout])
    model.train(step == "training")
    return model, torch.randn(batch, 3, size, size).to(memory_format=LAYOUTS[layout])


def peak_bytes(job: tuple, threads: int, swapped: bool) -> int:
    """For a process of its own."""
    torch.set_num_threads(threads)
    model, x = make(*job)
    if swapped:
        myconv.replace(model)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    STEPS[job[-1]](model, x)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def in_a_process(function: Callable, *arguments: object):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure(name: str, batch: int, layout: str, size: int, budget: float, step: str = "forward") -> dict:
    job, run = (name, batch, layout, size, step), STEPS[step]
    theirs, x = make(*job)
    swapped = myconv.replace(theirs, inplace=False)
    ours, double = swapped.model, copy.deepcopy(theirs).double()
    # Compared in evaluation mode: with statistics of its own batch a gradient is as good as random in float32.
    sides = ((ours, x), (theirs, x), (double, x.double()))
    results = [run(model.eval(), input) for model, input in sides]
    error, failed = check(*results, x.dtype)
    for model in (ours, theirs):
        model.train(step == "training")
    del double, sides, results
    calls = [partial(run, ours, x), partial(run, theirs, x)]
    plain = [partial(training, ours, x)] if step == "penalty" else []
    ours_s, torch_s, *plain_s = interleave([*calls, *plain], budget)
    row = {
        "model": name,
        "batch": batch,
        "layout": layout,
        "convolutions": len(swapped.swapped),
        "ours_ms": ours_s * 1e3,
        "torch_ms": torch_s * 1e3,
        "ratio": 0.0 if failed else torch_s / ours_s,
        "error": error,
        "failed": failed,
    }
    if plain_s:
        row["plain_ms"] = plain_s[0] * 1e3  # ours, without the penalty
    if step != "forward" and sys.platform == "linux":
        peaks = [in_a_process(peak_bytes, job, torch.get_num_threads(), swap) for swap in (True, False)]
        row["ours_peak_bytes"], row["torch_peak_bytes"] = peaks
    return row


def main() -> int:
    arguments = parse_arguments()
    start(arguments, arguments.threads)
    step = arguments.step
    record = describe("models") | {"dtype": "float32", "step": step, "size": arguments.size}
    record["budget_s"] = arguments.budget
    path = output_path(record, "models" if step == "forward" else step, arguments.json, arguments.record)
    jobs = [
        (name, batch, layout) for name in arguments.model for batch in arguments.batch for layout in arguments.layout
    ]
    rows = [measure(*job, arguments.size, arguments.budget, step) for job in progress(jobs, arguments.plain)]
    title = (
        f"networks with myconv {record['myconv']} ({record['isa']}) against torch {record['torch']}: {step}, float32, "
        f"{arguments.size}x{arguments.size} pixels, {record['threads']} threads, {record['machine']['cpu']}"
    )
    columns = ["model ", "batch", "layout ", "convolutions", "ours ms", "torch ms", "torch / ours", "error"]
    lines = [
        [row["model"], f"{row['batch']}", row["layout"], f"{row['convolutions']}", f"{row['ours_ms']:.2f}",
         f"{row['torch_ms']:.2f}", f"{row['ratio']:.2f}", f"{row['error']:.1e}"]
        for row in rows
    ]  # fmt: skip
    mean = ["geomean", "", "", "", "", "", f"{geomean([row['ratio'] for row in rows]):.2f}", ""]
    extra = {
        "peak MiB": lambda row: f"{row['ours_peak_bytes'] / 2**20:.0f}" if "ours_peak_bytes" in row else "",
        "torch's": lambda row: f"{row['torch_peak_bytes'] / 2**20:.0f}" if "torch_peak_bytes" in row else "",
        "penalty / plain": lambda row: f"{row['ours_ms'] / row['plain_ms']:.2f}" if "plain_ms" in row else "",
    }
    for title_of, cell in extra.items():
        if any(map(cell, rows)):
            columns.append(title_of)
            lines = [[*line, cell(row)] for line, row in zip(lines, rows)]
            mean.append("")
    print_table(title, columns, [*lines, mean], arguments.plain)
    write_record(path, record, rows)
    return exit_status(rows)


if __name__ == "__main__":
    sys.exit(main())
