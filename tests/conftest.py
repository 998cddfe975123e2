"""Shared by all tests: fixtures, poisoned memory, and what a failure prints. How a case is checked is in checking.py.

python -m pytest                    everything but the slow tests
python -m pytest -m slow            the slow tests
MYCONV_TEST_SEED=7 python -m ...    other random data
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

import myconv

pytest.register_assert_rewrite("checking")
from checking import *  # noqa: E402, F403  for the tests
from checking import Case, facts, set_junk_fill  # noqa: E402

SEED = int(os.environ.get("MYCONV_TEST_SEED", "0"))


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_same_state(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    mine, reference = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(reference)
    for key in mine:
        torch.testing.assert_close(mine[key], reference[key], rtol=0, atol=0, equal_nan=True)


# --------------------------------------------------------------------------------------- poisoned memory


PAGE = mmap.PAGESIZE
FENCE = 16 * PAGE  # on either side of a guarded tensor
PROT_NONE = 0

_libc = ctypes.CDLL(None, use_errno=True)


def fenced(tensor: torch.Tensor, end: bool) -> torch.Tensor:
    """Poisoned memory for a tensor of these strides, right before untouchable pages or right behind some."""
    if tensor.numel() == 0:
        return tensor
    span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    size = span * tensor.element_size()
    room = -(-size // PAGE) * PAGE
    mapping = mmap.mmap(-1, room + 2 * FENCE)  # the tensor keeps it alive
    first = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    for fence in (first, first + FENCE + room):
        if _libc.mprotect(ctypes.c_void_p(fence), ctypes.c_size_t(FENCE), PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect")
    torch.frombuffer(mapping, dtype=torch.uint8, count=room, offset=FENCE).fill_(0xFF)
    flat = torch.frombuffer(mapping, dtype=tensor.dtype, count=span, offset=FENCE + (room - size if end else 0))
    return flat.as_strided(tensor.shape, tensor.stride())


def guarded(tensor: torch.Tensor, end: bool) -> torch.Tensor:
    """A copy, strides included, in fenced memory."""
    return fenced(tensor, end).copy_(tensor)


@pytest.fixture(scope="session", autouse=True)
def poisoned_memory() -> Iterator[None]:
    if not set_junk_fill(True):  # then at least what goes through torch.empty
        torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(64).isnan().all(), "fresh memory is not poisoned"
    yield
    set_junk_fill(False)


# ------------------------------------------------------------------------------------- what a failure prints


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    report = yield
    if report.failed:
        parameters = getattr(item, "callspec", None)
        shown: dict[str, object] = {"seed": SEED, "isa": myconv._C.isa(), "threads": torch.get_num_threads()}
        shown |= {
            name: getattr(value, "name", value) for name, value in (parameters.params if parameters else {}).items()
        }
        shown |= facts
        lines = [f"{name}: {value}" for name, value in shown.items()]
        slow = " -m slow" if item.get_closest_marker("slow") else ""
        environment = "".join(
            f"{name}={os.environ[name]} " for name in ("MYCONV_ISA", "OMP_NUM_THREADS") if name in os.environ
        )
        command = f"{environment}MYCONV_TEST_SEED={SEED} python -m pytest{slow} '{item.nodeid}'"
        report.sections.append(("to repeat", "\n".join([*lines, command])))
    return report


def pytest_runtest_setup(item: pytest.Item) -> None:
    facts.clear()


# ---------------------------------------------------------------------------------------------- hypothesis

# "default" tries the same calls in every run; --hypothesis-profile=long many more, others each time.
_COMMON = {"deadline": None, "print_blob": True, "suppress_health_check": list(hypothesis.HealthCheck)}
hypothesis.settings.register_profile("default", derandomize=True, database=None, max_examples=150, **_COMMON)
hypothesis.settings.register_profile("long", max_examples=1500, **_COMMON)
hypothesis.settings.load_profile("default")

# ------------------------------------------------------------------------------------------------- pytest


def pytest_make_parametrize_id(val: object) -> str | None:
    if isinstance(val, Case):
        return val.name
    return str(val).removeprefix("torch.") if isinstance(val, torch.dtype) else None


def pytest_report_header() -> str:
    isas = " ".join(myconv._C.isas())
    return f"myconv on {isas}, torch {torch.__version__}, threads: {torch.get_num_threads()}"


CUDA = torch.cuda.is_available() and "cuda" in myconv._C.devices()


@pytest.fixture(params=["cpu", "cuda"] if CUDA else ["cpu"])
def device(request: pytest.FixtureRequest) -> str:
    """Each device that this machine and this build have."""
    return request.param


@pytest.fixture
def seed() -> int:
    return SEED
