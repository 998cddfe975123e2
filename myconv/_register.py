"""What must be registered from Python: vmap rules and FLOP formulas of the operators."""

from __future__ import annotations

import math

import torch
from torch.utils.flop_counter import register_flop_formula

from . import _C  # noqa: F401  loading it is what makes the operators exist

ops = torch.ops.myconv


# --- vmap -------------------------------------------------------------------------------------------------------------
#
# A batch of problems is one larger problem. With B copies:
#   only the activation is batched   (B, N, ...)       -> into the batch:     (B * N, ...)
#   anything else                    (N, B * C, ...)   -> into the groups:    B * groups of them, copy by copy
# and with one group the second case needs no copy of the tensor that is not batched: B * K output (or input) channels.
# conv_backward is batched in C++, by the operators that it fuses.


def _front(tensor, dim):
    return tensor.movedim(dim, 0)


def _copies(tensor, dim, batch_size):
    """(B, ...) whether or not the tensor has a batch dimension."""
    return tensor.expand(batch_size, *tensor.shape) if dim is None else _front(tensor, dim)


def _into_channels(tensor, dim, batch_size):
    """(N, C, ...) in B copies -> (N, B * C, ...)."""
    return _copies(tensor, dim, batch_size).movedim(0, 1).flatten(1, 2)


def _activation_rule(op, channels_of_result):
    def rule(info, in_dims, activation, weight, bias, size, stride, padding, dilation, groups, padding_mode=0):
        a_dim, w_dim, b_dim, *_ = in_dims
        batch_size = info.batch_size
        inner_bias = bias if b_dim is None and w_dim is None else None
        rest = (size, stride, padding, dilation)
        if w_dim is None and a_dim is None:
            result = op(activation, weight, None, *rest, groups, padding_mode)
            result, out_dim = result.expand(batch_size, *result.shape), 0
        elif w_dim is None:
            x = _front(activation, a_dim)
            result = op(x.flatten(0, 1), weight, inner_bias, *rest, groups, padding_mode)
            result, out_dim = result.unflatten(0, x.shape[:2]), 0
        elif a_dim is None and groups == 1:
            w = weight.movedim(w_dim, channels_of_result).flatten(channels_of_result, channels_of_result + 1)
            result = op(activation, w, None, *rest, 1, padding_mode).unflatten(1, (batch_size, -1))
            out_dim = 1
        else:
            x = _into_channels(activation, a_dim, batch_size)
            w = _front(weight, w_dim).flatten(0, 1)
            result = op(x, w, None, *rest, batch_size * groups, padding_mode).unflatten(1, (batch_size, -1))
            out_dim = 1
        if bias is not None and inner_bias is None:
            ones = (1,) * (result.dim() - 3)
            if b_dim is None:
                added = bias.view(-1, *ones)
            else:
                added = _front(bias, b_dim)
                added = added.view(batch_size, 1, -1, *ones) if out_dim == 0 else added.view(*added.shape, *ones)
            result = result + added
        return result, out_dim

    return rule


def _weight_rule(info, in_dims, grad_output, input, kernel_size, stride, padding, dilation, groups, padding_mode=0):
    g_dim, x_dim, *_ = in_dims
    batch_size = info.batch_size
    rest = (kernel_size, stride, padding, dilation)
    if groups == 1 and g_dim is None:
        x = _into_channels(input, x_dim, batch_size)
        result = ops.conv_backward_weight(grad_output, x, *rest, 1, padding_mode)
        return result.unflatten(1, (batch_size, -1)), 1
    gy = _into_channels(grad_output, g_dim, batch_size)
    if groups == 1 and x_dim is None:
        result = ops.conv_backward_weight(gy, input, *rest, 1, padding_mode)
    else:
        x = _into_channels(input, x_dim, batch_size)
        result = ops.conv_backward_weight(gy, x, *rest, batch_size * groups, padding_mode)
    return result.unflatten(0, (batch_size, -1)), 0


torch.library.register_vmap("myconv::conv_forward", _activation_rule(ops.conv_forward, 0))
torch.library.register_vmap("myconv::conv_backward_input", _activation_rule(ops.conv_backward_input, 1))
torch.library.register_vmap("myconv::conv_backward_weight", _weight_rule)


# --- FLOPs ------------------------------------------------------------------------------------------------------------
#
# Two FLOPs a multiply-add, one multiply-add for each pair of an output of the convolution and a weight of its channel:
# what torch.utils.flop_counter counts for torch's convolutions. In weight gradients it pairs each output channel with
# all input channels, whatever the groups; a swapped model shall count the same.


def _flops(conv_output, weight) -> int:
    return 2 * math.prod(conv_output) * math.prod(weight[1:])


@register_flop_formula(ops.conv_forward)
def _forward_flops(input, weight, bias, output_size, *args, out_shape=None, **kwargs) -> int:
    return _flops((input[0], weight[0], *output_size), weight)


@register_flop_formula(ops.conv_backward_input)
def _backward_input_flops(grad_output, weight, *args, out_shape=None, **kwargs) -> int:
    return _flops(grad_output, weight)


@register_flop_formula(ops.conv_backward_weight)
def _backward_weight_flops(grad_output, input, kernel_size, *args, out_shape=None, **kwargs) -> int:
    return _flops(grad_output, (None, input[1], *kernel_size))


@register_flop_formula(ops.conv_backward)
def _backward_flops(grad_output, input, weight, *args, out_shape=None, **kwargs) -> int:
    output_mask = kwargs.get("output_mask", args[-1] if args else (True, True, True))
    of_input = output_mask[0] and _flops(grad_output, weight)
    return of_input + (output_mask[1] and _backward_weight_flops(grad_output, input, weight[2:]))
