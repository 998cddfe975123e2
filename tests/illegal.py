"""Calls that must be refused, as data. Imports torch and numpy only.

CALLS       torch refuses them; myconv refuses them with the same exception type, and with torch's words where those are
            clear.
TORCH_UNSAFE  torch crashes, answers nonsense, or returns memory it never wrote; myconv refuses them.
ACCEPTED    calls that torch refuses and myconv runs, most of them kinds of padding. docs/padding.md lists the same calls.
EXTENSIONS  illegal calls with what myconv.functional has and torch.nn.functional has not.
OPERATORS   torch.ops.myconv.* called directly. Each row changes one argument of a legal call, see LEGAL.

A call is an expression over `vocabulary(library)`, so a failing row prints what to type. `#` in a call and its words
stands for 1, 2 and 3: such a row is three rows. A word is text that the message must contain, or a compiled pattern.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

FUNCTIONS = [f"{name}{rank}d" for name in ("conv", "conv_transpose") for rank in (1, 2, 3)]
CLASSES = [f"{name}{rank}d" for name in ("Conv", "ConvTranspose") for rank in (1, 2, 3)]
DTYPES = {
    "f64": torch.float64,
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f8": torch.float8_e4m3fn,
    "i64": torch.int64,
    "i32": torch.int32,
    "i16": torch.int16,
    "i8": torch.int8,
    "u8": torch.uint8,
    "u16": torch.uint16,
    "bool_": torch.bool,
    "c64": torch.complex64,
}
# How a message may name a dtype: torch's enum, C++ or tensor-type name, or torch.dtype's.
NAMED = {
    "f64": re.compile("double|float64", re.I),
    "f32": re.compile(r"\bfloat\b|FloatTensor|float32", re.I),
    "f16": re.compile("half|float16", re.I),
    "bf16": re.compile("bfloat16", re.I),
    "i64": re.compile("long|int64", re.I),
    "i32": re.compile(r"\bint\b|IntTensor|int32", re.I),
    "u8": re.compile("byte|unsigned char|uint8", re.I),
    "c64": re.compile(r"complex(<float>|float|64)", re.I),
}


Words = str | re.Pattern | tuple[str | re.Pattern, ...]  # one, or several in any order


class Row(NamedTuple):
    id: str
    call: str
    error: type[Exception] | tuple[type[Exception], ...]
    words: Words = ()  # in the message of both
    ours: Words = ()  # in the message of myconv


class Unsafe(NamedTuple):
    id: str
    call: str
    error: type[Exception]
    ours: Words
    torch_does: str


class Accepted(NamedTuple):
    id: str
    call: str
    error: type[Exception]  # of torch


class Operator(NamedTuple):
    id: str
    op: str
    change: dict[str, Any]
    ours: Words


def t(*size: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    """Ones: no illegal call depends on values."""
    return torch.ones(size, device=device).to(dtype)


def with_(module: torch.nn.Module, **tensors: torch.Tensor) -> torch.nn.Module:
    """`module` with parameters replaced by hand."""
    for name, value in tensors.items():
        setattr(module, name, torch.nn.Parameter(value, requires_grad=value.is_floating_point()))
    return module


def set_(module: torch.nn.Module, **attributes: object) -> torch.nn.Module:
    """`module` with attributes assigned after its construction."""
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def vocabulary(library: Mapping[str, Any]) -> dict[str, Any]:
    """The names a call may use; `library` gives conv1d .. ConvTranspose3d. x#, w#, v# are the input, the weight and the
    weight of the transposed convolution of a legal call of that rank: 4 channels, 6 for w# and v# to produce, kernel 3.
    """
    names = {name: library[name] for name in FUNCTIONS + CLASSES}
    for rank in (1, 2, 3):
        names[f"x{rank}"] = t(2, 4, *(8,) * rank)
        names[f"w{rank}"] = t(6, 4, *(3,) * rank)
        names[f"v{rank}"] = t(4, 6, *(3,) * rank)
    return {**names, **DTYPES, "t": t, "with_": with_, "set_": set_, "torch": torch, "np": np}


def each_rank(rows: list) -> list:
    """Writes out the rows that contain `#`, and puts the function's name before each id."""

    def fill(value: Any, rank: str) -> Any:
        if isinstance(value, str):
            return value.replace("#", rank)
        return tuple(fill(item, rank) for item in value) if isinstance(value, tuple) else value

    written = []
    for row in rows:
        for rank in "123" if "#" in row.call else "0":
            filled = type(row)(*(fill(field, rank) for field in row))
            function = re.search(r"\b[cC]onv\w+", filled.call).group()
            written.append(filled._replace(id=f"{function}-{filled.id}"))
    return written


# ---- torch's words


def input_of(function: str, size: str) -> str:
    rank = int(function[-2])
    return f"Expected {rank + 1}D (unbatched) or {rank + 2}D (batched) input to {function}, but got input of size: {size}"


def numbers(name: str, count: str, got: str) -> str:
    return (
        f"expected {name} to be a single integer value or a list of {count} values to match the convolution dimensions, "
        f"but got {name}={got}"
    )


def bias_of(size: str) -> str:
    return f"expected bias to be 1-dimensional with 6 elements, but got bias of size {size} instead"


def channels(expected: int, got: int) -> str:
    return f"to have {expected} channels, but got {got} channels instead"


def must_be(argument: str, got: str, legal: str) -> re.Pattern:
    return re.compile(rf"\(\): argument '{argument}'( \(position \d\))? must be (int or )?{legal}, not {got}")


STRIDE = "non-positive stride is not supported"
PADDING = "negative padding is not supported"
GROUPS = "non-positive groups is not supported"
OUTPUT_PADDING = "output padding must be smaller than either stride or dilation"
REFLECT = "Padding size should be less than the corresponding input dimension"
CIRCULAR = "Padding value causes wrapping around more than once"
SAME = "padding='same' is not supported for strided convolutions"
EMPTY = "Only zero batch or zero channel inputs are supported, but got input shape: [2, 4, "
WEIGHT = "weight should have at least three dimensions"
KERNEL = "Kernel size can't be greater than actual input size"
DILATION = re.compile("non-positive dilation|dilation should be greater than zero")
KERNEL_SIZE = re.compile("kernel.size", re.I)
TOO_BIG = re.compile("overflow|too large|too big|64 bits|Kernel size can't be greater", re.I)
INT = re.compile(r"\bints?\b")
INPUT = re.compile("input", re.I)
SPARSE = re.compile("sparse", re.I)

# One call a line, as in a table.
# fmt: off

# ---- number of dimensions

DIMENSIONS = [
    Row("input-0d", "conv1d(t(), w1)", RuntimeError, input_of("conv1d", "[]")),
    Row("input-1d", "conv1d(t(4), w1)", RuntimeError, input_of("conv1d", "[4]")),
    Row("input-4d", "conv1d(x2, w1)", RuntimeError, input_of("conv1d", "[2, 4, 8, 8]")),
    Row("input-0d", "conv2d(t(), w2)", RuntimeError, input_of("conv2d", "[]")),
    Row("input-1d", "conv2d(t(8), w2)", RuntimeError, input_of("conv2d", "[8]")),
    Row("input-2d", "conv2d(t(8, 8), w2)", RuntimeError, input_of("conv2d", "[8, 8]")),
    Row("input-5d", "conv2d(x3, w2)", RuntimeError, input_of("conv2d", "[2, 4, 8, 8, 8]")),
    Row("input-3d", "conv3d(x1, w3)", RuntimeError, input_of("conv3d", "[2, 4, 8]")),
    Row("input-6d", "conv3d(t(2, 4, 8, 8, 8, 8), w3)", RuntimeError, input_of("conv3d", "[2, 4, 8, 8, 8, 8]")),
    Row("input-0d", "conv_transpose1d(t(), v1)", RuntimeError, input_of("conv_transpose1d", "[]")),
    Row("input-4d", "conv_transpose1d(x2, v1)", RuntimeError, input_of("conv_transpose1d", "[2, 4, 8, 8]")),
    Row("input-2d", "conv_transpose2d(t(8, 8), v2)", RuntimeError, input_of("conv_transpose2d", "[8, 8]")),
    Row("input-5d", "conv_transpose2d(x3, v2)", RuntimeError, input_of("conv_transpose2d", "[2, 4, 8, 8, 8]")),
    Row("input-3d", "conv_transpose3d(x1, v3)", RuntimeError, input_of("conv_transpose3d", "[2, 4, 8]")),
    Row("input-6d", "conv_transpose3d(t(2, 4, 8, 8, 8, 8), v3)", RuntimeError, input_of("conv_transpose3d", "[2, 4, 8, 8, 8, 8]")),
    Row("weight-0d", "conv#d(x#, t())", RuntimeError, WEIGHT),
    Row("weight-1d", "conv#d(x#, t(6))", RuntimeError, WEIGHT),
    Row("weight-2d", "conv#d(x#, t(6, 4))", RuntimeError, WEIGHT),
    Row("weight-2d", "conv_transpose#d(x#, t(4, 6))", RuntimeError, WEIGHT),
    Row("weight-4d", "conv1d(x1, w2)", RuntimeError, "Expected 4-dimensional input for 4-dimensional weight [6, 4, 3, 3], but got 3-dimensional input of size [2, 4, 8] instead"),
    Row("weight-4d", "conv_transpose1d(x1, v2)", RuntimeError, "Expected 4-dimensional input for 4-dimensional weight [4, 6, 3, 3], but got 3-dimensional input of size [2, 4, 8] instead"),
    # torch blames the default stride here.
    Row("weight-3d", "conv2d(x2, w1)", RuntimeError, (), ("weight", "[6, 4, 3]", "[2, 4, 8, 8]")),
    Row("weight-3d-input-3d", "conv2d(x1, w1)", RuntimeError, (), ("weight", "[6, 4, 3]")),
    Row("weight-5d", "conv2d(x2, w3)", RuntimeError, (), ("weight", "[6, 4, 3, 3, 3]", "[2, 4, 8, 8]")),
    Row("weight-4d", "conv3d(x3, w2)", RuntimeError, (), ("weight", "[6, 4, 3, 3]", "[2, 4, 8, 8, 8]")),
    Row("weight-6d", "conv3d(x3, t(6, 4, 3, 3, 3, 3))", RuntimeError, (), ("weight", "[6, 4, 3, 3, 3, 3]")),
    Row("weight-3d", "conv_transpose2d(x2, v1)", RuntimeError, (), ("weight", "[4, 6, 3]", "[2, 4, 8, 8]")),
    Row("weight-5d", "conv_transpose2d(x2, v3)", RuntimeError, (), ("weight", "[4, 6, 3, 3, 3]")),
    Row("weight-4d", "conv_transpose3d(x3, v2)", RuntimeError, (), ("weight", "[4, 6, 3, 3]")),
    Row("bias-0d", "conv#d(x#, w#, t())", RuntimeError, bias_of("[]")),
    Row("bias-too-long", "conv2d(x2, w2, t(7))", RuntimeError, bias_of("[7]")),
    Row("bias-too-short", "conv#d(x#, w#, t(5))", RuntimeError, bias_of("[5]")),
    Row("bias-one", "conv2d(x2, w2, t(1))", RuntimeError, bias_of("[1]")),
    Row("bias-empty", "conv2d(x2, w2, t(0))", RuntimeError, bias_of("[0]")),
    Row("bias-2d", "conv#d(x#, w#, t(6, 1))", RuntimeError, bias_of("[6, 1]")),
    Row("bias-4d", "conv2d(x2, w2, t(1, 6, 1, 1))", RuntimeError, bias_of("[1, 6, 1, 1]")),
    Row("bias-unbatched", "conv2d(x2[0], w2, t(5))", RuntimeError, bias_of("[5]")),
    Row("bias-empty-batch", "conv2d(x2[:0], w2, t(5))", RuntimeError, bias_of("[5]")),
    Row("bias-too-short", "conv_transpose#d(x#, v#, t(5))", RuntimeError, ("Given transposed=1, weight of size", bias_of("[5]"))),
    Row("bias-of-input", "conv_transpose2d(x2, v2, t(4))", RuntimeError, bias_of("[4]")),
    Row("bias-per-group", "conv_transpose2d(x2, t(4, 3, 3, 3), t(3), groups=2)", RuntimeError, bias_of("[3]")),
]

# ---- channels and groups

CHANNELS = [
    Row("channels", "conv1d(t(2, 3, 8), w1)", RuntimeError, "Given groups=1, weight of size [6, 4, 3], expected input[2, 3, 8] to have 4 channels, but got 3 channels instead"),
    Row("channels", "conv2d(t(2, 3, 8, 8), w2)", RuntimeError, "Given groups=1, weight of size [6, 4, 3, 3], expected input[2, 3, 8, 8] to have 4 channels, but got 3 channels instead"),
    Row("channels", "conv3d(t(2, 3, 8, 8, 8), w3)", RuntimeError, "Given groups=1, weight of size [6, 4, 3, 3, 3], expected input[2, 3, 8, 8, 8] to have 4 channels, but got 3 channels instead"),
    Row("channels-last", "conv2d(t(2, 8, 8, 4), w2)", RuntimeError, channels(4, 8)),
    Row("channels-unbatched", "conv2d(t(3, 8, 8), w2)", RuntimeError, channels(4, 3)),
    Row("channels-empty-batch", "conv2d(t(0, 3, 8, 8), w2)", RuntimeError, "expected input[0, 3, 8, 8] to have 4 channels, but got 3 channels instead"),
    Row("channels-of-groups", "conv2d(x2, w2, groups=2)", RuntimeError, "Given groups=2, weight of size [6, 4, 3, 3], expected input[2, 4, 8, 8] to have 8 channels, but got 4 channels instead"),
    Row("channels-do-not-divide", "conv#d(x#, w#[:, :1], groups=3)", RuntimeError, ("Given groups=3", channels(3, 4))),
    Row("no-channels-in-input", "conv2d(t(2, 0, 8, 8), w2)", RuntimeError, channels(4, 0)),
    Row("no-channels-in-weight", "conv2d(x2, t(6, 0, 3, 3))", RuntimeError, channels(0, 4)),
    Row("out-channels-divide", "conv2d(x2, t(5, 2, 3, 3), groups=2)", RuntimeError, ("Given groups=2, expected weight to be divisible by 2 at dimension 0, but got weight of size", "[5, 2, 3, 3]")),
    Row("out-channels-divide", "conv1d(x1, t(5, 2, 3), groups=2)", RuntimeError, "expected weight to be divisible by 2 at dimension 0"),
    Row("out-channels-divide", "conv3d(x3, t(5, 2, 3, 3, 3), groups=2)", RuntimeError, "expected weight to be divisible by 2 at dimension 0"),
    Row("out-channels-few", "conv2d(x2, t(1, 2, 3, 3), groups=2)", RuntimeError, "Given groups=2, expected weight to be at least 2 at dimension 0, but got weight of size [1, 2, 3, 3] instead"),
    Row("out-channels-0", "conv#d(x#, w#[:0])", RuntimeError, "Given groups=1, expected weight to be at least 1 at dimension 0, but got weight of size [0, 4, 3"),
    Row("out-channels-0-groups", "conv2d(x2, t(0, 2, 3, 3), groups=2)", RuntimeError, "expected weight to be at least 2 at dimension 0, but got weight of size [0, 2, 3, 3] instead"),
    Row("no-channels-at-all", "conv2d(t(2, 0, 8, 8), t(0, 0, 3, 3))", RuntimeError, "expected weight to be at least 1 at dimension 0, but got weight of size [0, 0, 3, 3] instead"),
    Row("groups-0", "conv#d(x#, w#, groups=0)", RuntimeError, GROUPS),
    Row("groups-negative", "conv#d(x#, w#, groups=-1)", RuntimeError, GROUPS),
    Row("groups-huge", "conv2d(x2, w2, groups=2**62)", RuntimeError, "Given groups=4611686018427387904, expected weight to be at least 4611686018427387904 at dimension 0"),
    Row("groups-int64-max", "conv2d(x2, w2, groups=2**63 - 1)", RuntimeError, "Given groups=9223372036854775807"),
    Row("groups-int64-min", "conv2d(x2, w2, groups=-2**63)", RuntimeError, GROUPS),
    Row("channels", "conv_transpose1d(t(2, 3, 8), v1)", RuntimeError, "Given transposed=1, weight of size [4, 6, 3], expected input[2, 3, 8] to have 4 channels, but got 3 channels instead"),
    Row("channels", "conv_transpose2d(t(2, 3, 8, 8), v2)", RuntimeError, "Given transposed=1, weight of size [4, 6, 3, 3], expected input[2, 3, 8, 8] to have 4 channels, but got 3 channels instead"),
    Row("channels", "conv_transpose3d(t(2, 3, 8, 8, 8), v3)", RuntimeError, "Given transposed=1, weight of size [4, 6, 3, 3, 3], expected input[2, 3, 8, 8, 8] to have 4 channels, but got 3 channels instead"),
    Row("channels-unbatched", "conv_transpose2d(t(3, 8, 8), v2)", RuntimeError, channels(4, 3)),
    Row("channels-of-conv-weight", "conv_transpose2d(x2, w2)", RuntimeError, channels(6, 4)),
    Row("groups-divide", "conv_transpose#d(x#, v#, groups=3)", RuntimeError, "Given groups=3, expected weight to be divisible by 3 at dimension 0"),
    Row("groups-many", "conv_transpose2d(x2, v2, groups=8)", RuntimeError, "Given groups=8, expected weight to be at least 8 at dimension 0, but got weight of size [4, 6, 3, 3] instead"),
    Row("groups-0", "conv_transpose#d(x#, v#, groups=0)", RuntimeError, GROUPS),
    Row("groups-negative", "conv_transpose2d(x2, v2, groups=-2)", RuntimeError, GROUPS),
    Row("no-channels", "conv_transpose#d(x#[:, :0], v#[:0])", RuntimeError, "Given groups=1, expected weight to be at least 1 at dimension 0"),
    # torch: a oneDNN primitive descriptor (float32), a weight "non-empty 2D or 4D" (float64).
    Row("out-channels-0", "conv_transpose#d(x#, v#[:, :0])", RuntimeError, (), ("weight", "[4, 0, 3")),
    Row("out-channels-0-f64", "conv_transpose2d(x2.double(), v2[:, :0].double())", RuntimeError, ("weight", "[4, 0, 3, 3]")),
]

# ---- sizes

SIZES = [
    Row("kernel-larger", "conv1d(t(2, 4, 2), w1)", RuntimeError, "Calculated padded input size per channel: (2). Kernel size: (3). Kernel size can't be greater than actual input size"),
    Row("kernel-larger", "conv2d(t(2, 4, 2, 2), w2)", RuntimeError, "Calculated padded input size per channel: (2 x 2). Kernel size: (3 x 3). Kernel size can't be greater than actual input size"),
    Row("kernel-larger", "conv3d(t(2, 4, 2, 8, 8), w3)", RuntimeError, "Calculated padded input size per channel: (2 x 8 x 8). Kernel size: (3 x 3 x 3). Kernel size can't be greater than actual input size"),
    Row("kernel-higher", "conv2d(t(2, 4, 2, 8), w2)", RuntimeError, "(2 x 8). Kernel size: (3 x 3)"),
    Row("kernel-wider", "conv2d(t(2, 4, 8, 2), w2)", RuntimeError, "(8 x 2). Kernel size: (3 x 3)"),
    Row("kernel-deeper", "conv3d(t(2, 4, 8, 8, 2), w3)", RuntimeError, "(8 x 8 x 2). Kernel size: (3 x 3 x 3)"),
    Row("kernel-larger-unbatched", "conv2d(t(4, 2, 2), w2)", RuntimeError, "(2 x 2). Kernel size: (3 x 3)"),
    Row("kernel-larger-empty-batch", "conv2d(t(0, 4, 2, 2), w2)", RuntimeError, "(2 x 2). Kernel size: (3 x 3)"),
    Row("kernel-larger-padded", "conv2d(t(2, 4, 2, 2), t(6, 4, 5, 5), padding=1)", RuntimeError, "(4 x 4). Kernel size: (5 x 5)"),
    Row("kernel-larger-valid", "conv2d(t(2, 4, 2, 2), w2, padding='valid')", RuntimeError, "(2 x 2). Kernel size: (3 x 3)"),
    Row("kernel-larger-f64", "conv2d(t(2, 4, 2, 2, dtype=f64), w2.double())", RuntimeError, "(2 x 2). Kernel size: (3 x 3)"),
    Row("kernel-larger-grad", "conv2d(x2.requires_grad_(), t(6, 4, 9, 9))", RuntimeError, "(8 x 8). Kernel size: (9 x 9)"),
    Row("kernel-larger-meta", "conv2d(t(2, 4, 8, 8, device='meta'), t(6, 4, 9, 3, device='meta'))", RuntimeError, "(8 x 8). Kernel size: (9 x 3)"),
    Row("kernel-dilated", "conv2d(x2, w2, dilation=4)", RuntimeError, "(8 x 8). Kernel size: (9 x 9)"),
    Row("kernel-dilated-mixed", "conv2d(x2, w2, padding=(0, 1), dilation=(4, 5))", RuntimeError, "(8 x 10). Kernel size: (9 x 11)"),
    Row("kernel-dilated-2**31", "conv2d(x2, w2, dilation=2**31)", RuntimeError, "(8 x 8). Kernel size: (4294967297 x 4294967297)"),
    Row("kernel-dilated-2**61", "conv1d(x1, w1, dilation=2**61)", RuntimeError, "(8). Kernel size: (4611686018427387905)"),
    Row("empty-space", "conv1d(t(2, 4, 0), w1)", RuntimeError, "(0). Kernel size: (3)"),
    Row("empty-space", "conv2d(t(2, 4, 0, 8), w2)", RuntimeError, "(0 x 8). Kernel size: (3 x 3)"),
    Row("empty-space-kernel-1", "conv2d(t(2, 4, 0, 8), t(6, 4, 1, 3))", RuntimeError, "(0 x 8). Kernel size: (1 x 3)"),
    Row("empty-space-some-padding", "conv2d(t(2, 4, 0, 8), w2, padding=1)", RuntimeError, "(2 x 10). Kernel size: (3 x 3)"),
    Row("empty-space-same", "conv2d(t(2, 4, 0, 8), w2, padding='same')", RuntimeError, "(2 x 10). Kernel size: (3 x 3)"),
    Row("empty-space-empty-batch", "conv2d(t(0, 4, 0, 8), t(6, 4, 1, 3))", RuntimeError, "(0 x 8). Kernel size: (1 x 3)"),
    Row("empty-space-padded", "conv#d(x#[..., :0], w#, padding=2)", RuntimeError, EMPTY),
    Row("empty-space", "conv_transpose#d(x#[..., :0], v#)", RuntimeError, EMPTY),
    Row("empty-space-output-padding", "conv_transpose2d(t(2, 4, 0, 8), v2, stride=2, output_padding=1)", RuntimeError, "Only zero batch or zero channel inputs are supported, but got input shape: [2, 4, 0, 8]"),
    # torch: a oneDNN primitive descriptor, or select() out of range when the batch is empty.
    Row("kernel-0", "conv#d(x#, w#[..., :0])", RuntimeError, (), (KERNEL_SIZE, "0")),
    Row("kernel-0-high", "conv2d(x2, t(6, 4, 0, 3))", RuntimeError, (), (KERNEL_SIZE, re.compile("0 x 3|0, 3|height: 0"))),
    Row("kernel-0-f64", "conv2d(x2.double(), t(6, 4, 0, 3, dtype=f64))", RuntimeError, (KERNEL_SIZE, "greater than zero")),
    Row("kernel-0-same", "conv2d(x2, t(6, 4, 0, 3), padding='same')", RuntimeError, (), KERNEL_SIZE),
    Row("kernel-0", "conv_transpose#d(x#, v#[..., :0])", RuntimeError, (), (KERNEL_SIZE, "0")),
    Row("kernel-0-f64", "conv_transpose2d(x2.double(), t(4, 6, 0, 3, dtype=f64))", RuntimeError, (), (re.compile("kernel.size|weight", re.I), "0")),
    # torch has these words for float64; in float32 oneDNN "could not construct a memory descriptor".
    Row("output-negative", "conv_transpose#d(x#, v#, padding=6)", RuntimeError, (), ("output size", "too small", "-2")),
    Row("output-negative-f64", "conv_transpose2d(x2.double(), v2.double(), padding=6)", RuntimeError, "Given input size per channel: (8 x 8). Calculated output size per channel: (-2 x -2). Output size is too small"),
    Row("output-0-f64", "conv_transpose2d(x2.double(), v2.double(), padding=5)", RuntimeError, "Given input size per channel: (8 x 8). Calculated output size per channel: (0 x 0). Output size is too small"),
    Row("output-negative-f64", "conv_transpose3d(x3.double(), v3.double(), padding=6)", RuntimeError, "Calculated output size per channel: (-2 x -2 x -2). Output size is too small"),
    Row("output-negative-f64", "conv_transpose1d(x1.double(), v1.double(), padding=6)", RuntimeError, "-2). Output size is too small"),
    Row("output-negative-kernel-1", "conv_transpose1d(t(2, 4, 1).double(), t(4, 6, 1).double(), padding=1)", RuntimeError, "-1). Output size is too small"),
    Row("output-negative-one-axis", "conv_transpose2d(t(4, 1, 8), t(4, 6, 1, 1), padding=3)", RuntimeError, "Calculated output size per channel: (-5 x 2). Output size is too small"),
    Row("output-negative-empty-batch", "conv_transpose2d(x2[:0], v2, padding=6)", RuntimeError, "-2"),
]

# ---- stride, padding, dilation, output_padding: values, list lengths

PARAMETERS = [
    Row("stride-0", "conv#d(x#, w#, stride=0)", RuntimeError, STRIDE),
    Row("stride-negative", "conv#d(x#, w#, stride=-1)", RuntimeError, STRIDE),
    Row("stride-second-0", "conv2d(x2, w2, stride=(1, 0))", RuntimeError, STRIDE),
    Row("stride-0-empty-batch", "conv2d(x2[:0], w2, stride=0)", RuntimeError, STRIDE),
    Row("stride-0-valid", "conv2d(x2, w2, stride=0, padding='valid')", RuntimeError, STRIDE),
    Row("padding-negative", "conv#d(x#, w#, padding=-1)", RuntimeError, PADDING),
    Row("padding-second-negative", "conv2d(x2, w2, padding=(0, -1))", RuntimeError, PADDING),
    Row("dilation-0", "conv#d(x#, w#, dilation=0)", RuntimeError, (DILATION)),
    Row("dilation-negative", "conv#d(x#, w#, dilation=-1)", RuntimeError, (DILATION)),
    Row("dilation-second-0", "conv2d(x2, w2, dilation=(1, 0))", RuntimeError, (DILATION)),
    Row("dilation-0-kernel-1", "conv2d(x2, t(6, 4, 1, 1), dilation=0)", RuntimeError, "dilation"),
    Row("dilation-0-f64", "conv2d(x2.double(), w2.double(), dilation=0)", RuntimeError, "dilation"),
    Row("stride-0", "conv_transpose#d(x#, v#, stride=0)", RuntimeError, STRIDE),
    Row("stride-negative", "conv_transpose#d(x#, v#, stride=-1)", RuntimeError, STRIDE),
    Row("padding-negative", "conv_transpose#d(x#, v#, padding=-1)", RuntimeError, PADDING),
    Row("dilation-negative", "conv_transpose#d(x#, v#, dilation=-1)", RuntimeError, (DILATION)),
    Row("dilation-0", "conv_transpose#d(x#, v#, dilation=0)", RuntimeError, (), (DILATION)),
    Row("dilation-0-f64", "conv_transpose2d(x2.double(), v2.double(), dilation=0)", RuntimeError, "dilation"),
    Row("output-padding-negative", "conv_transpose#d(x#, v#, output_padding=-1)", RuntimeError, "negative output_padding is not supported"),
    Row("output-padding-stride", "conv_transpose#d(x#, v#, output_padding=1)", RuntimeError, OUTPUT_PADDING),
    Row("output-padding-is-stride", "conv_transpose#d(x#, v#, stride=2, output_padding=2)", RuntimeError, OUTPUT_PADDING),
    Row("output-padding-dilation", "conv_transpose2d(x2, v2, dilation=3, output_padding=3)", RuntimeError, OUTPUT_PADDING),
    Row("output-padding-one-axis", "conv_transpose2d(x2, v2, stride=(2, 1), dilation=(1, 3), output_padding=(2, 2))", RuntimeError, OUTPUT_PADDING),
    Row("output-padding-depth", "conv_transpose3d(x3, v3, stride=2, output_padding=(2, 1, 1))", RuntimeError, OUTPUT_PADDING),
    Row("output-padding-last", "conv_transpose3d(x3, v3, stride=2, output_padding=(1, 1, 2))", RuntimeError, OUTPUT_PADDING),
    Row("output-padding-f64", "conv_transpose2d(x2.double(), v2.double(), output_padding=1)", RuntimeError, OUTPUT_PADDING),
    Row("output-padding-bf16", "conv_transpose2d(x2.bfloat16(), v2.bfloat16(), output_padding=1)", RuntimeError, OUTPUT_PADDING),
    Row("output-padding-groups", "conv_transpose2d(x2, t(4, 3, 3, 3), groups=2, output_padding=1)", RuntimeError, OUTPUT_PADDING),
    Row("stride-3-numbers", "conv2d(x2, w2, stride=(1, 1, 1))", RuntimeError, numbers("stride", "2", "[1, 1, 1]")),
    Row("stride-2-numbers", "conv1d(x1, w1, stride=(1, 1))", RuntimeError, numbers("stride", "1", "[1, 1]")),
    Row("stride-2-numbers", "conv3d(x3, w3, stride=(1, 1))", RuntimeError, numbers("stride", "3", "[1, 1]")),
    Row("stride-4-numbers", "conv3d(x3, w3, stride=[1, 1, 1, 1])", RuntimeError, "but got stride=[1, 1, 1, 1]"),
    Row("stride-no-numbers", "conv#d(x#, w#, stride=())", RuntimeError, numbers("stride", "#", "[]")),
    Row("padding-3-numbers", "conv2d(x2, w2, padding=(1, 1, 1))", RuntimeError, numbers("padding", "2", "[1, 1, 1]")),
    Row("padding-2-numbers", "conv1d(x1, w1, padding=(1, 1))", RuntimeError, numbers("padding", "1", "[1, 1]")),
    Row("padding-2-numbers", "conv3d(x3, w3, padding=(1, 1))", RuntimeError, numbers("padding", "3", "[1, 1]")),
    Row("padding-no-numbers", "conv#d(x#, w#, padding=())", RuntimeError, numbers("padding", "#", "[]")),
    Row("dilation-3-numbers", "conv2d(x2, w2, dilation=(1, 1, 1))", RuntimeError, numbers("dilation", "2", "[1, 1, 1]")),
    Row("dilation-no-numbers", "conv#d(x#, w#, dilation=[])", RuntimeError, numbers("dilation", "#", "[]")),
    Row("stride-3-numbers", "conv_transpose2d(x2, v2, stride=(1, 1, 1))", RuntimeError, numbers("stride", "2", "[1, 1, 1]")),
    Row("stride-2-numbers", "conv_transpose1d(x1, v1, stride=(1, 1))", RuntimeError, numbers("stride", "1", "[1, 1]")),
    Row("padding-2-numbers", "conv_transpose3d(x3, v3, padding=(1, 1))", RuntimeError, numbers("padding", "3", "[1, 1]")),
    Row("dilation-3-numbers", "conv_transpose2d(x2, v2, dilation=(1, 1, 1))", RuntimeError, numbers("dilation", "2", "[1, 1, 1]")),
    Row("output-padding-3-numbers", "conv_transpose2d(x2, v2, stride=2, output_padding=(1, 1, 1))", RuntimeError, numbers("output_padding", "2", "[1, 1, 1]")),
    Row("output-padding-no-numbers", "conv_transpose#d(x#, v#, output_padding=())", RuntimeError, numbers("output_padding", "#", "[]")),
    Row("padding-2**62", "conv#d(x#, w#, padding=2**62)", RuntimeError, ("padding", "4611686018427387904", "at most 4611686018427387903")),
    Row("padding-second-2**62", "conv2d(x2, w2, padding=(0, 2**62))", RuntimeError, ("padding", "4611686018427387904")),
    Row("padding-int64-max", "conv2d(x2, w2, padding=2**63 - 1)", RuntimeError, ("padding", "9223372036854775807")),
    Row("padding-2**62-stride", "conv2d(x2, w2, padding=2**62, stride=2**62)", RuntimeError, ("padding", "4611686018427387904")),
    Row("padding-2**62", "conv_transpose#d(x#, v#, padding=2**62)", RuntimeError, ("padding", "4611686018427387904", "at most 4611686018427387903")),
    Row("padding-2**61", "conv2d(x2, w2, padding=2**61)", RuntimeError, (), TOO_BIG),
    Row("padding-int64-min", "conv2d(x2, w2, padding=-2**63)", RuntimeError),
    Row("stride-int64-min", "conv2d(x2, w2, stride=-2**63)", RuntimeError),
    Row("stride-2**62", "conv_transpose#d(x#, v#, stride=2**62)", RuntimeError, (), TOO_BIG),
    Row("stride-int64-max", "conv_transpose2d(x2, v2, stride=2**63 - 1)", RuntimeError, (), TOO_BIG),
    Row("dilation-2**62", "conv_transpose#d(x#, v#, dilation=2**62)", RuntimeError, (), TOO_BIG),
    Row("output-padding-2**62", "conv_transpose2d(x2, v2, output_padding=2**62)", RuntimeError, (), re.compile("output.padding")),
    Row("dilation-2**62-same", "conv2d(x2, w2, padding='same', dilation=2**62)", RuntimeError, (), re.compile("dilation|padding|overflow")),
    Row("stride-2**63", "conv#d(x#, w#, stride=2**63)", ValueError, "verflow"),
    Row("stride-2**200", "conv2d(x2, w2, stride=2**200)", ValueError, "verflow"),
    Row("padding-2**63", "conv#d(x#, w#, padding=2**63)", ValueError, "verflow"),
    Row("padding-below-int64", "conv2d(x2, w2, padding=-2**63 - 1)", ValueError, "verflow"),
    Row("dilation-2**63", "conv2d(x2, w2, dilation=2**63)", ValueError, "verflow"),
    Row("groups-2**63", "conv2d(x2, w2, groups=2**63)", ValueError, "verflow"),
    Row("stride-2**63", "conv_transpose2d(x2, v2, stride=2**63)", ValueError, "verflow"),
    Row("output-padding-2**63", "conv_transpose2d(x2, v2, output_padding=2**63)", ValueError, "verflow"),
    Row("groups-2**63", "conv_transpose2d(x2, v2, groups=2**63)", ValueError, "verflow"),
    Row("stride-2**63-in-tuple", "conv2d(x2, w2, stride=(2**63, 1))", TypeError, ("stride", "verflow")),
    Row("stride-2**64-second", "conv2d(x2, w2, stride=(1, 2**64))", TypeError, ("stride", "verflow")),
]

# Every argument given, lists in full: how a module calls, and the shortest way through myconv.
IN_FULL = [
    Row("stride-0", "conv2d(x2, w2, None, (0, 1), (0, 0), (1, 1), 1)", RuntimeError, STRIDE),
    Row("padding-negative", "conv2d(x2, w2, None, (1, 1), (-1, 0), (1, 1), 1)", RuntimeError, PADDING),
    Row("padding-2**62", "conv2d(x2, w2, None, (1, 1), (2**62, 0), (1, 1), 1)", RuntimeError, ("padding", "at most 4611686018427387903")),
    Row("dilation-0", "conv2d(x2, w2, None, (1, 1), (0, 0), (0, 1), 1)", RuntimeError, DILATION),
    Row("dilation-large", "conv2d(x2, w2, None, (1, 1), (0, 0), (4, 1), 1)", RuntimeError, "(8 x 8). Kernel size: (9 x 3)"),
    Row("groups-0", "conv2d(x2, w2, None, (1, 1), (0, 0), (1, 1), 0)", RuntimeError, GROUPS),
    Row("groups-2", "conv2d(x2, w2, None, (1, 1), (0, 0), (1, 1), 2)", RuntimeError, channels(8, 4)),
    Row("groups-2**63", "conv2d(x2, w2, None, (1, 1), (0, 0), (1, 1), 2**63)", ValueError, "verflow"),
    Row("stride-2**63", "conv2d(x2, w2, None, (1, 2**63), (0, 0), (1, 1), 1)", TypeError, ("stride", "verflow")),
    Row("stride-3-numbers", "conv2d(x2, w2, None, (1, 1, 1), (0, 0), (1, 1), 1)", RuntimeError, numbers("stride", "2", "[1, 1, 1]")),
    Row("input-2d", "conv2d(t(8, 8), w2, None, (1, 1), (0, 0), (1, 1), 1)", RuntimeError, input_of("conv2d", "[8, 8]")),
    Row("weight-3d", "conv2d(x2, w1, None, (1, 1), (0, 0), (1, 1), 1)", RuntimeError, (), ("weight", "[6, 4, 3]")),
    Row("bias-short", "conv2d(x2, w2, t(5), (1, 1), (0, 0), (1, 1), 1)", RuntimeError, bias_of("[5]")),
    Row("bias-f64", "conv2d(x2, w2, t(6).double(), (1, 1), (0, 0), (1, 1), 1)", RuntimeError, ("bias", NAMED["f32"], NAMED["f64"])),
    Row("weight-f64", "conv2d(x2, w2.double(), None, (1, 1), (0, 0), (1, 1), 1)", RuntimeError, ("weight", NAMED["f32"], NAMED["f64"])),
    Row("stride-0", "conv_transpose2d(x2, v2, None, (0, 1), (0, 0), (0, 0), 1, (1, 1))", RuntimeError, STRIDE),
    Row("padding-negative", "conv_transpose2d(x2, v2, None, (1, 1), (-1, 0), (0, 0), 1, (1, 1))", RuntimeError, PADDING),
    Row("output-padding", "conv_transpose2d(x2, v2, None, (2, 1), (0, 0), (1, 1), 1, (1, 1))", RuntimeError, OUTPUT_PADDING),
    Row("output-padding-negative", "conv_transpose2d(x2, v2, None, (2, 2), (0, 0), (1, -1), 1, (1, 1))", RuntimeError, "negative output_padding is not supported"),
    Row("groups-0", "conv_transpose2d(x2, v2, None, (1, 1), (0, 0), (0, 0), 0, (1, 1))", RuntimeError, GROUPS),
    Row("dilation-0", "conv_transpose2d(x2, v2, None, (1, 1), (0, 0), (0, 0), 1, (1, 0))", RuntimeError, (), DILATION),
    Row("output-negative", "conv_transpose2d(x2, v2, None, (1, 1), (6, 0), (0, 0), 1, (1, 1))", RuntimeError, (), ("-2 x 10", "too small")),
    Row("bias-short", "conv_transpose2d(x2, v2, t(4), (1, 1), (0, 0), (0, 0), 1, (1, 1))", RuntimeError, bias_of("[4]")),
]

# ---- padding strings

STRINGS = [
    Row("same-strided", "conv#d(x#, w#, stride=2, padding='same')", RuntimeError, SAME),
    Row("same-strided-one-axis", "conv2d(x2, w2, stride=(1, 2), padding='same')", RuntimeError, SAME),
    Row("same-stride-0", "conv2d(x2, w2, stride=0, padding='same')", RuntimeError, SAME),
    Row("same-positional", "conv2d(x2, w2, None, 2, 'same')", RuntimeError, SAME),
    Row("unknown", "conv#d(x#, w#, padding='full')", RuntimeError, "Invalid padding string: 'full'"),
    Row("upper-case", "conv2d(x2, w2, padding='SAME')", RuntimeError, "Invalid padding string: 'SAME'"),
    Row("empty", "conv2d(x2, w2, padding='')", RuntimeError, "Invalid padding string: ''"),
    Row("mode", "conv1d(x1, w1, padding='reflect')", RuntimeError, "Invalid padding string: 'reflect'"),
    Row("same-dilation-0", "conv2d(x2, w2, padding='same', dilation=0)", RuntimeError, "non-positive dilation is not supported"),
    Row("same-dilation-negative", "conv2d(x2, w2, padding='same', dilation=-1)", RuntimeError, (), "dilation"),
    Row("same-groups", "conv2d(x2, w2, padding='same', groups=3)", RuntimeError, ("Given groups=3", channels(12, 4))),
    Row("valid-groups", "conv2d(x2, w2, padding='valid', groups=3)", RuntimeError, ("Given groups=3", channels(12, 4))),
    Row("same-groups-0", "conv2d(x2, w2, padding='same', groups=0)", RuntimeError, GROUPS),
    Row("same-channels", "conv2d(t(2, 3, 8, 8), w2, padding='same')", RuntimeError, channels(4, 3)),
    Row("same-bias", "conv2d(x2, w2, t(5), padding='same')", RuntimeError, bias_of("[5]")),
    Row("same-input-2d", "conv2d(t(8, 8), w2, padding='same')", RuntimeError, input_of("conv2d", "[8, 8]")),
    Row("same-weight-2d", "conv1d(x1, t(6, 4), padding='same')", RuntimeError, WEIGHT),
    Row("same-weight-3d", "conv2d(x2, w1, padding='same')", RuntimeError, (re.compile(r"weight ?\[6, 4, 3\]"), "size [2, 4, 8, 8]")),
    Row("same-stride-3-numbers", "conv2d(x2, w2, padding='same', stride=(1, 1, 1))", RuntimeError, ("stride", "2")),
    Row("same-dilation-3-numbers", "conv2d(x2, w2, padding='same', dilation=(1, 1, 1))", RuntimeError, ("dilation", "2")),
    Row("valid-stride-3-numbers", "conv2d(x2, w2, padding='valid', stride=(1, 1, 1))", RuntimeError, numbers("stride", "2", "[1, 1, 1]")),
    Row("same", "conv_transpose#d(x#, v#, padding='same')", TypeError, must_be("padding", "str", "tuple of ints")),
    Row("valid", "conv_transpose2d(x2, v2, padding='valid')", TypeError, must_be("padding", "str", "tuple of ints")),
    Row("same-positional", "conv_transpose2d(x2, v2, None, 1, 'same')", TypeError, must_be("padding", "str", "tuple of ints")),
]

# ---- types of arguments. torch lists its overloads and what it got; ours must name the argument, its type and what is legal.

TYPES = [
    Row("stride-float", "conv#d(x#, w#, stride=1.0)", TypeError, ("conv#d()", "stride", "float", INT)),
    Row("stride-str", "conv2d(x2, w2, stride='1')", TypeError, ("stride", "str", INT)),
    Row("stride-none", "conv#d(x#, w#, stride=None)", TypeError, ("stride", "NoneType", INT)),
    Row("stride-bool", "conv2d(x2, w2, stride=True)", TypeError, ("stride", "bool", INT)),
    Row("stride-tensor-1d", "conv2d(x2, w2, stride=torch.tensor([1, 1]))", TypeError, ("stride", "Tensor", INT)),
    Row("stride-tensor-float", "conv2d(x2, w2, stride=(torch.tensor(1.0), 1))", TypeError, ("stride", INT)),
    Row("stride-array", "conv2d(x2, w2, stride=np.array([1, 1]))", TypeError, ("stride", "ndarray", INT)),
    Row("stride-float64", "conv2d(x2, w2, stride=np.float64(1))", TypeError, ("stride", "float64", INT)),
    Row("stride-range", "conv2d(x2, w2, stride=range(1, 3))", TypeError, ("stride", "range", INT)),
    Row("stride-set", "conv2d(x2, w2, stride={1, 2})", TypeError, ("stride", "set", INT)),
    Row("stride-dict", "conv2d(x2, w2, stride={1: 1})", TypeError, ("stride", "dict", INT)),
    Row("stride-nested", "conv2d(x2, w2, stride=((1, 1),))", TypeError, ("stride", "tuple", INT)),
    Row("stride-float-second", "conv2d(x2, w2, stride=(1, 1.0))", TypeError, ("stride", "float", INT)),
    Row("stride-none-second", "conv2d(x2, w2, stride=(1, None))", TypeError, ("stride", "NoneType", INT)),
    Row("stride-str-second", "conv2d(x2, w2, stride=(1, '1'))", TypeError, ("stride", "str", INT)),
    Row("stride-positional", "conv2d(x2, w2, None, 1.5)", TypeError, ("float", INT), "stride"),
    Row("padding-float", "conv#d(x#, w#, padding=1.0)", TypeError, ("padding", "float", INT)),
    Row("padding-none", "conv2d(x2, w2, padding=None)", TypeError, ("padding", "NoneType", INT)),
    Row("padding-bool", "conv2d(x2, w2, padding=True)", TypeError, ("padding", "bool", INT)),
    Row("padding-float-second", "conv2d(x2, w2, padding=(1, 1.5))", TypeError, ("padding", "float")),
    Row("padding-strings", "conv2d(x2, w2, padding=('same', 'same'))", TypeError, ("padding", INT)),
    Row("dilation-float", "conv#d(x#, w#, dilation=1.5)", TypeError, ("dilation", "float", INT)),
    Row("dilation-none", "conv2d(x2, w2, dilation=None)", TypeError, ("dilation", "NoneType", INT)),
    Row("dilation-str", "conv2d(x2, w2, dilation='1')", TypeError, ("dilation", "str", INT)),
    Row("groups-float", "conv#d(x#, w#, groups=1.0)", TypeError, ("groups", "float", INT)),
    Row("groups-float32", "conv2d(x2, w2, groups=np.float32(1))", TypeError, ("groups", "float32", INT)),
    Row("groups-none", "conv2d(x2, w2, groups=None)", TypeError, ("groups", "NoneType", INT)),
    Row("groups-str", "conv2d(x2, w2, groups='1')", TypeError, ("groups", "str", INT)),
    Row("groups-bool", "conv2d(x2, w2, groups=True)", TypeError, ("groups", "bool", INT)),
    Row("groups-tuple", "conv2d(x2, w2, groups=(1,))", TypeError, ("groups", "tuple", INT)),
    Row("input-none", "conv#d(None, w#)", TypeError, ("input", "NoneType", "Tensor")),
    Row("input-list", "conv2d([1, 2], w2)", TypeError, ("input", "list", "Tensor")),
    Row("input-float", "conv2d(1.0, w2)", TypeError, ("input", "float", "Tensor")),
    Row("input-array", "conv2d(np.ones((2, 4, 8, 8), np.float32), w2)", TypeError, ("input", "ndarray", "Tensor")),
    Row("input-str", "conv2d('x', w2)", TypeError, ("input", "str", "Tensor")),
    Row("weight-none", "conv#d(x#, None)", TypeError, ("weight", "NoneType", "Tensor")),
    Row("weight-array", "conv2d(x2, np.ones((6, 4, 3, 3)))", TypeError, ("weight", "ndarray", "Tensor")),
    Row("both-none", "conv3d(None, None)", TypeError, ("input", "NoneType", "Tensor")),
    Row("bias-int", "conv2d(x2, w2, 1)", TypeError, ("bias", "int", "Tensor")),
    Row("bias-float", "conv2d(x2, w2, 1.0)", TypeError, ("bias", "float", "Tensor")),
    Row("bias-list", "conv2d(x2, w2, [1.0] * 6)", TypeError, ("bias", "list", "Tensor")),
    Row("bias-true", "conv2d(x2, w2, True)", TypeError, ("bias", "bool", "Tensor")),
    Row("bias-false", "conv#d(x#, w#, False)", TypeError, ("bias", "bool", "Tensor")),
    Row("bias-keyword-int", "conv2d(x2, weight=w2, bias=3)", TypeError, ("bias", "int", "Tensor")),
    Row("stride-float", "conv_transpose#d(x#, v#, stride=1.5)", TypeError, must_be("stride", "float", "tuple of ints")),
    Row("padding-float", "conv_transpose2d(x2, v2, padding=1.5)", TypeError, must_be("padding", "float", "tuple of ints")),
    Row("output-padding-float", "conv_transpose2d(x2, v2, output_padding=1.5)", TypeError, must_be("output_padding", "float", "tuple of ints")),
    Row("output-padding-none", "conv_transpose2d(x2, v2, output_padding=None)", TypeError, must_be("output_padding", "NoneType", "tuple of ints")),
    Row("output-padding-str", "conv_transpose2d(x2, v2, output_padding='same')", TypeError, must_be("output_padding", "str", "tuple of ints")),
    Row("groups-float", "conv_transpose2d(x2, v2, groups=1.0)", TypeError, must_be("groups", "float", "int")),
    Row("dilation-str", "conv_transpose2d(x2, v2, dilation='2')", TypeError, must_be("dilation", "str", "tuple of ints")),
    Row("input-none", "conv_transpose#d(None, v#)", TypeError, must_be("input", "NoneType", "Tensor")),
    Row("weight-none", "conv_transpose#d(x#, None)", TypeError, must_be("weight", "NoneType", "Tensor")),
    Row("bias-str", "conv_transpose2d(x2, v2, 'b')", TypeError, must_be("bias", "str", "Tensor")),
]

# ---- the signature. torch answers the conv functions with its overloads; ours must say which name is wrong.

SIGNATURE = [
    Row("nothing", "conv#d()", TypeError, "conv#d()", ("input", "weight")),
    Row("no-weight", "conv#d(x#)", TypeError, ("conv#d()", "weight")),
    Row("no-weight-but-bias", "conv2d(x2, bias=None)", TypeError, "weight"),
    Row("no-input", "conv2d(weight=w2)", TypeError, "input"),
    Row("unknown", "conv#d(x#, w#, bogus=1)", TypeError, ("conv#d()", "bogus")),
    Row("unknown-kernel-size", "conv2d(x2, w2, kernel_size=3)", TypeError, "kernel_size"),
    Row("unknown-output-padding", "conv2d(x2, w2, output_padding=0)", TypeError, "output_padding"),
    Row("too-many", "conv#d(x#, w#, None, 1, 0, 1, 1, 1)", TypeError, "conv#d()", re.compile("8|argument")),
    Row("groups-twice", "conv2d(x2, w2, None, 1, 0, 1, 1, groups=1)", TypeError, "groups"),
    Row("weight-twice", "conv2d(x2, w2, weight=w2)", TypeError, "weight"),
    Row("input-twice", "conv2d(x2, input=x2)", TypeError, "input"),
    Row("bias-skipped", "conv2d(x2, w2, 1, 0)", TypeError, "Tensor", "bias"),
    Row("nothing", "conv_transpose#d()", TypeError, ("conv_transpose#d() missing 2 required positional argument", "input", "weight")),
    Row("no-weight", "conv_transpose2d(x2)", TypeError, ("conv_transpose2d() missing 1 required positional argument", "weight")),
    Row("no-input", "conv_transpose2d(weight=v2)", TypeError, ("missing", "input")),
    Row("unknown", "conv_transpose#d(x#, v#, bogus=1)", TypeError, "conv_transpose#d() got an unexpected keyword argument 'bogus'"),
    Row("unknown-output-size", "conv_transpose2d(x2, v2, output_size=(10, 10))", TypeError, "got an unexpected keyword argument 'output_size'"),
    Row("too-many", "conv_transpose2d(x2, v2, None, 1, 0, 0, 1, 1, 1)", TypeError, "conv_transpose2d() takes from 2 to 8 positional arguments but 9 were given"),
    Row("dilation-twice", "conv_transpose2d(x2, v2, None, 1, 0, 0, 1, 1, dilation=1)", TypeError, "conv_transpose2d() got multiple values for argument 'dilation'"),
    Row("weight-twice", "conv_transpose2d(x2, v2, weight=v2)", TypeError, "conv_transpose2d() got multiple values for argument 'weight'"),
]

# ---- dtypes


def _mixed() -> list[Row]:
    """Every ordered pair of NAMED as input and weight, and as input and bias, in two dimensions; one pair elsewhere."""
    rows = []
    for one in NAMED:
        for other in NAMED:
            if one == other:
                continue
            named = (NAMED[one], NAMED[other])
            rows.append(Row(f"weight-{one}-{other}", f"conv2d(x2.to({one}), w2.to({other}))", RuntimeError, named, "weight"))
            rows.append(
                Row(f"bias-{one}-{other}", f"conv2d(x2.to({one}), w2.to({one}), t(6, dtype={other}))", RuntimeError, named, "bias")
            )
    return rows


DTYPE = [
    *_mixed(),
    Row("weight-f32-f64", "conv1d(x1, w1.double())", RuntimeError, ("weight", NAMED["f32"], NAMED["f64"])),
    Row("weight-f32-f64", "conv3d(x3, w3.double())", RuntimeError, ("weight", NAMED["f32"], NAMED["f64"])),
    Row("weight-f64-f32", "conv1d(x1.double(), w1)", RuntimeError, (NAMED["f32"], NAMED["f64"]), "weight"),
    Row("weight-f64-f32", "conv3d(x3.double(), w3)", RuntimeError, (NAMED["f32"], NAMED["f64"]), "weight"),
    Row("weight-f32-f64", "conv_transpose#d(x#, v#.double())", RuntimeError, ("weight", NAMED["f32"], NAMED["f64"])),
    Row("weight-f64-f32", "conv_transpose#d(x#.double(), v#)", RuntimeError, (NAMED["f32"], NAMED["f64"]), "weight"),
    Row("weight-i64-f32", "conv_transpose2d(x2.long(), v2)", RuntimeError, (NAMED["f32"], NAMED["i64"]), "weight"),
    Row("weight-c64-f32", "conv_transpose2d(x2.to(c64), v2)", RuntimeError, ("weight", NAMED["c64"])),
    Row("weight-grouped", "conv2d(x2, t(6, 2, 3, 3, dtype=f64), groups=2)", RuntimeError, ("weight", NAMED["f32"], NAMED["f64"])),
    Row("weight-same", "conv2d(x2.double(), w2, padding='same')", RuntimeError, (NAMED["f32"], NAMED["f64"]), "weight"),
    Row("weight-grad", "conv2d(x2.requires_grad_(), w2.long())", RuntimeError, ("weight", NAMED["f32"], NAMED["i64"])),
    Row("bias-f32-f64", "conv1d(x1, w1, t(6, dtype=f64))", RuntimeError, ("bias", NAMED["f32"], NAMED["f64"])),
    Row("bias-f32-f64", "conv3d(x3, w3, t(6, dtype=f64))", RuntimeError, ("bias", NAMED["f32"], NAMED["f64"])),
    Row("bias-empty-batch", "conv2d(x2[:0], w2, t(6, dtype=f64))", RuntimeError, ("bias", NAMED["f32"], NAMED["f64"])),
    Row("bias-f32-f64", "conv_transpose#d(x#, v#, t(6, dtype=f64))", RuntimeError, ("bias", NAMED["f32"], NAMED["f64"])),
    Row("bias-bf16-f32", "conv_transpose#d(x#.bfloat16(), v#.bfloat16(), t(6))", RuntimeError, ("bias", NAMED["bf16"], NAMED["f32"])),
    Row("bias-f32-c64", "conv_transpose2d(x2, v2, t(6, dtype=c64))", RuntimeError, ("bias", NAMED["f32"], NAMED["c64"])),
    Row("bias-i64-f32", "conv_transpose2d(x2.long(), v2.long(), t(6))", RuntimeError, (NAMED["f32"], NAMED["i64"]), "bias"),
    Row("bool", "conv#d(x#.bool(), w#.bool())", NotImplementedError, "not implemented for 'Bool'"),
    Row("bool-bias", "conv2d(x2.bool(), w2.bool(), t(6).bool())", NotImplementedError, "not implemented for 'Bool'"),
    Row("bool-same", "conv2d(x2.bool(), w2.bool(), padding='same')", NotImplementedError, "not implemented for 'Bool'"),
    Row("float8", "conv#d(x#.to(f8), w#.to(f8))", NotImplementedError, "not implemented for 'Float8_e4m3fn'"),
    Row("uint16", "conv#d(x#.to(u16), w#.to(u16))", NotImplementedError, "not implemented for 'UInt16'"),
    Row("bool", "conv_transpose#d(x#.bool(), v#.bool())", NotImplementedError, "not implemented for 'Bool'"),
    Row("uint8", "conv_transpose#d(x#.to(u8), v#.to(u8))", NotImplementedError, "not implemented for 'Byte'"),
    Row("int8", "conv_transpose#d(x#.to(i8), v#.to(i8))", NotImplementedError, "not implemented for 'Char'"),
    Row("int16", "conv_transpose#d(x#.to(i16), v#.to(i16))", NotImplementedError, "not implemented for 'Short'"),
    Row("int32", "conv_transpose#d(x#.to(i32), v#.to(i32))", NotImplementedError, "not implemented for 'Int'"),
    Row("float8", "conv_transpose#d(x#.to(f8), v#.to(f8))", NotImplementedError, "not implemented for 'Float8_e4m3fn'"),
]

# ---- kinds of tensor

KINDS = [
    Row("sparse-input", "conv#d(x#.to_sparse(), w#)", RuntimeError, (), (INPUT, SPARSE)),
    Row("sparse-weight", "conv#d(x#, w#.to_sparse())", RuntimeError, ("weight", SPARSE)),
    Row("sparse-bias", "conv2d(x2, w2, t(6).to_sparse())", RuntimeError, ("bias", SPARSE)),
    Row("sparse-input", "conv_transpose#d(x#.to_sparse(), v#)", RuntimeError, (), (INPUT, SPARSE)),
    Row("mkldnn-weight", "conv2d(x2, w2.to_mkldnn())", RuntimeError, ("weight", re.compile("mkldnn", re.I))),
    Row("quantized-input", "conv2d(torch.quantize_per_tensor(x2, 0.1, 0, torch.quint8), w2)", NotImplementedError, re.compile("quantized", re.I)),
    Row("quantized-weight", "conv2d(x2, torch.quantize_per_tensor(w2, 0.1, 0, torch.qint8))", RuntimeError, ("weight", re.compile("quantized|qint8", re.I))),
    Row("nested-input", "conv2d(torch.nested.nested_tensor([x2[0], x2[1]]), w2)", NotImplementedError, re.compile("nested", re.I)),
    Row("nested-input", "conv_transpose2d(torch.nested.nested_tensor([x2[0], x2[1]]), v2)", NotImplementedError, re.compile("nested", re.I)),
    Row("meta-channels", "conv2d(t(2, 3, 8, 8, device='meta'), t(6, 4, 3, 3, device='meta'))", RuntimeError, "channel"),
]

# ---- several things wrong: the same one is named

PRECEDENCE = [
    Row("input-before-string", "conv2d(t(8, 8), w2, padding='full')", RuntimeError, "Expected 3D (unbatched) or 4D (batched) input"),
    Row("input-before-weight", "conv2d(t(8, 8), t(6, 4), stride=0)", RuntimeError, "Expected 3D (unbatched) or 4D (batched) input"),
    Row("input-before-dtype", "conv2d(t(8, 8), w2.double())", RuntimeError, "Expected 3D (unbatched) or 4D (batched) input"),
    Row("string-before-stride", "conv2d(x2, w2, stride=0, padding='full')", RuntimeError, "Invalid padding string: 'full'"),
    Row("same-before-channels", "conv2d(t(2, 3, 8, 8), w2, t(5), stride=2, padding='same')", RuntimeError, SAME),
    Row("groups-before-stride", "conv2d(x2, w2, groups=0, stride=0, padding=-1, dilation=0)", RuntimeError, GROUPS),
    Row("length-before-value", "conv2d(x2, w2, stride=(0, 0, 0))", RuntimeError, "but got stride=[0, 0, 0]"),
    Row("stride-length-first", "conv2d(x2, w2, stride=(1, 1, 1), padding=(1, 1, 1), dilation=())", RuntimeError, "but got stride=[1, 1, 1]"),
    Row("padding-before-stride", "conv2d(x2, w2, stride=0, padding=-1)", RuntimeError, PADDING),
    Row("stride-before-dilation", "conv2d(x2, w2, stride=0, dilation=0)", RuntimeError, STRIDE),
    Row("stride-before-channels", "conv2d(t(2, 3, 8, 8), w2, stride=0)", RuntimeError, STRIDE),
    Row("divide-before-channels", "conv2d(t(2, 3, 8, 8), t(5, 4, 3, 3), groups=2)", RuntimeError, "expected weight to be divisible by 2 at dimension 0"),
    Row("channels-before-bias", "conv2d(t(2, 3, 8, 8), w2, t(5))", RuntimeError, channels(4, 3)),
    Row("channels-before-kernel", "conv2d(t(2, 3, 8, 8), t(6, 4, 9, 3))", RuntimeError, channels(4, 3)),
    Row("bias-before-kernel", "conv2d(x2, t(6, 4, 9, 3), t(5))", RuntimeError, bias_of("[5]")),
    Row("shape-before-dtype", "conv2d(t(2, 3, 8, 8), w2.double())", RuntimeError, channels(4, 3)),
    Row("kernel-before-dtype", "conv2d(x2, t(6, 4, 9, 3, dtype=f64))", RuntimeError, "(8 x 8). Kernel size: (9 x 3)"),
    Row("bias-dtype-before-weight", "conv2d(x2, w2.double(), t(6, dtype=i64))", RuntimeError, ("bias", NAMED["f32"], NAMED["i64"])),
    Row("channels-before-output-padding", "conv_transpose2d(t(2, 3, 8, 8), v2, output_padding=5)", RuntimeError, channels(4, 3)),
    Row("bias-before-output-padding", "conv_transpose2d(x2, v2, t(5), output_padding=5)", RuntimeError, bias_of("[5]")),
    Row("padding-before-output-padding", "conv_transpose2d(x2, v2, padding=-1, output_padding=-1, stride=0)", RuntimeError, PADDING),
    Row("output-padding-before-stride", "conv_transpose2d(x2, v2, output_padding=-1, stride=0)", RuntimeError, "negative output_padding is not supported"),
    Row("output-padding-before-size", "conv_transpose2d(x2, v2, padding=9, output_padding=5)", RuntimeError, OUTPUT_PADDING),
    Row("weight-type-before-stride", "conv_transpose2d(x2, None, stride=2.5)", TypeError, must_be("weight", "NoneType", "Tensor")),
    Row("stride-type-before-padding", "conv_transpose2d(x2, v2, stride=2.5, padding='x')", TypeError, must_be("stride", "float", "tuple of ints")),
]

# ---- modules

CONSTRUCTORS = [
    Row("nothing", "Conv#d()", TypeError, ("in_channels", "out_channels", "kernel_size")),
    Row("no-kernel-size", "Conv#d(4, 6)", TypeError, "kernel_size"),
    Row("in-channels-groups", "Conv#d(4, 6, 3, groups=3)", ValueError, "in_channels must be divisible by groups"),
    Row("out-channels-groups", "Conv#d(4, 6, 3, groups=4)", ValueError, "out_channels must be divisible by groups"),
    Row("groups-0", "Conv#d(4, 6, 3, groups=0)", ValueError, "groups must be a positive integer"),
    Row("groups-negative", "Conv2d(4, 6, 3, groups=-1)", ValueError, "groups must be a positive integer"),
    Row("groups-float", "Conv2d(4, 6, 3, groups=1.0)", TypeError, "float"),
    Row("groups-none", "Conv2d(4, 6, 3, groups=None)", TypeError, "NoneType"),
    Row("padding-mode", "Conv#d(4, 6, 3, padding_mode='bogus')", ValueError, ("padding_mode must be one of", "bogus")),
    Row("padding-mode-none", "Conv2d(4, 6, 3, padding_mode=None)", ValueError, ("padding_mode must be one of", "None")),
    Row("padding-string", "Conv#d(4, 6, 3, padding='full')", ValueError, "Invalid padding string 'full', should be one of"),
    Row("same-strided", "Conv#d(4, 6, 3, padding='same', stride=2)", ValueError, SAME),
    Row("same-strided-one-axis", "Conv2d(4, 6, 3, padding='same', stride=(1, 2))", ValueError, SAME),
    Row("kernel-negative", "Conv2d(4, 6, -1)", RuntimeError, "negative dimension"),
    Row("kernel-float", "Conv2d(4, 6, 2.5)", TypeError, "float"),
    Row("kernel-none", "Conv2d(4, 6, None)", TypeError, "NoneType"),
    Row("in-channels-negative", "Conv2d(-4, 6, 3)", RuntimeError, "negative dimension"),
    Row("in-channels-float", "Conv2d(4.0, 6, 3)", TypeError, "float"),
    Row("in-channels-str", "Conv2d('4', 6, 3)", TypeError),
    Row("unknown", "Conv#d(4, 6, 3, bogus=1)", TypeError, "bogus"),
    Row("unknown-output-padding", "Conv2d(4, 6, 3, output_padding=1)", TypeError, "output_padding"),
    Row("too-many", "Conv2d(4, 6, 3, 1, 0, 1, 1, True, 'zeros', None, None, 1)", TypeError, "positional arguments"),
    Row("kernel-twice", "Conv2d(4, 6, 3, kernel_size=3)", TypeError, "kernel_size"),
    Row("dtype-int", "Conv2d(4, 6, 3, dtype=i64)", RuntimeError, "floating point"),
    Row("dtype-str", "Conv2d(4, 6, 3, dtype='float32')", TypeError, "dtype"),
    Row("device", "Conv2d(4, 6, 3, device='nowhere')", RuntimeError, "nowhere"),
    Row("padding-mode-unknown", "ConvTranspose2d(4, 6, 3, padding_mode='bogus')", ValueError, (), ("padding_mode must be one of", "bogus")),
    Row("in-channels-groups", "ConvTranspose#d(4, 6, 3, groups=3)", ValueError, "in_channels must be divisible by groups"),
    Row("out-channels-groups", "ConvTranspose#d(4, 6, 3, groups=4)", ValueError, "out_channels must be divisible by groups"),
    Row("groups-0", "ConvTranspose#d(4, 6, 3, groups=0)", ValueError, "groups must be a positive integer"),
    Row("no-kernel-size", "ConvTranspose#d(4, 6)", TypeError, "kernel_size"),
    Row("unknown", "ConvTranspose2d(4, 6, 3, bogus=1)", TypeError, "bogus"),
    Row("groups-before-padding", "Conv2d(4, 6, 3, groups=0, padding='full', padding_mode='x')", ValueError, "groups must be a positive integer"),
    Row("padding-before-mode", "Conv2d(4, 6, 3, padding='full', padding_mode='x')", ValueError, "Invalid padding string 'full'"),
    Row("state-missing", "Conv2d(4, 6, 3).load_state_dict({})", RuntimeError, ("loading state_dict for Conv2d", "Missing key(s)", "weight", "bias")),
    Row("state-size", "Conv2d(4, 6, 3).load_state_dict({'weight': t(6, 3, 3, 3), 'bias': t(6)})", RuntimeError, ("size mismatch for weight", "[6, 3, 3, 3]", "[6, 4, 3, 3]")),
    Row("state-unknown", "Conv2d(4, 6, 3).load_state_dict({'weight': w2, 'bias': t(6), 'x': t(1)})", RuntimeError, ("Unexpected key(s)", "x")),
]

FORWARD = [
    Row("channels", "Conv#d(4, 6, 3)(x#[:, :3])", RuntimeError, ("Given groups=1, weight of size", channels(4, 3))),
    Row("dimensions", "Conv#d(4, 6, 3)(t(4))", RuntimeError, "input to conv#d, but got input of size: [4]"),
    Row("kernel-larger", "Conv#d(4, 6, 3)(x#[..., :2])", RuntimeError, KERNEL),
    Row("dtype", "Conv#d(4, 6, 3)(x#.double())", RuntimeError, ("bias", NAMED["f32"], NAMED["f64"])),
    Row("dtype-no-bias", "Conv2d(4, 6, 3, bias=False).double()(x2)", RuntimeError, ("weight", NAMED["f32"], NAMED["f64"])),
    Row("dtype-int", "Conv2d(4, 6, 3)(x2.long())", RuntimeError, ("bias", NAMED["f32"], NAMED["i64"])),
    Row("none", "Conv#d(4, 6, 3)(None)", TypeError, ("input", "NoneType", "Tensor")),
    Row("str", "Conv2d(4, 6, 3)('x')", TypeError, ("input", "str", "Tensor")),
    Row("nothing", "Conv2d(4, 6, 3)()", TypeError, "input"),
    Row("too-many", "Conv2d(4, 6, 3)(x2, t(1))", TypeError, "2 positional arguments but 3 were given"),
    Row("unknown", "Conv2d(4, 6, 3)(x2, bogus=1)", TypeError, "bogus"),
    Row("sparse", "Conv2d(4, 6, 3)(x2.to_sparse())", RuntimeError, SPARSE),
    Row("stride-0", "Conv#d(4, 6, 3, stride=0)(x#)", RuntimeError, STRIDE),
    Row("stride-float", "Conv2d(4, 6, 3, stride=2.5)(x2)", TypeError, ("float", INT), "stride"),
    Row("padding-negative", "Conv#d(4, 6, 3, padding=-1)(x#)", RuntimeError, PADDING),
    Row("padding-3-numbers", "Conv2d(4, 6, 3, padding=(1, 1, 1))(x2)", RuntimeError, numbers("padding", "2", "[1, 1, 1]")),
    Row("dilation-0", "Conv#d(4, 6, 3, dilation=0)(x#)", RuntimeError, "non-positive dilation is not supported"),
    Row("kernel-1-number", "Conv2d(4, 6, (3,))(x2)", RuntimeError, (), ("weight", "[6, 4, 3]")),
    Row("kernel-3-numbers", "Conv2d(4, 6, (3, 3, 3))(x2)", RuntimeError, (), ("weight", "[6, 4, 3, 3, 3]")),
    Row("weight-replaced", "with_(Conv2d(4, 6, 3), weight=t(6, 3, 3, 3))(x2)", RuntimeError, channels(3, 4)),
    Row("bias-replaced", "with_(Conv2d(4, 6, 3), bias=t(5))(x2)", RuntimeError, bias_of("[5]")),
    Row("weight-f64", "with_(Conv2d(4, 6, 3), weight=t(6, 4, 3, 3, dtype=f64))(x2)", RuntimeError, ("weight", NAMED["f32"], NAMED["f64"])),
    Row("reflect-too-far", "Conv#d(4, 6, 3, padding=8, padding_mode='reflect')(x#)", RuntimeError, "Padding size should be less than the corresponding input dimension, but got: padding (8, 8)"),
    Row("reflect-one", "Conv2d(4, 6, 3, padding=1, padding_mode='reflect')(t(2, 4, 1, 8))", RuntimeError, "Padding size should be less than the corresponding input dimension, but got: padding (1, 1) at dimension 2 of input [2, 4, 1, 8]"),
    Row("reflect-same", "Conv2d(4, 6, 3, padding='same', padding_mode='reflect', dilation=8)(x2)", RuntimeError, REFLECT),
    Row("reflect-2**62", "Conv2d(4, 6, 3, padding=2**62, padding_mode='reflect')(x2)", RuntimeError, (re.compile("padding", re.I), "4611686018427387904")),
    Row("circular-too-far", "Conv#d(4, 6, 3, padding=9, padding_mode='circular')(x#)", RuntimeError, CIRCULAR),
    Row("circular-one", "Conv2d(4, 6, 3, padding=2, padding_mode='circular')(t(2, 4, 1, 8))", RuntimeError, CIRCULAR),
    Row("circular-empty", "Conv#d(4, 6, 3, padding=2, padding_mode='circular')(x#[..., :0])", RuntimeError, (), "[2, 4, "),
    Row("replicate-empty", "Conv#d(4, 6, 3, padding=2, padding_mode='replicate')(x#[..., :0])", RuntimeError, (INPUT, "[2, 4, ")),
    Row("reflect-channels", "Conv2d(4, 6, 3, padding=1, padding_mode='reflect')(t(2, 3, 8, 8))", RuntimeError, channels(4, 3)),
    Row("reflect-dimensions", "Conv1d(4, 6, 3, padding=1, padding_mode='reflect')(t(8))", NotImplementedError, (INPUT, re.compile("1D|size: .8."))),
    Row("reflect-dimensions", "Conv2d(4, 6, 3, padding=1, padding_mode='reflect')(t(8, 8))", NotImplementedError, INPUT),
    Row("circular-dimensions", "Conv2d(4, 6, 3, padding=1, padding_mode='circular')(x3)", NotImplementedError, INPUT),
    Row("replicate-dimensions", "Conv3d(4, 6, 3, padding=1, padding_mode='replicate')(x1)", NotImplementedError, INPUT),
    Row("reflect-dtype", "Conv2d(4, 6, 3, padding=1, padding_mode='reflect')(x2.double())", RuntimeError, ("bias", NAMED["f32"], NAMED["f64"])),
    Row("reflect-none", "Conv2d(4, 6, 3, padding=1, padding_mode='reflect')(None)", TypeError, ("input", "NoneType", "Tensor")),
    Row("reflect-padding-float", "Conv2d(4, 6, 3, padding=1.5, padding_mode='reflect')(x2)", TypeError, ("float", INT)),
    Row("circular-stride-0", "Conv2d(4, 6, 3, padding=1, padding_mode='circular', stride=0)(x2)", RuntimeError, STRIDE),
    Row("circular-dilation-0", "Conv2d(4, 6, 3, padding=1, padding_mode='circular', dilation=0)(x2)", RuntimeError, "non-positive dilation is not supported"),
    Row("replicate-kernel-larger", "Conv2d(4, 6, 3, padding=1, padding_mode='replicate', dilation=9)(x2)", RuntimeError, "Calculated padded input size per channel: (10 x 10). Kernel size: (19 x 19). Kernel size can't be greater than actual input size"),
    Row("valid-kernel-larger", "Conv2d(4, 6, 3, padding='valid', padding_mode='circular')(t(2, 4, 2, 2))", RuntimeError, "(2 x 2). Kernel size: (3 x 3)"),
    Row("channels", "ConvTranspose#d(4, 6, 3)(x#[:, :3])", RuntimeError, ("Given transposed=1, weight of size", channels(4, 3))),
    Row("dimensions", "ConvTranspose#d(4, 6, 3)(t(4))", RuntimeError, "input to conv_transpose#d, but got input of size: [4]"),
    Row("output-padding", "ConvTranspose#d(4, 6, 3, output_padding=1)(x#)", RuntimeError, OUTPUT_PADDING),
    Row("padding-string", "ConvTranspose2d(4, 6, 3, padding='same')(x2)", TypeError, ("padding", INT)),
    Row("dtype", "ConvTranspose2d(4, 6, 3, bias=False).double()(x2)", RuntimeError, ("weight", NAMED["f32"], NAMED["f64"])),
    Row("output-size-large", "ConvTranspose2d(4, 6, 3, stride=2)(x2, output_size=(19, 19))", ValueError, "requested an output size of (19, 19), but valid sizes range from [17, 17] to [18, 18] (for an input of torch.Size([8, 8]))"),
    Row("output-size-small", "ConvTranspose2d(4, 6, 3, stride=2)(x2, output_size=(16, 17))", ValueError, "requested an output size of (16, 17), but valid sizes range from [17, 17] to [18, 18]"),
    Row("output-size-no-stride", "ConvTranspose2d(4, 6, 3)(x2, output_size=(11, 11))", ValueError, "valid sizes range from [10, 10] to [10, 10]"),
    Row("output-size-1d", "ConvTranspose1d(4, 6, 3, stride=2)(x1, output_size=(19,))", ValueError, "requested an output size of (19,), but valid sizes range from [17] to [18]"),
    Row("output-size-3d", "ConvTranspose3d(4, 6, 3, stride=2)(x3, output_size=(19, 17, 17))", ValueError, "requested an output size of (19, 17, 17)"),
    Row("output-size-1-number", "ConvTranspose2d(4, 6, 3, stride=2)(x2, output_size=(18,))", ValueError, "output_size must have 2 or 4 elements (got 1)"),
    Row("output-size-3-numbers", "ConvTranspose2d(4, 6, 3, stride=2)(x2, output_size=(18, 18, 18))", ValueError, "output_size must have 2 or 4 elements (got 3)"),
    Row("output-size-unbatched", "ConvTranspose2d(4, 6, 3, stride=2)(x2[0], output_size=(2, 6, 18, 18))", ValueError, "output_size must have 2 or 3 elements (got 4)"),
    Row("output-size-int", "ConvTranspose2d(4, 6, 3, stride=2)(x2, output_size=18)", TypeError),
    Row("output-size-float", "ConvTranspose2d(4, 6, 3, stride=2)(x2, output_size=(18.0, 18.0))", TypeError, "float"),
    Row("output-size-dimensions", "ConvTranspose2d(4, 6, 3, stride=2)(t(8, 8), output_size=(18, 18))", IndexError),
    Row("output-size-none-input", "ConvTranspose2d(4, 6, 3, stride=2)(None, output_size=(18, 18))", AttributeError),
    Row("unknown", "ConvTranspose2d(4, 6, 3)(x2, bogus=1)", TypeError, "bogus"),
]

_GROUPS = {
    "dimensions": DIMENSIONS,
    "channels": CHANNELS,
    "sizes": SIZES,
    "parameters": PARAMETERS,
    "in-full": IN_FULL,
    "strings": STRINGS,
    "types": TYPES,
    "signature": SIGNATURE,
    "dtypes": DTYPE,
    "kinds": KINDS,
    "precedence": PRECEDENCE,
    "constructors": CONSTRUCTORS,
    "forward": FORWARD,
}


CALLS = [
    row._replace(id=f"{group}/{row.id}") for group, members in _GROUPS.items() for row in each_rank(members)
]

# ---- torch is no guide

WRAPS = "the dilated kernel size wraps around int64: torch returns an output of that wrong size"
UNWRITTEN = "torch returns memory that nobody wrote"
TORCH_UNSAFE = each_rank(
    [
        Unsafe("dilation-int64-max", "conv#d(x#, w#, dilation=2**63 - 1)", RuntimeError, TOO_BIG, WRAPS),
        Unsafe("dilation-2**62-f64", "conv#d(x#.double(), w#.double(), dilation=2**62)", RuntimeError, TOO_BIG, WRAPS),
        Unsafe("dilation-int64-max-int", "conv2d(x2.long(), w2.long(), dilation=2**63 - 1)", RuntimeError, TOO_BIG, WRAPS),
        Unsafe("dilation-int64-max", "conv_transpose#d(x#, v#, dilation=2**63 - 1)", RuntimeError, TOO_BIG, WRAPS),
        Unsafe("padding-2**61-f64", "conv2d(x2.double(), w2.double(), padding=2**61)", RuntimeError, TOO_BIG, "a segmentation fault"),
        Unsafe("padding-2**61-f64", "conv3d(x3.double(), w3.double(), padding=2**61)", RuntimeError, TOO_BIG, "a segmentation fault"),
        Unsafe("weight-meta", "conv#d(x#, w#.to('meta'))", RuntimeError, ("meta", "cpu"), UNWRITTEN),
        Unsafe("bias-meta", "conv2d(x2, w2, t(6, device='meta'))", RuntimeError, ("meta", "cpu"), UNWRITTEN),
        Unsafe("weight-meta", "conv_transpose#d(x#, v#.to('meta'))", RuntimeError, ("meta", "cpu"), UNWRITTEN),
        Unsafe("bias-meta", "conv_transpose2d(x2, v2, t(6, device='meta'))", RuntimeError, ("meta", "cpu"), UNWRITTEN),
        Unsafe(
            "reflects-channels",
            "Conv2d(6, 6, 3, padding=(1, 1, 1), padding_mode='reflect')(x2)",
            RuntimeError,
            ("expected padding to be a single integer value or a list of 2 values", "[1, 1, 1]"),
            "torch pads the channels too, so that an input with two channels too few runs",
        ),
    ]
)

# ---- padding_mode, a keyword of myconv's functions alone

MODES = (ValueError, TypeError)
ACCEPTED = each_rank(
    [
        Accepted("pair", "conv#d(x#, w#, padding=((1, 2),))", TypeError),
        Accepted("pairs", "conv2d(x2, w2, padding=((1, 2), (0, 3)))", TypeError),
        Accepted("pair-and-number", "conv2d(x2, w2, padding=(1, (0, 2)))", TypeError),
        Accepted("causal", "conv1d(x1, w1, padding='causal')", RuntimeError),
        Accepted("padding-mode", "conv#d(x#, w#, padding=1, padding_mode='reflect')", TypeError),
        Accepted("pair", "conv_transpose#d(x#, v#, padding=((1, 2),))", TypeError),
        Accepted("padding-mode", "conv_transpose#d(x#, v#, padding=1, padding_mode='circular')", TypeError),
        Accepted("pair", "Conv#d(4, 6, 3, padding=((1, 2),))(x#)", TypeError),
        Accepted("pair-padding-mode", "Conv#d(4, 6, 3, padding=((1, 2),), padding_mode='reflect')(x#)", TypeError),
        Accepted("causal", "Conv1d(4, 6, 3, padding='causal')", ValueError),
        Accepted("pair", "ConvTranspose#d(4, 6, 3, padding=((1, 2),))(x#)", TypeError),
        Accepted("padding-mode", "ConvTranspose#d(4, 6, 3, padding_mode='reflect')", ValueError),
        Accepted("dilated-integers", "conv#d(x#.int(), w#.int(), dilation=2)", NotImplementedError),
        Accepted("padding-mode-set-later", "set_(ConvTranspose#d(4, 6, 3), padding_mode='circular')(x#)", ValueError),
    ]
)

EXTENSIONS = each_rank(
    [
        Row("one-pair-unwrapped", "conv1d(x1, w1, padding=(1, 2))", RuntimeError, (), (numbers("padding", "1", "[1, 2]"), "((low, high),)")),
        Row("pair-negative-low", "conv#d(x#, w#, padding=((-1, 2),))", RuntimeError, (), PADDING),
        Row("pair-negative-high", "conv#d(x#, w#, padding=((1, -2),))", RuntimeError, (), PADDING),
        Row("pair-negative-high", "conv_transpose#d(x#, v#, padding=((1, -2),))", RuntimeError, (), PADDING),
        Row("pair-of-three", "conv2d(x2, w2, padding=((1, 2, 3), (1, 2)))", TypeError, (), ("padding", "(low, high) pairs")),
        Row("pair-of-one", "conv2d(x2, w2, padding=((1,), (1, 2)))", TypeError, (), ("padding", "(low, high) pairs")),
        Row("pair-empty", "conv2d(x2, w2, padding=((), ()))", TypeError, (), ("padding", "(low, high) pairs")),
        Row("pair-float", "conv2d(x2, w2, padding=((1, 2.5), 1))", TypeError, (), ("padding", "float")),
        Row("pair-and-string", "conv2d(x2, w2, padding=((1, 2), 'same'))", TypeError, (), ("padding", "(low, high) pairs", "str")),
        Row("pairs-too-many", "conv1d(x1, w1, padding=((1, 2), (1, 2)))", RuntimeError, (), numbers("padding", "1", "[1, 1]")),
        Row("pairs-too-few", "conv3d(x3, w3, padding=((1, 2), (1, 2)))", RuntimeError, (), numbers("padding", "3", "[1, 1]")),
        Row("pair-high-2**62", "conv#d(x#, w#, padding=((0, 2**62),))", RuntimeError, (), ("padding", "4611686018427387904", "at most")),
        Row("pair-2**63", "conv2d(x2, w2, padding=((0, 2**63), 1))", TypeError, (), "verflow"),
        Row("pair-kernel-larger", "conv2d(t(2, 4, 2, 2), w2, padding=((0, 1), 0))", RuntimeError, (), "(3 x 2). Kernel size: (3 x 3)"),
        Row("pair-output-small", "conv_transpose2d(x2, v2, padding=((9, 2), 0))", RuntimeError, (), "(-1 x 10). Output size is too small"),
        Row("pair-reflect-high", "conv2d(x2, w2, padding=((0, 8), 0), padding_mode='reflect')", RuntimeError, (), "got: padding (0, 8)"),
        Row("pair-reflect-unreached", "conv2d(x2, w2, padding=((0, 8), 0), stride=20, padding_mode='reflect')", RuntimeError, (), "got: padding (0, 8)"),
        Row("pair-circular-high", "conv1d(x1, w1, padding=((0, 9),), padding_mode='circular')", RuntimeError, (), CIRCULAR),
        Row("transposed-reflect", "conv_transpose1d(t(2, 4, 1), t(4, 6, 7), padding=3, padding_mode='reflect')", RuntimeError, (), REFLECT),
        Row("transposed-unknown", "conv_transpose#d(x#, v#, padding_mode='bogus')", ValueError, (), ("padding_mode", "bogus", "reflect")),
        Row("transposed-same", "conv_transpose#d(x#, v#, padding='same', padding_mode='reflect')", TypeError, (), ("padding", "str")),
        Row("transposed-causal", "conv_transpose1d(x1, v1, padding='causal')", TypeError, (), ("padding", "str")),
        Row("causal-2d", "conv2d(x2, w2, padding='causal')", RuntimeError, (), ("'causal' is for conv1d", "pairs", "((dilation * (kernel_size - 1), 0), (0, 0))")),
        Row("causal-3d", "conv3d(x3, w3, padding='causal')", RuntimeError, (), ("'causal' is for conv1d", "pairs", "(0, 0), (0, 0))")),
        Row("causal-dilation-0", "conv1d(x1, w1, padding='causal', dilation=0)", RuntimeError, (), "non-positive dilation"),
        Row("causal-stride-0", "conv1d(x1, w1, padding='causal', stride=0)", RuntimeError, (), STRIDE),
        Row("causal-reflect", "conv1d(x1, w1, padding='causal', dilation=4, padding_mode='reflect')", RuntimeError, (), REFLECT),
        Row("unknown-string-1d", "conv1d(x1, w1, padding='full')", RuntimeError, (), "should be one of 'same', 'valid', 'causal'"),
        Row("causal", "Conv2d(4, 6, 3, padding='causal')", ValueError, (), ("'causal' is for Conv1d", "pairs")),
        Row("causal", "Conv3d(4, 6, 3, padding='causal')", ValueError, (), ("'causal' is for Conv1d", "pairs")),
        Row("pair-of-three", "Conv2d(4, 6, 3, padding=((1, 2, 3), 1))", ValueError, (), ("padding must have 2 entries", "(low, high)")),
        Row("pairs-too-many", "Conv1d(4, 6, 3, padding=((1, 2), (1, 2)))", ValueError, (), "padding must have 1 entries"),
        Row("pair-negative", "Conv#d(4, 6, 3, padding=((1, -2),))(x#)", RuntimeError, (), PADDING),
        Row("padding-mode-unknown", "set_(ConvTranspose2d(4, 6, 3), padding_mode='bogus')(x2)", ValueError, (), ("padding_mode", "bogus")),
        Row("unknown", "conv#d(x#, w#, padding_mode='bogus')", ValueError, (), ("padding_mode", "bogus", "zeros", "reflect", "replicate", "circular")),
        Row("upper-case", "conv2d(x2, w2, padding_mode='Reflect')", ValueError, (), ("padding_mode", "Reflect")),
        Row("none", "conv2d(x2, w2, padding_mode=None)", MODES, (), ("padding_mode", "None")),
        Row("number", "conv2d(x2, w2, padding_mode=1)", MODES, (), "padding_mode"),
        Row("positional", "conv#d(x#, w#, None, 1, 0, 1, 1, 'reflect')", TypeError, (), "conv#d()"),
        Row("reflect-too-far", "conv#d(x#, w#, padding=8, padding_mode='reflect')", RuntimeError, (), "Padding size should be less than the corresponding input dimension, but got: padding (8, 8)"),
        Row("reflect-same-too-far", "conv2d(x2, w2, padding='same', dilation=8, padding_mode='reflect')", RuntimeError, (), REFLECT),
        Row("reflect-same-even-too-far", "conv1d(t(2, 4, 2), t(6, 4, 4), padding='same', padding_mode='reflect')", RuntimeError, (), REFLECT),
        Row("circular-too-far", "conv#d(x#, w#, padding=9, padding_mode='circular')", RuntimeError, (), CIRCULAR),
        Row("replicate-empty", "conv#d(x#[..., :0], w#, padding=2, padding_mode='replicate')", RuntimeError, (), "[2, 4, "),
        Row("negative", "conv#d(x#, w#, padding=-1, padding_mode='reflect')", RuntimeError, (), PADDING),
        Row("kernel-larger", "conv2d(x2, w2, padding=1, dilation=9, padding_mode='replicate')", RuntimeError, (), "(10 x 10). Kernel size: (19 x 19). Kernel size can't be greater"),
        Row("channels", "conv2d(t(2, 3, 8, 8), w2, padding=1, padding_mode='circular')", RuntimeError, (), channels(4, 3)),
        Row("stride-0", "conv2d(x2, w2, stride=0, padding=1, padding_mode='circular')", RuntimeError, (), STRIDE),
        Row("input-none", "conv2d(None, w2, padding=1, padding_mode='circular')", TypeError, (), ("input", "NoneType", "Tensor")),
        Row("padding-float", "conv2d(x2, w2, padding=1.5, padding_mode='circular')", TypeError, (), ("padding", "float", INT)),
        Row("unknown-string", "conv2d(x2, w2, padding='full', padding_mode='circular')", RuntimeError, (), "Invalid padding string: 'full'"),
    ]
)

# ---- the operators themselves

_PARAMETERS = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1, "padding_mode": 0}
LEGAL = {
    "conv_forward": {"input": t(2, 4, 8, 8), "weight": t(6, 4, 3, 3), "bias": t(6), "output_size": [6, 6], **_PARAMETERS},
    "conv_backward_input": {"grad_output": t(2, 6, 6, 6), "weight": t(6, 4, 3, 3), "bias": t(4), "input_size": [8, 8], **_PARAMETERS},
    "conv_backward_weight": {"grad_output": t(2, 6, 6, 6), "input": t(2, 4, 8, 8), "kernel_size": [3, 3], **_PARAMETERS},
    "conv_backward": {"grad_output": t(2, 6, 6, 6), "input": t(2, 4, 8, 8), "weight": t(6, 4, 3, 3), **_PARAMETERS, "output_mask": [True, True, True]},
}
MISSING = object()  # as a value: the argument is left out

_CHANGES = {  # of every operator that has the arguments
    "stride-1-number": ({"stride": [1]}, "stride"),
    "stride-3-numbers": ({"stride": [1, 1, 1]}, "stride"),
    "stride-no-numbers": ({"stride": []}, "stride"),
    "stride-0": ({"stride": [0, 1]}, "stride"),
    "stride-negative": ({"stride": [1, -1]}, "stride"),
    "stride-str": ({"stride": "same"}, "stride"),
    "stride-float": ({"stride": [1.5, 1.5]}, "stride"),
    "padding-1-number": ({"padding": [0]}, "padding"),
    "padding-3-numbers": ({"padding": [0, 0, 0]}, "padding"),
    "padding-negative": ({"padding": [0, -1]}, "padding"),
    "padding-int64-max": ({"padding": [2**63 - 1, 0]}, "padding"),
    "padding-string": ({"padding": "same"}, "padding"),
    "dilation-1-number": ({"dilation": [1]}, "dilation"),
    "dilation-3-numbers": ({"dilation": [1, 1, 1]}, "dilation"),
    "dilation-0": ({"dilation": [1, 0]}, "dilation"),
    "dilation-negative": ({"dilation": [-1, 1]}, "dilation"),
    "dilation-overflow": ({"dilation": [2**62, 1]}, ()),
    "stride-overflow": ({"stride": [2**62, 1]}, ()),
    "all-lists-1-number": ({"stride": [1], "padding": [0], "dilation": [1]}, ()),
    "groups-0": ({"groups": 0}, "groups"),
    "groups-negative": ({"groups": -1}, "groups"),
    "groups-3": ({"groups": 3}, ()),
    "groups-huge": ({"groups": 2**62}, ()),
    "groups-none": ({"groups": None}, "groups"),
    "padding-mode-9": ({"padding_mode": 9}, ("padding_mode", "9")),
    "padding-mode-negative": ({"padding_mode": -1}, ("padding_mode", "-1")),
    "padding-mode-str": ({"padding_mode": "zeros"}, "padding_mode"),
    "reflect-too-far": ({"padding_mode": 1, "padding": [8, 0]}, re.compile("padding", re.I)),
    "circular-too-far": ({"padding_mode": 3, "padding": [0, 9]}, re.compile("padding", re.I)),
    "input-none": ({"input": None}, "input"),
    "input-0d": ({"input": t()}, "input"),
    "input-3d": ({"input": t(4, 8, 8)}, ()),
    "input-5d": ({"input": t(2, 4, 8, 8, 8)}, ()),
    "input-channels": ({"input": t(2, 3, 8, 8)}, "channels"),
    "input-f64": ({"input": t(2, 4, 8, 8, dtype=torch.float64)}, ()),
    "weight-none": ({"weight": None}, "weight"),
    "weight-0d": ({"weight": t()}, "weight"),
    "weight-2d": ({"weight": t(6, 4)}, "weight"),
    "weight-3d": ({"weight": t(6, 4, 3)}, "weight"),
    "weight-5d": ({"weight": t(6, 4, 3, 3, 3)}, "weight"),
    "weight-channels": ({"weight": t(6, 5, 3, 3)}, ()),
    "weight-no-kernel": ({"weight": t(6, 4, 0, 3)}, ()),
    "weight-f64": ({"weight": t(6, 4, 3, 3, dtype=torch.float64)}, "weight"),
    "weight-bf16": ({"weight": t(6, 4, 3, 3, dtype=torch.bfloat16)}, "weight"),
    "bias-0d": ({"bias": t()}, "bias"),
    "bias-long": ({"bias": t(7)}, "bias"),
    "bias-2d": ({"bias": t(6, 1)}, "bias"),
    "bias-f64": ({"bias": t(6, dtype=torch.float64)}, "bias"),
    "grad-none": ({"grad_output": None}, "grad_output"),
    "grad-0d": ({"grad_output": t()}, ()),
    "grad-3d": ({"grad_output": t(6, 6, 6)}, ()),
    "grad-5d": ({"grad_output": t(2, 6, 6, 6, 6)}, ()),
    "grad-channels": ({"grad_output": t(2, 5, 6, 6)}, ()),
    "grad-f64": ({"grad_output": t(2, 6, 6, 6, dtype=torch.float64)}, ()),
    "output-size-1-number": ({"output_size": [6]}, re.compile("output.size", re.I)),
    "output-size-3-numbers": ({"output_size": [6, 6, 6]}, re.compile("output.size", re.I)),
    "output-size-no-numbers": ({"output_size": []}, re.compile("output.size", re.I)),
    "output-size-negative": ({"output_size": [6, -1]}, "negative"),
    "output-size-overflow": ({"output_size": [2**40, 2**40]}, ()),
    "output-size-int64-max": ({"output_size": [2**63 - 1, 6]}, ()),
    "input-size-1-number": ({"input_size": [8]}, re.compile("input.size", re.I)),
    "input-size-3-numbers": ({"input_size": [8, 8, 8]}, re.compile("input.size", re.I)),
    "input-size-negative": ({"input_size": [-1, 8]}, "negative"),
    "input-size-overflow": ({"input_size": [2**40, 2**40]}, ()),
    "kernel-size-1-number": ({"kernel_size": [3]}, re.compile("size")),
    "kernel-size-3-numbers": ({"kernel_size": [3, 3, 3]}, re.compile("size")),
    "kernel-size-negative": ({"kernel_size": [3, -1]}, re.compile("size")),
    "kernel-size-overflow": ({"kernel_size": [2**40, 2**40]}, ()),
    "output-mask-1": ({"output_mask": [True]}, ()),
    "output-mask-4": ({"output_mask": [True] * 4}, ()),
    "unknown": ({"bogus": 1}, "argument"),
    "stride-missing": ({"stride": MISSING}, "stride"),
}
# What only some operators can notice: the same sizes are legal elsewhere.
_ONE_OPERATOR = [
    Operator("reflect-reaches-too-far", "conv_forward", {"padding_mode": 1, "output_size": [20, 6]}, ()),
    Operator("circular-reaches-too-far", "conv_forward", {"padding_mode": 3, "output_size": [15, 6]}, ()),
    Operator("replicate-empty", "conv_forward", {"padding_mode": 2, "input": t(2, 4, 0, 8)}, ()),
    Operator("batch", "conv_backward_weight", {"grad_output": t(3, 6, 6, 6)}, re.compile("batch", re.I)),
    Operator("batch", "conv_backward", {"grad_output": t(3, 6, 6, 6)}, re.compile("batch", re.I)),
    Operator("weight-none-out-channels", "conv_forward", {"weight": t(0, 4, 3, 3), "bias": None}, "weight"),
]
# What sizes do not tell: a meta tensor may pass, as it may with a size that memory cannot hold.
_CPU_ONLY = [
    Operator("bool", "conv_forward", {"input": t(2, 4, 8, 8).bool(), "weight": t(6, 4, 3, 3).bool(), "bias": None}, "Bool"),
    Operator("input-sparse", "conv_forward", {"input": t(2, 4, 8, 8).to_sparse()}, ()),
    Operator("weight-sparse", "conv_forward", {"weight": t(6, 4, 3, 3).to_sparse()}, ()),
]


# It takes its channels from these two.
_LEGAL_AFTER_ALL = {("conv_backward_weight", "input-channels"), ("conv_backward_weight", "grad-channels")}


def _operators() -> dict[str, list[Operator]]:
    rows = list(_ONE_OPERATOR)
    for op, legal in LEGAL.items():
        for name, (change, words) in _CHANGES.items():
            if (name == "unknown" or legal.keys() >= change.keys()) and (op, name) not in _LEGAL_AFTER_ALL:
                rows.append(Operator(name, op, change, words))
    meta = [row for row in rows if not re.search("overflow|int64-max", row.id)]
    return {
        "cpu": [row._replace(id=f"{row.op}-{row.id}") for row in rows + _CPU_ONLY],
        "meta": [row._replace(id=f"{row.op}-{row.id}-meta") for row in meta],
    }


OPERATORS = _operators()
