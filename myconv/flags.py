"""Switches: which algorithm and instruction set run, and what happens to denormals.

Each is a context manager, also usable as a decorator, and holds for the convolutions that the calling thread runs
inside it. A backward pass reads the switches when it runs, not when its forward ran; with CUDA tensors torch runs it on
a thread of its own, which has no switches. Threads that are started inside do not inherit them. Compiled graphs and
exported programs obey them, since the operators read them at run time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from . import _C

__all__ = ["algorithm", "exclude", "flush_denormals", "isa", "winograd"]

DIRECTIONS = ("forward", "backward_input", "backward_weight")


def _rows(*directions: str, last: bool = True) -> set[str]:
    """The names in the tables of all devices; the last row of each on demand, since it cannot be done without."""
    tables = [_C.algorithms(direction, device) for direction in directions for device in _C.devices()]
    return {name for table in tables for name in (table if last else table[:-1])}


@contextlib.contextmanager
def algorithm(direction: str, name: str) -> Iterator[None]:
    """Force one row of a selection table.

    Args:
        direction: of the operator that runs: ``"forward"``, ``"backward_input"`` or ``"backward_weight"``. The
            output of a transposed convolution is made by ``backward_input``.
        name: a row of that table, as :func:`myconv.explain` names them. Devices have tables of their own; one that
            has no row of this name raises.

    Raises:
        ValueError: the direction or the name is unknown.
        RuntimeError: (from the convolution) the row declines it; the message says why.
    """
    names = _rows(direction)
    if name not in names:
        raise ValueError(f"{direction} has no algorithm {name!r}; it has {', '.join(sorted(names))}")
    before = _C.forced_algorithm(direction)
    _C.force_algorithm(direction, name)
    try:
        yield
    finally:
        _C.force_algorithm(direction, before)


@contextlib.contextmanager
def exclude(*names: str) -> Iterator[None]:
    """Take rows out of all selection tables, so that the next row that accepts a convolution runs it.

    Args:
        names: rows of any table but ``"reference"``, which takes what no other row does. Inside another ``exclude``,
            rows are added to those that it takes out. A row that :func:`algorithm` forces runs all the same.

    Raises:
        ValueError: a name is unknown, or is ``"reference"``.
    """
    known = _rows(*DIRECTIONS, last=False)
    for name in names:
        if name not in known:
            raise ValueError(f"there is no algorithm {name!r} to exclude; there are {', '.join(sorted(known))}")
    with _excluded({*_C.excluded_algorithms(), *names}):
        yield


@contextlib.contextmanager
def winograd(enabled: bool) -> Iterator[None]:
    """Allow or exclude the rows that compute by Winograd's minimal filtering: the rows named ``winograd*``.

    They do less arithmetic than the definition of the convolution and round differently (their error against exact
    results is larger by a small factor).
    """
    rows = {name for name in _rows(*DIRECTIONS) if name.startswith("winograd")}
    excluded = set(_C.excluded_algorithms())
    with _excluded(excluded - rows if enabled else excluded | rows):
        yield


@contextlib.contextmanager
def _excluded(names: set[str]) -> Iterator[None]:
    before = _C.excluded_algorithms()
    _C.exclude_algorithms(sorted(names))
    try:
        yield
    finally:
        _C.exclude_algorithms(before)


@contextlib.contextmanager
def isa(name: str) -> Iterator[None]:
    """Run on no better instruction set than ``"portable"``, ``"avx2"``, ``"avx512"`` or ``"avx512_bf16"``.

    The environment variable ``MYCONV_ISA`` does the same for a whole process.

    Raises:
        ValueError: the name is unknown to this build.
    """
    before = _C.isa_cap()
    _C.cap_isa(name)
    try:
        yield
    finally:
        _C.cap_isa(before)


@contextlib.contextmanager
def flush_denormals(enabled: bool) -> Iterator[None]:
    """Whether float32 and bfloat16 convolutions (and complex64 ones) treat denormals as zeros, which is the default.

    A denormal, in float32 a number below 1.2e-38, can take a processor a hundred times as long as another. Flushed,
    denormal values of input, weight and gradient count as zeros, and results that would be denormal are zeros, in all
    threads of the call. ``flush_denormals(False)`` gives torch's values: the thread's own mode, set by
    :func:`torch.set_flush_denormal`, decides, for all threads of the call. myconv never flushes float64 and float16.
    """
    before = _C.flush_denormals()
    _C.set_flush_denormals(bool(enabled))
    try:
        yield
    finally:
        _C.set_flush_denormals(before)
