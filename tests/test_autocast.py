"""Autocast on the CPU treats these convolutions as it treats torch's."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import myconv
from cases import BY_NAME, Case, make_tensors, torch_conv
from conftest import assert_accurate, noting, our_conv

LOW = [torch.bfloat16, torch.float16]
KINDS = [
    BY_NAME[name]
    for name in (
        "length_16 stride_2 depthwise groups_2 same_even circular_2d depth_tail transposed_1d_stride_3 "
        "transposed_stride_2 transposed_3d"
    ).split()
]
BOTH = pytest.mark.parametrize("conv", [our_conv, torch_conv], ids=["ours", "torch"])


def leaves_of(case: Case, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[torch.Tensor]:
    return [t.requires_grad_() for t in make_tensors(case, dtype, seed=seed)[:3] if t is not None]


@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("case", KINDS)
def test_values_and_dtypes(case, low, seed):
    """The output is that of the rounded arguments in the lower dtype; the gradients are float32."""
    leaves, gy = leaves_of(case, seed=seed), make_tensors(case, low, seed=seed).gy
    with torch.autocast("cpu", low):
        y = our_conv(case, *leaves)
        expected_dtype = torch_conv(case, *leaves).dtype
    assert y.dtype == expected_dtype == low
    rounded = [leaf.detach().to(low).double().requires_grad_() for leaf in leaves]
    exact = torch_conv(case, *rounded)
    assert_accurate(y, exact)
    gradients = torch.autograd.grad(y, leaves, gy)
    for name, actual, expected in zip("xwb", gradients, torch.autograd.grad(exact, rounded, gy.double()), strict=True):
        assert actual.dtype == torch.float32
        assert_accurate(actual.to(low), expected, what=f"gradient of {name}")
        assert torch.equal(actual, actual.to(low).float()), "the gradient was not computed in the lower dtype"


@pytest.mark.parametrize("case", KINDS)
def test_modules(case, seed):
    """A module's float32 parameters, under autocast, train."""
    name = case.op.replace("conv_transpose", "ConvTranspose").replace("conv", "Conv")
    arguments = case.arguments | ({"padding_mode": case.padding_mode} if not case.transposed else {})
    module = getattr(myconv, name)(case.input[1], case.out_channels, case.kernel_size, **arguments)
    twin = getattr(torch.nn, name)(case.input[1], case.out_channels, case.kernel_size, **arguments)
    twin.load_state_dict(module.state_dict())
    x = make_tensors(case, seed=seed).x
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = module(x), twin(x)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
    ours.float().pow(2).sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())


class CastCounter(TorchDispatchMode):
    """Counts the casts around the operators; what a kernel does inside is not seen."""

    casts = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.casts += function is torch.ops.aten._to_copy.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", [case for case in KINDS if case.padding_mode == "zeros"])
def test_the_weight_is_cast_once_a_region(case, seed):
    """As in torch: three calls cast three inputs, one weight, one bias; without the cache all of them."""
    x, w, b = leaves_of(case, seed=seed)
    x = x.detach()

    def three_calls(conv, cached: bool) -> int:
        with CastCounter() as counter, torch.autocast("cpu", torch.bfloat16, cache_enabled=cached):
            for _ in range(3):
                conv(case, x, w, b)
        return counter.casts

    for cached, casts in ((True, 3 + 1 + 1), (False, 9)):
        with noting(cache_enabled=cached):
            assert three_calls(torch_conv, cached) == casts, "torch itself"
            assert three_calls(our_conv, cached) == casts


def test_shared_weight_gradient_passes_one_cast(seed):
    """The cached cast is one node of the graph: its gradient adds up before it is cast back, as torch's."""
    case = BY_NAME["stride_2"]
    x, w, b = leaves_of(case, seed=seed)

    def casts_of(conv) -> set:
        with torch.autocast("cpu", torch.bfloat16):
            outputs = [conv(case, x, w, b) for _ in range(2)]
        return {
            function
            for y in outputs
            for function, _ in y.grad_fn.next_functions
            if function is not None
            and any(f is not None and getattr(f, "variable", None) is w for f, _ in function.next_functions)
        }

    assert len(casts_of(torch_conv)) == 1
    assert len(casts_of(our_conv)) == 1


@pytest.mark.parametrize("case", KINDS)
def test_double_backward(case, seed):
    leaves = leaves_of(case, seed=seed)

    def second_order(conv) -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            loss = conv(case, *leaves).float().pow(2).sum()
        gradients = torch.autograd.grad(loss, leaves, create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in gradients), leaves)

    def plain(case: Case, *arguments: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return torch_conv(case, *[t.float() for t in arguments])

    for actual, expected in zip(second_order(our_conv), second_order(plain), strict=True):
        assert actual.dtype == torch.float32
        assert (actual - expected).norm() <= 3e-2 * expected.norm()


@BOTH
@pytest.mark.parametrize("case", KINDS)
def test_backward_inside_a_region_stays_float32(case, conv, seed):
    """A graph recorded in float32 runs backward in float32, wherever backward() is called, twice too."""
    leaves, gy = leaves_of(case, seed=seed), make_tensors(case, seed=seed).gy
    outside = torch.autograd.grad(conv(case, *leaves), leaves, gy)
    y = conv(case, *leaves)
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(y, leaves, gy, create_graph=conv is our_conv)
        for a, e, exact in zip(inside, outside, (True, True, False)[: len(leaves)], strict=True):
            assert a.dtype == torch.float32
            if exact:
                assert torch.equal(a, e)
            else:  # the bias gradient has two orders of summation; this is far inside bfloat16
                torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)
        if conv is our_conv:
            for gradient in torch.autograd.grad(sum(g.pow(2).sum() for g in inside), leaves[:2]):
                assert gradient.dtype == torch.float32
                assert not torch.equal(gradient, gradient.bfloat16().float())


@BOTH
def test_disabled_inside_a_region(conv, seed):
    case = BY_NAME["stride_2"]
    x, w, b = leaves_of(case, seed=seed)
    expected = conv(case, x, w, b)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            assert torch.equal(conv(case, x, w, b), expected)
        with torch.autocast("cpu", torch.float16):  # detached, or the cached weight would still be bfloat16
            assert conv(case, x.detach(), w.detach(), b.detach()).dtype == torch.float16
        assert conv(case, x, w, b).dtype == torch.bfloat16
    assert torch.equal(conv(case, x, w, b), expected)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.int64])
def test_other_dtypes_pass_untouched(dtype, conv, seed):
    for case in (BY_NAME["stride_2"], BY_NAME["transposed_1d_stride_3"]):
        x, w, b, _ = make_tensors(case, dtype, seed=seed)
        if dtype == torch.int64:
            b = None
        expected = conv(case, x, w, b)
        with torch.autocast("cpu", torch.bfloat16):
            actual = conv(case, x, w, b)
        assert actual.dtype == dtype
        assert torch.equal(actual, expected)


@BOTH
def test_mixed_arguments(conv, seed):
    """Floating dtypes below float64 are brought to one; float64 beside float32 is an error as ever."""
    case = BY_NAME["stride_2"]
    x, w, b, _ = make_tensors(case, seed=seed)
    with torch.autocast("cpu", torch.bfloat16):
        assert conv(case, x.half(), w, b.bfloat16()).dtype == torch.bfloat16
        with pytest.raises(RuntimeError):
            conv(case, x.double(), w, b)
        with pytest.raises(RuntimeError):
            conv(case, x, w, b.double())


def test_operators_under_autocast(seed):
    """The two that make activations are cast. The others belong to backward and keep what they are given."""
    case = BY_NAME["stride_2"]
    x, w, _, gy = make_tensors(case, seed=seed)
    p, ops = case.problem, torch.ops.myconv
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.conv_forward(x, w, None, p.output_size, *p.parameters).dtype == torch.bfloat16
        assert ops.conv_backward_input(gy, w, None, p.input_size[2:], *p.parameters).dtype == torch.bfloat16


def test_compiled_region(seed):
    case = BY_NAME["stride_2"]
    x, w, b = leaves_of(case, seed=seed)

    def step(x, w, b):
        with torch.autocast("cpu", torch.bfloat16):
            return our_conv(case, x, w, b)

    y = torch.compile(step, fullgraph=True, backend="aot_eager")(x, w, b)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, step(x, w, b))
    y.sum().backward()
    assert w.grad.dtype == torch.float32
