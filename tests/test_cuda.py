"""What is particular to CUDA: streams, graphs, autocast, refused mixtures of devices, replace and explain.

Values, rows and dtypes are compared in test_parity.py, whose tests run on each device.
"""

from __future__ import annotations

import copy
import time
from functools import partial

import pytest
import torch
from torch import nn

import myconv
from cases import CHANNELS_LAST, CORE, DIRECTIONS, INVARIANCE, Case, make_tensors, torch_conv
from conftest import CUDA, check_parity, noting, our_conv
from test_gpu_command import bench, gpu_checks

pytestmark = pytest.mark.skipif(not CUDA, reason="no CUDA device, or a build without CUDA kernels")


@pytest.mark.parametrize("check", ["streams", "repeat", "batch", "graph", "devices", "autograd", "autocast", "tf32"])
def test_checks_of_the_gpu_command(check):
    """benchmarks/gpu.py has them, with time limits, for machines without pytest."""
    try:
        found = getattr(gpu_checks, check)(bench(device="cuda", quick=False), gpu_checks.Clock(time.monotonic() + 300))
    except gpu_checks.Skip as reason:
        pytest.skip(str(reason))
    assert found["failures"] == [] and found["checks"] == found["of"]


@pytest.mark.parametrize("layouts", [("channels_last", "contiguous"), ("contiguous", "channels_last")])
@pytest.mark.parametrize("case", CORE)
def test_output_layout(case, layouts, seed):
    """The memory format is that of the same call on the CPU."""
    on_cpu = [make_tensors(case, layout=layout, seed=seed) for layout in layouts]
    x, w, b = on_cpu[0].x, on_cpu[1].w, on_cpu[0].b
    there = our_conv(case, x.cuda(), w.cuda(), None if b is None else b.cuda())
    assert there.stride() == our_conv(case, x, w, b).stride()


@pytest.mark.parametrize("where", ["input", "weight", "bias"])
@pytest.mark.parametrize("conv", [torch_conv, our_conv], ids=["torch", "ours"])
def test_two_devices_are_refused(where, conv):
    tensors = dict(zip(("input", "weight", "bias"), make_tensors(CORE[0], device="cuda")[:3], strict=True))
    tensors[where] = tensors[where].cpu()
    with pytest.raises(RuntimeError, match="same"):
        conv(CORE[0], *tensors.values())


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_operators_refuse_two_devices(direction):
    case = CORE[0]
    x, w, _, y = make_tensors(case, device="cuda")
    operands = {"forward": (x, w, None), "backward_input": (y, w, None), "backward_weight": (y, x)}[direction]
    size = {"forward": y.shape[2:], "backward_input": x.shape[2:], "backward_weight": w.shape[2:]}[direction]
    operator = getattr(torch.ops.myconv, f"conv_{direction}")
    with pytest.raises(RuntimeError, match="at least two devices"):
        operator(operands[0], operands[1].cpu(), *operands[2:], size, *case.problem.parameters)


def test_replace_trains_as_torch_does(seed):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2, stride=2), nn.Conv2d(4, 2, 1)]
    theirs = nn.Sequential(*layers).double().cuda()
    ours = copy.deepcopy(theirs)
    assert len(myconv.replace(ours).swapped) == 3
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, device="cuda").to(memory_format=CHANNELS_LAST[4])
    for model in (ours, theirs):
        model(x).square().sum().backward()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-10, atol=1e-10)


def test_explain_names_a_row_of_the_table(seed):
    x, w, b, _ = make_tensors(CORE[0], seed=seed, device="cuda")
    (call,) = myconv.explain(partial(our_conv, CORE[0]), x, w, b).calls
    for name, direction in call.directions.items():
        assert direction.algorithm in myconv._C.algorithms(name, "cuda") and direction.isa == "cuda"


def test_a_large_batch(seed):
    """More elements than one turn of the grid takes in the weight gradient's sum."""
    case: Case = INVARIANCE[0].with_batch(600)
    with noting(case=case.name):
        tensors = make_tensors(case, seed=seed, device="cuda")
        check_parity(partial(our_conv, case), partial(torch_conv, case), tensors)
