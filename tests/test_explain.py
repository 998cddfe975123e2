"""explain names what runs; flags decide it, on their own thread only."""

import os
import subprocess
import sys
import threading
import typing
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import myconv
import myconv.functional
from cases import CORE, DIRECTIONS, make_tensors
from conftest import kernels, our_conv
from myconv import flags

ROLES = ("forward", "backward_input", "backward_weight")
WITH_RESULT = [case for case in CORE if 0 not in case.input]


def operands(case, layout="contiguous", dtype=torch.float32):
    return make_tensors(case, dtype, layout)


def explained(case, tensors):
    (call,) = myconv.explain(our_conv, case, *tensors[:3]).calls
    return call


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", WITH_RESULT)
def test_every_row_that_is_forced_is_named(case, layout):
    tensors = operands(case, layout)
    call = explained(case, tensors)
    assert tuple(call.directions) == ROLES
    assert call.operation == case.op and call.output == tuple(tensors[3].shape)
    for explanation in call.directions.values():
        direction = explanation.operator.removeprefix("conv_")
        for row, isa in kernels(direction, case.problem, tensors[:2], layout):
            with flags.algorithm(direction, row), flags.isa(isa):
                found = [d for d in explained(case, tensors).directions.values() if d.operator == explanation.operator]
            assert [(d.algorithm, d.isa) for d in found] == [(row, isa)]


@pytest.mark.parametrize("case", WITH_RESULT)
def test_explanation_is_of_the_call(case):
    """What explain names, forced, gives the bits of the call; the rows before it decline."""
    tensors = operands(case)
    x, w, b = (t if t is None else t.requires_grad_() for t in tensors[:3])

    def results():
        y = our_conv(case, x, w, b)
        return [y, *torch.autograd.grad(y, (x, w), tensors[3])]

    call = explained(case, tensors)
    for expected, role in zip(results(), ROLES):
        found = call.directions[role]
        direction = found.operator.removeprefix("conv_")
        rows = myconv._C.algorithms(direction)
        assert set(rows[: rows.index(found.algorithm)]) <= set(found.declined)
        assert found.algorithm not in found.declined
        with flags.algorithm(direction, found.algorithm):
            assert torch.equal(dict(zip(ROLES, results()))[role], expected)


def test_explain_runs_no_kernel_and_changes_nothing():
    """Explaining costs one call; the values come from it, gradients are left alone."""
    layer = myconv.Conv2d(4, 6, 3)
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    seen = []
    explanation = myconv.explain(lambda: seen.append(layer(x)))
    assert torch.equal(seen[0], layer(x)) and seen[0].grad_fn is not None
    assert x.grad is None and layer.weight.grad is None
    assert len(explanation.calls) == 1
    assert torch.equal(layer(x), seen[0])


def test_recording_ends_with_an_error():
    def fails():
        raise ValueError("from inside")

    with pytest.raises(ValueError, match="from inside"):
        myconv._C.record(fails)
    with pytest.raises(ValueError, match="from inside"):
        myconv.explain(fails)
    x = torch.ones(1, 1, 3, 3)
    assert myconv.functional.conv2d(x, x).item() == 9


def test_whole_model():
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1),
        nn.Sequential(nn.ReLU(), nn.ConvTranspose2d(8, 8, 2, stride=2)),
        nn.Conv2d(8, 2, 1),
    )
    myconv.replace(model, names=["0", "1.*"])
    explanation = myconv.explain(model, torch.randn(2, 4, 8, 8))
    assert [call.module for call in explanation.calls] == ["Sequential.0", "Sequential.1.1"]
    assert [call.operation for call in explanation.calls] == ["conv2d", "conv_transpose2d"]
    assert explanation.by_torch == ["Sequential.2"]
    assert explanation.threads == torch.get_num_threads()
    text = str(explanation)
    for call in explanation.calls:
        assert call.module in text
        for name, direction in call.directions.items():
            assert name in text and direction.algorithm in text and direction.packing in " ".join(text.split())
            assert all(reason in " ".join(text.split()) for reason in direction.declined.values())


@pytest.mark.parametrize("case", WITH_RESULT)
def test_flops_and_bytes(case):
    x, w, b, gy = operands(case)
    call = explained(case, (x, w, b))
    with FlopCounterMode(display=False) as counter:
        our_conv(case, x, w, b)
    assert {d.flops for d in call.directions.values()} == {counter.get_total_flops()}
    moved = {"forward": x.nbytes + w.nbytes + gy.nbytes + (0 if b is None else b.nbytes)}
    moved["backward_input"] = moved["backward_weight"] = x.nbytes + w.nbytes + gy.nbytes
    assert {name: d.bytes for name, d in call.directions.items()} == moved


WORKSPACE = """
import torch, myconv
from test_padding import peak_bytes

x, w = torch.randn(4, 32, 40, 40), torch.randn(32, 32, 3, 3)
y = myconv.functional.conv2d(x, w)
workspace = myconv.explain(myconv.functional.conv2d, x, w).calls[0].directions["forward"].workspace
peak = peak_bytes(lambda: myconv.functional.conv2d(x, w))
assert y.nbytes + workspace <= peak <= y.nbytes + workspace + 4096, (y.nbytes, workspace, peak)
assert workspace > 1 << 14
"""


def test_workspace_is_what_is_allocated():
    """The largest allocation besides the result; of a process of its own, since a workspace may outlive its call."""
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = os.environ | {"MYCONV_KEPT_MIB": "0", "PYTHONPATH": paths}
    subprocess.run([sys.executable, "-c", WORKSPACE], env=environment, check=True)


@pytest.mark.parametrize("threads", [1, 2, 16])
@pytest.mark.parametrize("channels", [256, 1024])
def test_workspace_is_bounded(channels, threads):
    """64 MiB and 2 MiB a thread, where a quarter of the tensors is less."""
    x, w = torch.zeros(1, channels, 40, 40), torch.zeros(channels, channels, 3, 3)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        directions = myconv.explain(myconv.functional.conv2d, x, w, padding=1).calls[0].directions
    finally:
        torch.set_num_threads(before)
    for role in ("forward", "backward_input"):
        assert directions[role].algorithm.startswith("winograd")
        assert directions[role].workspace <= (64 + 2 * threads) << 20


def test_copies():
    w = torch.randn(4, 8, 3, 3)
    x = torch.randn(2, 8, 10, 10)
    nothing = myconv.explain(myconv.functional.conv2d, x, w).calls[0]
    assert not any(d.copies for d in nothing.directions.values())
    sliced = myconv.explain(myconv.functional.conv2d, torch.randn(2, 8, 20, 10)[:, :, ::2], w).calls[0]
    assert sliced.directions["forward"].copies == {"input": x.nbytes}
    assert sliced.directions["backward_weight"].copies == {"input": x.nbytes}
    assert "copied whole: input" in str(sliced)
    mixed = myconv.explain(myconv.functional.conv2d, x, w.contiguous(memory_format=torch.channels_last)).calls[0]
    assert mixed.directions["forward"].layout == "channels_last"
    assert mixed.directions["forward"].copies == {"input": x.nbytes}


def test_other_dtypes_and_empty_calls():
    x, w = torch.randn(2, 4, 8, 8), torch.randn(6, 4, 3, 3)
    explain = myconv.explain
    call = explain(myconv.functional.conv2d, x.long(), w.long()).calls[0]
    assert list(call.directions) == ["forward"]
    call = explain(myconv.functional.conv2d, x.to(torch.complex64), w.to(torch.complex64)).calls[0]
    assert {d.kernels for d in call.directions.values()} == {4}
    call = explain(myconv.functional.conv2d, x[:0], w).calls[0]
    assert call.directions["forward"].algorithm == "nothing" and call.directions["forward"].flops == 0
    str(call)
    with torch.autocast("cpu", torch.bfloat16):
        call = explain(myconv.functional.conv2d, x, w).calls[0]
    assert call.dtype is torch.bfloat16
    assert not explain(myconv.functional.conv2d, x.to("meta"), w.to("meta")).calls
    assert not explain(torch.add, x, x).calls


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Using `torch.compile")
def test_compiled_and_scripted():
    layer = myconv.Conv2d(4, 6, 3)
    x = torch.randn(2, 4, 8, 8)
    for function in (torch.jit.script(layer), torch.compile(layer, backend="aot_eager")):
        function(x)
        assert len(myconv.explain(function, x).calls) == 1


def test_gradients_inside_are_not_calls():
    layer = myconv.Conv2d(4, 6, 3)
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    assert len(myconv.explain(lambda: layer(x).sum().backward()).calls) == 1


# ---- flags


def selected(direction, x, w):
    call = myconv.explain(myconv.functional.conv2d, x, w).calls[0]
    return call.directions[direction]


def test_exclude():
    x, w = torch.randn(2, 8, 10, 10), torch.randn(8, 8, 3, 3)
    assert selected("forward", x, w).algorithm == "direct"
    with flags.exclude("direct"):
        found = selected("forward", x, w)
        assert found.algorithm == "reference"
        assert found.declined["direct"] == "excluded by myconv.flags"
        with flags.exclude("implicit_gemm"):
            with flags.algorithm("forward", "direct"):
                assert selected("forward", x, w).algorithm == "direct"
            assert selected("forward", x, w).algorithm == "reference"
    assert selected("forward", x, w).algorithm == "direct"
    for name in ("reference", "nothing_like_it", ""):
        with pytest.raises(ValueError, match="no algorithm"), flags.exclude(name):
            pass


def test_exclude_computes_the_same():
    x, w = torch.randint(-4, 5, (2, 8, 10, 10)).float(), torch.randint(-4, 5, (8, 8, 3, 3)).float()
    expected = myconv.functional.conv2d(x, w)
    with flags.exclude("direct", "implicit_gemm"):
        assert torch.equal(myconv.functional.conv2d(x, w), expected)


def test_winograd_excludes_rows_of_that_name():
    def taken_out():
        return set(myconv._C.excluded_algorithms())

    rows = {row for direction in DIRECTIONS for row in myconv._C.algorithms(direction) if row.startswith("winograd")}
    with flags.exclude("direct"):
        with flags.winograd(False):
            assert taken_out() == rows | {"direct"}
            with flags.winograd(True):
                assert taken_out() == {"direct"}
        assert taken_out() == {"direct"}
    assert not taken_out()


@pytest.mark.parametrize(
    "flag, state",
    [
        (lambda: flags.algorithm("forward", "reference"), lambda: myconv._C.forced_algorithm("forward")),
        (lambda: flags.isa("portable"), lambda: myconv._C.isa()),
        (lambda: flags.exclude("direct"), lambda: myconv._C.excluded_algorithms()),
        (lambda: flags.flush_denormals(False), lambda: myconv._C.flush_denormals()),
    ],
    ids=["algorithm", "isa", "exclude", "flush_denormals"],
)
def test_flags_hold_for_their_thread(flag, state):
    before = state()
    elsewhere = []

    def other_thread():
        elsewhere.append(state())

    with flag():
        inside = state()
        thread = threading.Thread(target=other_thread)
        thread.start()
        thread.join()
    assert inside != before and elsewhere == [before] and state() == before

    with pytest.raises(KeyError), flag():
        raise KeyError
    assert state() == before

    @flag()
    def decorated():
        return state()

    assert decorated() == inside and decorated() == inside and state() == before


def test_flags_under_compile():
    layer = myconv.Conv2d(8, 8, 3)
    x = torch.randint(-3, 4, (2, 8, 10, 10)).float()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    compiled(x)
    with flags.algorithm("forward", "depthwise"), pytest.raises(RuntimeError, match="'depthwise' was forced but"):
        compiled(x)


# ---- denormals

TINY = {torch.float32: 1e-40, torch.bfloat16: 1e-40, torch.float16: 1e-7, torch.float64: 1e-310}
FLUSHED = (torch.float32, torch.bfloat16)


def results_on(case, x, w, gy):
    x, w = x.requires_grad_(), w.requires_grad_()
    y = our_conv(case, x, w, None)
    return [y, *torch.autograd.grad(y, (x, w), gy)]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", TINY, ids=str)
@pytest.mark.parametrize("case", [case for case in WITH_RESULT if case.padding_mode == "zeros"])
def test_denormals(case, dtype, threads):
    """Denormal operands count as zeros where they are flushed, and as themselves elsewhere, on every row."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, w, _, gy = (t if t is None else torch.ones_like(t) for t in operands(case, dtype=dtype))
        exact = results_on(case, x.detach().clone().double(), w.detach().clone().double(), gy.double())
        small = torch.tensor(TINY[dtype], dtype=dtype)
        tiny = (torch.full_like(x, small), torch.full_like(gy, small))
        for flush in (True, False):
            with flags.flush_denormals(flush):
                forward = our_conv(case, tiny[0], w, None)
                found = [forward, *results_on(case, x.clone(), w.clone(), tiny[1])[1:]]
            for actual, ones in zip(found, exact):
                if flush and dtype in FLUSHED:
                    assert not actual.any()
                else:
                    torch.testing.assert_close(actual.double(), ones * small.double(), rtol=0.01, atol=0)
    finally:
        torch.set_num_threads(before)


def test_denormal_results_are_zeros_and_the_mode_is_restored():
    x, w = torch.full((1, 1, 4, 4), 1e-20), torch.full((1, 1, 1, 1), 1e-20)
    assert not myconv.functional.conv2d(x, w).any()
    with flags.flush_denormals(False):
        assert myconv.functional.conv2d(x, w).all()
    assert (torch.full((3,), 1e-40) * 1).all()  # the caller's own arithmetic is not touched


@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="this processor cannot flush denormals")
def test_the_callers_mode_reaches_all_threads():
    x, w = torch.full((8, 8, 64, 64), 1e-310, dtype=torch.float64), torch.ones(8, 8, 3, 3, dtype=torch.float64)
    try:
        torch.set_flush_denormal(True)
        flushed = myconv.functional.conv2d(x, w)
    finally:
        torch.set_flush_denormal(False)
    # Bits, since threads that torch started meanwhile compare denormals as zeros.
    kept = myconv.functional.conv2d(x, w).view(torch.int64)
    assert not flushed.view(torch.int64).any() and kept.all()


# ---- build_info, types


def test_build_info():
    info = myconv.build_info()
    assert info["version"] == myconv.__version__
    assert info["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert info["isa"] in info["isas"] and info["threads"] == torch.get_num_threads()
    with flags.isa("portable"):
        assert myconv.build_info()["isa"] == "portable"
    assert isinstance(info["compiler"], str) and info["openmp"] in (True, False)
    assert bool(info["cuda"]) == ("cuda" in myconv._C.devices())


def test_annotations_resolve():
    for name in myconv.__all__:
        value = getattr(myconv, name)
        if callable(value):
            typing.get_type_hints(value.__init__ if isinstance(value, type) else value)
