"""Switches for tests and curiosity. Each is a context manager and holds for the calling thread."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from . import _C


@contextlib.contextmanager
def algorithm(direction: str, name: str) -> Iterator[None]:
    """Force one row of a selection table.

    Args:
        direction: ``"forward"``, ``"backward_input"`` or ``"backward_weight"``.
        name: one of ``myconv._C.algorithms(direction)``.

    Raises:
        ValueError: the direction or the name is unknown.
        RuntimeError: (from the convolution) the row declines it; the message says why.
    """
    names = _C.algorithms(direction)
    if name not in names:
        raise ValueError(f"{direction} has no algorithm {name!r}; it has {', '.join(names)}")
    before = _C.forced_algorithm(direction)
    _C.force_algorithm(direction, name)
    try:
        yield
    finally:
        _C.force_algorithm(direction, before)


@contextlib.contextmanager
def isa(name: str) -> Iterator[None]:
    """Run on no better instruction set than ``"portable"``, ``"avx2"`` or ``"avx512"``.

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
