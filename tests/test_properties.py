"""Properties of random calls, legal and not.

python -m pytest tests/test_properties.py                                 the same calls in every run
python -m pytest tests/test_properties.py --hypothesis-profile=long       many more, others each time

Each failure prints one line that repeats the call without these tests. The line is not made for the report: running
the code in it is how a test makes its call.
"""

from __future__ import annotations

import itertools
import math
import shlex
import subprocess
import sys
import types
from dataclasses import dataclass
from dataclasses import replace as replace_fields

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, example, given, note, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

import illegal
import myconv
import myconv.functional
from cases import DIRECTIONS, LAYOUTS, PADDING_MODES, Case, Problem, reference_operator
from conftest import ROUNDS_INTEGERS, SEED, assert_accurate, forced, kernels, run_operator

# torch warns of its padded copy for an even kernel, and of what it makes of meta tensors
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

CONV = ("conv1d", "conv2d", "conv3d")
TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
FLOATS = (torch.float32, torch.float64)
COMPLEX = (torch.complex64, torch.complex128)
HALVES = (torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)  # transposed: the first alone


# ------------------------------------------------------------------------------------------- a call as a line


def tensor_source(shape: tuple[int, ...], dtype: torch.dtype, layout: str = "contiguous", integers=True) -> str:
    """An expression for a random tensor in one of cases.LAYOUTS. `integers` draws from -3..3: sums are exact."""

    def values(shape: tuple[int, ...]) -> str:
        if not integers:
            return f"torch.randn({shape}, dtype={dtype})"
        low = 0 if dtype == torch.uint8 else -3
        draw = f"torch.randint({low}, 4, {shape})"
        return f"({draw} + 1j * {draw}).to({dtype})" if dtype.is_complex else f"{draw}.to({dtype})"

    axis = min(1, len(shape) - 1)
    if layout == "channels_last" and len(shape) in (4, 5):
        return f"{values(shape)}.contiguous(memory_format=torch.channels_last{'_3d' * (len(shape) == 5)})"
    if layout in ("channels_last", "transposed"):
        swapped = list(shape)
        swapped[axis], swapped[-1] = swapped[-1], swapped[axis]
        return f"{values(tuple(swapped))}.transpose({axis}, -1)"
    if layout == "expanded":
        return f"{values((1, *shape[1:]))}.expand({shape})"
    if layout == "sliced":
        larger = (*(n + 1 for n in shape[:-1]), 2 * shape[-1] + 1)
        return f"{values(larger)}[{'1:, ' * (len(shape) - 1)}1::2]"
    return values(shape)


def command(code: str) -> str:
    quote = '"' if "'" in code else "'"
    return f"python -c {quote}{code}{quote}"  # no code here has both, nor a character that a shell would read


@dataclass(frozen=True)
class Call:
    """A legal call: `case` in full, `arguments` in one of the ways to write them."""

    case: Case
    arguments: dict[str, object]
    dtype: torch.dtype = torch.float32
    layouts: tuple[str, ...] = ("contiguous",) * 4  # of x, w, b and gy
    wanted: tuple[str, ...] = ()  # whose gradients
    unbatched: bool = False
    integers: bool = True

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        case, first = self.case, int(self.unbatched)
        shapes = (case.input[first:], case.weight_shape, (case.out_channels,), case.output_shape[first:])
        return dict(zip(("x", "w", "b", "gy"), shapes))

    @property
    def code(self) -> str:
        statements = ["import torch, myconv.functional as F", f"torch.manual_seed({SEED})"]
        for (name, shape), layout in zip(self.shapes.items(), self.layouts):
            if name == "b" and not self.case.bias:
                source = "None"
            else:
                source = tensor_source(shape, self.dtype, layout, self.integers)
            if name != "gy" or self.wanted:
                statements.append(f"{name} = {source}{'.requires_grad_()' * (name in self.wanted)}")
        arguments = ", ".join(["x, w, b", *(f"{name}={value!r}" for name, value in self.arguments.items())])
        statements.append(f"y = F.{self.case.op}({arguments})")
        if self.wanted:
            statements.append(f"grads = torch.autograd.grad(y, ({', '.join(self.wanted)},), gy)")
        return "; ".join([*statements, f"print(y{', grads' * bool(self.wanted)})"])

    @property
    def line(self) -> str:
        return command(self.code)

    def run(self) -> dict[str, object]:
        """The variables of the line: x, w, b, y and, with gradients, gy and grads."""
        note(self.line)
        variables: dict[str, object] = {"print": lambda *_: None}
        exec(self.code, variables)
        return variables

    def tensors(self) -> list[torch.Tensor]:
        """x, w and, if there is one, b."""
        variables = self.run()
        return [variables[name].detach() for name in "xwb" if variables[name] is not None]

    def function(self, *tensors: torch.Tensor) -> torch.Tensor:
        return getattr(myconv.functional, self.case.op)(*tensors, **self.arguments)


def test_the_line_repeats_the_call():
    """In another process: it prints what the call gives here."""
    case = Case("strided", "conv2d", (2, 4, 8, 8), 6, 3, (2, 1), ((1, 2), 0))
    call = Call(case, {"stride": (2, 1), "padding": ((1, 2), 0)}, wanted=("w",))
    variables: dict[str, object] = {"print": lambda *_: None}
    exec(call.code, variables)
    x, w, b, y = (variables[name] for name in "xwby")
    assert torch.equal(y, myconv.functional.conv2d(x, w, b, stride=(2, 1), padding=((1, 2), 0)))
    _, *arguments = shlex.split(call.line)
    printed = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True).stdout
    assert printed == f"{y} {variables['grads']}\n"


# --------------------------------------------------------------------------------------------- legal calls


def spelled(draw, values: tuple) -> object:
    """One value an axis: as a tuple, a list or, if all are the same, one number."""
    ways = [tuple(values), list(values)]
    if len(set(values)) == 1:
        ways += [values[:1], values[0]]
    return draw(st.sampled_from(ways))


def spelled_padding(draw, pads: list[tuple[int, int]]) -> object:
    """(low, high) an axis: as pairs, numbers, both, one pair, or one number."""
    ways: list[object] = [tuple(pads), [list(pair) for pair in pads]]
    mixed = tuple(low if low == high else (low, high) for low, high in pads)
    ways.append(mixed)
    if len(set(pads)) == 1:
        ways += [pads[:1], *([mixed[:1], list(mixed), mixed[0]] if pads[0][0] == pads[0][1] else [])]
    return draw(st.sampled_from(ways))


CHANNELS = st.integers(1, 4) | st.integers(1, 4) | st.sampled_from((7, 8, 16, 17, 33, 40))
SIDE = st.integers(0, 3) | st.integers(0, 9)
KERNEL = st.integers(1, 4) | st.integers(1, 7)


@st.composite
def calls(
    draw,
    ops=CONV + TRANSPOSED,
    dtypes=(*FLOATS, *FLOATS, *COMPLEX, *HALVES, *INTEGERS),
    layouts=LAYOUTS,
    batches=(0, 3),
    unbatched=True,
    gradients=True,
    integers=True,
    strings=True,
    work=100_000,  # multiply-adds at most
) -> Call:
    """A legal call. Extents come last: they are drawn on top of the smallest that are legal with all else."""
    op = draw(st.sampled_from(ops))
    rank, transposed = int(op[-2]), "transpose" in op
    axes = range(rank)
    groups = draw(st.integers(1, 3) | st.sampled_from((1, 1, 2, 8, 17)))
    in_per_group, out_per_group = draw(CHANNELS), draw(CHANNELS)
    kernel = tuple(draw(KERNEL) for _ in axes)
    stride = tuple(draw(st.integers(1, 4)) for _ in axes)
    dilation = tuple(draw(st.integers(1, 3)) for _ in axes)
    mode = draw(st.sampled_from(("zeros", *PADDING_MODES)))
    output_padding = tuple(draw(st.integers(0, max(s, d) - 1)) if transposed else 0 for s, d in zip(stride, dilation))
    named = [] if transposed or not strings else ["same", "valid", *["causal"] * (rank == 1)]
    padding = draw(st.sampled_from(["amounts", "amounts", "sides", *named]))
    if padding == "same":
        stride = (1,) * rank
    if padding == "amounts":
        padding = tuple((side, side) for side in (draw(SIDE) for _ in axes))
    elif padding == "sides":
        padding = tuple((draw(SIDE), draw(SIDE)) for _ in axes)
    case = Case(
        "random",
        op,
        (1, groups * in_per_group, *(1,) * rank),
        groups * out_per_group,
        kernel,
        stride,
        padding,
        dilation,
        groups,
        draw(st.booleans()),
        mode,
        output_padding,
    )

    # What is padded must hold its border, and the result at least one element.
    extents = []
    for axis, (k, s, d, (low, high), o) in enumerate(zip(kernel, stride, dilation, case.pads, output_padding)):
        padded = {"reflect": max(low, high) + 1, "circular": max(low, high, 1)}.get(mode, 1)
        reach = d * (k - 1) + 1
        if transposed:
            least = max(1, 1 - (reach + o - low - high - padded) // s)
        else:
            least = max(padded, reach - low - high)
        extents.append(least + draw(st.integers(0, 40 if axis == rank - 1 and draw(st.booleans()) else 3)))
    batch = draw(st.integers(*batches))
    case = replace_fields(case, input=(batch, groups * in_per_group, *extents))
    assume(macs(case) <= work)

    alone = unbatched and batch == 1 and draw(st.booleans())
    dtype = draw(st.sampled_from(dtypes if not transposed else [t for t in dtypes if t not in INTEGERS[1:]]))
    arguments = {
        "stride": spelled(draw, stride),
        "padding": padding if isinstance(padding, str) else spelled_padding(draw, case.pads),
        "dilation": spelled(draw, dilation),
        "groups": groups,
    }
    if transposed:
        arguments["output_padding"] = spelled(draw, output_padding)
    if mode != "zeros" or draw(st.booleans()):
        arguments["padding_mode"] = mode
    defaults = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, "output_padding": 0}
    for name, default in defaults.items():
        if arguments.get(name) == default and draw(st.booleans()):
            del arguments[name]
    wanted: tuple[str, ...] = ()
    if gradients and dtype not in INTEGERS:
        wanted = tuple(name for name in "xwb" if (name != "b" or case.bias) and draw(st.booleans()))
    places = tuple(draw(st.sampled_from(layouts)) for _ in range(4))
    return Call(case, arguments, dtype, places, wanted, alone, integers)


def macs(case: Case) -> int:
    reduced = case.input if case.transposed else case.output_shape
    return math.prod(reduced[2:]) * case.input[0] * math.prod(case.weight_shape)


def definition(case: Case, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
    """The case by explicit padding, and torch's convolution without any.

    A transposed case runs the other way: torch's transposed convolution without padding, then the adjoint of padding.
    """
    pads = [amount for pair in reversed(case.pads) for amount in pair]
    mode = "constant" if case.padding_mode == "zeros" else case.padding_mode
    if not case.transposed:
        return getattr(F, case.op)(F.pad(x, pads, mode), w, b, case.stride, 0, case.dilation, case.groups)
    full = getattr(F, case.op)(x, w, None, case.stride, 0, 0, case.groups, case.dilation)
    full = F.pad(full, [amount for o in reversed(case.output_padding) for amount in (0, o)])
    inner = full.new_zeros(case.output_shape, requires_grad=True)
    (y,) = torch.autograd.grad(F.pad(inner, pads, mode), inner, full, create_graph=True)
    return y if b is None else y + b.reshape(-1, *[1] * case.rank)


def defined(call: Call, variables: dict, absolute: bool = False) -> list[torch.Tensor]:
    """y and the wanted gradients by definition, in float64 or complex128; of the absolute values, if told."""
    wide = torch.complex128 if call.dtype.is_complex and not absolute else torch.float64
    leaves: dict[str, torch.Tensor | None] = {}
    for name in ("x", "w", "b", "gy"):
        tensor = variables.get(name)
        if tensor is not None:
            tensor = tensor.detach().abs() if absolute else tensor.detach()
            tensor = tensor.to(wide).contiguous().requires_grad_(name in call.wanted)
        leaves[name] = tensor
    x, w, b, gy = leaves.values()
    y = definition(call.case, x.unsqueeze(0) if call.unbatched else x, w, b)
    y = y.squeeze(0) if call.unbatched else y
    return [y.detach(), *(torch.autograd.grad(y, [leaves[n] for n in call.wanted], gy) if call.wanted else ())]


def narrowed(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In `dtype`: one rounding, or wrapped around."""
    return (exact.long() if dtype in INTEGERS else exact).to(dtype)


@given(calls())
def test_every_line_is_its_call(call):
    """The line that a failure prints is one line, and makes the call that was drawn."""
    assert shlex.split(call.line) == ["python", "-c", call.code] and "\n" not in call.code
    variables = call.run()
    tensors = [variables[name] for name in "xwb"]
    for name, tensor in zip("xwb", tensors):
        assert tensor is None or (tensor.shape, tensor.dtype) == (call.shapes[name], call.dtype)
        assert tensor is None or tensor.requires_grad == (name in call.wanted)
    assert torch.equal(variables["y"], call.function(*tensors))


@given(calls())
def test_exact_by_definition(call):
    """Of small integers every sum is exact, in any order: values and gradients are those of the definition."""
    variables = call.run()
    results = (variables["y"], *variables.get("grads", ()))
    for name, actual, exact in zip(("y", *call.wanted), results, defined(call, variables)):
        assert actual.dtype == call.dtype and actual.shape == exact.shape, name
        assert torch.equal(actual, narrowed(exact, call.dtype)), name


@given(calls(dtypes=(*FLOATS, *COMPLEX, *HALVES), integers=False))
def test_accurate_by_definition(call):
    variables = call.run()
    results = (variables["y"], *variables.get("grads", ()))
    every = zip(("y", *call.wanted), results, defined(call, variables), defined(call, variables, absolute=True))
    for name, actual, exact, terms in every:
        assert_accurate(actual, exact, what=name, terms=terms)


# --------------------------------------------------------------------------------------- the same bits


@given(calls(dtypes=(*FLOATS, *FLOATS, *COMPLEX, *HALVES), batches=(2, 4), unbatched=False, integers=False))
def test_a_sample_is_the_same_in_a_batch(call):
    call = replace_fields(call, wanted=("x",))
    variables = call.run()
    x, w, b, gy = (variables[name] for name in ("x", "w", "b", "gy"))
    arguments = (w,) if b is None else (w, b)
    for i in range(call.case.input[0]):
        sample = x.detach()[i : i + 1].requires_grad_()
        y = call.function(sample, *arguments)
        assert torch.equal(y, variables["y"][i : i + 1])
        assert torch.equal(torch.autograd.grad(y, sample, gy[i : i + 1])[0], variables["grads"][0][i : i + 1])


# --------------------------------------------------------------------------------------------- derivatives

# torch makes no dual tensor of an expanded one.
TINY = dict(
    dtypes=[torch.float64],
    layouts=[name for name in LAYOUTS if name != "expanded"],
    batches=(1, 2),
    integers=False,
    work=2000,
)


@given(calls(**TINY))
def test_gradcheck(call):
    leaves = [tensor.clone().requires_grad_() for tensor in call.tensors()]
    assert gradcheck(call.function, leaves, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(call.function, leaves, fast_mode=True)


@given(calls(**TINY))
def test_forward_mode_is_reverse_mode_twice(call):
    """u -> pull(u) is linear: its own pullback is the pushforward."""
    tensors = tuple(call.tensors())
    tangents = tuple(torch.randn_like(tensor) for tensor in tensors)
    y, pushed = torch.func.jvp(call.function, tensors, tangents)
    value, pull = torch.func.vjp(call.function, *tensors)
    assert torch.equal(y, value)
    _, pull_back = torch.func.vjp(pull, torch.zeros_like(y))
    torch.testing.assert_close(pushed, pull_back(tangents)[0], rtol=1e-12, atol=1e-12)


@settings(max_examples=3 * settings.default.max_examples)  # each rule has four branches
@given(calls(dtypes=(*FLOATS, *COMPLEX), work=20_000), st.data())
def test_vmap_is_a_loop(call, data):
    """Over the call and its pullback, for a batch dimension anywhere in any of the tensors."""
    tensors = call.tensors()
    batched = data.draw(st.sampled_from([some for some in itertools.product((0, 1), repeat=len(tensors)) if any(some)]))
    in_dims = [data.draw(st.integers(0, t.dim())) if some else None for t, some in zip(tensors, batched)]
    note(f"in_dims={tuple(in_dims)}")
    copies = [[t if d is None else t + i for t, d in zip(tensors, in_dims)] for i in range(3)]

    def both(*tensors):
        y, pull = torch.func.vjp(call.function, *tensors)
        return y, *pull(torch.ones_like(y))

    stacked = [t if d is None else torch.stack(s, d) for t, d, s in zip(tensors, in_dims, zip(*copies))]
    together = torch.func.vmap(both, tuple(in_dims))(*stacked)
    for actual, *expected in zip(together, *(both(*copy) for copy in copies)):
        assert torch.equal(actual, torch.stack(expected))


@given(calls(ops=CONV, dtypes=FLOATS, gradients=False, strings=False))
def test_transposed_is_the_adjoint(call):
    """<conv(x), g> = <x, conv_transpose(g)>, with the same arguments."""
    case = replace_fields(call.case, bias=False)
    variables = replace_fields(call, case=case).run()
    x, w, y = (variables[name] for name in "xwy")
    left_over = [
        (n + low + high - d * (k - 1) - 1) % s
        for n, (low, high), d, k, s in zip(case.input[2:], case.pads, case.dilation, case.kernel_size, case.stride)
    ]
    g = torch.randint_like(y, -3, 4)
    transpose = getattr(myconv.functional, case.op.replace("conv", "conv_transpose"))
    back = transpose(g, w, output_padding=left_over, **call.arguments)
    assert back.shape == x.shape
    assert (y.double() * g).sum() == (x.double() * back).sum()


# ------------------------------------------------------------------------------------------------- modules


@given(calls(dtypes=(*FLOATS, *HALVES, *COMPLEX), integers=False), st.data())
def test_modules_are_the_functions(call, data):
    case = call.case
    call = replace_fields(call, wanted=tuple(name for name in call.wanted if name == "x"))
    variables = call.run()
    constructor = getattr(myconv, case.op.replace("conv", "Conv").replace("_t", "T"))
    arguments = {**call.arguments, "bias": case.bias, "dtype": call.dtype}
    if case.padding_mode != "zeros":  # where the constructor, torch's, wants an amount for every axis
        for name in ("padding", "dilation"):
            value = arguments.get(name)
            if isinstance(value, (tuple, list)) and len(value) == 1 and isinstance(value[0], int):
                arguments[name] = tuple(value) * case.rank
    kernel = [case.kernel_size, *([case.kernel_size[0]] if len(set(case.kernel_size)) == 1 else [])]
    module = constructor(case.input[1], case.out_channels, data.draw(st.sampled_from(kernel)), **arguments)
    assert module.weight.shape == variables["w"].shape
    module.weight = torch.nn.Parameter(variables["w"])
    if case.bias:
        module.bias = torch.nn.Parameter(variables["b"])
    x = variables["x"].detach().requires_grad_()
    y = module(x)
    assert torch.equal(y, variables["y"])
    if call.wanted:
        assert torch.equal(torch.autograd.grad(y, x, variables["gy"])[0], variables["grads"][0])


# ------------------------------------------------------------------------------------ operators, told any size


@st.composite
def problems(draw) -> Problem:
    """Any legal problem: the told size need not be what the input's implies."""
    call = draw(calls(dtypes=[torch.float32], batches=(1, 3), unbatched=False, gradients=False))
    problem = call.case.problem
    more = 0 if problem.padding_mode else 3  # the index maps of padding modes end where the declared padding does
    told = tuple(draw(st.integers(1, size + more)) for size in problem.output_size)
    return problem._replace(output_size=told)


@given(problems(), st.sampled_from(DIRECTIONS), st.sampled_from(FLOATS), st.sampled_from(LAYOUTS[:2]))
def test_every_row_agrees(problem, direction, dtype, layout):
    """Every row on every ISA gives the same small integers, for any told size."""
    shapes = {
        "x": problem.input_size,
        "w": problem.weight_size,
        "y": (problem.input_size[0], problem.weight_size[0], *problem.output_size),
    }
    setup = ["import torch, myconv", f"torch.manual_seed({SEED})"]
    setup += [f"{name} = {tensor_source(shape, dtype, layout)}" for name, shape in shapes.items()]
    operands, told = {
        "forward": ("x, w, None", problem.output_size),
        "backward_input": ("y, w, None", problem.input_size[2:]),
        "backward_weight": ("y, x", problem.weight_size[2:]),
    }[direction]
    arguments = ", ".join([operands, *map(str, (told, *problem.parameters))])
    variables: dict[str, torch.Tensor] = {}
    exec("; ".join(setup), variables)
    x, w, y = (variables[name] for name in "xwy")
    expected = reference_operator(direction, x, w, None, y, problem)
    for row, isa in kernels(direction, problem, (x, w, y), layout):
        switches = [
            f"isa = myconv.flags.isa({isa!r}); isa.__enter__()",
            f"row = myconv.flags.algorithm({direction!r}, {row!r}); row.__enter__()",
        ]
        note(command("; ".join([*setup, *switches, f"print(torch.ops.myconv.conv_{direction}({arguments}))"])))
        with forced(direction, row, isa):
            actual = run_operator(direction, x, w, None, y, problem)
        if row in ROUNDS_INTEGERS:
            assert_accurate(actual, expected)
        else:
            assert torch.equal(actual.double(), expected), row


# ------------------------------------------------------------------------------------------------ any call
#
# Most are illegal. Arguments are text, since a value such as torch.tensor(2) does not print as what makes it.

LEGAL_NUMBERS = ("1", "2", "3")
NUMBERS = (*LEGAL_NUMBERS, "0", "8", "-1", "-3", "True", "torch.tensor(2)")
# 2**48: with a size below that and above a million, a result might be allocated after all.
HUGE = ("2**48", "2**61", "2**62", "2**63 - 1", "2**63", "2**64", "-2**48", "-2**62", "-2**63")
NO_NUMBERS = ("1.0", "2.5", "None", "'2'", "float('nan')", "torch.tensor(2.0)", "torch.tensor([1, 2])", "{}")
NO_TENSORS = ("None", "1", "[1.0]", "'x'")
STRINGS = ("'same'", "'valid'", "'causal'", "'full'", "''")
MODES = ("'zeros'", "'reflect'", "'replicate'", "'circular'", "'constant'", "None", "1")

number = st.sampled_from(NUMBERS) | st.sampled_from((*NUMBERS, *HUGE, *NO_NUMBERS))


def sequence(entry: st.SearchStrategy) -> st.SearchStrategy:
    brackets = st.sampled_from(["({},)", "[{}]"])
    several = st.lists(entry, min_size=1, max_size=4).map(", ".join)
    return st.builds(str.format, brackets, several) | st.sampled_from(["()", "[]"])


parameter = number | sequence(st.sampled_from(LEGAL_NUMBERS)) | sequence(number)
padding = parameter | st.sampled_from(STRINGS) | sequence(number | sequence(number))
PARAMETERS = {
    "stride": parameter,
    "padding": padding,
    "dilation": parameter,
    "groups": number | sequence(number),
    "output_padding": parameter,
    "padding_mode": st.sampled_from(MODES),
    "bogus": number,
}


@st.composite
def any_tensor(draw, shape: tuple[int, ...]) -> str:
    kind = draw(st.sampled_from(("shape", "shape", "shape", "dtype", "device", "type")))
    if kind == "type":
        return draw(st.sampled_from(NO_TENSORS))
    if kind == "dtype":
        return f"torch.ones({shape}).to({draw(st.sampled_from(list(illegal.DTYPES.values())))})"
    if kind == "device":
        return f"torch.ones({shape}, device='meta')"
    if draw(st.booleans()):
        shape = shape[: draw(st.integers(0, len(shape)))] + tuple(draw(st.lists(st.integers(1, 3), max_size=2)))
    if shape:
        axis = draw(st.integers(0, len(shape) - 1))
        shape = (*shape[:axis], draw(st.integers(0, 9)), *shape[axis + 1 :])
    return f"torch.ones({shape})"


@st.composite
def any_calls(draw) -> str:
    """A legal call after changes to up to three of its arguments."""
    op = draw(st.sampled_from(CONV + TRANSPOSED))
    rank, groups = int(op[-2]), draw(st.integers(1, 2))
    kind = draw(st.sampled_from((torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.int64)))
    batch = draw(st.sampled_from((2, 1, 0)))
    shapes = {"input": (batch, 4, *(8,) * rank), "weight": (6, 4 // groups, *(3,) * rank), "bias": (6,)}
    if op in TRANSPOSED:
        shapes["weight"] = (4, 6 // groups, *(3,) * rank)
    parameters = [name for name in PARAMETERS if name != "output_padding" or op in TRANSPOSED]
    changed = draw(st.lists(st.sampled_from([*shapes, *parameters]), max_size=3, unique=True))
    arguments = [draw(any_tensor(s)) if n in changed else f"torch.ones({s}).to({kind})" for n, s in shapes.items()]
    arguments = [source.replace(".to(torch.float32)", "") for source in arguments]
    arguments += [f"{name}={draw(PARAMETERS[name])}" for name in parameters if name in changed]
    arguments += [f"groups={groups}"] * ("groups" not in changed and groups > 1)
    return f"F.{op}({', '.join(arguments)})"


def as_tuple(value: object) -> tuple:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


class Given:
    """The arguments of a call, by name; `case` is their meaning, if they have one."""

    def __init__(self, source: str):
        self.source, self.op = source, source[2 : source.index("(")]
        self.rank, self.transposed = int(self.op[-2]), self.op in TRANSPOSED
        names = ("input", "weight", "bias")
        collect = types.SimpleNamespace(**{self.op: lambda *tensors, **rest: {**dict(zip(names, tensors)), **rest}})
        self.arguments: dict[str, object] = eval(source, {"torch": torch, "F": collect})
        self.tensors = [value for name in names if isinstance(value := self.arguments[name], torch.Tensor)]
        self.two_dtypes = len({t.dtype for t in self.tensors}) > 1
        try:
            self.case = self._case()
            batch, channels, *extents = self.case.output_shape
            if not self.transposed and not self.case.input[1]:
                channels = 0  # docs/limits.md, "Zero channels"
            self.shape = (batch, channels, *extents)[self.tensors[0].dim() == self.rank + 1 :]
        except (TypeError, ValueError, IndexError, AttributeError, ArithmeticError):
            self.case = self.shape = None

    def _axes(self, name: str, default: int) -> tuple:
        entries = as_tuple(self.arguments.get(name, default))
        values = tuple(tuple(entry) if isinstance(entry, (tuple, list)) else int(entry) for entry in entries)
        return values * self.rank if len(values) == 1 else values

    def _case(self) -> Case:
        x, w = self.tensors[:2]
        groups = int(self.arguments.get("groups", 1))
        padding = self.arguments.get("padding", 0)
        return Case(
            "any",
            self.op,
            (*(1,) * (self.rank + 2 - x.dim()), *x.shape),
            w.shape[1] * groups if self.transposed else w.shape[0],
            tuple(w.shape[2:]),
            self._axes("stride", 1),
            padding if isinstance(padding, str) else self._axes("padding", 0),
            self._axes("dilation", 1),
            groups,
            output_padding=self._axes("output_padding", 0),
        )


# Calls that torch cannot be asked about: numbers that crash it, and what it does not have (docs/padding.md). Of other
# releases than 2.13 some refuse with other types, and 2.11 aborts on one call.
NOT_FOR_TORCH = {
    "another torch": lambda g: not (2, 13) <= torch.__version__ < (2, 14),
    "huge numbers": lambda g: "2**" in g.source,
    "padding_mode": lambda g: "padding_mode" in g.arguments,
    "causal": lambda g: g.arguments.get("padding") == "causal" and g.op == "conv1d",
    "pairs": lambda g: any(isinstance(entry, (tuple, list)) for entry in as_tuple(g.arguments.get("padding"))),
}
# Calls that torch runs and myconv refuses: docs/limits.md and docs/errors.md.
STRICTER = {
    "two devices": lambda g: len({t.device for t in g.tensors}) > 1,
    "an empty batch": lambda g: (
        g.case and g.case.input[0] == 0 and (g.two_dtypes or g.transposed or 0 in g.case.dilation)
    ),
    "two dtypes": lambda g: g.transposed and g.two_dtypes,
    "no output": lambda g: g.transposed and g.shape and 0 in g.shape[-g.rank :],
    "dilation 0": lambda g: g.transposed and g.case and 0 in g.case.dilation,
}
# Refused by both, for another reason: of two mistakes, or where torch fails inside.
OTHER_TYPE = {
    "on meta": lambda g: any(t.is_meta for t in g.tensors),
    "two dtypes, one of them unsupported": lambda g: g.two_dtypes,
    "an empty batch and an empty kernel": lambda g: g.case and g.case.input[0] == 0 and 0 in g.case.weight_shape,
}


def outcome(source: str, functions) -> type | tuple:
    """The exception's type, or the shape and dtype of the result."""
    try:
        result = eval(source, {"torch": torch, "F": functions})
    except Exception as exception:
        return type(exception)
    return tuple(result.shape), result.dtype


@settings(max_examples=10 * settings.default.max_examples)
@given(any_calls())
@example("F.conv_transpose2d(torch.ones((2, 4, 8, 8)), torch.ones((4, 6, 3, 3)), torch.ones((6,)), stride=[True, 1])")
@example("F.conv2d(torch.ones((2, 4, 8, 8)), torch.ones((6, 4, 3, 3)), torch.ones((6,)), stride=[1, True])")
@example("F.conv2d(torch.ones((2, 4, 8, 8)), torch.ones((6, 4, 3, 3)).to_sparse(), torch.ones((6,)), groups=True)")
@example("F.conv1d(torch.ones((2, 0, 8)), torch.ones((6, 0, 3)), torch.ones((6,)))")
def test_any_call(source):
    """A result of the right shape, or torch's exception type."""
    note(command(f"import torch, myconv.functional as F; print({source})"))
    given = Given(source)
    assume(given.shape is None or not 2e5 < math.prod(given.shape) < 2**47)
    ours = outcome(source, myconv.functional)
    if isinstance(ours, type):
        assert ours in (RuntimeError, ValueError, TypeError, NotImplementedError)
    else:
        assert ours[0] == given.shape
    if any(holds(given) for holds in NOT_FOR_TORCH.values()):
        return
    torchs = outcome(source, F)
    if ours != torchs:
        assert isinstance(ours, type), f"torch: {torchs}, myconv: {ours}"
        known = OTHER_TYPE if isinstance(torchs, type) else STRICTER
        assert any(holds(given) for holds in known.values()), f"torch: {torchs}, myconv: {ours}"
