"""torch.nn's convolution modules, computed by myconv.

Each class subclasses its namesake in torch.nn and inherits everything (attributes, initial values, repr,
state_dict, pickling); only the functional call differs. ``padding_mode`` is applied inside the operator, so no
padded copy of the input is made.

The constructors have torch's arguments and take more kinds of padding: see :func:`_constructor`.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from myconv import functional

__all__ = ["Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"]


# ---- what the classes share


def _weight_and_bias(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """``module.weight, module.bias``, read where they are.

    nn.Module finds a parameter only after the ordinary lookup has failed, in ``__getattr__``: that costs
    several times as much as the rest of the method. A subclass may define ``weight`` as a property
    (parametrizations do), and pruning and weight_norm keep it as a plain attribute: these are read in the
    ordinary way.
    """
    state = module.__dict__
    if type(module) in _CLASSES and "weight" not in state and "bias" not in state:
        parameters = state["_parameters"]
        try:
            return parameters["weight"], parameters["bias"]
        except KeyError:  # a buffer, or deleted
            pass
    return module.weight, module.bias


def _convolve_padded(convolve, module, input: Tensor, weight: Tensor, bias: Tensor | None, rank: int) -> Tensor:
    """Convolve with a padding mode other than zeros.

    As in torch, the amounts come from ``_reversed_padding_repeated_twice`` (low and high side of the last
    dimension, then of the one before), which assigning ``padding`` later does not change and which some
    models set by hand. The operator pads as it reads. Negative amounts, which crop, are applied ahead of it, as
    torch does.
    """
    mode, stride, dilation = module.padding_mode, module.stride, module.dilation
    if isinstance(input, Tensor) and input.dim() not in (
        rank + 1,
        rank + 2,
    ):  # the type torch's padding raises
        raise NotImplementedError(
            f"Expected {rank + 1}D (unbatched) or {rank + 2}D (batched) input to conv{rank}d, "
            f"but got input of size: {list(input.shape)}"
        )
    amounts = module._reversed_padding_repeated_twice
    low, high = tuple(amounts[-2::-2]), tuple(amounts[::-2])
    if min(amounts) < 0:
        input = nn.functional.pad(input, amounts, mode=mode)
        return convolve(input, weight, bias, stride, (0,) * len(low), dilation, module.groups)
    padding = low if low == high else tuple(zip(low, high))
    return convolve(input, weight, bias, stride, padding, dilation, module.groups, padding_mode=mode)


def _convolve_transposed(convolve, module, input: Tensor, output_size: list[int] | None, rank: int) -> Tensor:
    padding, output_padding = module.padding, module.output_padding
    if not isinstance(padding, tuple):
        raise AssertionError("self.padding must be a tuple")
    if output_size is not None:
        # Torch's search knows one amount of padding an axis. It needs the extent of the dilated kernel less both sides,
        # which an undilated kernel of that extent without padding has too.
        sides = [sum(p) if isinstance(p, tuple) else 2 * p for p in padding]
        extents = [d * (k - 1) + 1 - p for d, k, p in zip(module.dilation, module.kernel_size, sides)]
        nothing, once = (0,) * rank, (1,) * rank
        output_padding = tuple(module._output_padding(input, output_size, module.stride, nothing, extents, rank, once))
    weight, bias = _weight_and_bias(module)
    parameters = (module.stride, padding, output_padding, module.groups, module.dilation)
    if module.padding_mode != "zeros":
        return convolve(input, weight, bias, *parameters, padding_mode=module.padding_mode)
    return convolve(input, weight, bias, *parameters)


P = ParamSpec("P")
M = TypeVar("M", bound=nn.modules.conv._ConvNd)


def _constructor(init: Callable[Concatenate[M, P], None]) -> Callable[Concatenate[M, P], None]:
    """Torch's constructor ``init``, with padding that torch's does not take.

    ``padding`` may hold a pair ``(low, high)`` for an axis, ``Conv1d`` takes ``padding='causal'``, and transposed
    convolutions take every ``padding_mode``. The attribute ``padding`` then has a pair for every axis, or
    ``'causal'``.
    """
    signature = inspect.signature(init)

    @functools.wraps(init)
    def __init__(self: M, *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            call = signature.bind(self, *args, **kwargs)
        except TypeError:
            return init(self, *args, **kwargs)  # raises in torch's words
        padding = call.arguments.get("padding", 0)
        mode = call.arguments.get("padding_mode", "zeros")
        transposed = isinstance(self, nn.modules.conv._ConvTransposeNd)
        pairs = isinstance(padding, (tuple, list)) and any(isinstance(entry, (tuple, list)) for entry in padding)
        causal = padding == "causal" and not transposed
        if causal and not isinstance(self, nn.Conv1d):
            raise ValueError(
                "padding='causal' is for Conv1d: more axes do not tell which is time. Give (low, high) pairs, for "
                "example padding=((dilation * (kernel_size - 1), 0), (0, 0)) for Conv2d"
            )
        if causal or pairs:
            call.arguments["padding"] = 0
        if transposed:
            call.arguments["padding_mode"] = "zeros"
            if mode not in functional.PADDING_MODES:
                modes = ", ".join(map(repr, functional.PADDING_MODES))
                raise ValueError(f"padding_mode must be one of {modes}, but got padding_mode={mode!r}")
        init(*call.args, **call.kwargs)
        self.padding_mode = mode
        rank = len(self.kernel_size)
        if pairs:
            sides = [entry if isinstance(entry, (tuple, list)) else (entry, entry) for entry in padding]
            if len(sides) not in (1, rank) or any(len(pair) != 2 for pair in sides):
                raise ValueError(
                    f"padding must have {rank} entries, each an int or a (low, high) pair, got {padding!r}"
                )
            self.padding = tuple(map(tuple, sides * (rank // len(sides))))
        elif causal:
            self.padding = padding
            sides = [(self.dilation[0] * (self.kernel_size[0] - 1), 0)]
        if pairs or causal:
            self._reversed_padding_repeated_twice = [
                side for pair in reversed(self.padding if pairs else sides) for side in pair
            ]

    return __init__


# ---- TorchScript
# It cannot compile the methods below, but it compiles a method from the source of its __wrapped__, if it has
# one. So these functions are what a scripted module runs; eager calls never reach them and need no
# is_scripting() branch.


def _each_axis(values: list[int], rank: int) -> list[int]:
    return values * rank if len(values) == 1 else values


def _scripted_conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    low: list[int],
    high: list[int],
    dilation: list[int],
    groups: int,
    padding_mode: str,
) -> Tensor:
    batched = input.dim() == weight.dim()
    x = input if batched else input.unsqueeze(0)
    rank = weight.dim() - 2
    stride, dilation = _each_axis(stride, rank), _each_axis(dilation, rank)
    low, high = _each_axis(low, rank), _each_axis(high, rank)
    size: list[int] = []
    for i in range(rank):
        reach = dilation[i] * (weight.size(i + 2) - 1) + 1
        size.append((x.size(i + 2) + low[i] + high[i] - reach) // stride[i] + 1)
        if size[i] < 1:
            raise RuntimeError("Kernel size can't be greater than actual input size")
    mode = ["zeros", "reflect", "replicate", "circular"].index(padding_mode)
    y = torch.ops.myconv.conv_forward(x, weight, bias, size, stride, low, dilation, groups, mode)
    if x.size(1) == 0:
        y = y.narrow(1, 0, 0)
    return y if batched else y.squeeze(0)


def _scripted_conv_transpose(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    low: list[int],
    high: list[int],
    output_padding: list[int],
    groups: int,
    dilation: list[int],
    padding_mode: str,
) -> Tensor:
    batched = input.dim() == weight.dim()
    x = input if batched else input.unsqueeze(0)
    rank = weight.dim() - 2
    stride, dilation = _each_axis(stride, rank), _each_axis(dilation, rank)
    low, high = _each_axis(low, rank), _each_axis(high, rank)
    output_padding = _each_axis(output_padding, rank)
    size: list[int] = []
    for i in range(rank):
        reach = dilation[i] * (weight.size(i + 2) - 1) + 1
        size.append((x.size(i + 2) - 1) * stride[i] - low[i] - high[i] + reach + output_padding[i])
        if size[i] < 1:
            raise RuntimeError("Output size is too small")
    mode = ["zeros", "reflect", "replicate", "circular"].index(padding_mode)
    y = torch.ops.myconv.conv_backward_input(x, weight, bias, size, stride, low, dilation, groups, mode)
    return y if batched else y.squeeze(0)


def _amounts(amounts: list[int], side: int) -> list[int]:
    """One side of ``_reversed_padding_repeated_twice``, in the order of the axes."""
    sides: list[int] = []
    for i in range(len(amounts) // 2):
        sides.insert(0, amounts[2 * i + side])
    return sides


def _scripted_conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None):
    low = _amounts(self._reversed_padding_repeated_twice, 0)
    high = _amounts(self._reversed_padding_repeated_twice, 1)
    if not isinstance(self.padding, str):
        if self.padding_mode == "zeros" and isinstance(self.padding[0], int):
            low = self.padding
            high = self.padding
    return _scripted_conv(input, weight, bias, self.stride, low, high, self.dilation, self.groups, self.padding_mode)


def _scripted_forward(self, input: Tensor) -> Tensor:
    return self._conv_forward(input, self.weight, self.bias)


def _scripted_forward_transposed(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
    low = _amounts(self._reversed_padding_repeated_twice, 0)
    high = _amounts(self._reversed_padding_repeated_twice, 1)
    if isinstance(self.padding[0], int):
        low = self.padding
        high = self.padding
    rank = len(self.kernel_size)
    low, high = _each_axis(low, rank), _each_axis(high, rank)
    dilation, kernel_size = _each_axis(self.dilation, rank), _each_axis(self.kernel_size, rank)
    extents: list[int] = []
    for i in range(rank):
        extents.append(dilation[i] * (kernel_size[i] - 1) + 1 - low[i] - high[i])
    output_padding = self._output_padding(input, output_size, self.stride, [0] * rank, extents, rank, [1] * rank)
    return _scripted_conv_transpose(
        input,
        self.weight,
        self.bias,
        self.stride,
        low,
        high,
        output_padding,
        self.groups,
        self.dilation,
        self.padding_mode,
    )


# ---- the classes


def _forward(self, input: Tensor) -> Tensor:
    weight, bias = _weight_and_bias(self)
    return self._conv_forward(input, weight, bias)  # looked up by name: subclasses and users replace it


_forward.__wrapped__ = _scripted_forward


class Conv1d(nn.Conv1d):
    """:class:`torch.nn.Conv1d`, with its arguments, state and errors, computed by myconv."""

    __init__ = _constructor(nn.Conv1d.__init__)
    forward = _forward

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None):
        if self.padding_mode != "zeros":
            return _convolve_padded(functional.conv1d, self, input, weight, bias, 1)
        return functional.conv1d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    _conv_forward.__wrapped__ = _scripted_conv_forward


class Conv2d(nn.Conv2d):
    """:class:`torch.nn.Conv2d`, with its arguments, state and errors, computed by myconv."""

    __init__ = _constructor(nn.Conv2d.__init__)
    forward = _forward

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None):
        if self.padding_mode != "zeros":
            return _convolve_padded(functional.conv2d, self, input, weight, bias, 2)
        return functional.conv2d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    _conv_forward.__wrapped__ = _scripted_conv_forward


class Conv3d(nn.Conv3d):
    """:class:`torch.nn.Conv3d`, with its arguments, state and errors, computed by myconv."""

    __init__ = _constructor(nn.Conv3d.__init__)
    forward = _forward

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None):
        if self.padding_mode != "zeros":
            return _convolve_padded(functional.conv3d, self, input, weight, bias, 3)
        return functional.conv3d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    _conv_forward.__wrapped__ = _scripted_conv_forward


class ConvTranspose1d(nn.ConvTranspose1d):
    """:class:`torch.nn.ConvTranspose1d`, with its arguments, state and errors, computed by myconv."""

    __init__ = _constructor(nn.ConvTranspose1d.__init__)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return _convolve_transposed(functional.conv_transpose1d, self, input, output_size, 1)

    forward.__wrapped__ = _scripted_forward_transposed


class ConvTranspose2d(nn.ConvTranspose2d):
    """:class:`torch.nn.ConvTranspose2d`, with its arguments, state and errors, computed by myconv."""

    __init__ = _constructor(nn.ConvTranspose2d.__init__)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return _convolve_transposed(functional.conv_transpose2d, self, input, output_size, 2)

    forward.__wrapped__ = _scripted_forward_transposed


class ConvTranspose3d(nn.ConvTranspose3d):
    """:class:`torch.nn.ConvTranspose3d`, with its arguments, state and errors, computed by myconv."""

    __init__ = _constructor(nn.ConvTranspose3d.__init__)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return _convolve_transposed(functional.conv_transpose3d, self, input, output_size, 3)

    forward.__wrapped__ = _scripted_forward_transposed


_CLASSES = frozenset({Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d})
