"""Swap the convolutions of a model: torch.nn's for myconv's, and back.

The module stays the same object, so its parameters, buffers, hooks, attributes and mode are kept, and a second
name in the model or any other reference sees the change. :func:`replace` assigns ``module.__class__`` and touches
nothing else; :func:`patch` adds attributes that hide methods of the class, and touches nothing else.
"""

import copy
import fnmatch
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils import parametrize

from myconv import _C, modules

__all__ = ["Report", "patch", "replace", "restore"]

_OURS: dict[type, type] = {getattr(nn, name): getattr(modules, name) for name in modules.__all__}
_TORCHS: dict[type, type] = {ours: torchs for torchs, ours in _OURS.items()}
# A parametrized module has a class of its own, derived from this one.
_own_class = parametrize.type_before_parametrizations
_DEVICES = (*_C.devices(), "meta")
_TENSOR_TYPES = (torch.Tensor, nn.Parameter, nn.UninitializedParameter)
_METHODS = ("forward", "_conv_forward")  # the first runs the second, but in transposed modules


@dataclass(frozen=True, repr=False)
class Report:
    """What a conversion did; printing it shows all of it.

    Names are those of ``model.named_modules()``: the model itself is ``""``, and a module that has several
    names is listed once, under the first.

    Attributes:
        model: the converted model; the argument itself unless ``inplace=False``.
        swapped: names of the convolutions that were changed.
        left: ``(name, reason)`` of every other convolution.
    """

    model: nn.Module
    swapped: list[str]
    left: list[tuple[str, str]]

    def __str__(self) -> str:
        groups = {"swapped": self.swapped}
        for name, reason in self.left:
            groups.setdefault(f"left ({reason})", []).append(name)
        lines = [f"{len(self.swapped)} swapped, {len(self.left)} left"]
        for title, names in groups.items():
            if names:
                lines.append(f"  {title}: {', '.join(name or '(the model itself)' for name in names)}")
        return "\n".join(lines)

    __repr__ = __str__


def replace(
    model: nn.Module,
    *,
    types: type | Iterable[type] | None = None,
    names: str | Iterable[str] | None = None,
    filter: Callable[[str, nn.Module], bool] | None = None,
    inplace: bool = True,
) -> Report:
    """Make the torch.nn convolutions of ``model`` compute with myconv.

    Parametrized, pruned, weight- and spectral-normalised modules are swapped and stay so. Lazy modules become
    myconv's lazy ones. Left as they are, with the reason in the report: subclasses of torch.nn's classes and
    modules whose ``forward`` was replaced (what they compute is not known); modules that :func:`patch` has
    changed; scripted modules; quantized modules and those prepared for it; modules with tensors that myconv does
    not take (sparse, nested, quantized, tensor subclasses, devices other than CPU and meta). Calls of
    ``torch.nn.functional`` in other modules are not seen: :class:`myconv.override` is for these.

    Calling it again swaps what has not been swapped yet. :func:`restore` undoes it.

    Args:
        model: any module, also a single convolution.
        types: swap only these torch.nn classes, for example ``nn.Conv2d`` or ``(nn.Conv1d, nn.Conv3d)``.
        names: swap only modules with a name that matches one of these patterns, for example ``"backbone.*"``
            (``fnmatch``: ``*`` matches dots too).
        filter: swap only modules for which ``filter(name, module)`` is true. It is asked about each
            module that could be swapped and passes ``types`` and ``names``, under each of its names until one
            is accepted.
        inplace: change ``model``; otherwise change a ``copy.deepcopy`` of it, found in the report.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``types`` has a class that is not one of torch.nn's convolutions.
    """
    return _convert(model, _chosen((*_CHECKS, _subclass), types, names, filter), _replace, inplace)


def patch(
    model: nn.Module,
    *,
    types: type | Iterable[type] | None = None,
    names: str | Iterable[str] | None = None,
    filter: Callable[[str, nn.Module], bool] | None = None,
    inplace: bool = True,
) -> Report:
    """Make the torch.nn convolutions of ``model`` compute with myconv, and keep ``type(module)``.

    For code that asks for the exact type, as ``torch.ao.quantization.fuse_modules`` does. A patched module has an
    attribute of its own, ``_conv_forward`` (``forward`` if it is transposed), that hides the method of its class.
    Deep copies and pickles of it are patched too. TorchScript refuses it; ``torch.jit.trace`` does not.

    Takes and leaves the modules that :func:`replace` does, but takes subclasses too if they inherit ``forward`` and
    ``_conv_forward`` from torch.nn.

    Calling it again patches what has not been patched yet. :func:`restore` undoes it.

    Args:
        model, names, filter, inplace: as in :func:`replace`.
        types: patch only these torch.nn classes, and what derives from them.

    Raises:
        TypeError, ValueError: as :func:`replace`.
    """
    return _convert(model, _chosen((*_CHECKS, _overrides), types, names, filter), _patch, inplace)


def _chosen(checks, types, names, filter) -> Callable[[nn.Module, list[str]], str | None]:
    """Why a module, with these names, is left; None: it is not."""
    wanted_types = None if types is None else {types} if isinstance(types, type) else set(types)
    wanted_names = None if names is None else (names,) if isinstance(names, str) else tuple(names)
    if wanted_types is not None and not wanted_types <= _OURS.keys():
        allowed = ", ".join(cls.__name__ for cls in _OURS)
        raise ValueError(f"types must be among torch.nn's {allowed}; got {types!r}")

    def why_not(module: nn.Module, aliases: list[str]) -> str | None:
        for check in checks:
            reason = check(module)
            if reason is not None:
                return reason
        if wanted_types is not None and _torch_class(module) not in wanted_types:
            return "not among types"
        if wanted_names is not None:
            aliases = [a for a in aliases if any(fnmatch.fnmatchcase(a, pattern) for pattern in wanted_names)]
            if not aliases:
                return "no match in names"
        if filter is not None and not any(filter(alias, module) for alias in aliases):
            return "declined by filter"
        return None

    return why_not


def restore(model: nn.Module, *, inplace: bool = True) -> Report:
    """Turn every myconv convolution of ``model`` into its torch.nn namesake: undoes :func:`replace` and :func:`patch`.

    Works on copies of a swapped model and on models built from myconv's classes too. Subclasses of these,
    modules whose ``forward`` or ``_conv_forward`` was replaced, and modules with kinds of padding that torch.nn
    lacks, are left.

    Args:
        model: any module, also a single convolution.
        inplace: change ``model``; otherwise change a ``copy.deepcopy`` of it, found in the report.

    Raises:
        TypeError: ``model`` is not a module.
    """

    def why_not(module: nn.Module, aliases: list[str]) -> str | None:
        patches = _patches(module)
        if patches:
            return None if set(patches) & set(_METHODS) else _method_replaced(module)
        if _own_class(module) not in _TORCHS:
            ours = isinstance(module, tuple(_TORCHS))
            return f"a subclass: {_class_name(module)}" if ours else "not a myconv module"
        return _beyond_torch(module) or _method_replaced(module)

    return _convert(model, why_not, _restore, inplace)


def _convert(
    model: nn.Module,
    why_not: Callable[[nn.Module, list[str]], str | None],
    change: Callable[[nn.Module], None],
    inplace: bool,
) -> Report:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not inplace:
        model = copy.deepcopy(model)
    # Decide everything before changing anything: a filter may raise.
    convolutions = [(names, module) for names, module in _modules_and_names(model) if _is_convolution(module)]
    decisions = [(names[0], module, why_not(module, names)) for names, module in convolutions]
    for _, module, reason in decisions:
        if reason is None:
            change(module)
    swapped = [name for name, _, reason in decisions if reason is None]
    return Report(model, swapped, [(name, reason) for name, _, reason in decisions if reason is not None])


def _modules_and_names(model: nn.Module) -> list[tuple[list[str], nn.Module]]:
    """Every module once, in the order of ``named_modules()``, with all its names."""
    found: dict[int, tuple[list[str], nn.Module]] = {}
    path: list[int] = []

    def visit(name: str, module: nn.Module) -> None:
        found.setdefault(id(module), ([], module))[0].append(name)
        if id(module) in path:  # a module that contains itself
            return
        path.append(id(module))
        for child_name, child in module._modules.items():
            if child is not None:
                visit(f"{name}.{child_name}" if name else child_name, child)
        path.pop()

    visit("", model)
    return list(found.values())


def _is_convolution(module: nn.Module) -> bool:
    """Whether the report mentions this module."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return True
    # Scripted and quantized modules derive from none of torch.nn's classes.
    if isinstance(module, torch.jit.ScriptModule):
        return getattr(module, "original_name", "").removeprefix("Mkldnn") in modules.__all__
    return _is_quantized(module) and "Conv" in type(module).__name__ and not isinstance(module, nn.Sequential)


def _replace(module: nn.Module) -> None:
    _become(module, _OURS[_own_class(module)])


def _patch(module: nn.Module) -> None:
    torchs = _torch_class(module)
    name = "forward" if issubclass(torchs, nn.modules.conv._ConvTransposeNd) else "_conv_forward"
    patch = _Patch(module, _OURS[torchs])
    vars(module).update({key: getattr(patch, key) for key in (name, "__prepare_scriptable__")})


def _restore(module: nn.Module) -> None:
    patches = _patches(module)
    for name in patches:
        del vars(module)[name]
    if not patches:
        _become(module, _TORCHS[_own_class(module)])


class _Patch:
    """The methods that a patched module has instead of those of its class.

    They are bound to this object and not to the module, because a bound method is pickled as a name to look up in
    what it is bound to, and in the module that name is torch's method.
    """

    def __init__(self, module: nn.Module, ours: Any):
        self.module, self.ours = module, ours

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None):
        return self.ours._conv_forward(self.module, input, weight, bias)

    def forward(self, input: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        return self.ours.forward(self.module, input, output_size)

    def __prepare_scriptable__(self):  # TorchScript would compile the methods of the class
        raise RuntimeError("a patched module cannot be scripted: use myconv.replace instead of myconv.patch")


def _patches(module: nn.Module) -> list[str]:
    methods = {name: value for name, value in vars(module).items() if isinstance(value, MethodType)}
    return [name for name, method in methods.items() if isinstance(method.__self__, _Patch)]


def _torch_class(module: nn.Module) -> Any:
    """The first of torch.nn's classes that the module derives from."""
    return next((cls for cls in type(module).__mro__ if cls in _OURS), None)


def _become(module: nn.Module, target: type) -> None:
    cls = type(module)
    if _own_class(module) is not cls:
        # The derived class holds the properties that compute the parameters, and parametrize goes back to its
        # base when the last one is removed: derive the same class from the new base.
        members = {key: value for key, value in vars(cls).items() if key not in ("__dict__", "__weakref__")}
        target = type(f"Parametrized{target.__name__}", (target,), members)
    module.__class__ = target


def _class_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _is_quantized(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.ao.")


# ---- why a module is left as it is; the first check with an answer decides


def _scripted(module: nn.Module) -> str | None:
    return "a scripted module" if isinstance(module, torch.jit.ScriptModule) else None


def _already_ours(module: nn.Module) -> str | None:
    return "already a myconv module" if isinstance(module, tuple(_TORCHS)) else None


def _already_patched(module: nn.Module) -> str | None:
    return "already patched" if _patches(module) else None


def _quantized(module: nn.Module) -> str | None:
    if _is_quantized(module):
        return "a quantized module, or one for quantization-aware training"
    return "prepared for quantization" if getattr(module, "qconfig", None) is not None else None


def _subclass(module: nn.Module) -> str | None:
    return None if _own_class(module) in _OURS else f"a subclass: {_class_name(module)}"


def _overrides(module: nn.Module) -> str | None:
    torchs = _torch_class(module)
    for name in _METHODS:
        if torchs is None or getattr(type(module), name) is not getattr(torchs, name):
            return f"a subclass with its own {name}: {_class_name(module)}"
    return None


def _beyond_torch(module: Any) -> str | None:
    if module.transposed and module.padding_mode != "zeros":
        return f"has padding_mode={module.padding_mode!r}, which torch.nn lacks in transposed convolutions"
    if module.padding == "causal" or any(isinstance(entry, tuple) for entry in module.padding):
        return f"has padding={module.padding!r}, which torch.nn lacks"
    return None


def _method_replaced(module: nn.Module) -> str | None:
    return next((f"its {name} was replaced" for name in _METHODS if name in vars(module)), None)


def _tensors(module: nn.Module) -> str | None:
    named = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    # weight_norm, spectral_norm and pruning keep the tensor that is used as a plain attribute.
    named += [(name, vars(module)[name]) for name in ("weight", "bias") if vars(module).get(name) is not None]
    if parametrize.is_parametrized(module):
        parametrizations: Any = module.parametrizations
        for name, originals in parametrizations.items():
            named += [(name, t) for t in originals.parameters(recurse=False)]
            named += [(name, t) for t in originals.buffers(recurse=False)]
    for name, tensor in named:
        reason = why_not_taken(tensor)
        if reason is not None:
            return f"{name} {reason}"
    return None


def why_not_taken(tensor: torch.Tensor) -> str | None:
    """Why myconv does not compute with this tensor; None: it does."""
    for says_no, reason in _TENSOR_CHECKS:
        if says_no(tensor):
            return reason(tensor)
    return None


_CHECKS = (_scripted, _already_ours, _already_patched, _quantized, _method_replaced, _tensors)

_TENSOR_CHECKS = (
    (lambda t: t.is_nested, lambda t: "is nested"),
    (lambda t: t.is_quantized, lambda t: "is quantized"),
    (lambda t: t.layout != torch.strided, lambda t: f"has layout {t.layout}"),
    (lambda t: t.device.type not in _DEVICES, lambda t: f"is on device {t.device.type}"),
    (
        lambda t: type(t) not in _TENSOR_TYPES and not isinstance(t, FakeTensor),
        lambda t: f"is a {type(t).__name__}",
    ),
)
