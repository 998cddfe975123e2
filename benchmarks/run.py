"""Time myconv's convolutions against torch's, on the layers of real networks.

    python benchmarks/run.py --quick
    python benchmarks/run.py --pass backward_weight --layout nhwc --batch 8 --only depthwise resnet50
    python benchmarks/run.py --quick --padding-mode reflect

A ratio is torch's time divided by ours: above 1, myconv is faster. Each result is first compared with float64; the
exit status is 1 if one is wrong. A share is of the roofline, whose two ceilings are measured first. README.md in this
folder describes the method and the records.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from ceilings import describe_ceilings, highest, roof_seconds
from ceilings import measure as measure_ceilings
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
# How far a padding mode reaches, for a size of the input. Zeros and replicate have no limit.
LIMITS = {"reflect": lambda size: size - 1, "circular": lambda size: size, "replicate": lambda size: math.inf}
SIDES = {  # what the time of ours is compared with
    "torch": "torch {torch}",
    "zeros": "itself, padding with zeros",
    "float32": "itself in float32",
    "normal": "itself without denormals",
}
FIELDS = ("out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "bias", "output_padding")


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__, 0.15)
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="only the layers marked quick")
    extent.add_argument("--full", action="store_true", help="all layers (the default)")
    parser.add_argument(
        "--pass", dest="passes", nargs="+", choices=DIRECTIONS, metavar="PASS",
        help="forward, backward, backward_input, backward_weight (default: forward backward; padding modes: forward)",
    )  # fmt: skip
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="default: both")
    parser.add_argument("--dtype", choices=["float32", "float64", "bfloat16", "float16"], default="float32")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8], help="batch sizes (default: 1 8)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: as torch chooses)")
    parser.add_argument("--only", nargs="+", default=[], help="categories, models or parts of a layer's id")
    parser.add_argument("--op", nargs="+", choices=[*FUNCTIONS, "all"], default=["Conv2d"], metavar="OP",
                        help="Conv1d .. ConvTranspose3d, or all (default: Conv2d)")  # fmt: skip
    parser.add_argument("--isa", choices=["portable", "avx2", "avx512", "avx512_bf16"],
                        help="cap myconv's (not torch's) kernels")  # fmt: skip
    parser.add_argument("--worst", type=int, default=15, help="how many of the worst rows to print (default: 15)")
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--padding-mode", choices=LIMITS, help="padded layers in this mode, against F.pad and torch's "
                       "convolution, and against our own zeros mode")  # fmt: skip
    other.add_argument("--against", choices=["torch", "float32"], default="torch", help="float32: our own")
    other.add_argument("--denormals", action="store_true", help="inputs half of denormals, against normal ones")
    arguments = parser.parse_args()
    if arguments.passes is None:
        arguments.passes = ["forward"] if arguments.padding_mode else ["forward", "backward"]
    return arguments


def sides_of(arguments: argparse.Namespace) -> tuple[str, ...]:
    if arguments.padding_mode:
        return "torch", "zeros"
    return ("normal",) if arguments.denormals else (arguments.against,)


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


def has_mode(case: Case, mode: str) -> bool:
    """Whether the mode does something else than zeros, and torch can do it."""
    limits = zip(case.input[2:], case.pads)
    return not case.transposed and any(map(any, case.pads)) and all(max(p) <= LIMITS[mode](n) for n, p in limits)


def make_jobs(arguments: argparse.Namespace) -> list[tuple]:
    """(layer, case, layout, pass) of every row. A layer that comes with a batch keeps it."""
    jobs = []
    for layer in load_layers(arguments):
        case, mode = as_case(layer), arguments.padding_mode
        if mode:
            if not has_mode(case, mode):
                continue
            case = replace(case, padding_mode=mode)
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


def our_function(case: Case) -> Callable:
    function = getattr(myconv.functional, case.op)
    return function if case.padding_mode == "zeros" else partial(function, padding_mode=case.padding_mode)


def torch_function(case: Case) -> Callable:
    """A padding mode is a call of its own for torch."""
    function = getattr(F, case.op)
    if case.padding_mode == "zeros":
        return function
    pads = [amount for pair in reversed(case.pads) for amount in pair]
    return lambda x, w, b, stride, padding, *rest: function(F.pad(x, pads, case.padding_mode), w, b, stride, 0, *rest)


def converted(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    return Tensors(*(None if t is None else t.detach().to(dtype, copy=True) for t in tensors))


def with_denormals(tensors: Tensors) -> Tensors:
    """Every other value of the activations and their gradients, at random, too small for a normal number."""
    x, w, b, gy = converted(tensors, tensors.x.dtype)
    generator = torch.Generator().manual_seed(0)
    for t in (x, gy):
        t[torch.rand(t.shape, generator=generator) < 0.5] *= torch.finfo(t.dtype).tiny / 8
    return Tensors(x, w, b, gy)


def bytes_moved(tensors: Tensors, what: str) -> int:
    """Of the operands and the results, each once: the least that must move."""
    x, w, b, gy = (0 if t is None else t.nbytes for t in tensors)
    return x + w + gy + {"forward": b, "backward": x + w + b}.get(what, 0)  # any one direction moves x, w and y once


def chosen_algorithms(case: Case, what: str, tensors: Tensors) -> dict[str, str]:
    """The row that runs, for each operator of the pass."""
    call = myconv.explain(getattr(myconv.functional, case.op), *tensors[:3], **case.arguments).calls[0]
    found = [call.directions[direction] for direction in DIRECTIONS[what]]
    return {direction.operator.removeprefix("conv_"): direction.algorithm for direction in found}


def measure(case: Case, layout: str, what: str, arguments: argparse.Namespace) -> dict:
    dtype, sides = getattr(torch, arguments.dtype), sides_of(arguments)
    normal = make_tensors(case, dtype, LAYOUTS[layout])
    tensors = with_denormals(normal) if arguments.denormals else normal
    doubles = converted(tensors, torch.float64)
    ours, theirs = our_function(case), torch_function(case)
    timed = {
        "ours": (ours, tensors),
        "torch": (theirs, tensors),
        "zeros": (getattr(myconv.functional, case.op), tensors),
        "float32": (ours, normal if dtype == torch.float32 else converted(normal, torch.float32)),
        "normal": (ours, normal),
    }
    with torch.set_grad_enabled(what != "forward"):
        calls = {name: make_call(case, *timed[name], what) for name in ("ours", *sides)}
        others = calls.get("torch") or make_call(case, theirs, tensors, what)
        error, failed = check(calls["ours"](), others(), make_call(case, theirs, doubles, what)(), dtype)
        del doubles, others
        seconds = dict(zip(calls, interleave(list(calls.values()), arguments.budget)))
    row = {f"{name}_ms": value * 1e3 for name, value in seconds.items()}
    return row | {
        "ratio": 0.0 if failed else seconds[sides[0]] / seconds["ours"],
        "bytes": bytes_moved(tensors, what),
        "error": error if math.isfinite(error) else None,
        "algorithms": chosen_algorithms(case, what, tensors),
        "failed": failed,
    }


def run_job(job: tuple, arguments: argparse.Namespace) -> dict:
    layer, case, layout, what = job
    row = {
        "id": layer["id"],
        "category": layer["category"],
        "batch": case.input[0],
        "layout": layout,
        "pass": what,
        "flops": layer["flops"] * case.input[0] // layer["input"][0] * len(DIRECTIONS[what]),
    }
    try:
        return row | measure(case, layout, what, arguments)
    except Exception as exception:  # one row must not end the run; it counts as a failure
        failed = f"{type(exception).__name__}: {exception}".splitlines()[0][:200]
        return row | {"ratio": 0.0, "error": None, "algorithms": {}, "failed": failed}


def add_shares(rows: list[dict], ceilings: dict) -> None:
    """The part of its time that ours, and torch's, would take at the roofline."""
    for row in rows:
        for name in ("ours", "torch"):
            if f"{name}_ms" in row and not row["failed"]:
                row[f"{name}_share"] = roof_seconds(row["flops"], row["bytes"], ceilings) / row[f"{name}_ms"] * 1e3


def ratio(row: dict, side: str) -> float:
    return 0.0 if row["failed"] else row[f"{side}_ms"] / row["ours_ms"]


def report(rows: list[dict], side: str, title: str, plain: bool) -> None:
    """A line for each pass, layout and category."""
    groups = defaultdict(list)
    for row in rows:
        for category in (row["category"], "all"):
            groups[row["pass"], row["layout"], category].append(row)
    order = sorted(groups, key=lambda names: (*names[:2], names[2] == "all", names[2]))
    groups = {names: groups[names] for names in order} | {("all", "", ""): rows}

    def summary(group: list[dict]) -> list[str]:
        ratios = [ratio(row, side) for row in group]
        shares = [[row[name] for row in group if name in row] for name in ("ours_share", "torch_share")]
        above = sum(share > 1 for share in shares[0])
        below = [sum(ratio < limit for ratio in ratios) for limit in (1, 0.95)]
        means = [f"{geomean(values):.2f}" if values else "" for values in shares]
        return [f"{len(ratios)}", f"{geomean(ratios):.2f}", f"{min(ratios):.2f}", *map(str, below), *means, f"{above}"]

    columns = ["pass ", "layout ", "category ", "rows", "geomean", "min", "below 1", "below 0.95"]
    columns += ["share", "torch's", "above roof"]
    print_table(title, columns, [[*names, *summary(group)] for names, group in groups.items()], plain)


def report_worst(rows: list[dict], sides: tuple[str, ...], worst: int, plain: bool) -> None:
    def cells(row: dict) -> list[str]:
        def number(name: str, form: str) -> str:
            return "" if row.get(name) is None else format(row[name], form)

        times = [number(f"{name}_ms", ".3f") for name in ("ours", *sides)]
        measured = [*times, number("ours_share", ".2f"), number("error", ".1e")]
        outcome = row["failed"] or " + ".join(dict.fromkeys(row["algorithms"].values()))
        return [f"{row['ratio']:.2f}", *measured, row["pass"], row["layout"], str(row["batch"]), row["id"], outcome]

    times = [f"{name} ms" for name in ("ours", *sides)]
    columns = ["ratio", *times, "share", "error", "pass ", "layout ", "batch", "layer ", "algorithm "]
    shown = sorted(rows, key=lambda row: row["ratio"])[:worst]
    print_table(f"the worst {len(shown)} of {len(rows)} rows", columns, map(cells, shown), plain)


def main() -> int:
    arguments = parse_arguments()
    start(arguments, arguments.threads)
    jobs = make_jobs(arguments)
    if not jobs:
        stop("no layer matches these options")
    sides = sides_of(arguments)
    kind = arguments.padding_mode or ("denormals" if arguments.denormals else "")
    kind = kind or ("" if arguments.against == "torch" else f"against-{arguments.against}")
    with myconv.flags.isa(arguments.isa) if arguments.isa else contextlib.nullcontext():
        record = describe("run") | {"dtype": arguments.dtype, "budget_s": arguments.budget, "against": sides}
        path = output_path(record, "-".join(filter(None, (arguments.dtype, kind))), arguments.json, arguments.record)
        before = measure_ceilings(arguments.dtype)
        rows = [run_job(job, arguments) for job in progress(jobs, arguments.plain)]
        measured = before and [before, measure_ceilings(arguments.dtype)]
    if measured:
        record |= {"ceilings": highest(measured), "ceilings_measured": measured}
        add_shares(rows, record["ceilings"])
    ours = f"myconv {record['myconv']} ({record['isa']}{kind and ', ' + kind})"
    where = f"{arguments.dtype}, {record['threads']} threads, {record['machine']['cpu']}"
    for side in sides:
        report(
            rows,
            side,
            f"{ours} against {SIDES[side].format(**record)}: {where}; ratio = {side} / ours",
            arguments.plain,
        )
    if measured:
        print(f"\nshares are of the roofline: {describe_ceilings(record['ceilings'])}")
    report_worst(rows, sides, arguments.worst, arguments.plain)
    write_record(path, record, rows)
    return exit_status(rows)


if __name__ == "__main__":
    sys.exit(main())
