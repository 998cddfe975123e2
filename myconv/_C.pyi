"""The compiled module, csrc/python.cpp."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

_Ints: TypeAlias = int | Sequence[int]
_Padding: TypeAlias = int | Sequence[int | tuple[int, int]]
_PaddingMode: TypeAlias = Literal["zeros", "reflect", "replicate", "circular"]
_Direction: TypeAlias = Literal["forward", "backward_input", "backward_weight"] | str

def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Ints = 1,
    padding: _Padding | str = 0,
    dilation: _Ints = 1,
    groups: int = 1,
    *,
    padding_mode: _PaddingMode = "zeros",
) -> Tensor: ...
def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Ints = 1,
    padding: _Padding | str = 0,
    dilation: _Ints = 1,
    groups: int = 1,
    *,
    padding_mode: _PaddingMode = "zeros",
) -> Tensor: ...
def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Ints = 1,
    padding: _Padding | str = 0,
    dilation: _Ints = 1,
    groups: int = 1,
    *,
    padding_mode: _PaddingMode = "zeros",
) -> Tensor: ...
def conv_transpose1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Ints = 1,
    padding: _Padding = 0,
    output_padding: _Ints = 0,
    groups: int = 1,
    dilation: _Ints = 1,
    *,
    padding_mode: _PaddingMode = "zeros",
) -> Tensor: ...
def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Ints = 1,
    padding: _Padding = 0,
    output_padding: _Ints = 0,
    groups: int = 1,
    dilation: _Ints = 1,
    *,
    padding_mode: _PaddingMode = "zeros",
) -> Tensor: ...
def conv_transpose3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Ints = 1,
    padding: _Padding = 0,
    output_padding: _Ints = 0,
    groups: int = 1,
    dilation: _Ints = 1,
    *,
    padding_mode: _PaddingMode = "zeros",
) -> Tensor: ...

# For myconv itself.
def set_general(name: str, function: Callable[..., Tensor]) -> None: ...
def check_call(
    name: str,
    rank: int,
    transposed: bool,
    input: Sequence[int],
    weight: Sequence[int],
    bias: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    padding_high: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    padding_mode: int,
) -> list[int]: ...
def check_storage(input: Tensor, weight: Tensor, bias: Tensor | None) -> None: ...
def isas() -> list[str]: ...
def isa() -> str: ...
def cap_isa(name: str) -> None: ...
def isa_cap() -> str: ...
def openmp() -> bool: ...
def devices() -> list[str]: ...
def algorithms(direction: _Direction, device: str = "cpu") -> list[str]: ...
def force_algorithm(direction: _Direction, name: str | None) -> None: ...
def forced_algorithm(direction: _Direction) -> str | None: ...
def exclude_algorithms(names: list[str]) -> None: ...
def excluded_algorithms() -> list[str]: ...
def set_flush_denormals(enabled: bool) -> None: ...
def flush_denormals() -> bool: ...
def kept_memory() -> int: ...
def release_kept_memory() -> None: ...
def selection(
    direction: _Direction,
    input_size: Sequence[int],
    weight_size: Sequence[int],
    output_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    padding_mode: int,
    dtype: torch.dtype,
    channels_last: bool,
    device: str = "cpu",
    may_yield: bool = False,
) -> list[tuple[str, str]]: ...
def record(function: Callable[[], object]) -> list[dict[str, Any]]: ...
