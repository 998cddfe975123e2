"""Derivatives of every order and mode, and what autograd keeps, shares and checks on the way."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from cases import BY_NAME, CORE, Case, Tensors, lay_out, make_tensors, torch_conv
from conftest import assert_accurate, noting, our_conv

# Tiny problems of every kind: numerical differentiation calls the convolution once or twice per element.
TINY = [
    Case("plain", "conv2d", (2, 2, 3, 4), 2, 2, padding=1),
    Case("no_bias", "conv2d", (1, 2, 4, 3), 2, 3, padding=1, bias=False),
    Case("strided", "conv2d", (1, 2, 5, 4), 2, 3, stride=(2, 3), padding=1),
    Case("dilated", "conv2d", (1, 1, 5, 5), 2, 2, dilation=(2, 3)),
    Case("grouped", "conv2d", (1, 4, 3, 3), 2, 2, groups=2),
    Case("depthwise", "conv2d", (1, 2, 4, 3), 4, 3, padding=1, groups=2),
    Case("same_even", "conv2d", (1, 2, 3, 4), 2, (2, 4), padding="same"),
    Case("reflect", "conv2d", (1, 1, 3, 4), 2, 3, padding=(1, 2), padding_mode="reflect"),
    Case("replicate", "conv2d", (1, 1, 3, 2), 2, 3, stride=2, padding=(1, 3), padding_mode="replicate"),
    Case("circular", "conv2d", (1, 1, 3, 4), 2, 3, padding=(2, 1), padding_mode="circular"),
    Case("1d", "conv1d", (2, 2, 5), 3, 3, stride=2, padding=1),
    Case("3d", "conv3d", (1, 2, 2, 3, 2), 2, 2, padding=(1, 0, 1)),
    Case("transposed", "conv_transpose2d", (2, 2, 3, 2), 2, 2),
    Case("transposed_strided", "conv_transpose2d", (1, 2, 2, 3), 2, 3, 2, 1, output_padding=1),
    Case("transposed_grouped", "conv_transpose2d", (1, 4, 2, 2), 2, 2, stride=2, groups=2, bias=False),
    Case("transposed_dilated", "conv_transpose2d", (1, 1, 3, 2), 2, 2, 1, 0, 3, output_padding=2),
    Case("transposed_1d", "conv_transpose1d", (1, 2, 4), 2, 3, 2, 1, output_padding=1),
    Case("transposed_3d", "conv_transpose3d", (1, 1, 2, 2, 2), 2, 2, stride=2, padding=1),
]


def differentiable(tensors: Tensors) -> list[torch.Tensor]:
    """x, w and, if there is one, b as leaves."""
    return [t.detach().requires_grad_() for t in tensors[:3] if t is not None]


def function_of(case: Case, conv=our_conv):
    """The case as a function of x, w and perhaps b."""
    return lambda x, w, b=None: conv(case, x, w, b)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("case", TINY)
def test_gradcheck(case, dtype, layout, seed):
    leaves = differentiable(make_tensors(case, dtype, layout, seed))
    assert gradcheck(
        function_of(case),
        leaves,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("case", TINY)
def test_gradgradcheck(case, dtype, seed):
    leaves = differentiable(make_tensors(case, dtype, "contiguous", seed))
    assert gradgradcheck(function_of(case), leaves, check_fwd_over_rev=dtype == torch.float64, fast_mode=True)


@pytest.mark.slow
@pytest.mark.parametrize("case", TINY)
def test_gradgradcheck_element_by_element(case, seed):
    leaves = differentiable(make_tensors(case, torch.float64, "contiguous", seed))
    assert gradgradcheck(function_of(case), leaves, check_fwd_over_rev=True, check_batched_grad=True)


def torch_any_order(case: Case, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
    """torch_conv, but with output_padding spelled out: torch cannot differentiate its own three times."""
    if not any(case.output_padding):
        return torch_conv(case, x, w, b)
    sizes = [
        (n - 1) * s + d * (k - 1) + 1
        for n, s, d, k in zip(x.shape[2:], case.stride, case.dilation, case.kernel_size, strict=True)
    ]
    full = getattr(F, case.op)(x, w, None, case.stride, 0, 0, case.groups, case.dilation)
    rows = list(zip(sizes, case.output_shape[2:], case.padding, strict=True))
    y = F.pad(full, [n for have, want, low in reversed(rows) for n in (-low, want + low - have)])
    return y if b is None else y + b.reshape(-1, *[1] * case.rank)


def nested(conv, case: Case, leaves: list[torch.Tensor], order: int) -> list[list[torch.Tensor]]:
    """Gradients of order 1 to `order`: each round differentiates the sum of the squares of the last."""
    scalar = conv(case, *leaves, *[None] * (3 - len(leaves))).pow(2).sum()
    rounds = []
    for _ in range(order):
        gradients = torch.autograd.grad(scalar, leaves, create_graph=True)
        rounds.append([g.detach() for g in gradients])
        scalar = sum(g.pow(2).sum() for g in gradients) * 1e-2
    return rounds


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CORE)
def test_three_orders(case, layout, seed):
    """The third-order gradients, where every operator is the derivative of each of the others."""
    tensors = make_tensors(case, torch.float64, layout, seed)
    ours = nested(our_conv, case, differentiable(tensors), order=3)
    theirs = nested(torch_any_order, case, differentiable(tensors), order=3)
    for order, (a, e) in enumerate(zip(ours, theirs, strict=True), start=1):
        for index, (actual, expected) in enumerate(zip(a, e, strict=True)):
            with noting(order=order, argument="xwb"[index]):
                torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().sum() > 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CORE)
def test_forward_mode(case, dtype, seed):
    """Directional derivatives by dual numbers, for every choice of arguments that carry a tangent."""
    primals = [t for t in make_tensors(case, dtype, "contiguous", seed)[:3] if t is not None]
    tangents = [t for t in make_tensors(case, dtype, "contiguous", seed + 1)[:3] if t is not None]

    def directional(conv, primals, tangents, chosen):
        with forward_ad.dual_level():
            arguments = [
                forward_ad.make_dual(p, t) if bit else p for p, t, bit in zip(primals, tangents, chosen, strict=True)
            ]
            return forward_ad.unpack_dual(conv(case, *arguments, *[None] * (3 - len(arguments)))).tangent

    wide = [[t.double() for t in tensors] for tensors in (primals, tangents)]
    for bits in range(1, 2 ** len(primals)):
        chosen = [bool(bits >> i & 1) for i in range(len(primals))]
        with noting(tangents=chosen):
            actual = directional(our_conv, primals, tangents, chosen)
            theirs = directional(torch_conv, primals, tangents, chosen)
            exact = directional(torch_conv, *wide, chosen)
            # Two convolutions are added, each with a rounding of its own.
            torch.testing.assert_close(
                actual,
                exact.to(dtype),
                rtol=1e-5 if dtype == torch.float32 else 1e-12,
                atol=1e-4 if dtype == torch.float32 else 1e-11,
            )
            if chosen in ([True, False], [True, False, False]):
                assert_accurate(actual, exact, theirs, "tangent")


def test_no_tangent_gives_none(seed):
    case = BY_NAME["stride_2"]
    x, w, b, _ = make_tensors(case, seed=seed)
    with forward_ad.dual_level():
        assert forward_ad.unpack_dual(our_conv(case, x, w, b)).tangent is None


# --------------------------------------------------------------------------------- only what is asked for

SUBSETS = [
    (needs_x, needs_w, needs_b) for needs_x in (False, True) for needs_w in (False, True) for needs_b in (False, True)
]
KINDS = [
    BY_NAME[name]
    for name in (
        "stride_2",
        "depthwise",
        "circular_2d",
        "length_7",
        "depth_tail",
        "transposed_stride_2",
        "transposed_1d_stride_3",
    )
]


@pytest.mark.parametrize("needs", SUBSETS, ids=lambda needs: "".join(n for n, on in zip("xwb", needs) if on) or "none")
@pytest.mark.parametrize("case", KINDS)
def test_gradients_only_where_asked(case, needs, seed):
    x, w, b, gy = make_tensors(case, seed=seed)
    leaves = [t.requires_grad_(on) for t, on in zip((x, w, b), needs, strict=True)]
    y = our_conv(case, *leaves)
    assert y.requires_grad == any(needs)
    if not any(needs):
        assert y.grad_fn is None
        return
    y.backward(gy)
    everything = differentiable(make_tensors(case, seed=seed))
    our_conv(case, *everything).backward(gy)
    for leaf, full, on, exact in zip(leaves, everything, needs, (True, True, False), strict=True):
        assert (leaf.grad is not None) == on
        if on and exact:
            assert torch.equal(leaf.grad, full.grad)
        elif on:  # the bias gradient has two orders of summation: in the fused operator, and without it
            torch.testing.assert_close(leaf.grad, full.grad, rtol=1e-5, atol=1e-5)


def is_freed(case: Case, frozen: str, seed: int) -> bool:
    """Whether the graph lets go of an argument that no wanted gradient reads."""
    x, w, b, gy = make_tensors(case, seed=seed)
    x.requires_grad_(frozen == "w")
    w.requires_grad_(frozen == "x")
    # A non-leaf, as in a network: the graph must not hold its value.
    source, x = x, x * 1
    other, w = w, w * 1
    y = our_conv(case, x, w, b)
    watched = weakref.ref(x if frozen == "w" else w)
    del x, w
    gc.collect()
    freed = watched() is None
    y.backward(gy)
    assert (source if frozen == "w" else other).grad is not None
    return freed


@pytest.mark.parametrize("case", KINDS)
def test_frozen_weight_frees_the_input(case, seed):
    assert is_freed(case, "w", seed)


@pytest.mark.parametrize("case", KINDS)
def test_input_without_gradient_frees_the_weight(case, seed):
    assert is_freed(case, "x", seed)


@pytest.mark.parametrize("case", KINDS)
def test_saved_tensors(case, seed):
    """What autograd saves, as saved-tensor hooks see it: checkpointing and offloading build on these."""

    def saved(needs: tuple[bool, ...], conv) -> int:
        x, w, b, gy = make_tensors(case, seed=seed)
        for t, on in zip((x, w, b), needs, strict=True):
            t.requires_grad_(on)
        packed = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.shape) or t, lambda t: t):
            y = conv(case, x, w, b)
        if y.requires_grad:
            y.backward(gy)
        return len(packed)

    expected = {"": 0, "x": 1, "w": 1, "b": 0, "xw": 2, "xb": 1, "wb": 1, "xwb": 2}
    for needs in SUBSETS:
        names = "".join(n for n, on in zip("xwb", needs, strict=True) if on)
        with noting(needs=names):
            assert saved(needs, our_conv) == expected[names]


# ------------------------------------------------------------------------------------- strides of gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CORE)
def test_gradients_have_the_strides_of_their_parameters(case, layout, dtype, seed):
    """To the letter, also in size-1 dimensions: DistributedDataParallel compares them."""
    tensors = make_tensors(case, dtype, layout, seed)
    leaves = differentiable(tensors)
    y = our_conv(case, *leaves, *[None] * (3 - len(leaves)))
    for gy in (tensors.gy, lay_out(tensors.gy, "contiguous"), lay_out(tensors.gy, "sliced")):
        gradients = torch.autograd.grad(y, leaves, gy, retain_graph=True)
        assert gradients[1].stride() == leaves[1].stride(), "weight"
        assert gradients[-1].stride() == leaves[-1].stride(), "last argument"


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("needs_x", [False, True])
@pytest.mark.parametrize(
    "layouts",
    [
        ("contiguous", "channels_last"),
        ("channels_last", "contiguous"),
        ("sliced", "contiguous"),
        ("sliced", "channels_last"),
    ],
    ids="-".join,
)
@pytest.mark.parametrize("case", KINDS)
def test_weight_gradient_strides(case, layouts, needs_x, create_graph, seed):
    x, w, b, gy = make_tensors(case, seed=seed)
    x = lay_out(x, layouts[0]).requires_grad_(needs_x)
    w = lay_out(w, layouts[1]).requires_grad_()
    (gw,) = torch.autograd.grad(our_conv(case, x, w, b), w, gy, create_graph=create_graph)
    assert gw.stride() == w.stride()


@pytest.mark.parametrize("case", KINDS)
def test_gradient_of_a_strided_input(case, seed):
    """An input that is a slice gets a gradient that is right where the slice lies and zero elsewhere."""
    x, w, b, gy = make_tensors(case, torch.float64, "contiguous", seed)
    larger = torch.zeros([n + 2 for n in x.shape], dtype=x.dtype)
    inside = tuple(slice(1, -1) for _ in x.shape)
    larger[inside] = x
    larger.requires_grad_()
    our_conv(case, larger[inside], w, b).backward(gy)
    leaf = x.requires_grad_()
    torch_conv(case, leaf, w, b).backward(gy)
    expected = torch.zeros_like(larger)
    expected[inside] = leaf.grad
    torch.testing.assert_close(larger.grad, expected, rtol=1e-12, atol=1e-12)


# -------------------------------------------------------------------------------------- the autograd engine


@pytest.mark.parametrize("which", ["x", "w"])
@pytest.mark.parametrize("case", KINDS)
def test_changed_in_place_raises(case, which, seed):
    x, w, b = differentiable(make_tensors(case, seed=seed))
    x, w = x * 1, w * 1
    y = our_conv(case, x, w, b)
    (x if which == "x" else w).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("case", KINDS)
def test_unread_arguments_may_change_in_place(case, seed):
    x, w, b, gy = make_tensors(case, seed=seed)
    b.requires_grad_()
    y = our_conv(case, x.requires_grad_(), w, b)
    with torch.no_grad():
        x.zero_()  # only the weight is read for the gradient of x
        b.zero_()
    y.backward(gy)
    leaf = make_tensors(case, seed=seed).x.requires_grad_()
    our_conv(case, leaf, w, None).backward(gy)
    assert torch.equal(x.grad, leaf.grad)


@pytest.mark.parametrize("case", KINDS)
def test_backward_twice(case, seed):
    tensors = make_tensors(case, seed=seed)
    leaves = differentiable(tensors)
    y = our_conv(case, *leaves)
    y.backward(tensors.gy, retain_graph=True)
    once = [leaf.grad.clone() for leaf in leaves]
    y.backward(tensors.gy)
    for leaf, gradient in zip(leaves, once, strict=True):
        assert torch.equal(leaf.grad, gradient * 2)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward(tensors.gy)


@pytest.mark.parametrize("case", KINDS)
def test_hooks(case, seed):
    """Tensor hooks and node hooks run, see the gradients and may change them."""
    tensors = make_tensors(case, seed=seed)
    plain, hooked = differentiable(tensors), differentiable(tensors)
    our_conv(case, *plain).backward(tensors.gy)
    seen = []
    handles = [leaf.register_hook(lambda g: g * 2) for leaf in hooked]
    y = our_conv(case, *hooked)
    y.grad_fn.register_hook(lambda inputs, outputs: seen.append((len(inputs), len(outputs))))
    y.grad_fn.register_prehook(lambda outputs: seen.append(len(outputs)))
    y.backward(tensors.gy)
    assert seen == [1, (3, 1)]
    for a, b in zip(plain, hooked, strict=True):
        assert torch.equal(a.grad * 2, b.grad)
    for handle in handles:
        handle.remove()


def test_shared_weight_accumulates(seed):
    """Two uses of one weight in a graph."""
    case = BY_NAME["resnet_3x3"]
    x, w, _, gy = make_tensors(case, torch.float64, "contiguous", seed)
    results = []
    for conv in (our_conv, torch_conv):
        leaf = w.clone().requires_grad_()
        conv(case, conv(case, x, leaf, None), leaf, None).backward(gy)
        results.append(leaf.grad)
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-9)


def test_undefined_and_zero_gradients(seed):
    """Only one of two outputs takes part; the other's convolution gets no gradient at all."""
    case = BY_NAME["stride_2"]
    tensors = make_tensors(case, seed=seed)
    leaves, others = differentiable(tensors), differentiable(tensors)
    y, unused = our_conv(case, *leaves), our_conv(case, *others)
    (y + unused.detach()).sum().backward()
    assert all(leaf.grad is not None for leaf in leaves)
    assert all(other.grad is None for other in others)


def test_stride_0_gradient(seed):
    """sum() and mean() send back a gradient that is one number, expanded."""
    for case in CORE:
        tensors = make_tensors(case, torch.float64, "contiguous", seed)
        ours, theirs = differentiable(tensors), differentiable(tensors)
        function_of(case)(*ours).sum().backward()
        function_of(case, torch_conv)(*theirs).sum().backward()
        with noting(case=case.name):
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("case", KINDS)
def test_checkpoint(case, use_reentrant, seed):
    from torch.utils.checkpoint import checkpoint

    tensors = make_tensors(case, seed=seed)
    plain, recomputed = differentiable(tensors), differentiable(tensors)
    our_conv(case, *plain).backward(tensors.gy)
    checkpoint(function_of(case), *recomputed, use_reentrant=use_reentrant).backward(tensors.gy)
    for a, b in zip(plain, recomputed, strict=True):
        assert torch.equal(a.grad, b.grad)


def test_anomaly_mode_and_grad_modes(seed):
    case = BY_NAME["stride_2"]
    x, w, b = differentiable(make_tensors(case, seed=seed))
    with torch.autograd.detect_anomaly(check_nan=True):
        our_conv(case, x, w, b).sum().backward()
    with torch.no_grad():
        assert not our_conv(case, x, w, b).requires_grad
    with torch.inference_mode():
        y = our_conv(case, x, w, b)
        assert y.is_inference()
    assert torch.equal(y.clone(), our_conv(case, x, w, b))


def test_backward_from_another_thread(seed):
    """The engine may run a backward on a thread that never made a call of its own."""
    import threading

    case = BY_NAME["resnet_3x3"]
    x, w, _, gy = make_tensors(case, seed=seed)
    leaf, here = w.clone().requires_grad_(), w.clone().requires_grad_()
    worker = threading.Thread(target=lambda: our_conv(case, x, leaf, None).backward(gy))
    worker.start()
    worker.join()
    our_conv(case, x, here, None).backward(gy)
    assert torch.equal(leaf.grad, here.grad)
