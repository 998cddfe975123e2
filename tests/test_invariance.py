"""The same sample gives the same bits at any batch size and position, with any thread count, in any run."""

from __future__ import annotations

import functools

import pytest
import torch

from cases import BATCH, CHANNELS_LAST, DIRECTIONS, INVARIANCE, PARTS, Case, make_tensors
from checking import assert_accurate, bias_for, forced, isas, run_operator, size_of_sums
from conftest import every_kernel, noting, our_conv, threads

LAYOUTS = ["contiguous", "channels_last"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("direction", ["forward", "backward_input"])
@pytest.mark.parametrize("case", INVARIANCE)
def test_any_batch(case, direction, layout, seed):
    for run, x, y in every_kernel(case, direction, layout, seed):
        whole = run(x, y)
        for part in PARTS:
            with noting(samples=part):
                assert torch.equal(run(x[part], y[part]), whole[part])
        order = torch.randperm(BATCH, generator=torch.Generator().manual_seed(seed))
        with noting(samples=order.tolist()):
            assert torch.equal(run(like(x, x[order]), like(y, y[order])), whole[order])


def like(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """`other` in the memory format of `tensor`."""
    return torch.empty_like(tensor).copy_(other)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("direction", ["forward", "backward_input"])
@pytest.mark.parametrize("case", INVARIANCE)
def test_a_sample_made_a_batch(case, direction, layout, seed):
    """x[i].unsqueeze(0), with its odd stride in dimension 0, a clone of it, and one sample repeated."""
    for run, x, y in every_kernel(case, direction, layout, seed):
        whole = run(x, y)
        for i in (0, BATCH - 1):
            single = run(x[i].unsqueeze(0), y[i].unsqueeze(0))
            assert torch.equal(single, whole[i : i + 1])
            assert torch.equal(run(x[i : i + 1].clone(), y[i : i + 1].clone()), single)
        repeated = run(like(x, x[:1].expand_as(x)), like(y, y[:1].expand_as(y)))
        assert torch.equal(repeated, whole[:1].expand_as(whole))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", INVARIANCE)
def test_any_thread_count_and_any_run(case, direction, layout, seed):
    for run, x, y in every_kernel(case, direction, layout, seed):
        results = []
        for count in (1, 2, 3, 1, 2):
            with threads(count), noting(threads=count):
                results.append(run(x, y))
        for result in results[1:]:
            assert torch.equal(result, results[0])


@pytest.mark.parametrize("offset", [1, 3, 4, 15])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", INVARIANCE[::3])
def test_any_alignment(case, direction, layout, offset, seed):
    """Nothing is chosen or peeled by the address of the data."""

    def shifted(tensor: torch.Tensor) -> torch.Tensor:
        buffer = torch.empty(tensor.numel() + 16, dtype=tensor.dtype)
        return buffer.as_strided(tensor.shape, tensor.stride(), offset).copy_(tensor)

    for run, x, y in every_kernel(case, direction, layout, seed):
        assert torch.equal(run(shifted(x), shifted(y)), run(x, y))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", INVARIANCE)
def test_whole_calls(case, layout, seed):
    """The functional calls with the kernels that they choose: batch, threads and unbatched input."""
    x, w, b, gy = make_tensors(case, torch.float32, layout, seed)

    def output_and_input_gradient(x: torch.Tensor, gy: torch.Tensor) -> list[torch.Tensor]:
        leaf = x.detach().requires_grad_()
        y = our_conv(case, leaf, w, b)
        return [y.detach(), *torch.autograd.grad(y, leaf, gy)]

    with threads(2):
        whole = output_and_input_gradient(x, gy)
    for count in (1, 2):
        with threads(count), noting(threads=count):
            for part in PARTS[:4]:
                for a, e in zip(output_and_input_gradient(x[part], gy[part]), whole, strict=True):
                    assert torch.equal(a, e[part])
            if layout == "contiguous" or case.rank + 2 not in CHANNELS_LAST:  # one sample has no channels_last
                assert torch.equal(our_conv(case, x[2], w, b), whole[0][2])


PAST_THE_CACHES = [
    Case("past", "conv2d", (8, 64, 113, 122), 64, 3, padding=1, groups=64),
    Case("past_stride_2", "conv2d", (8, 64, 147, 122), 64, 3, stride=2, padding=1, groups=64),
]


@pytest.mark.parametrize("case", PAST_THE_CACHES)
@pytest.mark.parametrize("direction", ["forward", "backward_input"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_past_the_caches(dtype, direction, case, seed):
    """Tensors of more than 32 MB, whose results go straight to memory; those of a sample do not."""
    x, w, b, y = make_tensors(case, dtype, "channels_last", seed)
    for isa in isas("cpu"):
        with forced(direction, "depthwise", isa):
            run = functools.partial(run_operator, direction, w=w, b=bias_for(case, direction, b), problem=case.problem)
            whole = run(x=x, y=y)
            for i in range(case.input[0]):
                with noting(sample=i):
                    assert torch.equal(run(x=x[i : i + 1], y=y[i : i + 1])[0], whole[i])


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_input_gradient_beside_that_of_the_weight(dtype, stride, seed):
    """Less than 32 MB, but for the input that the weight's gradient reads: straight to memory, too."""
    height = {1: 70, 2: 110}[stride] * 4 // dtype.itemsize
    case = Case("beside", "conv2d", (8, 64, height, 90), 64, 3, stride, padding=1, groups=64)
    x, w, _, y = make_tensors(case, dtype, "channels_last", seed)
    for isa in isas("cpu"):
        with forced("backward_input", "depthwise", isa):
            alone = run_operator("backward_input", x, w, None, y, case.problem)
            beside = torch.ops.myconv.conv_backward(y, x, w, *case.problem.parameters, [True, True, False])[0]
            assert torch.equal(beside, alone)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [(2, 3, 40, 50), (1, 130, 7, 7), (3, 2048, 1, 1), (1, 1, 300, 301), (9, 24, 31, 33)])
def test_bias_gradient(sizes, dtype, layout, fused, seed):
    """Beside both other gradients a kernel of ours; without that of the input, as in a first layer, torch's sum."""
    samples, channels, *pixels = sizes
    case = Case("bias", "conv2d", (samples, 2, *pixels), channels, 1)
    x, w, b, gy = make_tensors(case, dtype, layout, seed)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            leaves = [x.detach().requires_grad_(fused), w.detach().requires_grad_(), b.detach().requires_grad_()]
            y = our_conv(case, *leaves)
            results.append(torch.autograd.grad(y, leaves if fused else leaves[1:], gy)[-1])
    for result in results:
        assert torch.equal(result, results[0])
    exact = gy.double().sum((0, 2, 3))
    assert_accurate(results[0], exact, gy.sum((0, 2, 3)), "bias gradient", terms=size_of_sums(gy, exact, case.rank))
