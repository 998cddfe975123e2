"""The calls that torch's documentation shows for its convolutions, on the sizes that it shows."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

import myconv
from cases import Case, Tensors, make_tensors, torch_conv
from conftest import RESULTS, SEED, assert_accurate, assert_same_state, check_parity, our_conv, with_gradients

WIDE = (20, 16, 50, 100)
DEEP = (20, 16, 10, 50, 100)

# The case, and the output size that its documentation or arithmetic gives. These take milliseconds ...
QUICK = [
    (Case("Conv1d_stride", "conv1d", (20, 16, 50), 33, 3, stride=2), (20, 33, 24)),
    (Case("Conv2d_square_stride", "conv2d", WIDE, 33, 3, stride=2), (20, 33, 24, 49)),
    (Case("Conv2d_padding", "conv2d", WIDE, 33, (3, 5), (2, 1), (4, 2)), (20, 33, 28, 100)),
    (Case("Conv2d_dilation", "conv2d", WIDE, 33, (3, 5), (2, 1), (4, 2), (3, 1)), (20, 33, 26, 100)),
    (Case("ConvTranspose2d_square_stride", "conv_transpose2d", WIDE, 33, 3, stride=2), (20, 33, 101, 201)),
    (Case("ConvTranspose2d_padding", "conv_transpose2d", WIDE, 33, (3, 5), (2, 1), (4, 2)), (20, 33, 93, 100)),
    (Case("conv1d", "conv1d", (33, 16, 30), 20, 5, bias=False), (33, 20, 26)),
    (Case("conv2d", "conv2d", (1, 4, 5, 5), 8, 3, padding=1, bias=False), (1, 8, 5, 5)),
    (Case("conv_transpose1d", "conv_transpose1d", (20, 16, 50), 33, 5, bias=False), (20, 33, 54)),
    (Case("conv_transpose2d", "conv_transpose2d", (1, 4, 5, 5), 8, 3, padding=1, bias=False), (1, 8, 5, 5)),
    (Case("tutorial", "conv2d", (40, 40, 32, 32), 100, 3, stride=2, padding=3), (40, 100, 18, 18)),
]
# ... and these seconds, by torch in float64. By default one sample of the batch runs.
LARGE = [
    (Case("Conv3d_cube_stride", "conv3d", DEEP, 33, 3, stride=2), (20, 33, 4, 24, 49)),
    (Case("Conv3d_padding", "conv3d", DEEP, 33, (3, 5, 2), (2, 1, 1), (4, 2, 0)), (20, 33, 8, 50, 99)),
    (Case("ConvTranspose3d_cube_stride", "conv_transpose3d", DEEP, 33, 3, stride=2), (20, 33, 21, 101, 201)),
    (
        Case("ConvTranspose3d_padding", "conv_transpose3d", DEEP, 33, (3, 5, 2), (2, 1, 1), (0, 4, 2)),
        (20, 33, 21, 46, 97),
    ),
    (Case("conv3d", "conv3d", (20, 16, 50, 10, 20), 33, 3, bias=False), (20, 33, 48, 8, 18)),
    (Case("conv_transpose3d", "conv_transpose3d", (20, 16, 50, 10, 20), 33, 3, bias=False), (20, 33, 52, 12, 22)),
]
EXAMPLES = [
    *[pytest.param(case, size, id=case.name) for case, size in QUICK],
    *[pytest.param(case.with_batch(1), (1, *size[1:]), id=f"{case.name}_one_sample") for case, size in LARGE],
    *[pytest.param(case, size, id=case.name, marks=pytest.mark.slow) for case, size in LARGE],
]
examples = pytest.mark.parametrize("case, size", EXAMPLES)


@examples
def test_function(case, size, seed):
    tensors = make_tensors(case, seed=seed)
    assert our_conv(case, *tensors[:3]).shape == size
    check_parity(partial(our_conv, case), partial(torch_conv, case), tensors)


def pair(name: str, *args, **kwargs) -> list[nn.Module]:
    """Ours and torch's, made under the same seed."""
    made = []
    for namespace in (myconv, nn):
        torch.manual_seed(SEED)
        made.append(getattr(namespace, name)(*args, **kwargs))
    assert_same_state(*made)
    return made


@examples
def test_module(case, size, seed):
    """The module starts with torch's parameters, and computes what the function does, which is compared above."""
    name = "".join(word.capitalize() for word in case.op.split("_"))
    ours, _ = pair(name, case.input[1], case.out_channels, case.kernel_size, bias=case.bias, **case.arguments)
    x, _, _, gy = make_tensors(case, seed=seed)
    expected = with_gradients(partial(our_conv, case), Tensors(x, ours.weight, ours.bias, gy))
    y = ours(x.requires_grad_())
    assert y.shape == size
    y.backward(gy)
    for name, actual, e in zip(RESULTS, [y, x.grad, *[p.grad for p in ours.parameters()]], expected):
        assert torch.equal(actual, e), name


def down_and_up(down: nn.Module, up: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The image halved and brought back to its size, and all gradients."""
    leaves = [x.detach().requires_grad_(), *down.parameters(), *up.parameters()]
    h = down(leaves[0])
    assert h.shape == (1, 16, 6, 6)
    assert up(h).shape == (1, 16, 11, 11)
    y = up(h, output_size=x.size())
    assert y.shape == (1, 16, 12, 12)
    return [y, *torch.autograd.grad(y.square().sum(), leaves)]


def test_downsample_and_upsample():
    down, up = (pair(name, 16, 16, 3, stride=2, padding=1) for name in ("Conv2d", "ConvTranspose2d"))
    x = torch.randn(1, 16, 12, 12)
    ours, theirs = zip(down, up)
    actual, torchs = down_and_up(*ours, x), down_and_up(*theirs, x)
    exact = down_and_up(*[module.double() for module in theirs], x.double())
    for a, e, t in zip(actual, exact, torchs):
        assert_accurate(a, e, t)
