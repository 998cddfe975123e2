"""Time what a call costs besides arithmetic: nn.Conv2d against myconv.Conv2d on a problem that is almost empty.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --check 1.05        # exit status 1 if a ratio is above 1.05

A ratio here is our time divided by torch's: below 1, myconv is faster. One thread.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial

import torch
from common import check, describe, interleave, make_parser, output_path, print_table, progress, start, write_record
from torch import Tensor, nn

import myconv

MODES = ("no_grad", "forward", "forward+backward")


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__, 5.0, "a mode")
    parser.add_argument("--check", type=float, metavar="MAX", help="fail if a ratio ours / torch is above MAX")
    return parser.parse_args()


def make_call(module: nn.Module, x: Tensor, gy: Tensor, mode: str) -> Callable[[], object]:
    if mode != "forward+backward":
        return partial(module, x)
    leaves = (x, module.weight, module.bias)
    return lambda: torch.autograd.grad(module(x), leaves, gy)


def measure(mode: str, budget: float) -> dict:
    torch.manual_seed(0)
    theirs, ours = nn.Conv2d(4, 8, 3, padding=1), myconv.Conv2d(4, 8, 3, padding=1)
    ours.load_state_dict(theirs.state_dict())
    x, gy = torch.randn(1, 4, 8, 8, requires_grad=True), torch.randn(1, 8, 8, 8)
    with torch.set_grad_enabled(mode != "no_grad"):
        calls = [make_call(module, x, gy, mode) for module in (ours, theirs)]
        double = nn.Conv2d(4, 8, 3, padding=1, dtype=torch.float64)
        double.load_state_dict(theirs.state_dict())
        exact = make_call(double, x.detach().double().requires_grad_(), gy.double(), mode)()
        error, failed = check(*(call() for call in calls), exact, torch.float32)
        ours_s, torch_s = interleave(calls, budget, bundle=1e-3, least=50, most=10_000)
    return {
        "mode": mode,
        "ours_us": ours_s * 1e6,
        "torch_us": torch_s * 1e6,
        "ours_over_torch": ours_s / torch_s,
        "error": error,
        "failed": failed,
    }


def main() -> int:
    arguments = parse_arguments()
    start(arguments, threads=1)
    record = describe("overhead") | {"budget_s": arguments.budget}
    path = output_path(record, "overhead", arguments.json, arguments.record)
    rows = [measure(mode, arguments.budget) for mode in progress(MODES, arguments.plain)]
    title = f"a 3x3 Conv2d(4, 8) on 1x4x8x8, one thread: myconv {record['myconv']} against torch {record['torch']}"
    columns = ["mode ", "ours µs", "torch µs", "ours / torch"]
    numbers = ("ours_us", "torch_us", "ours_over_torch")
    print_table(title, columns, [[r["mode"], *(f"{r[n]:.2f}" for n in numbers)] for r in rows], arguments.plain)
    write_record(path, record, rows)

    complaints = [f"{r['mode']}: {r['failed']}" for r in rows if r["failed"]]
    if arguments.check is not None:
        slow = [r for r in rows if not r["ours_over_torch"] <= arguments.check]
        complaints += [f"{r['mode']}: {r['ours_over_torch']:.3f} is above {arguments.check}" for r in slow]
    print("\n".join(complaints), file=sys.stderr, end="\n" if complaints else "")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
