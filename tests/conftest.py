"""Shared by all tests: the tolerance table, poisoned memory, every kernel by name, and what a failure prints.

python -m pytest                    everything but the slow tests
python -m pytest -m slow            the slow tests
MYCONV_TEST_SEED=7 python -m ...    other random data
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import pathlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import hypothesis
import pytest
import torch

import myconv
from cases import PIECE_PAIRS, Case, Problem, Tensors, layout_is_ambiguous, split

SEED = int(os.environ.get("MYCONV_TEST_SEED", "0"))

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
ROUNDS_INTEGERS = ("winograd_4x4",)


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
    actual = with_gradients(ours, tensors)
    assert [t.dtype for t in actual] == [dtype] * len(actual)
    exact = exact_results(theirs, tensors)
    # torch's own error counts in the table only where a result is held to a relative error.
    relative = TOLERANCE[dtype].relative_l2 is not None
    torchs = with_gradients(theirs, tensors) if relative else [None] * len(actual)
    for name, a, e, t in zip(RESULTS, actual, exact, torchs, strict=False):
        assert_accurate(a, e, t, name)


def convolution_roles(case: Case, tensors: Tensors) -> tuple[torch.Tensor, ...]:
    """(x, w, b, y) of the convolution: a transposed case runs it backward, from y to x."""
    x, w, b, gy = tensors
    return (gy, w, b, x) if case.transposed else (x, w, b, gy)


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


def kernels(direction: str, problem: Problem, operands: tuple[torch.Tensor, ...], layout: str) -> list[tuple[str, str]]:
    """(row, ISA) of every table row that takes the problem, on every ISA that this machine runs.

    A row is named only if it takes both layouts where the tensors do not tell which one they are in.
    """
    channels_last = layout == "channels_last" and operands[0].dim() in (4, 5)
    if operands[0].dim() == 3:  # in 1d the weight's strides decide, and not every stride tells
        unclear = layout == "channels_last"
    else:
        unclear = any(map(layout_is_ambiguous, operands))
    layouts = {channels_last, not channels_last} if unclear else {channels_last}
    found = []
    for isa in myconv._C.isas():
        with myconv.flags.isa(isa):
            for row in myconv._C.algorithms(direction):
                reasons = [
                    dict(myconv._C.selection(direction, *problem, operands[0].dtype, flag))[row] for flag in layouts
                ]
                if not any(reasons):
                    found.append((row, isa))
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


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_same_state(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    mine, reference = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(reference)
    for key in mine:
        torch.testing.assert_close(mine[key], reference[key], rtol=0, atol=0, equal_nan=True)


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


PAGE = mmap.PAGESIZE
FENCE = 16 * PAGE  # on either side of a guarded tensor
PROT_NONE = 0

_libc = ctypes.CDLL(None, use_errno=True)


def fenced(tensor: torch.Tensor, end: bool) -> torch.Tensor:
    """Poisoned memory for a tensor of these strides, right before untouchable pages or right behind some."""
    if tensor.numel() == 0:
        return tensor
    span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    size = span * tensor.element_size()
    room = -(-size // PAGE) * PAGE
    mapping = mmap.mmap(-1, room + 2 * FENCE)  # the tensor keeps it alive
    first = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    for fence in (first, first + FENCE + room):
        if _libc.mprotect(ctypes.c_void_p(fence), ctypes.c_size_t(FENCE), PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect")
    torch.frombuffer(mapping, dtype=torch.uint8, count=room, offset=FENCE).fill_(0xFF)
    flat = torch.frombuffer(mapping, dtype=tensor.dtype, count=span, offset=FENCE + (room - size if end else 0))
    return flat.as_strided(tensor.shape, tensor.stride())


def guarded(tensor: torch.Tensor, end: bool) -> torch.Tensor:
    """A copy, strides included, in fenced memory."""
    return fenced(tensor, end).copy_(tensor)


@pytest.fixture(scope="session", autouse=True)
def poisoned_memory() -> Iterator[None]:
    if not set_junk_fill(True):  # then at least what goes through torch.empty
        torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(64).isnan().all(), "fresh memory is not poisoned"
    yield
    set_junk_fill(False)


# ------------------------------------------------------------------------------------- what a failure prints

_facts: dict[str, object] = {}  # of the test that runs


@contextlib.contextmanager
def noting(**facts: object) -> Iterator[None]:
    """Adds facts, such as the row and the ISA a loop is at, to the report of a failure in the block."""
    before = dict(_facts)
    _facts.update(facts)
    yield  # without try/finally: after an exception the facts must stay for the report
    _facts.clear()
    _facts.update(before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    report = yield
    if report.failed:
        parameters = getattr(item, "callspec", None)
        facts: dict[str, object] = {"seed": SEED, "isa": myconv._C.isa(), "threads": torch.get_num_threads()}
        facts |= {
            name: getattr(value, "name", value) for name, value in (parameters.params if parameters else {}).items()
        }
        facts |= _facts
        lines = [f"{name}: {value}" for name, value in facts.items()]
        slow = " -m slow" if item.get_closest_marker("slow") else ""
        environment = "".join(
            f"{name}={os.environ[name]} " for name in ("MYCONV_ISA", "OMP_NUM_THREADS") if name in os.environ
        )
        command = f"{environment}MYCONV_TEST_SEED={SEED} python -m pytest{slow} '{item.nodeid}'"
        report.sections.append(("to repeat", "\n".join([*lines, command])))
    return report


def pytest_runtest_setup(item: pytest.Item) -> None:
    _facts.clear()


# ---------------------------------------------------------------------------------------------- hypothesis

# "default" tries the same calls in every run; --hypothesis-profile=long many more, others each time.
_COMMON = {"deadline": None, "print_blob": True, "suppress_health_check": list(hypothesis.HealthCheck)}
hypothesis.settings.register_profile("default", derandomize=True, database=None, max_examples=150, **_COMMON)
hypothesis.settings.register_profile("long", max_examples=1500, **_COMMON)
hypothesis.settings.load_profile("default")

# ------------------------------------------------------------------------------------------------- pytest


def pytest_make_parametrize_id(val: object) -> str | None:
    if isinstance(val, Case):
        return val.name
    return str(val).removeprefix("torch.") if isinstance(val, torch.dtype) else None


def pytest_report_header() -> str:
    isas = " ".join(myconv._C.isas())
    return f"myconv on {isas}, torch {torch.__version__}, threads: {torch.get_num_threads()}"


@pytest.fixture
def seed() -> int:
    return SEED
