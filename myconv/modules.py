"""torch.nn's convolution modules, computed by myconv.

Each class subclasses its namesake in torch.nn and inherits everything (constructor, attributes, initial
values, repr, state_dict, pickling); only the functional call differs. ``padding_mode`` is applied inside the
operator, so no padded copy of the input is made.
"""

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


def _convolve_padded(convolve, module, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve with a padding mode other than zeros.

    As in torch, the amounts come from ``_reversed_padding_repeated_twice`` (low and high side of the last
    dimension, then of the one before), which assigning ``padding`` later does not change and which some
    models set by hand. Where the ``padding`` argument can express them, the operator pads as it reads. Other
    amounts, uneven or negative, are padded ahead of it, as torch does.
    """
    mode, stride, dilation = module.padding_mode, module.stride, module.dilation
    rank = len(stride)
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
    if low == high and min(low) >= 0:
        padding = low
    elif stride == (1,) * len(low) and all(
        (before, after) == (d * (k - 1) // 2, d * (k - 1) - d * (k - 1) // 2)
        for before, after, d, k in zip(low, high, dilation, weight.shape[2:])
    ):
        padding = "same"
    else:
        input = nn.functional.pad(input, amounts, mode=mode)
        return convolve(input, weight, bias, stride, (0,) * len(low), dilation, module.groups)
    return convolve(input, weight, bias, stride, padding, dilation, module.groups, padding_mode=mode)


def _output_padding(module, input: Tensor, output_size: list[int] | None, rank: int) -> tuple[int, ...]:
    """The ``output_padding`` that gives ``output_size``, with torch's checks and errors."""
    if module.padding_mode != "zeros":
        raise ValueError(f"Only `zeros` padding mode is supported for ConvTranspose{rank}d")
    if not isinstance(module.padding, tuple):
        raise AssertionError("self.padding must be a tuple")
    if output_size is None:
        return module.output_padding
    sizes = (module.stride, module.padding, module.kernel_size)
    return tuple(module._output_padding(input, output_size, *sizes, rank, module.dilation))


# ---- TorchScript
# It cannot compile the methods below, but it compiles a method from the source of its __wrapped__, if it has
# one. So these functions are what a scripted module runs; eager calls never reach them and need no
# is_scripting() branch.


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
    size: list[int] = []
    for i in range(len(stride)):
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
    padding: list[int],
    output_padding: list[int],
    groups: int,
    dilation: list[int],
) -> Tensor:
    batched = input.dim() == weight.dim()
    x = input if batched else input.unsqueeze(0)
    if weight.size(1) == 0:
        raise RuntimeError("expected weight to have out channels")
    size: list[int] = []
    for i in range(len(stride)):
        reach = dilation[i] * (weight.size(i + 2) - 1) + 1
        size.append((x.size(i + 2) - 1) * stride[i] - 2 * padding[i] + reach + output_padding[i])
        if output_padding[i] >= stride[i] and output_padding[i] >= dilation[i]:
            raise RuntimeError("output padding must be smaller than either stride or dilation")
        if size[i] < 1:
            raise RuntimeError("Output size is too small")
        if x.size(i + 2) == 0 and x.size(0) != 0 and x.size(1) != 0:
            raise RuntimeError("Only zero batch or zero channel inputs are supported")
    y = torch.ops.myconv.conv_backward_input(x, weight, bias, size, stride, padding, dilation, groups)
    return y if batched else y.squeeze(0)


def _scripted_conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None):
    low: list[int] = []
    high: list[int] = []
    if self.padding_mode == "zeros" and not isinstance(self.padding, str):
        low = self.padding
        high = self.padding
    else:
        amounts: list[int] = self._reversed_padding_repeated_twice
        for i in range(len(self.stride)):
            low.insert(0, amounts[2 * i])
            high.insert(0, amounts[2 * i + 1])
    return _scripted_conv(input, weight, bias, self.stride, low, high, self.dilation, self.groups, self.padding_mode)


def _scripted_forward(self, input: Tensor) -> Tensor:
    return self._conv_forward(input, self.weight, self.bias)


def _scripted_forward_transposed(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
    rank = len(self.stride)
    output_padding = self._output_padding(
        input, output_size, self.stride, self.padding, self.kernel_size, rank, self.dilation
    )
    return _scripted_conv_transpose(
        input, self.weight, self.bias, self.stride, self.padding, output_padding, self.groups, self.dilation
    )


# ---- the classes


def _forward(self, input: Tensor) -> Tensor:
    weight, bias = _weight_and_bias(self)
    return self._conv_forward(input, weight, bias)  # looked up by name: subclasses and users replace it


_forward.__wrapped__ = _scripted_forward


class Conv1d(nn.Conv1d):
    """:class:`torch.nn.Conv1d`, with its arguments, state and errors, computed by myconv."""

    forward = _forward

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None):
        if self.padding_mode != "zeros":
            return _convolve_padded(functional.conv1d, self, input, weight, bias)
        return functional.conv1d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    _conv_forward.__wrapped__ = _scripted_conv_forward


class Conv2d(nn.Conv2d):
    """:class:`torch.nn.Conv2d`, with its arguments, state and errors, computed by myconv."""

    forward = _forward

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None):
        if self.padding_mode != "zeros":
            return _convolve_padded(functional.conv2d, self, input, weight, bias)
        return functional.conv2d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    _conv_forward.__wrapped__ = _scripted_conv_forward


class Conv3d(nn.Conv3d):
    """:class:`torch.nn.Conv3d`, with its arguments, state and errors, computed by myconv."""

    forward = _forward

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None):
        if self.padding_mode != "zeros":
            return _convolve_padded(functional.conv3d, self, input, weight, bias)
        return functional.conv3d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    _conv_forward.__wrapped__ = _scripted_conv_forward


class ConvTranspose1d(nn.ConvTranspose1d):
    """:class:`torch.nn.ConvTranspose1d`, with its arguments, state and errors, computed by myconv."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        output_padding = _output_padding(self, input, output_size, 1)
        weight, bias = _weight_and_bias(self)
        return functional.conv_transpose1d(
            input, weight, bias, self.stride, self.padding, output_padding, self.groups, self.dilation
        )

    forward.__wrapped__ = _scripted_forward_transposed


class ConvTranspose2d(nn.ConvTranspose2d):
    """:class:`torch.nn.ConvTranspose2d`, with its arguments, state and errors, computed by myconv."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        output_padding = _output_padding(self, input, output_size, 2)
        weight, bias = _weight_and_bias(self)
        return functional.conv_transpose2d(
            input, weight, bias, self.stride, self.padding, output_padding, self.groups, self.dilation
        )

    forward.__wrapped__ = _scripted_forward_transposed


class ConvTranspose3d(nn.ConvTranspose3d):
    """:class:`torch.nn.ConvTranspose3d`, with its arguments, state and errors, computed by myconv."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        output_padding = _output_padding(self, input, output_size, 3)
        weight, bias = _weight_and_bias(self)
        return functional.conv_transpose3d(
            input, weight, bias, self.stride, self.padding, output_padding, self.groups, self.dilation
        )

    forward.__wrapped__ = _scripted_forward_transposed


_CLASSES = frozenset({Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d})
