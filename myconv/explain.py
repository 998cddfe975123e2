"""What a convolution does: which algorithm runs each direction, and why the others declined."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.module_tracker import ModuleTracker

from . import _C
from .functional import PADDING_MODES

__all__ = ["Call", "Direction", "Explanation", "explain"]


@dataclass(frozen=True)
class Direction:
    """One direction of a call: its result, or one of its gradients.

    Attributes:
        operator: the operator that computes it, ``"conv_forward"``, ``"conv_backward_input"`` or
            ``"conv_backward_weight"``; for :func:`myconv.flags.algorithm`, without ``conv_``.
        algorithm: the row of the operator's table that runs; ``"nothing"`` if the result is empty.
        declined: the rows that do not run this call, with the reason, in the table's order. Rows behind the chosen one
            that would have accepted are not among them.
        isa: the instruction set.
        layout: ``"channels_first"`` or ``"channels_last"``: how the activations lie that the kernel reads and writes.
        flops: two for each multiply-add of the definition, as ``torch.utils.flop_counter`` counts.
        bytes: of the operands and the result, each once: the least that must move.
        workspace: bytes that the algorithm allocates besides, for what it packs and for partial sums.
        packing: what the algorithm packs piece by piece as it runs.
        copies: bytes of the tensors, by name, that are copied whole, because they lie in another layout than the one
            the call is computed in, or in none.
        kernels: real convolutions that this one takes: 1, or 4 for complex dtypes.
    """

    operator: str
    algorithm: str
    declined: dict[str, str]
    isa: str
    layout: str
    flops: int
    bytes: int
    workspace: int
    packing: str
    copies: dict[str, int]
    kernels: int


@dataclass(frozen=True)
class Call:
    """One convolution.

    Attributes:
        module: the name of the module that called, as ``torch.utils.module_tracker`` gives it; "" outside of modules.
        operation: ``"conv2d"`` and so on.
        dtype: of its tensors, behind autocast.
        input, weight, output: sizes.
        arguments: stride, padding (the low sides), dilation, groups and padding mode of the operator.
        directions: ``"forward"``, ``"backward_input"`` and ``"backward_weight"`` of the call; integers have no
            gradients, and only forward.
    """

    module: str
    operation: str
    dtype: torch.dtype
    input: tuple[int, ...]
    weight: tuple[int, ...]
    output: tuple[int, ...]
    arguments: dict[str, Any]
    directions: dict[str, Direction]

    def __str__(self) -> str:
        arguments = " ".join(f"{name}={_short(value)}" for name, value in self.arguments.items())
        sizes = " ".join(f"{n}={_size(s)}" for n, s in (("x", self.input), ("w", self.weight), ("y", self.output)))
        lines = [
            f"{self.module or self.operation}: {self.operation} {str(self.dtype).removeprefix('torch.')}",
            f"  {sizes} {arguments}",
        ]
        for name, d in self.directions.items():
            times = f" x {d.kernels}" if d.kernels > 1 else ""
            lines.append(
                f"  {name:15s} {d.algorithm}{times} ({d.operator}, {d.isa}, {d.layout}): {_amount(d.flops, 1000)}FLOP, "
                f"{_amount(d.bytes, 1024)}B in and out, {_amount(d.workspace, 1024)}B workspace"
            )
            copied = ", ".join(f"{tensor} ({_amount(count, 1024)}B)" for tensor, count in d.copies.items())
            notes = [f"packs {d.packing}"]
            notes += [f"copied whole: {copied}"] if copied else []
            notes += [f"not {row}: {reason}" for row, reason in d.declined.items()]
            for note in notes:
                lines += textwrap.wrap(note, 110, initial_indent=" " * 18, subsequent_indent=" " * 20)
        return "\n".join(lines)


@dataclass(frozen=True, repr=False)
class Explanation:
    """What :func:`explain` found; printing it shows all of it.

    Attributes:
        calls: the convolutions that myconv computed, in order.
        by_torch: the modules (or "") whose convolutions torch computed.
        threads: that the kernels may use.
    """

    calls: list[Call] = field(default_factory=list)
    by_torch: list[str] = field(default_factory=list)
    threads: int = 1

    def __str__(self) -> str:
        counts = f"{len(self.calls)} by myconv, {len(self.by_torch)} by torch"
        lines = [f"{counts}; {self.threads} threads", *map(str, self.calls)]
        if self.by_torch:
            lines.append(f"by torch: {', '.join(name or 'a call outside of modules' for name in self.by_torch)}")
        return "\n".join(lines)

    __repr__ = __str__


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Run ``function(*args, **kwargs)`` and say what its convolutions do.

    Args:
        function: a function of :mod:`myconv.functional`, a module of myconv, or anything that calls some: a whole
            model, also one inside ``myconv.override()``.
        args, kwargs: what to call it with.

    The call runs once. For each convolution in it, the result and both gradients are then asked for again in a mode in
    which operators do everything but run the kernel: they check, settle the layout, and choose from the same tables,
    under the switches (:mod:`myconv.flags`) and the thread count in force. Gradients are explained for an output
    gradient with the strides of the output, whether or not anything requires them.

    Scripted code is seen too; code under ``torch.compile`` is run eagerly for it. Convolutions of tensors without
    memory (``meta``, fake tensors) are not seen: no kernel is chosen for them.

    Raises:
        Exception: whatever the call raises.

    >>> layer = myconv.Conv2d(64, 64, 3, padding=1)
    >>> print(myconv.explain(layer, torch.randn(8, 64, 56, 56)))
    """
    calls: list[Call] = []
    by_torch: list[str] = []
    # Left to itself, a compiler that meets a dispatch mode gives up on the code for good.
    eager = torch.compiler.set_stance("force_eager")
    with eager, ModuleTracker() as tracker, _Watch(tracker, calls, by_torch):
        function(*args, **kwargs)
    return Explanation(calls, by_torch, torch.get_num_threads())


_OPS = torch.ops.myconv
_PARAMETERS = ("stride", "padding", "dilation", "groups", "padding_mode")


class _Watch(TorchDispatchMode):
    def __init__(self, tracker: ModuleTracker, calls: list[Call], by_torch: list[str]) -> None:
        super().__init__()
        self.tracker, self.calls, self.by_torch = tracker, calls, by_torch

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if self.tracker.is_bw:
            return result
        modules = self.tracker.parents - {"Global"}
        name = max(modules, key=len) if modules else ""  # parents are the prefixes of the innermost name
        if func in (_OPS.conv_forward.default, _OPS.conv_backward_input.default):
            if result.device.type in _C.devices() and type(result) is Tensor:
                self.calls.append(_call(name, func, args, result))
        elif func is torch.ops.aten.convolution.default:
            self.by_torch.append(name)
        return result


def _call(module: str, func, args, y: Tensor) -> Call:
    x, w, bias, size, *parameters = args
    parameters = (*parameters, 0)[:5]  # the schema's default for padding_mode is left out
    transposed = func is _OPS.conv_backward_input.default
    gy = torch.empty_like(y)
    flops = 2 * math.prod((x if transposed else y).shape) * math.prod(w.shape[1:])  # of each direction
    queries = {"forward": (func, (x, w, bias, size, *parameters))}
    if x.is_floating_point() or x.is_complex():
        # A transposed convolution is one from y to x, run backward.
        adjoint = _OPS.conv_forward if transposed else _OPS.conv_backward_input
        operands = (x, gy) if transposed else (gy, x)
        queries["backward_input"] = (adjoint.default, (gy, w, None, x.shape[2:], *parameters))
        queries["backward_weight"] = (_OPS.conv_backward_weight.default, (*operands, w.shape[2:], *parameters))
    return Call(
        module,
        f"conv{'_transpose' if transposed else ''}{w.dim() - 2}d",
        x.dtype,
        tuple(x.shape),
        tuple(w.shape),
        tuple(y.shape),
        {**dict(zip(_PARAMETERS, parameters)), "padding_mode": list(PADDING_MODES)[parameters[-1]]},
        {name: _direction(*query, flops) for name, query in queries.items()},
    )


def _direction(func, args, flops: int) -> Direction:
    results = []
    with torch.no_grad():
        choices = _C.record(lambda: results.append(func(*args)))
    tensors = [*(a for a in args if isinstance(a, Tensor)), results[0]]
    moved = sum(t.nbytes for t in tensors)
    copies: dict[str, int] = {}
    for tensor, count in (copy for choice in choices for copy in choice["copies"]):
        copies[tensor] = copies.get(tensor, 0) + count
    first: dict[str, Any] = (
        choices[0] if choices else {"algorithm": "nothing", "rows": [], "isa": "", "channels_last": False, "packing": "nothing"}
    )
    return Direction(
        func.overloadpacket.__name__,
        first["algorithm"],
        {row: reason for row, reason in first["rows"] if reason},
        first["isa"],
        "channels_last" if first["channels_last"] else "channels_first",
        flops,
        moved,
        max((choice["workspace"] for choice in choices), default=0),
        first["packing"],
        copies,
        len(choices),
    )


def _size(size: tuple[int, ...]) -> str:
    return "x".join(map(str, size))


def _short(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return str(value[0]) if len(set(value)) == 1 else "x".join(map(str, value))
    return str(value)


def _amount(value: float, base: int) -> str:
    """12345 with base 1000 as '12.3 k': three digits and a prefix."""
    prefixes = ["", "k", "M", "G", "T", "P"] if base == 1000 else ["", "Ki", "Mi", "Gi", "Ti", "Pi"]
    index = 0
    while value >= base and index < len(prefixes) - 1:
        value, index = value / base, index + 1
    return f"{value:.3g} {prefixes[index]}"
