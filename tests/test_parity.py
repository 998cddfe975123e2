"""Values, strides and dtypes of the forward and of all gradients against torch in float64."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

import myconv.functional
from cases import (
    BY_NAME,
    CASES,
    CHANNELS_LAST,
    CORE,
    DIRECTIONS,
    Case,
    Problem,
    Tensors,
    lay_out,
    layout_is_ambiguous,
    make_tensors,
    reference_operator,
    torch_conv,
)
from conftest import (
    RESULTS,
    ROUNDS_INTEGERS,
    assert_accurate,
    bias_for,
    check_integers,
    check_parity,
    check_rows,
    convolution_roles,
    describe_difference,
    forced,
    kernels,
    noting,
    our_conv,
    poison,
    run_operator,
    size_of_sums,
    threads,
    with_gradients,
)


def check_case(case: Case, tensors: Tensors) -> None:
    check_parity(partial(our_conv, case), partial(torch_conv, case), tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients(case, layout, dtype, device, seed):
    check_case(case, make_tensors(case, dtype, layout, seed, device=device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex64, torch.complex128])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CORE)
def test_other_dtypes(case, layout, dtype, device, seed):
    check_case(case, make_tensors(case, dtype, layout, seed, device=device))


@pytest.mark.parametrize("layout", ["expanded", "transposed"])
@pytest.mark.parametrize("case", CORE)
def test_other_layouts(case, layout, device, seed):
    check_case(case, make_tensors(case, torch.float32, layout, seed, device=device))


@pytest.mark.parametrize("layouts", [("channels_last", "contiguous"), ("contiguous", "channels_last")])
@pytest.mark.parametrize("case", CORE)
def test_mixed_layouts(case, layouts, seed):
    """Input, weight and gradient each in a layout of its own."""
    x, w, b, gy = make_tensors(case, torch.float32, "contiguous", seed)
    check_case(case, Tensors(lay_out(x, layouts[0]), lay_out(w, layouts[1]), b, lay_out(gy, layouts[1])))


@pytest.mark.parametrize("case", [case for case in CORE if case.input[0]])
def test_unbatched(case, seed):
    x, w, b, gy = make_tensors(case, torch.float32, "contiguous", seed)
    ours = with_gradients(partial(our_conv, case), Tensors(x[0], w, b, gy[0]))
    batched = with_gradients(partial(our_conv, case), Tensors(x[:1], w, b, gy[:1]))
    batched[:2] = [t.squeeze(0) for t in batched[:2]]
    for name, a, e in zip(RESULTS, ours, batched, strict=False):
        assert torch.equal(a, e), name


# ----------------------------------------------------------------------------------------- integer dtypes

INTEGER_DTYPES = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64]


# As in torch, transposed convolution takes int64 alone.
INTEGER_CALLS = [(c, d) for c in CORE for d in INTEGER_DTYPES if d == torch.int64 or not c.transposed]


@pytest.mark.parametrize("case, dtype", INTEGER_CALLS)
def test_integer_dtypes(case, dtype, device, seed):
    check_integers(case, dtype, seed, device)


# ---------------------------------------------------------------------- every row of every table, to the bit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", CASES)
def test_exact_on_integers(case, direction, dtype, device, seed):
    """With small integers every sum is exact in any order, so each row on each ISA must give the same bits.

    A result that does not fit the dtype is rounded once.
    """
    check_rows(case, direction, dtype, seed, integers=True, device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", CORE)
def test_every_row_is_accurate(case, direction, dtype, device, seed):
    check_rows(case, direction, dtype, seed, integers=False, device=device)


# ------------------------------------------------------------------------------------------ told sizes


@pytest.mark.parametrize("change", [-2, -1, 1, 3])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    "name",
    [
        "length_16",
        "out_channels_6",
        "stride_2",
        "stride_3_2",
        "dilation_2",
        "depthwise",
        "1x1_stride_2",
        "7x7",
        "groups_2",
        "stride_2_3d",
        "depthwise_stride_2",
    ],
)
def test_told_sizes(name, direction, change, seed):
    """Any output size is legal in zeros mode: beyond the input is zero, what is short is not computed."""
    case = BY_NAME[name]
    problem = case.problem
    output_size = tuple(n + change for n in problem.output_size)
    problem = problem._replace(output_size=output_size)
    x, w, b, _ = make_tensors(case, torch.float32, "contiguous", seed, integers=True)
    y = make_tensors(case, torch.float32, "contiguous", seed + 1, integers=True).gy
    repeats = [math.ceil(n / m) for n, m in zip(output_size, y.shape[2:], strict=True)]
    y = y.repeat(1, 1, *repeats)[(..., *[slice(n) for n in output_size])].contiguous()
    b = bias_for(case, direction, b)
    expected = reference_operator(direction, x, w, b, y, problem)
    for row, isa in kernels(direction, problem, (x, w, y), "contiguous"):
        with forced(direction, row, isa):
            actual = run_operator(direction, x, w, b, y, problem)
            if row in ROUNDS_INTEGERS:
                assert_accurate(actual, expected)
            else:
                assert torch.equal(actual.double(), expected), describe_difference(actual, expected)


@pytest.mark.parametrize("low", [(0, 3), (4, 1), (7, 7)])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_low_padding_alone(low, direction, seed):
    """The high side is whatever the size implies: causal, one-sided, or a cropped far end."""
    problem = Problem((2, 5, 7, 8), (6, 5, 3, 4), (6, 6), (1, 1), low, (1, 1), 1, 0)
    generator = torch.Generator().manual_seed(seed)
    shapes = (problem.input_size, problem.weight_size, (2, 6, *problem.output_size))
    x, w, y = (torch.randint(-3, 4, shape, generator=generator).float() for shape in shapes)
    expected = reference_operator(direction, x, w, None, y, problem)
    for row, isa in kernels(direction, problem, (x, w, y), "contiguous"):
        with forced(direction, row, isa):
            actual = run_operator(direction, x, w, None, y, problem)
            if row in ROUNDS_INTEGERS:
                assert_accurate(actual, expected)
            else:
                assert torch.equal(actual.double(), expected), describe_difference(actual, expected)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_stride_as_large_as_can_be(layout, groups, seed):
    """It reads what any other stride beyond the image reads."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    w = torch.randn(6, 4 // groups, 3, 3, generator=generator)
    if layout == "channels_last":
        x, w = (t.to(memory_format=torch.channels_last) for t in (x, w))
    results = [myconv.functional.conv2d(x, w, stride=stride, groups=groups) for stride in (9, 2**63 - 1)]
    assert torch.equal(*results)


@pytest.mark.parametrize("direction", ["forward", "backward_input"])
@pytest.mark.parametrize("name", ["reflect_2d", "replicate_3d", "circular_1d"])
def test_padding_modes_take_a_smaller_output(name, direction, seed):
    case = BY_NAME[name]
    problem = case.problem._replace(output_size=tuple(n - 1 for n in case.problem.output_size))
    x, w, b, y = make_tensors(case, torch.float32, "contiguous", seed, integers=True)
    y = y[(..., *[slice(n) for n in problem.output_size])]
    b = bias_for(case, direction, b)
    actual = run_operator(direction, x, w, b, y, problem)
    assert torch.equal(actual.double(), reference_operator(direction, x, w, b, y, problem))


@pytest.mark.parametrize("mode", [1, 2, 3])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_transposed_padding_modes(rank, mode, seed):
    """conv_backward_input with a bias and a padding mode: a transposed convolution that torch lacks."""
    problem = Problem(
        (2, 4, *(5, 6, 4)[:rank]),
        (3, 4, *[3] * rank),
        (5, 6, 4)[:rank],
        (1,) * rank,
        (1,) * rank,
        (1,) * rank,
        1,
        mode,
    )
    generator = torch.Generator().manual_seed(seed)
    shapes = (problem.input_size, problem.weight_size, (2, 3, *problem.output_size), (4,))
    x, w, y, b = (torch.randint(-3, 4, shape, generator=generator).float() for shape in shapes)
    actual = run_operator("backward_input", x, w, b, y, problem)
    assert torch.equal(actual.double(), reference_operator("backward_input", x, w, b, y, problem))


# ----------------------------------------------------------------------------------- the fused backward


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", ["stride_2", "groups_2", "depthwise", "circular_1d", "batch_0", "video_3x3x3"])
def test_fused_backward(name, layout, seed):
    """conv_backward gives what the single operators give, for each of the eight masks."""
    case = BY_NAME[name]
    tensors = make_tensors(case, torch.float32, layout, seed)
    x, w, _, gy = tensors
    single = [run_operator(d, x, w, None, gy, case.problem) for d in DIRECTIONS[1:]]
    bias_gradient = gy.double().sum([0, *range(2, gy.dim())])
    for bits in range(8):
        mask = [bool(bits & bit) for bit in (1, 2, 4)]
        with noting(mask=mask):
            got = torch.ops.myconv.conv_backward(gy, x, w, *case.problem.parameters, mask)
            assert [g is not None for g in got] == mask
            for actual, expected in zip(got, single, strict=False):
                assert actual is None or torch.equal(actual, expected)
            if mask[2]:
                torchs = gy.sum([0, *range(2, gy.dim())])
                assert_accurate(
                    got[2], bias_gradient, torchs, "bias gradient", terms=size_of_sums(gy, bias_gradient, case.rank)
                )
            if mask[1]:
                assert same_strides(got[1], w), "the weight gradient has strides of its own"


BIASED = [(case, torch.float32) for case in CASES if not case.transposed]
BIASED += [(case, t) for case in CORE if not case.transposed for t in (torch.float64, torch.bfloat16, torch.float16)]


@pytest.mark.parametrize("case, dtype", BIASED)
def test_bias_gradient_of_each_row(case, dtype, seed):
    """Each row that makes the weight gradient makes that of the bias too: the same bits on any number of threads."""
    for layout in ("contiguous", "channels_last")[: 2 if case.rank > 1 else 1]:
        x, w, _, gy = make_tensors(case, dtype, layout, seed, integers=True)
        rounding = make_tensors(case, dtype, layout, seed).gy
        expected = gy.double().sum([0, *range(2, gy.dim())]).to(dtype)
        for row, isa in kernels("backward_weight", case.problem, (x, w, gy), layout):
            with forced("backward_weight", row, isa), noting(layout=layout):
                poison(expected.nbytes, "cpu")
                backward = partial(fused_backward, x=x, w=w, problem=case.problem)
                assert torch.equal(backward(gy)[2], expected)
                results = []
                for count in (1, 2, 3):
                    with threads(count):
                        results.append(backward(rounding)[2])
                assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def fused_backward(gy: torch.Tensor, x: torch.Tensor, w: torch.Tensor, problem: Problem) -> tuple:
    return torch.ops.myconv.conv_backward(gy, x, w, *problem.parameters, [False, True, True])


# ---------------------------------------------------------------------------------------- output strides


def same_strides(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal strides in the dimensions that have more than one element."""
    return all(n <= 1 or s == t for n, s, t in zip(a.shape, a.stride(), b.stride(), strict=True))


def dense_layouts(tensor: torch.Tensor) -> list[bool]:
    """Whether the tensor is contiguous, and whether channels_last; 1d counts as 2d with one row."""
    tensor = tensor.unsqueeze(2) if tensor.dim() == 3 else tensor
    return [tensor.is_contiguous(), tensor.is_contiguous(memory_format=CHANNELS_LAST[tensor.dim()])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "layouts",
    [
        ("contiguous", "contiguous"),
        ("channels_last", "contiguous"),
        ("contiguous", "channels_last"),
        ("channels_last", "channels_last"),
        ("sliced", "contiguous"),
        ("transposed", "contiguous"),
        ("expanded", "contiguous"),
    ],
    ids="-".join,
)
@pytest.mark.parametrize("case", CORE)
def test_output_strides(case, layouts, dtype, seed):
    """channels_last if the input or the weight is, else contiguous, as torch's.

    In 1d, as in torch, the weight alone decides. Two exceptions: torch drops channels_last in some padding
    modes and, in 3d, some dtypes, here it is kept; and where size-1 dimensions leave the layout open, either
    will do.
    """
    tensors = make_tensors(case, dtype, "contiguous", seed)
    x, w = lay_out(tensors.x, layouts[0]), lay_out(tensors.w, layouts[1])
    y = our_conv(case, x, w, tensors.b)
    assert y.dtype == dtype
    dense = dense_layouts(y)
    assert any(dense), f"strides {y.stride()} of shape {tuple(y.shape)} are not dense"
    if any(map(layout_is_ambiguous, (x, w, y))):
        return
    channels_last = "channels_last" in (layouts[1:] if case.rank == 1 else layouts)
    assert dense == [not channels_last, channels_last], f"strides {y.stride()} of shape {tuple(y.shape)}"
    if case.rank < 3 and case.padding_mode == "zeros":
        assert same_strides(y, torch_conv(case, x, w, tensors.b)), "torch has other strides"


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CORE)
def test_operator_strides(case, layout, seed):
    """conv_forward and conv_backward_input follow the layout of their activation, else of the weight."""
    x, w, _, y = convolution_roles(case, make_tensors(case, torch.float32, layout, seed))
    for direction, like in (("forward", y), ("backward_input", x)):
        result = run_operator(direction, x, w, None, y, case.problem)
        if case.rank > 1 and not any(map(layout_is_ambiguous, (x, w, y))):
            assert same_strides(result, like), direction
        else:
            assert any(dense_layouts(result)), direction


def test_arguments_are_left_alone(seed):
    """No operator writes to what it was given."""
    for case in CORE:
        for layout in ("contiguous", "channels_last", "sliced"):
            tensors = make_tensors(case, torch.float32, layout, seed)
            before = [None if t is None else t.clone() for t in tensors]
            with noting(case=case.name, layout=layout):
                with_gradients(partial(our_conv, case), tensors)
                assert all(a is None or torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_other_seeds_give_other_data():
    for case in CORE:
        data = [make_tensors(case, seed=seed) for seed in (0, 1, 2)]
        assert not any(torch.equal(a.w, b.w) for a, b in zip(data, data[1:], strict=False)), case.name


# ------------------------------------------------------------------------------ values that are not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("direction", ["forward", "backward_input"])
@pytest.mark.parametrize(
    "name", ["out_channels_17", "stride_2", "tiles_of_stride_2_3d", "depthwise", "1x1", "groups_2", "video_3x3x3"]
)
def test_not_finite_stays_local(name, direction, layout, value, seed):
    """One such element reaches the outputs whose window holds it and no other, the same in every row."""
    case = BY_NAME[name]
    x, w, b, y = make_tensors(case, torch.float32, layout, seed, integers=True)
    w = torch.where(w == 0, torch.ones_like(w), w)  # 0 x inf is NaN, which paths may or may not meet in padding
    x, y = x.clone(), y.clone()
    read = x if direction == "forward" else y
    read[(0, 0, *[n // 2 for n in read.shape[2:]])] = value
    b = b if direction == "forward" else None
    expected = reference_operator(direction, x, w, b, y, case.problem).float()
    for row, isa in kernels(direction, case.problem, (x, w, y), layout):
        with forced(direction, row, isa):
            actual = run_operator(direction, x, w, b, y, case.problem)
            assert torch.equal(actual.isfinite(), expected.isfinite()), "it reached other outputs"
            if row not in ROUNDS_INTEGERS:
                assert torch.equal(actual.nan_to_num(7e7, 8e8, -8e8), expected.nan_to_num(7e7, 8e8, -8e8))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("direction", ["forward", "backward_input"])
@pytest.mark.parametrize(
    "name", ["dilation_mostly_padding", "dilation_reaches_only_padding", "aspp_dilated", "same_even"]
)
def test_weights_that_are_not_finite(name, direction, layout, seed):
    """The padding multiplies: 0 x inf is NaN, also where a tap reads nothing but padding."""
    case = BY_NAME[name]
    x, w, b, y = make_tensors(case, torch.float32, layout, seed, integers=True)
    w = w.clone()
    w[0, 0, 0, 0], w[-1, -1, -1, -1] = float("inf"), float("nan")
    expected = None
    for row, isa in reversed(kernels(direction, case.problem, (x, w, y), layout)):
        with forced(direction, row, isa):
            actual = run_operator(direction, x, w, None, y, case.problem)
        if expected is None:
            assert row == "reference"
            expected = actual
        assert torch.equal(actual.nan_to_num(7e7, 8e8, -8e8), expected.nan_to_num(7e7, 8e8, -8e8)), (row, isa)
