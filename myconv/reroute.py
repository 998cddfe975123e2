"""Answer calls of torch's convolution functions with myconv's, whoever makes them."""

from contextlib import ContextDecorator

import torch
from torch.overrides import TorchFunctionMode

from myconv import functional
from myconv.convert import why_not_taken

__all__ = ["override"]

# torch.nn.functional.conv2d and torch.conv2d are one object.
_FUNCTIONS = {getattr(torch, name): getattr(functional, name) for name in functional.__all__}


class override(TorchFunctionMode, ContextDecorator):
    """A region in which ``torch.nn.functional.conv1d`` .. ``conv_transpose3d`` are computed by myconv.

    It holds for the calling thread and everything called in the region, modules of torch.nn included. Nothing is
    changed outside it. Calls with a tensor that myconv does not take (sparse, nested, quantized, tensor subclasses,
    devices other than CPU and meta) stay torch's. Also a decorator, and ``torch.compile`` follows it.

    >>> with myconv.override():
    ...     y = model(x)
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        ours = _FUNCTIONS.get(function)
        if ours is not None and all(_taken(value) for value in (*args, *kwargs.values())):
            function = ours
        return function(*args, **kwargs)


def _taken(argument) -> bool:
    return not isinstance(argument, torch.Tensor) or why_not_taken(argument) is None
