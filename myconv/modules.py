"""torch.nn's convolution modules, computed by myconv.

Each class subclasses its namesake in torch.nn and inherits everything (attributes, initial values, repr,
state_dict, pickling); only the functional call differs. ``padding_mode`` is applied inside the operator, so no
padded copy of the input is made.

The constructors have torch's arguments and take more kinds of padding (docs/padding.md): a pair ``(low, high)`` for an
axis, ``padding='causal'`` in ``Conv1d``, and every ``padding_mode`` in transposed convolutions too. The attribute
``padding`` then has a pair for every axis, or is ``'causal'``.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from myconv import functional

__all__ = ["Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"]
__all__ += ["LazyConv1d", "LazyConv2d", "LazyConv3d"]
__all__ += ["LazyConvTranspose1d", "LazyConvTranspose2d", "LazyConvTranspose3d"]


# ---- what the classes share


def _weight_and_bias(module: Any) -> tuple[Tensor, Tensor | None]:
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
    if isinstance(input, Tensor) and input.dim() not in (rank + 1, rank + 2):  # the type torch's padding raises
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


# ---- TorchScript
# It cannot compile the methods below, but it compiles a method from the source of its __wrapped__, if it has
# one. So these functions are what a scripted module runs; eager calls never reach them and need no
# is_scripting() branch.

_Method = TypeVar("_Method", bound=Callable[..., Any])


def _scripted_as(twin: Callable[..., Any]) -> Callable[[_Method], _Method]:
    def mark(method: _Method) -> _Method:
        method.__wrapped__ = twin  # type: ignore[attr-defined]
        return method

    return mark


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
    size: list[int] = []
    for i in range(rank):
        reach = dilation[i] * (weight.size(i + 2) - 1) + 1
        size.append((x.size(i + 2) + low[i] + high[i] - reach) // stride[i] + 1)
        if size[i] < 1:
            raise RuntimeError("Kernel size can't be greater than actual input size")
        if x.size(i + 2) == 0 and x.size(0) != 0 and x.size(1) != 0:
            raise RuntimeError("Only zero batch or zero channel inputs are supported")
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
    if weight.size(1) == 0:
        raise RuntimeError("expected weight to have out channels")
    rank = weight.dim() - 2
    stride, dilation = _each_axis(stride, rank), _each_axis(dilation, rank)
    output_padding = _each_axis(output_padding, rank)
    size: list[int] = []
    for i in range(rank):
        reach = dilation[i] * (weight.size(i + 2) - 1) + 1
        size.append((x.size(i + 2) - 1) * stride[i] - low[i] - high[i] + reach + output_padding[i])
        if output_padding[i] >= stride[i] and output_padding[i] >= dilation[i]:
            raise RuntimeError("output padding must be smaller than either stride or dilation")
        if size[i] < 1:
            raise RuntimeError("Output size is too small")
        if x.size(i + 2) == 0 and x.size(0) != 0 and x.size(1) != 0:
            raise RuntimeError("Only zero batch or zero channel inputs are supported")
    mode = ["zeros", "reflect", "replicate", "circular"].index(padding_mode)
    y = torch.ops.myconv.conv_backward_input(x, weight, bias, size, stride, low, dilation, groups, mode)
    return y if batched else y.squeeze(0)


def _scripted_sides(self, weight: Tensor) -> tuple[list[int], list[int]]:
    """The amounts of padding on the low and high sides of the axes."""
    low: list[int] = []
    high: list[int] = []
    rank = weight.dim() - 2
    if isinstance(self.padding, str):
        dilation = _each_axis(self.dilation, rank)
        for i in range(rank):
            total = 0 if self.padding == "valid" else dilation[i] * (weight.size(i + 2) - 1)
            low.append(total if self.padding == "causal" else total // 2)
            high.append(total - low[i])
    else:
        for entry in self.padding:
            if isinstance(entry, int):
                low.append(entry)
                high.append(entry)
            else:
                low.append(entry[0])
                high.append(entry[1])
    return _each_axis(low, rank), _each_axis(high, rank)


def _scripted_conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None):
    low, high = self._scripted_sides(weight)
    if self.padding_mode != "zeros":
        amounts: list[int] = self._reversed_padding_repeated_twice
        for i in range(len(amounts) // 2):
            low[-1 - i] = amounts[2 * i]
            high[-1 - i] = amounts[2 * i + 1]
    return _scripted_conv(input, weight, bias, self.stride, low, high, self.dilation, self.groups, self.padding_mode)


def _scripted_forward(self, input: Tensor) -> Tensor:
    return self._conv_forward(input, self.weight, self.bias)


def _scripted_forward_transposed(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
    low, high = self._scripted_sides(self.weight)
    rank = len(self.kernel_size)
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


# ---- constructors

_Size: TypeAlias = int | Sequence[int]
_Padding: TypeAlias = int | Sequence[int | Sequence[int]]
_PaddingMode: TypeAlias = Literal["zeros", "reflect", "replicate", "circular"]


def _plain_padding(module: Any, padding: Any) -> Any:
    """``padding``, or 0 in place of what torch's constructors do not take."""
    if padding == "causal":
        if not isinstance(module, nn.Conv1d):
            raise ValueError(
                "padding='causal' is for Conv1d: more axes do not tell which is time. Give (low, high) pairs, for "
                "example padding=((dilation * (kernel_size - 1), 0), (0, 0)) for Conv2d"
            )
        return 0
    pairs = isinstance(padding, (tuple, list)) and any(isinstance(entry, (tuple, list)) for entry in padding)
    return 0 if pairs else padding


def _set_padding(module: Any, padding: Any) -> None:
    """Sets what torch's constructor would set for a padding that it does not take."""
    rank = len(module.kernel_size)
    sides: list[tuple[int, ...]]
    if padding == "causal":
        sides = [(module.dilation[0] * (module.kernel_size[0] - 1), 0)]
    else:
        sides = [tuple(entry) if isinstance(entry, (tuple, list)) else (entry, entry) for entry in padding]
        if len(sides) not in (1, rank) or any(len(pair) != 2 for pair in sides):
            raise ValueError(f"padding must have {rank} entries, each an int or a (low, high) pair, got {padding!r}")
        sides = sides * (rank // len(sides))
    module.padding = padding if padding == "causal" else tuple(sides)
    module._reversed_padding_repeated_twice = [side for pair in reversed(sides) for side in pair]


class _Conv:
    _scripted_sides = _scripted_sides

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _Size,
        stride: _Size = 1,
        padding: str | _Padding = 0,
        dilation: _Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: _PaddingMode = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        plain = _plain_padding(self, padding)
        sizes = (in_channels, out_channels, kernel_size, stride, plain, dilation, groups)
        super().__init__(*sizes, bias, padding_mode, device, dtype)  # type: ignore[call-arg]
        if plain is not padding:
            _set_padding(self, padding)


class _ConvTranspose:
    _scripted_sides = _scripted_sides

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _Size,
        stride: _Size = 1,
        padding: _Padding = 0,
        output_padding: _Size = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: _Size = 1,
        padding_mode: _PaddingMode = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if padding_mode not in functional.PADDING_MODES:
            modes = ", ".join(map(repr, functional.PADDING_MODES))
            raise ValueError(f"padding_mode must be one of {modes}, but got padding_mode={padding_mode!r}")
        plain = padding if isinstance(padding, str) else _plain_padding(self, padding)
        sizes = (in_channels, out_channels, kernel_size, stride, plain, output_padding, groups)
        super().__init__(*sizes, bias, dilation, "zeros", device, dtype)  # type: ignore[call-arg]
        self.padding_mode = padding_mode
        if plain is not padding:
            _set_padding(self, padding)


# ---- the classes


@_scripted_as(_scripted_forward)
def _forward(self, input: Tensor) -> Tensor:
    weight, bias = _weight_and_bias(self)
    return self._conv_forward(input, weight, bias)  # looked up by name: subclasses and users replace it


class Conv1d(_Conv, nn.Conv1d):
    """:class:`torch.nn.Conv1d`, with its arguments, state and errors, computed by myconv."""

    forward = _forward

    @_scripted_as(_scripted_conv_forward)
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None):
        if self.padding_mode != "zeros":
            return _convolve_padded(functional.conv1d, self, input, weight, bias, 1)
        return functional.conv1d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class Conv2d(_Conv, nn.Conv2d):
    """:class:`torch.nn.Conv2d`, with its arguments, state and errors, computed by myconv."""

    forward = _forward

    @_scripted_as(_scripted_conv_forward)
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None):
        if self.padding_mode != "zeros":
            return _convolve_padded(functional.conv2d, self, input, weight, bias, 2)
        return functional.conv2d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class Conv3d(_Conv, nn.Conv3d):
    """:class:`torch.nn.Conv3d`, with its arguments, state and errors, computed by myconv."""

    forward = _forward

    @_scripted_as(_scripted_conv_forward)
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None):
        if self.padding_mode != "zeros":
            return _convolve_padded(functional.conv3d, self, input, weight, bias, 3)
        return functional.conv3d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class ConvTranspose1d(_ConvTranspose, nn.ConvTranspose1d):
    """:class:`torch.nn.ConvTranspose1d`, with its arguments, state and errors, computed by myconv."""

    @_scripted_as(_scripted_forward_transposed)
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return _convolve_transposed(functional.conv_transpose1d, self, input, output_size, 1)


class ConvTranspose2d(_ConvTranspose, nn.ConvTranspose2d):
    """:class:`torch.nn.ConvTranspose2d`, with its arguments, state and errors, computed by myconv."""

    @_scripted_as(_scripted_forward_transposed)
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return _convolve_transposed(functional.conv_transpose2d, self, input, output_size, 2)


class ConvTranspose3d(_ConvTranspose, nn.ConvTranspose3d):
    """:class:`torch.nn.ConvTranspose3d`, with its arguments, state and errors, computed by myconv."""

    @_scripted_as(_scripted_forward_transposed)
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return _convolve_transposed(functional.conv_transpose3d, self, input, output_size, 3)


_CLASSES = frozenset({Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d})


# ---- lazy ones: torch's until the first call, which makes them one of the classes above


class LazyConv1d(nn.LazyConv1d, Conv1d):  # type: ignore[misc]
    """:class:`torch.nn.LazyConv1d`; the first call makes it a :class:`Conv1d`."""

    cls_to_become = Conv1d


class LazyConv2d(nn.LazyConv2d, Conv2d):  # type: ignore[misc]
    """:class:`torch.nn.LazyConv2d`; the first call makes it a :class:`Conv2d`."""

    cls_to_become = Conv2d


class LazyConv3d(nn.LazyConv3d, Conv3d):  # type: ignore[misc]
    """:class:`torch.nn.LazyConv3d`; the first call makes it a :class:`Conv3d`."""

    cls_to_become = Conv3d


class LazyConvTranspose1d(nn.LazyConvTranspose1d, ConvTranspose1d):  # type: ignore[misc]
    """:class:`torch.nn.LazyConvTranspose1d`; the first call makes it a :class:`ConvTranspose1d`."""

    cls_to_become = ConvTranspose1d


class LazyConvTranspose2d(nn.LazyConvTranspose2d, ConvTranspose2d):  # type: ignore[misc]
    """:class:`torch.nn.LazyConvTranspose2d`; the first call makes it a :class:`ConvTranspose2d`."""

    cls_to_become = ConvTranspose2d


class LazyConvTranspose3d(nn.LazyConvTranspose3d, ConvTranspose3d):  # type: ignore[misc]
    """:class:`torch.nn.LazyConvTranspose3d`; the first call makes it a :class:`ConvTranspose3d`."""

    cls_to_become = ConvTranspose3d
