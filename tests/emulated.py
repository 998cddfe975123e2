"""The CUDA kernels of csrc/cuda/, compiled by the host's compiler and run on the CPU: see docs/emulator.md."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import pathlib
import shutil
import subprocess
import tempfile
from collections.abc import Sequence

import pytest
import torch

from cases import DIRECTIONS, Problem
from conftest import fenced, guarded
from mutants import Edit

ROOT = pathlib.Path(__file__).parent.parent
CACHE = ROOT / "build" / "emulator"
HEADERS = [
    ROOT / "csrc/conv_shape.h",
    *sorted((ROOT / "csrc/cuda").glob("*.*h")),
    *sorted((ROOT / "tests/emulator").glob("*.h")),
]
CONVOLUTIONS = ("csrc/cuda/direct.cu", "tests/emulator/kernels.cpp")
SCHEDULES = ("forward", "reverse", "random", "warps")  # the index is emulator.cpp's enum
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # the index is conv_shape.h's enum
DTYPES += (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class KernelError(RuntimeError):
    """The emulator refused a launch, or stopped one."""


# ----------------------------------------------------------------------------------------------------- building


@functools.cache
def compiler() -> list[str]:
    command = os.environ.get("CXX", "c++").split()
    if shutil.which(command[0]) is None:
        pytest.skip("needs a C++ compiler: it compiles the CUDA kernels for the CPU")
    return [*command, "-std=c++20", "-O1", "-fPIC", "-DMYCONV_EMULATOR"]


def build(output: str, inputs: Sequence[str | pathlib.Path], options: Sequence[str]) -> pathlib.Path:
    """A file in the cache, named after all it is made from."""
    digest = hashlib.sha256(repr((compiler(), options, [str(path) for path in inputs])).encode())
    for path in (*HEADERS, *inputs):
        digest.update((ROOT / path).read_bytes())
    stem, suffix = output.split(".")
    result = CACHE / f"{stem}-{digest.hexdigest()[:16]}.{suffix}"
    if not result.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            product = pathlib.Path(folder, output)
            includes = ["-I", ROOT / "csrc", "-I", ROOT / "tests/emulator"]
            done = subprocess.run(
                [*compiler(), *includes, *options, *inputs, "-o", product], cwd=ROOT, capture_output=True, text=True
            )
            if done.returncode:
                raise RuntimeError(done.stderr)
            product.replace(result)  # at once, so that no other process sees half of it
    return result


def edited(path: str, edits: Sequence[Edit]) -> pathlib.Path:
    """The file, or a copy with the edits made."""
    text = (ROOT / path).read_text()
    for old, new in edits:
        if text.count(old) != 1:
            raise LookupError(f"{path} has {old!r} {text.count(old)} times, not once")
        text = text.replace(old, new)
    if not edits:
        return ROOT / path
    CACHE.mkdir(parents=True, exist_ok=True)
    copy = CACHE / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}{pathlib.Path(path).suffix}"
    copy.write_text(text)
    return copy


def library(*sources: str, edits: Sequence[Edit] = (), options: Sequence[str] = ()) -> ctypes.CDLL:
    """The emulator with kernels: to the first file the edits are made, and it is compiled with the options."""
    first, *others = sources
    objects = [build("kernels.o", [edited(first, edits)], ["-c", *options, "-x", "c++"])]
    for path in ("tests/emulator/emulator.cpp", *others):
        objects.append(build(f"{pathlib.Path(path).stem}.o", [path], ["-c", "-x", "c++"]))
    # Its symbols are its own, whatever else of this process has the same names: myconv._C does.
    loaded = ctypes.CDLL(str(build("kernels.so", objects, ["-shared", "-Wl,-Bsymbolic"])))
    loaded.emulator_error.restype = ctypes.c_char_p
    return loaded


def call(loaded: ctypes.CDLL, function: str, *arguments: object, schedule: str = "forward", seed: int = 0) -> None:
    """Runs an entry of the library under a schedule."""
    loaded.emulator_schedule(SCHEDULES.index(schedule), ctypes.c_uint(seed))
    status = getattr(loaded, function)(*arguments)
    assert status >= 0, f"{function} does not know {arguments}"
    if status:
        raise KernelError(loaded.emulator_error().decode())


# -------------------------------------------------------------------------------------------------- convolutions


class ConvShape(ctypes.Structure):  # csrc/conv_shape.h
    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "groups", "in_per_group", "out_per_group")]
    _fields_ += [(name, ctypes.c_int64 * 3) for name in ("in", "out", "kernel", "stride", "pad", "dilation")]
    _fields_ += [("weight_stride", ctypes.c_int64 * 5)]
    _fields_ += [(name, ctypes.c_int8) for name in ("dtype", "layout", "padding_mode")]


class ConvPointers(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_void_p) for name in ("input", "weight", "bias", "grad_output", "result", "stream", "grad_bias")
    ]


def conv_shape(problem: Problem, dtype: torch.dtype, channels_last: bool, weight_strides: Sequence[int]) -> ConvShape:
    def axes(values: Sequence[int], absent: int = 1) -> tuple[int, ...]:
        return (*[absent] * (3 - len(values)), *values)

    sizes = (problem.input_size[2:], problem.output_size, problem.weight_size[2:], problem.stride)
    padded = [axes(values) for values in (*sizes, problem.padding, problem.dilation)]
    padded[4] = axes(problem.padding, absent=0)
    channels = (problem.weight_size[1], problem.weight_size[0] // problem.groups)
    strides = (*weight_strides[:2], *axes(weight_strides[2:], absent=0))
    kinds = (DTYPES.index(dtype), channels_last, problem.padding_mode)
    return ConvShape(problem.input_size[0], problem.groups, *channels, *padded, strides, *kinds)


def run_row(
    loaded: ctypes.CDLL,
    row: str,
    direction: str,
    x: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor | None,
    y: torch.Tensor,
    problem: Problem,
    *,
    channels_last: bool = False,
    schedule: str = "forward",
    seed: int = 0,
) -> torch.Tensor:
    """run_operator of conftest.py by a CUDA kernel: all it touches is guarded, on one side in schedules of odd index
    and on the other in the rest, and what it is to write is poisoned. x and y are dense in the layout named.
    """
    end = SCHEDULES.index(schedule) % 2 == 0
    result = fenced({"forward": y, "backward_input": x, "backward_weight": w}[direction], end)
    used = {"forward": (x, w, b, None), "backward_input": (None, w, b, y), "backward_weight": (x, None, None, y)}
    operands = [None if t is None else guarded(t, end) for t in used[direction]]
    pointers = ConvPointers(*[None if t is None else t.data_ptr() for t in (*operands, result)])
    shape = conv_shape(problem, x.dtype, channels_last, w.stride())
    arguments = (row.encode(), DIRECTIONS.index(direction), ctypes.byref(shape), ctypes.c_size_t(ctypes.sizeof(shape)))
    call(loaded, "emulate", *arguments, ctypes.byref(pointers), schedule=schedule, seed=seed)
    return result.clone()
