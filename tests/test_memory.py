"""Memory that outlives its use (csrc/cpu/kept_memory.h)."""

import copy
import io
import os
import subprocess
import sys
import threading

import pytest
import torch

import myconv

F = myconv.functional
MIB = 1 << 20


@pytest.fixture(autouse=True)
def empty():
    myconv.empty_cache()
    yield
    myconv.empty_cache()


def result(mib: int = 1, value: float = 1.0) -> torch.Tensor:
    """Of so many MiB, and `value` everywhere."""
    return F.conv2d(torch.full((mib, 1, 512, 512), value), torch.ones(1, 1, 1, 1))


def test_results_leave_their_memory_to_later_ones():
    first = result()
    address = first.data_ptr()
    assert result().data_ptr() != address
    del first
    assert myconv._C.kept_memory() == 2 * MIB
    again = result(value=2.0)
    assert again.data_ptr() == address and (again == 2).all()
    assert myconv._C.kept_memory() == MIB
    myconv.empty_cache()
    assert myconv._C.kept_memory() == 0 and (again == 2).all()


@pytest.mark.parametrize("mib, taken", [(5, True), (4, True), (3, False), (6, False)])
def test_results_that_nearly_fit(mib, taken):
    address = result(5).data_ptr()
    assert (result(mib).data_ptr() == address) == taken


def test_small_results_are_not_kept():
    F.conv2d(torch.ones(1, 1, 100, 100), torch.ones(1, 1, 1, 1))
    assert myconv._C.kept_memory() == 0


def test_gradients_too():
    x, w = torch.randn(1, 16, 64, 64, requires_grad=True), torch.randn(16, 16, 3, 3, requires_grad=True)
    y = F.conv2d(x, w, padding=1)
    gy = torch.randn_like(y)
    for _ in range(3):
        torch.autograd.grad(y, (x, w), gy, retain_graph=True)
    assert myconv._C.kept_memory() == x.nbytes


def test_torchs_profiler_sees_every_use():
    result()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        result()
    changes = [e.nbytes() for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert changes.count(MIB) >= 1 and changes.count(-MIB) >= 1


def test_the_oldest_go_first():
    addresses = [result(mib).data_ptr() for mib in (40, 60, 100)]
    assert myconv._C.kept_memory() == 200 * MIB
    result(70)  # 270: the first goes
    assert myconv._C.kept_memory() == 230 * MIB
    assert result(100).data_ptr() == addresses[2]
    result(257)
    assert myconv._C.kept_memory() == 230 * MIB


CHILD = """
import os, torch, myconv
w = torch.ones(1, 1, 1, 1)
for mib in 1, 2, 3:
    myconv.functional.conv2d(torch.ones(mib, 1, 512, 512), w)
print(myconv._C.kept_memory() >> 20)
"""


@pytest.mark.parametrize("setting, kept", [("0", 0), ("2", 2), ("5", 5), ("-1", 0)])
def test_bound_of_the_environment(setting, kept):
    environment = os.environ | {"MYCONV_KEPT_MIB": setting, "PYTHONPATH": os.pathsep.join(sys.path)}
    output = subprocess.run([sys.executable, "-c", CHILD], env=environment, check=True, capture_output=True, text=True)
    assert int(output.stdout) == kept


def test_what_tensors_can_do():
    y = result()
    assert y.untyped_storage().resizable()
    buffer = io.BytesIO()
    torch.save(y, buffer)
    buffer.seek(0)
    for other in (torch.load(buffer), copy.deepcopy(y), y.clone()):
        assert torch.equal(other, y)
    array = y.numpy()
    address = y.data_ptr()
    del y  # the array holds the storage
    assert result(value=2.0).data_ptr() != address and (array == 1).all()
    grown = result().resize_(2, 1, 512, 512)
    assert (grown[0] == 1).all()
    shared = result().share_memory_()
    assert shared.is_shared() and (shared == 1).all()


def test_threads():
    failures = []

    def work(seed: int) -> None:
        held = []
        for i in range(40):
            value = float(seed * 100 + i)
            held.append((value, result(1 + i % 3, value)))
            if len(held) > 2:
                value, y = held.pop(0)
                if not (y == value).all():
                    failures.append((seed, i))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert 0 < myconv._C.kept_memory() <= 256 * MIB


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_fork():
    result()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # the threads of OpenMP are not there
        os._exit(0 if (result(value=3.0) == 3).all() and myconv._C.kept_memory() == MIB else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert myconv._C.kept_memory() == MIB
