"""Time whole networks with torch's convolutions and with ours: forward, eager, random weights.

    python benchmarks/models.py
    python benchmarks/models.py --model mobilenet_v2 --batch 1 --layout nhwc

A ratio is torch's time divided by ours: above 1, the network is faster with myconv. Everything but the convolutions is
the same on both sides. Outputs are first compared with float64.
"""

from __future__ import annotations

import argparse
import copy
import sys
from functools import partial

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

import myconv

LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__, 3.0)
    parser.add_argument("--model", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="default: all")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8], help="batch sizes (default: 1 8)")
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="default: both")
    parser.add_argument("--size", type=int, default=224, help="pixels of a side (default: 224)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: as torch chooses)")
    return parser.parse_args()


@torch.no_grad()
def measure(name: str, batch: int, layout: str, size: int, budget: float) -> dict:
    torch.manual_seed(0)
    theirs = randomize(NETWORKS[name]()).to(memory_format=LAYOUTS[layout])
    swapped = myconv.replace(theirs, inplace=False)
    ours, double = swapped.model, copy.deepcopy(theirs).double()
    x = torch.randn(batch, 3, size, size).to(memory_format=LAYOUTS[layout])
    error, failed = check(ours(x), theirs(x), double(x.double()), x.dtype)
    del double
    ours_s, torch_s = interleave([partial(ours, x), partial(theirs, x)], budget)
    return {
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


def main() -> int:
    arguments = parse_arguments()
    start(arguments, arguments.threads)
    record = describe("models") | {"dtype": "float32", "size": arguments.size, "budget_s": arguments.budget}
    path = output_path(record, "models", arguments.json, arguments.record)
    jobs = [
        (name, batch, layout) for name in arguments.model for batch in arguments.batch for layout in arguments.layout
    ]
    rows = [measure(*job, arguments.size, arguments.budget) for job in progress(jobs, arguments.plain)]
    title = (
        f"networks with myconv {record['myconv']} ({record['isa']}) against torch {record['torch']}: forward, float32, "
        f"{arguments.size}x{arguments.size} pixels, {record['threads']} threads, {record['machine']['cpu']}"
    )
    columns = ["model ", "batch", "layout ", "convolutions", "ours ms", "torch ms", "torch / ours", "error"]
    lines = [
        [row["model"], f"{row['batch']}", row["layout"], f"{row['convolutions']}", f"{row['ours_ms']:.2f}",
         f"{row['torch_ms']:.2f}", f"{row['ratio']:.2f}", f"{row['error']:.1e}"]
        for row in rows
    ]  # fmt: skip
    mean = ["geomean", "", "", "", "", "", f"{geomean([row['ratio'] for row in rows]):.2f}", ""]
    print_table(title, columns, [*lines, mean], arguments.plain)
    write_record(path, record, rows)
    return exit_status(rows)


if __name__ == "__main__":
    sys.exit(main())
