"""How a case is run and held to exact results, on any device: shared by the tests and benchmarks/gpu.py.

Imports torch and myconv only. References are computed on the CPU, by torch in float64.
"""

from __future__ import annotations

import contextlib
import ctypes
import pathlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

import myconv
from cases import (
    PIECE_PAIRS,
    Case,
    Problem,
    Tensors,
    convolution_roles,
    layout_is_ambiguous,
    make_tensors,
    reference_operator,
    split,
    torch_conv,
    torch_operator,
)

# ------------------------------------------------------------------------------------ what a failure is about

facts: dict[str, object] = {}  # of the test that runs


@contextlib.contextmanager
def noting(**more: object) -> Iterator[None]:
    """Adds facts, such as the row and the ISA a loop is at, to the report of a failure in the block."""
    before = dict(facts)
    facts.update(more)
    yield  # without try/finally: after an exception the facts must stay for the report
    facts.clear()
    facts.update(before)


# ---------------------------------------------------------------------------------------- the tolerance table


@dataclass(frozen=True)
class Tolerance:
    """relative_l2: allowed ||error|| / ||exact||, or twice torch's own error where that is more.
    ulps: (share of elements, distance from the rounded exact value in units of the last place), each must
    hold; below `floor` times the largest exact value, cancellation leaves the last place without meaning.
    """

    relative_l2: float | None = None
    ulps: tuple[tuple[float, float], ...] = ()
    floor: float = 0.0


ONE_ROUNDING = Tolerance(ulps=((0.999, 1), (1.0, 2)), floor=2e-6)  # of a float32 sum
TOLERANCE = {
    torch.float64: Tolerance(relative_l2=1e-15),
    torch.float32: Tolerance(relative_l2=2e-6),
    torch.complex128: Tolerance(relative_l2=1e-15),
    torch.complex64: Tolerance(relative_l2=2e-6),
    torch.complex32: Tolerance(relative_l2=1e-3),  # of four float16 convolutions
    torch.bfloat16: ONE_ROUNDING,
    torch.float16: ONE_ROUNDING,
}
# Rows that round even where all values are small integers: held to the table above instead of to equality.
ROUNDS_INTEGERS = ("winograd", "widened")  # the second runs on the first


def assert_accurate(
    actual: torch.Tensor,
    exact: torch.Tensor,
    torchs: torch.Tensor | None = None,
    what: str = "result",
    terms: torch.Tensor | None = None,
) -> None:
    """Holds `actual` to the table, given `exact` in float64 (complex128) and perhaps torch's own answer.

    `terms`, the sums of the terms' absolute values, takes the place of `exact` as what the error is relative to: for
    results of so few elements that all of them may cancel.
    """
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    if actual.numel() == 0:
        return
    actual, dtype = actual.detach(), actual.dtype
    exact = exact.detach()
    tolerance = TOLERANCE[dtype]
    error = (actual.to(exact.dtype) - exact).abs()
    worst = f"largest error {error.max():.3g} at {tuple(torch.unravel_index(error.argmax(), error.shape))}"
    assert torch.isfinite(error).all(), f"{what}: {int((~torch.isfinite(error)).sum())} elements are not finite"
    terms = exact.abs() if terms is None else terms
    if tolerance.relative_l2 is not None:
        size = terms.norm()
        allowed = tolerance.relative_l2 * size
        if torchs is not None:
            allowed = max(allowed, 2 * (torchs.detach().to(exact.dtype) - exact).norm())
        relative = error.norm() / size if size > 0 else error.norm()
        assert error.norm() <= allowed, (
            f"{what}: relative L2 error {relative:.3g}, allowed {allowed / size:.3g}; {worst}"
        )
        return
    rounded = exact.to(dtype).double()
    for share, distance in tolerance.ulps:
        allowed = distance * last_place(exact, dtype) + tolerance.floor * terms.max()
        good = ((actual.double() - rounded).abs() <= allowed).double().mean()
        # A single element may always miss by one more place: small tensors have no 0.1%.
        enough = min(share, 1 - 1 / exact.numel()) if share < 1 else share
        assert good >= enough, f"{what}: {1 - good:.3%} of elements off by more than {distance} ulp; {worst}"


def last_place(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The spacing of dtype's numbers around values."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(values.abs().clamp(min=info.tiny)).exponent - 1
    return torch.ldexp(torch.full_like(values, info.eps), exponent)


# ------------------------------------------------------------------------------------------- running a case


def our_conv(case: Case, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
    return getattr(myconv.functional, case.op)(x, w, b, **case.arguments)


RESULTS = ("output", "input gradient", "weight gradient", "bias gradient")
EXACT = {torch.float32: torch.float64, torch.float64: torch.float64, torch.bfloat16: torch.float64}
EXACT |= {torch.float16: torch.float64, torch.complex64: torch.complex128, torch.complex128: torch.complex128}
EXACT |= {torch.complex32: torch.complex128}


def with_gradients(conv: Callable, tensors: Tensors) -> list[torch.Tensor]:
    """conv(x, w, b) and the gradients of all arguments. The leaves keep their layout."""
    leaves = [t.detach().requires_grad_() for t in tensors[:3] if t is not None]
    y = conv(*leaves, *[None] * (3 - len(leaves)))
    return [y.detach(), *torch.autograd.grad(y, leaves, tensors.gy)]


def exact_results(conv: Callable, tensors: Tensors) -> list[torch.Tensor]:
    """with_gradients of torch's conv in float64 (complex128), in pieces where the tensors are of that dtype."""
    dtype = EXACT[tensors.x.dtype]
    x, w, b, gy = (None if t is None else t.to(dtype).resolve_conj().resolve_neg().contiguous() for t in tensors)
    if dtype != tensors.x.dtype:
        return with_gradients(conv, Tensors(x, w, b, gy))
    xs, ws, gys = split(x), split(w), split(gy)
    y = gx = gw = 0
    for i, j in PIECE_PAIRS:
        partial_y, partial_gx, _ = with_gradients(conv, Tensors(xs[i], ws[j], None, gys[i]))
        y, gx = y + partial_y, gx + partial_gx
        gw = gw + with_gradients(conv, Tensors(xs[j], ws[j], None, gys[i]))[2]
    if b is None:
        return [y, gx, gw]
    rank = w.dim() - 2
    gb = sum(piece.transpose(0, -rank - 1).flatten(1).sum(1) for piece in reversed(gys))
    return [y + b.reshape(-1, *[1] * rank), gx, gw, gb]


def check_parity(ours: Callable, theirs: Callable, tensors: Tensors) -> None:
    """Holds ours(x, w, b) and its gradients to the table; theirs is the same call of torch."""
    dtype = tensors.x.dtype
    actual = [t.cpu() for t in with_gradients(ours, tensors)]
    tensors = Tensors(*on_cpu(*tensors))
    assert [t.dtype for t in actual] == [dtype] * len(actual)
    exact = exact_results(theirs, tensors)
    # torch's own error counts in the table only where a result is held to a relative error.
    relative = TOLERANCE[dtype].relative_l2 is not None
    torchs = with_gradients(theirs, tensors) if relative else [None] * len(actual)
    for name, a, e, t in zip(RESULTS, actual, exact, torchs, strict=False):
        of_bias = name == "bias gradient"
        assert_accurate(a, e, t, name, terms=size_of_sums(tensors.gy, e, tensors.w.dim() - 2) if of_bias else None)


def size_of_sums(gy: torch.Tensor, exact: torch.Tensor, rank: int) -> torch.Tensor:
    """Of the bias gradient, but no less than random signs would make it: of few channels all may happen to cancel."""
    channels = gy.to(exact.dtype).transpose(0, -rank - 1).flatten(1)
    return exact.abs().maximum(torch.linalg.vector_norm(channels, dim=1))


def on_cpu(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    return tuple(None if t is None else t.cpu() for t in tensors)


def run_operator(
    direction: str,
    x: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor | None,
    y: torch.Tensor,
    problem: Problem,
) -> torch.Tensor:
    """One operator on the convolution's input, weight and output (gradient)."""
    ops, parameters = torch.ops.myconv, problem.parameters
    if direction == "forward":
        return ops.conv_forward(x, w, b, problem.output_size, *parameters)
    if direction == "backward_input":
        return ops.conv_backward_input(y, w, b, problem.input_size[2:], *parameters)
    return ops.conv_backward_weight(y, x, problem.weight_size[2:], *parameters)


def bias_for(case: Case, direction: str, b: torch.Tensor | None) -> torch.Tensor | None:
    """The bias, where this direction is the one that makes the case's activations."""
    return b if direction == ("backward_input" if case.transposed else "forward") else None


def isas(device: str) -> list[str]:
    """The instruction sets to try: all of a CPU's; a GPU's kernels do not look at them."""
    return myconv._C.isas() if device == "cpu" else [myconv._C.isa()]


def kernels(direction: str, problem: Problem, operands: tuple[torch.Tensor, ...], layout: str) -> list[tuple[str, str]]:
    """(row, ISA) of every table row that takes the problem, on every ISA that this machine runs.

    A row is named only if it takes both layouts where the tensors do not tell which one they are in.
    """
    device = operands[0].device.type
    channels_last = layout == "channels_last" and operands[0].dim() in (4, 5)
    if operands[0].dim() == 3:  # in 1d the weight's strides decide, and not every stride tells
        unclear = layout == "channels_last"
    else:
        unclear = any(map(layout_is_ambiguous, operands))
    layouts = {channels_last, not channels_last} if unclear else {channels_last}
    found = []
    for isa in isas(device):
        with myconv.flags.isa(isa):
            chosen = [
                dict(myconv._C.selection(direction, *problem, operands[0].dtype, flag, device)) for flag in layouts
            ]
        found += [(row, isa) for row in myconv._C.algorithms(direction, device) if not any(c[row] for c in chosen)]
    return found


@contextlib.contextmanager
def forced(direction: str, row: str, isa: str) -> Iterator[None]:
    """Runs one row on one ISA. On failure the report names both."""
    with (
        myconv.flags.isa(isa),
        myconv.flags.algorithm(direction, row),
        noting(direction=direction, row=row, isa=isa),
    ):
        yield


def check_rows(case: Case, direction: str, dtype: torch.dtype, seed: int, integers: bool, device: str = "cpu") -> None:
    """Each row that takes the case, in both layouts: to the bit on integers, else to the table."""
    x, w, b, y = convolution_roles(case, make_tensors(case, dtype, seed=seed, integers=integers))
    b = bias_for(case, direction, b)
    expected = reference_operator(direction, x, w, b, y, case.problem)
    for layout in ("contiguous", "channels_last")[: 2 if case.rank > 1 else 1]:
        x, w, b, y = convolution_roles(case, make_tensors(case, dtype, layout, seed, integers, device))
        b = bias_for(case, direction, b)
        torchs = None if integers else torch_operator(direction, *on_cpu(x, w, b, y), case.problem)
        available = kernels(direction, case.problem, (x, w, y), layout)
        assert {isa for _, isa in available} == set(isas(device)), "an ISA is left without any row"
        for row, isa in available:
            with forced(direction, row, isa), noting(layout=layout):
                poison(expected.numel() * x.itemsize, device)
                actual = run_operator(direction, x, w, b, y, case.problem).cpu()
                if integers and row not in ROUNDS_INTEGERS:
                    assert actual.dtype == dtype
                    assert torch.equal(actual, expected.to(dtype)), describe_difference(actual, expected)
                else:
                    assert_accurate(actual, expected, torchs)


def describe_difference(actual: torch.Tensor, expected: torch.Tensor) -> str:
    wrong = (actual.double() != expected.to(actual.dtype).double()).nonzero()
    if not len(wrong):
        return f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    at = tuple(wrong[0].tolist())
    return f"{len(wrong)} of {actual.numel()} elements differ, first {at}: {actual[at]} for {expected[at]}"


def check_integers(case: Case, dtype: torch.dtype, seed: int, device: str = "cpu") -> None:
    """Sums of full-range values wrap around: the reference is torch in int64, cut to the dtype."""
    tensors = make_tensors(case, torch.int64, "contiguous", seed)
    scale = torch.iinfo(dtype).max // 5
    x, w, b = (None if t is None else (t * scale).to(dtype) for t in tensors[:3])
    expected = torch_conv(case, x.long(), w.long(), None)  # torch casts an integer bias of some paths
    if b is not None:
        expected = expected + b.long().reshape(-1, *[1] * case.rank)
    actual = our_conv(case, *(None if t is None else t.to(device) for t in (x, w, b)))
    assert actual.dtype == dtype
    assert torch.equal(actual.cpu(), expected.to(dtype))


def every_kernel(
    case: Case, direction: str, layout: str, seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Iterator[tuple[Callable, torch.Tensor, torch.Tensor]]:
    """(run, operands) of each row and ISA; run(x, y) takes parts of the batch."""
    x, w, b, y = convolution_roles(case, make_tensors(case, dtype, layout, seed, device=device))
    b = bias_for(case, direction, b)
    for row, isa in kernels(direction, case.problem, (x, w, y), layout):

        def run(x: torch.Tensor, y: torch.Tensor, row=row, isa=isa) -> torch.Tensor:
            with forced(direction, row, isa), noting(batch=x.shape[0]):
                return run_operator(direction, x, w, b, y, case.problem)

        yield run, x, y


# --------------------------------------------------------------------------------------- poisoned memory


def set_junk_fill(on: bool) -> bool:
    """Has torch's CPU allocator fill all it hands out, outputs and workspaces alike, with a pattern that is
    NaN in float32, so that an element nobody wrote shows. Returns whether this torch has the switch.
    """
    folder = pathlib.Path(torch.__file__).parent / "lib"
    flag = "FLAGS_caffe2_cpu_allocator_do_junk_fill"
    for library in folder.glob("libc10.*"):
        for symbol in (flag, f"_ZN3c10{len(flag)}{flag}E"):
            with contextlib.suppress(ValueError):
                ctypes.c_bool.in_dll(ctypes.CDLL(str(library)), symbol).value = on
                return True
    return False


def poison(size: int, device: str) -> None:
    """Fills what CUDA's caching allocator will hand out next for `size` bytes with NaN (integers: -1).

    The CPU's allocator does so by itself, see set_junk_fill.
    """
    if device != "cpu":
        blocks = [torch.empty(size, dtype=torch.uint8, device=device).fill_(255) for _ in range(3)]
        del blocks  # the next request of this size takes one of them
