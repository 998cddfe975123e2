"""Which row a problem goes to: no layer of a real network goes to the reference."""

import json
from pathlib import Path

import pytest
import torch

import myconv
from cases import CHANNELS_LAST
from checking import isas

LAYERS = json.loads((Path(__file__).parents[1] / "benchmarks" / "layers.json").read_text())
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def explained(layer, dtype, channels_last):
    """The layer's call, explained; nothing is computed, and the tensors' memory is never touched."""
    transposed = layer["op"].startswith("ConvTranspose")
    c, k, groups = layer["input"][1], layer["out_channels"], layer["groups"]
    memory_format = CHANNELS_LAST[len(layer["input"])] if channels_last else torch.contiguous_format
    channels = (c, k // groups) if transposed else (k, c // groups)
    w = torch.empty(*channels, *layer["kernel_size"], dtype=dtype, memory_format=memory_format)
    x = torch.empty(layer["input"], dtype=dtype, memory_format=memory_format)
    b = torch.empty(k, dtype=dtype) if layer["bias"] else None
    names = ("stride", "padding", "dilation", "groups") + ("output_padding",) * transposed
    function = getattr(myconv.functional, "conv" + "_transpose" * transposed + layer["op"][-2:])
    (call,) = myconv.explain(function, x, w, b, **{name: layer[name] for name in names}).calls
    return call


@pytest.mark.parametrize("isa", [isa for isa in isas("cpu") if isa != "portable"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_no_layer_runs_on_the_reference(dtype, channels_last, isa):
    slow = []
    with myconv.flags.isa(isa):
        for layer in LAYERS:
            if channels_last and len(layer["input"]) not in CHANNELS_LAST:
                continue
            call = explained(layer, dtype, channels_last)
            for role in ("forward", "backward_input"):
                if call.directions[role].algorithm == "reference":
                    slow.append((layer["id"], role))
    assert not slow, f"{len(slow)} on the reference: {slow[:10]}"
