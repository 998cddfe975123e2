"""Time myconv's convolutions against torch's, on the layers of real networks.

    python benchmarks/run.py --quick
    python benchmarks/run.py --pass backward_weight --layout nhwc --batch 8 --only depthwise resnet50

A ratio is torch's time divided by ours: above 1, myconv is faster. Each result is first compared with float64; the
exit status is 1 if one is wrong. README.md in this folder describes the method and the records.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from common import (
    check,
    describe,
    geomean,
    interleave,
    output_path,
    print_table,
    progress,
    require_rich,
    stop,
    write_record,
)

import myconv

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from cases import CHANNELS_LAST, Case, Tensors, make_tensors  # noqa: E402

LAYOUTS = {"nchw": "contiguous", "nhwc": "channels_last"}  # the names of tests/cases.py
DIRECTIONS = {  # of a pass
    "forward": ("forward",),
    "backward": ("backward_input", "backward_weight"),
    "backward_input": ("backward_input",),
    "backward_weight": ("backward_weight",),
}
FUNCTIONS = {f"Conv{t}{rank}d": f"conv{t and '_transpose'}{rank}d" for t in ("", "Transpose") for rank in (1, 2, 3)}
FIELDS = ("out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "bias", "output_padding")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="only the layers marked quick")
    extent.add_argument("--full", action="store_true", help="all layers (the default)")
    parser.add_argument(
        "--pass", dest="passes", nargs="+", choices=DIRECTIONS, default=["forward", "backward"], metavar="PASS",
        help="forward, backward, backward_input, backward_weight (default: forward backward)",
    )  # fmt: skip
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="default: both")
    parser.add_argument("--dtype", choices=["float32", "float64", "bfloat16", "float16"], default="float32")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8], help="batch sizes (default: 1 8)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: as torch chooses)")
    parser.add_argument("--only", nargs="+", default=[], help="categories, models or parts of a layer's id")
    parser.add_argument("--op", nargs="+", choices=[*FUNCTIONS, "all"], default=["Conv2d"], metavar="OP",
                        help="Conv1d .. ConvTranspose3d, or all (default: Conv2d)")  # fmt: skip
    parser.add_argument("--budget", type=float, default=0.15, help="seconds for a measurement (default: 0.15)")
    parser.add_argument("--isa", choices=["portable", "avx2", "avx512"], help="cap myconv's (not torch's) kernels")
    parser.add_argument("--worst", type=int, default=15, help="how many of the worst rows to print (default: 15)")
    parser.add_argument("--record", action="store_true", help="write a record to benchmarks/results/")
    parser.add_argument("--json", metavar="OUT", help="write the record to this file instead")
    parser.add_argument("--plain", action="store_true", help="plain text: no rich, no progress bar")
    return parser.parse_args()


def load_layers(arguments: argparse.Namespace) -> list[dict]:
    layers = json.loads(Path(__file__).with_name("layers.json").read_text())
    categories = {layer["category"] for layer in layers}

    def named(layer: dict, name: str) -> bool:
        if name in categories:
            return name == layer["category"]
        return name in layer["models"] or name in layer["id"]

    return [
        layer
        for layer in layers
        if ("all" in arguments.op or layer["op"] in arguments.op)
        and (layer["quick"] or not arguments.quick)
        and (not arguments.only or any(named(layer, name) for name in arguments.only))
    ]


def as_case(layer: dict) -> Case:
    if layer["padding_mode"] != "zeros":
        raise ValueError(f"{layer['id']}: torch's functions have no padding mode to compare with")
    fields = {name: layer[name] for name in FIELDS if name in layer}
    # Tuples, as the modules pass them.
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    return Case(layer["id"], FUNCTIONS[layer["op"]], tuple(layer["input"]), **fields)


def make_jobs(arguments: argparse.Namespace) -> list[tuple]:
    """(layer, case, layout, pass) of every row. A layer that comes with a batch keeps it."""
    jobs = []
    for layer in load_layers(arguments):
        case = as_case(layer)
        for batch in arguments.batch if case.input[0] == 1 else case.input[:1]:
            for layout in arguments.layout:
                if layout == "nchw" or len(case.input) in CHANNELS_LAST:
                    jobs += [(layer, case.with_batch(batch), layout, what) for what in arguments.passes]
    return jobs


def make_call(case: Case, function: Callable, tensors: Tensors, what: str) -> Callable[[], object]:
    """The call to time: without arguments, it returns a tensor or a tuple of gradients."""
    x, w, b, gy = tensors
    names = ("stride", "padding", "dilation", "groups")
    if case.transposed:
        names = ("stride", "padding", "output_padding", "groups", "dilation")
    call = partial(function, x, w, b, *(getattr(case, name) for name in names))
    if what == "forward":
        return call
    leaves = [t.requires_grad_() for t in (x, w, b) if t is not None]
    wanted = {"backward": leaves, "backward_input": [x], "backward_weight": [w]}[what]
    return partial(torch.autograd.grad, call(), wanted, gy, retain_graph=True)


def chosen_algorithms(case: Case, what: str, tensors: Tensors) -> dict[str, str]:
    """The row that runs, for each operator of the pass."""
    call = myconv.explain(getattr(myconv.functional, case.op), *tensors[:3], **case.arguments).calls[0]
    found = [call.directions[direction] for direction in DIRECTIONS[what]]
    return {direction.operator.removeprefix("conv_"): direction.algorithm for direction in found}


def measure(case: Case, layout: str, what: str, dtype: torch.dtype, budget: float) -> dict:
    tensors = make_tensors(case, dtype, LAYOUTS[layout])
    doubles = Tensors(*(None if t is None else t.to(torch.float64, copy=True) for t in tensors))
    torch_function = getattr(torch.nn.functional, case.op)
    with torch.set_grad_enabled(what != "forward"):
        ours = make_call(case, getattr(myconv.functional, case.op), tensors, what)
        theirs = make_call(case, torch_function, tensors, what)
        error, failed = check(ours(), theirs(), make_call(case, torch_function, doubles, what)(), dtype)
        del doubles
        ours_s, torch_s = interleave([ours, theirs], budget)
    return {
        "ours_ms": ours_s * 1e3,
        "torch_ms": torch_s * 1e3,
        "ratio": 0.0 if failed else torch_s / ours_s,
        "error": error if math.isfinite(error) else None,
        "algorithms": chosen_algorithms(case, what, tensors),
        "failed": failed,
    }


def run_job(layer: dict, case: Case, layout: str, what: str, dtype: torch.dtype, budget: float) -> dict:
    row = {
        "id": layer["id"],
        "category": layer["category"],
        "batch": case.input[0],
        "layout": layout,
        "pass": what,
        "flops": layer["flops"] * case.input[0] // layer["input"][0] * len(DIRECTIONS[what]),
        **dict(ours_ms=None, torch_ms=None, ratio=0.0, error=None, algorithms={}, failed=None),
    }
    try:
        return row | measure(case, layout, what, dtype, budget)
    except Exception as exception:  # one row must not end the run; it counts as a failure
        return row | {"failed": f"{type(exception).__name__}: {exception}".splitlines()[0][:200]}


def report(rows: list[dict], title: str, worst: int, plain: bool) -> None:
    groups = defaultdict(list)
    for row in rows:
        for category in (row["category"], "all"):
            groups[row["pass"], row["layout"], category].append(row["ratio"])
    order = sorted(groups, key=lambda names: (*names[:2], names[2] == "all", names[2]))
    groups = {names: groups[names] for names in order} | {("all", "", ""): [row["ratio"] for row in rows]}

    def summary(ratios: list[float]) -> list[str]:
        below = [sum(ratio < limit for ratio in ratios) for limit in (1, 0.95)]
        return [f"{len(ratios)}", f"{geomean(ratios):.2f}", f"{min(ratios):.2f}", *map(str, below)]

    columns = ["pass ", "layout ", "category ", "rows", "geomean", "min", "below 1", "below 0.95"]
    print_table(title, columns, [[*names, *summary(ratios)] for names, ratios in groups.items()], plain)

    def cells(row: dict) -> list[str]:
        times = ["" if row[key] is None else f"{row[key]:.3f}" for key in ("ours_ms", "torch_ms")]
        error = "" if row["error"] is None else f"{row['error']:.1e}"
        outcome = row["failed"] or " + ".join(dict.fromkeys(row["algorithms"].values()))
        return [f"{row['ratio']:.2f}", *times, error, row["pass"], row["layout"], str(row["batch"]), row["id"], outcome]

    columns = ["ratio", "ours ms", "torch ms", "error", "pass ", "layout ", "batch", "layer ", "algorithm "]
    shown = sorted(rows, key=lambda row: row["ratio"])[:worst]
    print_table(f"the worst {len(shown)} of {len(rows)} rows", columns, map(cells, shown), plain)


def main() -> int:
    arguments = parse_arguments()
    if not arguments.plain:
        require_rich()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    jobs = make_jobs(arguments)
    if not jobs:
        stop("no layer matches these options")
    dtype = getattr(torch, arguments.dtype)
    with myconv.flags.isa(arguments.isa) if arguments.isa else contextlib.nullcontext():
        record = describe("run") | {"dtype": arguments.dtype, "budget_s": arguments.budget}
        path = output_path(record, arguments.dtype, arguments.json, arguments.record)
        rows = [run_job(*job, dtype, arguments.budget) for job in progress(jobs, arguments.plain)]
    title = (
        f"myconv {record['myconv']} ({record['isa']}) against torch {record['torch']}: {arguments.dtype}, "
        f"{record['threads']} threads, {record['machine']['cpu']}; ratio = torch's time / ours"
    )
    report(rows, title, arguments.worst, arguments.plain)
    write_record(path, record, rows)
    failed = sum(row["failed"] is not None for row in rows)
    if failed:
        print(f"{failed} of {len(rows)} rows are wrong or failed", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
