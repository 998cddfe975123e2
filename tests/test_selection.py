"""Which row a problem goes to: no layer of a real network goes to the reference."""

import json
from pathlib import Path

import pytest
import torch

import myconv
from cases import CHANNELS_LAST, DIRECTIONS, Case
from checking import assert_accurate, isas

LAYERS = json.loads((Path(__file__).parents[1] / "benchmarks" / "layers.json").read_text())
FIELDS = ("out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "bias", "output_padding")


def as_case(layer, **other):
    fields = {name: layer[name] for name in FIELDS if name in layer}
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    function = "conv" + "_transpose" * layer["op"].startswith("ConvTranspose") + layer["op"][-2:]
    return Case(layer["id"], function, tuple(layer["input"]), **fields, **other)


CASES = [as_case(layer) for layer in LAYERS]


@pytest.mark.parametrize("isa", [isa for isa in isas("cpu") if isa != "portable"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_no_layer_runs_on_the_reference(direction, dtype, channels_last, isa):
    slow = []
    with myconv.flags.isa(isa):
        for case in CASES:
            if channels_last and len(case.input) not in CHANNELS_LAST:
                continue
            rows = myconv._C.selection(direction, *case.problem, dtype, channels_last, may_yield=True)
            if next(row for row, reason in rows if not reason) == "reference":
                slow.append(case.name)
    assert not slow, f"{len(slow)} on the reference: {slow[:10]}"


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)  # docs/limits.md has the other types
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_no_layer_runs_on_the_reference_in_a_padding_mode(direction, dtype, channels_last):
    slow, tried = [], 0
    for layer in LAYERS:
        padding = layer["padding"]
        if layer["op"] != "Conv2d" or not any(padding) or max(padding) >= min(layer["input"][2:]):
            continue
        for mode in ("reflect", "replicate", "circular"):
            case = as_case(layer, padding_mode=mode)
            rows = myconv._C.selection(direction, *case.problem, dtype, channels_last, may_yield=True)
            tried += 1
            if next(row for row, reason in rows if not reason) == "reference":
                slow.append(f"{mode} {case.name}")
    assert tried > 300 and not slow, f"{len(slow)} of {tried} on the reference: {slow[:10]}"


@pytest.mark.parametrize("rows", [{"winograd", "winograd_2x2"}])
def test_rows_that_yield_can_be_forced(rows):
    """A row that leaves a problem to a faster one is not chosen, and runs where it is forced."""
    x, w = torch.randn(1, 2, 8, 8), torch.randn(2, 2, 3, 3)
    direction = myconv.explain(myconv.functional.conv2d, x, w).calls[0].directions["forward"]
    assert rows <= set(direction.declined)
    for row in rows:
        with myconv.flags.algorithm("forward", row):
            y = myconv.functional.conv2d(x, w)
        theirs, exact = (torch.nn.functional.conv2d(x.to(t), w.to(t)) for t in (torch.float32, torch.float64))
        assert_accurate(y, exact, theirs, row)


@pytest.mark.parametrize(
    ("channels_last", "width", "stride", "row"),
    [
        (False, 180, 1, "depthwise"),  # lines roll
        (False, 180, 2, "direct"),
        (False, 14, 1, "direct"),  # less than a vector
        (True, 180, 1, "implicit_gemm"),
    ],
)
def test_one_channel_with_many_filters(channels_last, width, stride, row):
    if "avx512" not in isas("cpu"):
        pytest.skip("this CPU has no AVX-512, without which no lines roll forward")
    case = Case("one_channel", "conv2d", (2, 1, 20, width), 64, 3, stride, 1)
    with myconv.flags.isa("avx512"):
        rows = myconv._C.selection("forward", *case.problem, torch.float32, channels_last, may_yield=True)
    assert next(name for name, reason in rows if not reason) == row


@pytest.mark.parametrize(
    ("of_group", "stride", "channels_last", "taken"),
    [
        (2, 1, True, True),
        (2, 2, True, True),
        (4, 2, True, True),
        (4, 1, True, False),
        (8, 2, True, False),
        (2, 1, False, False),
    ],
)
def test_few_channels_in_groups(of_group, stride, channels_last, taken):
    """Groups that a vector holds whole are repeated channel by channel, as depthwise ones with a multiplier."""
    case = Case("groups", "conv2d", (2, 64, 20, 20), 64, 3, stride, 1, groups=64 // of_group)
    rows = myconv._C.selection("forward", *case.problem, torch.float32, channels_last, may_yield=True)
    assert (not dict(rows)["depthwise"]) == taken
