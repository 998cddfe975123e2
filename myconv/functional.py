"""Convolutions with the signatures of :mod:`torch.nn.functional`, and more kinds of padding.

``padding`` is an int, or has an entry for each axis: an int, or a pair ``(low, high)`` of amounts for its two sides.
``conv1d`` .. ``conv3d`` also take ``'valid'`` and ``'same'``, and ``conv1d`` takes ``'causal'``, which pads
``dilation * (kernel_size - 1)`` on the low side alone. ``padding_mode`` is ``'zeros'``, ``'reflect'``, ``'replicate'``
or ``'circular'``; a transposed convolution with a mode is the adjoint of the convolution with that mode.

``conv1d`` .. ``conv_transpose3d`` are C functions. A plain call never enters Python; any other one (a padding string,
a tensor subclass, a mode, a NumPy int as parameter) goes to the Python function of the same name that is made and
registered below, which is also what Dynamo traces. Both end in one of two operators::

    conv_forward(input, weight, bias, output_size, stride, padding, dilation, groups, padding_mode)
    conv_backward_input(input, weight, bias, output_size, ...)        # a transposed convolution

The operators are told the spatial size of their result, so their ``padding`` is only the low side, and no kind of
padding needs a padded copy.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.overrides import handle_torch_function, has_torch_function

from . import _C

__all__ = ["conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"]

conv1d, conv2d, conv3d = _C.conv1d, _C.conv2d, _C.conv3d
conv_transpose1d, conv_transpose2d, conv_transpose3d = _C.conv_transpose1d, _C.conv_transpose2d, _C.conv_transpose3d

PADDING_MODES = {"zeros": 0, "reflect": 1, "replicate": 2, "circular": 3}  # the values of csrc/conv_shape.h


def _integer(function: str, argument: str, value, legal: str = "int or tuple of ints") -> Any:
    if isinstance(value, (int, SymInt)) and not isinstance(value, bool):
        return value
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise TypeError(f"{function}(): argument '{argument}' must be {legal}, not {type(value).__name__}")


def _axes(function: str, argument: str, value, rank: int, legal: str = "int or tuple of ints") -> list[int]:
    """The value of one parameter as a list: of one entry for each axis where the caller's length allows it."""
    if isinstance(value, (tuple, list)):
        # As in torch, which looks at the first entry more closely, a bool may be any other.
        entries = [
            int(v) if isinstance(v, bool) and i > 0 else _integer(function, argument, v, legal)
            for i, v in enumerate(value)
        ]
    else:
        entries = [_integer(function, argument, value, legal)]
    for entry in entries:
        if isinstance(entry, int) and not -(2**63) < entry < 2**63:
            error = TypeError if isinstance(value, (tuple, list)) else ValueError
            raise error(f"{function}(): argument '{argument}': Overflow when unpacking long long, got {entry}")
    return entries * rank if len(entries) == 1 else entries


def _sides(function: str, value, rank: int) -> tuple[list[int], list[int]]:
    """The low and high sides of ``padding``, each as from :func:`_axes`."""
    if not isinstance(value, (tuple, list)) or not any(isinstance(entry, (tuple, list)) for entry in value):
        low = _axes(function, "padding", value, rank)
        return low, low
    legal = "int or tuple of ints and (low, high) pairs of ints"
    if any(isinstance(entry, (tuple, list)) and len(entry) != 2 for entry in value):
        raise TypeError(f"{function}(): argument 'padding' must be {legal}, not {value!r}")
    pairs = [_axes(function, "padding", entry, 2, legal) for entry in value]
    low, high = ([pair[side] for pair in pairs] for side in (0, 1))
    return (low * rank, high * rank) if len(pairs) == 1 else (low, high)


def _tensor(function: str, argument: str, value) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{function}(): argument '{argument}' must be Tensor, not {type(value).__name__}")


def _shape(tensor: Tensor) -> tuple[int, ...]:
    """The sizes as ints: under torch.jit.trace they are tensors, and an operator's list wants ints."""
    return tuple(map(int, tensor.shape)) if torch.jit.is_tracing() else tuple(tensor.shape)


def _concrete(*sizes: Sequence[int]) -> bool:
    return all(type(entry) is int for size in sizes for entry in size)


def _named_padding(name, rank, padding: str, input, weight, stride, dilation) -> tuple[list[int], list[int]]:
    """The sides of ``'valid'``, ``'same'`` (an odd total has its larger half on the high side) and ``'causal'``."""
    nothing = [0] * rank
    if input.dim() not in (rank + 1, rank + 2):
        return nothing, nothing  # the check that follows refuses the call
    if padding == "causal" and rank > 1:
        raise RuntimeError(
            f"padding='causal' is for conv1d: {name} has {rank} axes and cannot know which is time. Give (low, high) "
            f"pairs, for example padding=((dilation * (kernel_size - 1), 0){', (0, 0)' * (rank - 1)})"
        )
    if padding not in ("valid", "same", "causal"):
        legal = "'same', 'valid', 'causal'" if rank == 1 else "'same', 'valid'"
        raise RuntimeError(f"Invalid padding string: '{padding}', should be one of {legal}")
    if padding == "valid" or weight.dim() != rank + 2:
        return nothing, nothing
    for argument, values in (("stride", stride), ("dilation", dilation)):
        if len(values) != rank:
            raise RuntimeError(f"{argument} cannot broadcast to {rank} dimensions: got {argument}={tuple(values)}")
    # max: a negative dilation is for the check to refuse, in its own words
    total = [max(0, d * (k - 1)) for d, k in zip(dilation, _shape(weight)[2:])]
    if padding == "causal":
        return total, nothing
    if any(s != 1 for s in stride):
        raise RuntimeError(f"padding='same' is not supported for strided convolutions, got stride={tuple(stride)}")
    low = [t // 2 for t in total]
    return low, [t - before for t, before in zip(total, low)]


def _convolve(
    name, rank, transposed, input, weight, bias, stride, padding, output_padding, dilation, groups, padding_mode
):
    _tensor(name, "input", input)
    _tensor(name, "weight", weight)
    if bias is not None:
        _tensor(name, "bias", bias)
    if padding_mode not in PADDING_MODES:
        modes = ", ".join(map(repr, PADDING_MODES))
        raise ValueError(f"padding_mode must be one of {modes}, but got padding_mode={padding_mode!r}")
    groups = _axes(name, "groups", _integer(name, "groups", groups, "int"), 1)[0]
    stride = _axes(name, "stride", stride, rank)
    dilation = _axes(name, "dilation", dilation, rank)
    output_padding = _axes(name, "output_padding", output_padding, rank)
    named = isinstance(padding, str) and not transposed
    low, high = ([0] * rank, [0] * rank) if named else _sides(name, padding, rank)
    if not torch.compiler.is_compiling():
        _C.check_storage(input, weight, bias)  # after the types of all arguments, as in torch
    if named:
        low, high = _named_padding(name, rank, padding, input, weight, stride, dilation)

    mode = PADDING_MODES[padding_mode]
    shapes = [_shape(input), _shape(weight), None if bias is None else _shape(bias)]
    parameters = [stride, low, high, output_padding, dilation]
    if not torch.compiler.is_compiling() and _concrete(*(s or () for s in shapes), *parameters, [groups]):
        size = _C.check_call(name, rank, transposed, *shapes, *parameters, groups, mode)
    else:
        size = _result_size(rank, transposed, input, weight, *parameters, mode)

    batched = input.dim() == rank + 2
    x = input if batched else input.unsqueeze(0)
    op = torch.ops.myconv.conv_backward_input if transposed else torch.ops.myconv.conv_forward
    y = op(x, weight, bias, size, stride, low, dilation, groups, mode)
    if not transposed and x.shape[1] == 0:
        y = y.narrow(1, 0, 0)  # torch gives a convolution over no channels no channels
    return y if batched else y.squeeze(0)


def _result_size(rank, transposed, input, weight, stride, low, high, output_padding, dilation, mode) -> list[int]:
    """The formula of csrc/checks.cpp, with its checks, for sizes that only Python can follow: symbolic ones."""
    size = []
    empty = math.prod(input.shape[:-rank]) == 0
    if transposed:
        torch._check(weight.shape[1] > 0, lambda: "expected weight to have out channels")
    for i in range(rank):
        extent, reach = input.shape[i - rank], dilation[i] * (weight.shape[i + 2] - 1)
        torch._check((extent > 0) | empty, lambda: "Only zero batch or zero channel inputs are supported")
        if transposed:
            torch._check(
                (output_padding[i] < stride[i]) | (output_padding[i] < dilation[i]),
                lambda: "output padding must be smaller than either stride or dilation",
            )
            size.append((extent - 1) * stride[i] - low[i] - high[i] + reach + output_padding[i] + 1)
        else:
            size.append((extent + low[i] + high[i] - reach - 1) // stride[i] + 1)
        torch._check(size[i] > 0, lambda: "the kernel does not fit the input: the output size is too small")
        most, padded = max(low[i], high[i]), size[i] if transposed else extent
        if mode == PADDING_MODES["reflect"]:
            torch._check(most < padded, lambda: "Padding size should be less than the corresponding input dimension")
        elif mode == PADDING_MODES["circular"]:
            torch._check(most <= padded, lambda: "Padding value causes wrapping around more than once")
    return size


def _conv_function(rank: int, entry):
    name = entry.__name__

    def conv(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, *, padding_mode="zeros"):
        tensors = (input, weight, bias)
        if has_torch_function(tensors):
            return handle_torch_function(
                entry, tensors, input, weight, bias, stride, padding, dilation, groups, padding_mode=padding_mode
            )
        return _convolve(name, rank, False, input, weight, bias, stride, padding, 0, dilation, groups, padding_mode)

    return conv


def _conv_transpose_function(rank: int, entry):
    name = entry.__name__

    def conv_transpose(
        input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1, *, padding_mode="zeros"
    ):
        tensors = (input, weight, bias)
        if has_torch_function(tensors):
            arguments = (input, weight, bias, stride, padding, output_padding, groups, dilation)
            return handle_torch_function(entry, tensors, *arguments, padding_mode=padding_mode)
        return _convolve(
            name, rank, True, input, weight, bias, stride, padding, output_padding, dilation, groups, padding_mode
        )

    return conv_transpose


def _register(entry, function) -> None:
    function.__name__ = function.__qualname__ = entry.__name__
    _C.set_general(entry.__name__, function)
    torch.compiler.substitute_in_graph(entry, skip_signature_check=True)(function)


for _rank, _conv, _conv_transpose in (
    (1, conv1d, conv_transpose1d),
    (2, conv2d, conv_transpose2d),
    (3, conv3d, conv_transpose3d),
):
    _register(_conv, _conv_function(_rank, _conv))
    _register(_conv_transpose, _conv_transpose_function(_rank, _conv_transpose))
