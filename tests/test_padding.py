"""Padding that torch copies or refuses: pairs, 'causal', modes by keyword, modes of transposed convolutions."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile

import myconv
import myconv.functional
from conftest import assert_accurate

MODES = ("zeros", "reflect", "replicate", "circular")
EXTENTS = (9, 8, 7)
KERNELS = (3, 2, 4)
PADDINGS = {  # by rank; each entry is what F.pad is given, and some are written in a shorter way
    1: {"pair": ((2, 0),), "high": ((0, 3),), "list": [[1, 2]], "same-sides": ((2, 2),)},
    2: {"pairs": ((1, 2), (0, 3)), "mixed": (1, (0, 2)), "one-for-all": ((2, 1),), "low": ((3, 0), (2, 0))},
    3: {"pairs": ((1, 2), (0, 1), (3, 0)), "mixed": (1, (0, 2), 0), "one-for-all": ((1, 2),)},
}
CALLS = [
    pytest.param(rank, padding, mode, id=f"{rank}d-{name}-{mode}")
    for rank, paddings in PADDINGS.items()
    for name, padding in paddings.items()
    for mode in MODES
]


def sides(padding, rank):
    """((low, high), ...) of every axis."""
    pairs = [(entry, entry) if isinstance(entry, int) else tuple(entry) for entry in padding]
    return pairs * (rank // len(pairs))


def torchs_pad(x, pairs, mode):
    amounts = [side for pair in reversed(pairs) for side in pair]
    return F.pad(x, amounts, mode="constant" if mode == "zeros" else mode)


def operands(rank, seed, dtype=torch.float64, channels=4, groups=2):
    torch.manual_seed(seed)
    x = torch.randn(2, channels, *EXTENTS[:rank], dtype=dtype, requires_grad=True)
    w = torch.randn(6, channels // groups, *KERNELS[:rank], dtype=dtype, requires_grad=True)
    b = torch.randn(6, dtype=dtype, requires_grad=True)
    return x, w, b


def compare(ours, theirs, leaves):
    gy = torch.randn_like(ours)
    grads = torch.autograd.grad(ours, leaves, gy), torch.autograd.grad(theirs, leaves, gy)
    for actual, exact in zip((ours, *grads[0]), (theirs, *grads[1])):
        assert_accurate(actual, exact)


@pytest.mark.parametrize("rank, padding, mode", CALLS)
def test_pairs(rank, padding, mode, seed):
    x, w, b = operands(rank, seed)
    parameters = {"stride": 2, "groups": 2}
    ours = getattr(myconv.functional, f"conv{rank}d")(x, w, b, padding=padding, padding_mode=mode, **parameters)
    padded = torchs_pad(x, sides(padding, rank), mode)
    compare(ours, getattr(F, f"conv{rank}d")(padded, w, b, **parameters), (x, w, b))


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("channels, filters, groups", [(4, 6, 2), (20, 24, 1), (24, 3, 1)])
def test_one_tap_padded_behind(channels, filters, groups, stride, mode, channels_last, seed):
    """No pixel comes before the first, but some come behind the last."""
    torch.manual_seed(seed)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(2, channels, 5, 7, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
    w = torch.randn(filters, channels // groups, 1, 1, dtype=torch.float64, requires_grad=True)
    pairs = [(0, 1), (0, 4)]
    ours = myconv.functional.conv2d(x, w, None, stride, pairs, 1, groups, padding_mode=mode)
    compare(ours, F.conv2d(torchs_pad(x, pairs, mode), w, None, stride, 0, 1, groups), (x, w))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 3])
def test_causal(stride, dilation, mode, seed):
    x, w, b = operands(1, seed)
    parameters = {"stride": stride, "dilation": dilation, "groups": 2}
    ours = myconv.functional.conv1d(x, w, b, padding="causal", padding_mode=mode, **parameters)
    assert ours.shape[-1] == -(-x.shape[-1] // stride)
    compare(ours, F.conv1d(torchs_pad(x, [(2 * dilation, 0)], mode), w, b, **parameters), (x, w, b))
    if mode in ("zeros", "replicate"):  # the future does not reach the past
        later = x.detach().clone()
        later[..., 5:] += 1
        with torch.no_grad():
            changed = myconv.functional.conv1d(later, w, b, padding="causal", padding_mode=mode, **parameters) - ours
        past = -(-5 // stride)
        assert not changed[..., :past].any() and changed[..., past:].all()


@pytest.mark.parametrize("output_padding", [0, 1])
@pytest.mark.parametrize("rank, padding, mode", CALLS)
def test_transposed_is_the_adjoint(rank, padding, mode, output_padding, seed):
    """<conv(x), g> = <x, conv_transpose(g)>, for the input size that output_padding names."""
    x, w, _ = (t.detach() for t in operands(rank, seed))
    stride = 2
    conv, transpose = (getattr(myconv.functional, f"{name}{rank}d") for name in ("conv", "conv_transpose"))
    pairs = sides(padding, rank)
    extents = [stride * 3 + k - sum(pair) + output_padding for k, pair in zip(w.shape[2:], pairs)]
    x = torch.randn(2, 4, *extents, dtype=x.dtype)
    if mode == "reflect" and any(max(pair) >= n for pair, n in zip(pairs, extents)):
        extents = [n + stride * 2 for n in extents]
        x = torch.randn(2, 4, *extents, dtype=x.dtype)
    y = conv(x, w, stride=stride, padding=padding, groups=2, padding_mode=mode)
    g = torch.randn_like(y)
    back = transpose(g, w, stride=stride, padding=padding, output_padding=output_padding, groups=2, padding_mode=mode)
    assert back.shape == x.shape
    # And the adjoint of torch's padding and torch's convolution, exactly.
    leaf = x.clone().requires_grad_()
    theirs = getattr(F, f"conv{rank}d")(torchs_pad(leaf, pairs, mode), w, stride=stride, groups=2)
    assert_accurate(back, torch.autograd.grad(theirs, leaf, g)[0])
    torch.testing.assert_close((y * g).sum(), (x * back).sum(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_gradgradcheck(mode, seed):
    torch.manual_seed(seed)
    x = torch.randn(1, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    w = torch.randn(2, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    for f in (myconv.functional.conv2d, myconv.functional.conv_transpose2d):

        def call(x, w, f=f):
            return f(x, w, stride=(2, 1), padding=((1, 0), (0, 2)), padding_mode=mode)

        assert torch.autograd.gradcheck(call, (x, w), check_forward_ad=True)
        assert torch.autograd.gradgradcheck(call, (x, w))


# ---- modules


MODULES = [
    ("Conv1d", {"padding": "causal", "dilation": 2}),
    ("Conv1d", {"padding": "causal", "stride": 3, "padding_mode": "reflect"}),
    ("Conv1d", {"padding": ((2, 1),), "padding_mode": "circular"}),
    ("Conv2d", {"padding": ((1, 2), (0, 3)), "stride": 2}),
    ("Conv2d", {"padding": (1, (0, 2)), "padding_mode": "replicate"}),
    ("Conv3d", {"padding": ((1, 2),)}),
    ("ConvTranspose1d", {"padding": ((2, 1),), "stride": 2, "output_padding": 1}),
    ("ConvTranspose1d", {"padding": 1, "padding_mode": "reflect"}),
    ("ConvTranspose2d", {"padding": ((1, 2), (0, 1)), "stride": 2, "padding_mode": "circular"}),
    ("ConvTranspose2d", {"padding": (1, 2), "stride": 2, "padding_mode": "replicate"}),
    ("ConvTranspose3d", {"padding": ((1, 0),), "padding_mode": "zeros"}),
]


def module_and_input(name, kwargs):
    torch.manual_seed(0)
    module = getattr(myconv, name)(4, 6, 3, **kwargs, dtype=torch.float64)
    return module, torch.randn(2, 4, *EXTENTS[: len(module.kernel_size)], dtype=torch.float64)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name, kwargs", MODULES, ids=str)
def test_modules(name, kwargs, tmp_path):
    module, x = module_and_input(name, kwargs)
    parameters = {k: v for k, v in kwargs.items() if k != "dtype"}
    y = getattr(myconv.functional, name.replace("Conv", "conv").replace("convT", "conv_t"))(
        x, module.weight, module.bias, **parameters
    )
    assert torch.equal(module(x), y)
    assert torch.equal(module(x[0]), y[0])
    torch.save(module, tmp_path / "module.pt")
    scripted = torch.jit.script(module)
    torch.jit.save(scripted, tmp_path / "module.ts")
    others = {
        "deepcopy": copy.deepcopy(module),
        "save": torch.load(tmp_path / "module.pt", weights_only=False),
        "script": scripted,
        "script, saved": torch.jit.load(tmp_path / "module.ts"),
        "trace": torch.jit.trace(module, x),
        "compile": torch.compile(module, fullgraph=True, backend="aot_eager"),
        "export": torch.export.export(module, (x,)).module(),
        "state_dict": getattr(myconv, name)(4, 6, 3, **kwargs, dtype=torch.float64),
    }
    others["state_dict"].load_state_dict(module.state_dict())
    for how, other in others.items():
        assert torch.equal(other(x), y), how
    assert repr(others["deepcopy"]) == repr(module)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("padding", [(1, 2), ((1, 2), (0, 1)), ((2, 1), 1)], ids=str)
def test_output_size(padding):
    module, x = module_and_input("ConvTranspose2d", {"padding": padding, "stride": (2, 3), "dilation": (1, 2)})
    least = module(x).shape[2:]
    scripted = torch.jit.script(module)
    for size in itertools.product(*(range(n, n + s) for n, s in zip(least, module.stride))):
        assert module(x, output_size=size).shape[2:] == size
        assert torch.equal(scripted(x, list(size)), module(x, output_size=size))
    for size in ((least[0] - 1, least[1]), (least[0], least[1] + 3)):
        with pytest.raises(ValueError, match="valid sizes range from") as refused:
            module(x, output_size=size)
        assert f"{list(least)} to {[n + s - 1 for n, s in zip(least, module.stride)]}" in str(refused.value)


def test_pairs_with_equal_sides_are_pairs():
    assert myconv.Conv2d(4, 6, 3, padding=((1, 1), 2)).padding == ((1, 1), (2, 2))
    assert myconv.Conv2d(4, 6, 3, padding=[1, 2]).padding == nn.Conv2d(4, 6, 3, padding=[1, 2]).padding


def test_what_torch_lacks_is_not_restored():
    left = nn.Sequential(*(getattr(myconv, name)(4, 6, 3, **kwargs) for name, kwargs in MODULES))
    report = myconv.restore(left)
    assert not report.swapped
    assert all("which torch.nn" in reason for _, reason in report.left)


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("name, kwargs", [("Conv1d", {"padding": "causal"}), ("Conv2d", {"padding": ((1, 2), (0, 3))})])
def test_lazy(name, kwargs):
    full = getattr(myconv, name)(4, 6, 3, **kwargs)
    lazy = getattr(myconv, f"Lazy{name}")(6, 3, **kwargs)
    x = torch.randn(2, 4, *EXTENTS[: len(full.kernel_size)])
    lazy(x)
    assert type(lazy) is type(full)
    lazy.load_state_dict(full.state_dict())
    assert torch.equal(lazy(x), full(x))


# ---- memory

LARGE = [
    ("conv2d", {"padding": ((1, 0), (0, 1))}),
    ("conv2d", {"padding": ((2, 1), (1, 2)), "padding_mode": "reflect"}),
    ("conv2d", {"padding": 1, "padding_mode": "circular"}),
    ("conv2d", {"padding": "same", "padding_mode": "replicate"}),
    ("conv1d", {"padding": "causal"}),
    ("conv1d", {"padding": "causal", "padding_mode": "reflect"}),
    ("conv_transpose2d", {"padding": ((1, 0), (0, 1))}),
    ("conv_transpose2d", {"padding": 1, "padding_mode": "reflect"}),
]


def peak_bytes(function):
    """The most memory that torch's CPU allocator held at once during function(), above what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = function()
    allocations = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(allocations, key=lambda e: e.start_ns())]
    assert changes, "nothing was recorded"
    del result
    return max(itertools.accumulate(changes))


@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "gradients"])
@pytest.mark.parametrize("op, arguments", LARGE, ids=str)
def test_no_copy(op, arguments, gradients):
    """Peak memory is that of the results and a workspace that does not grow with the batch."""
    rank = 1 if "1d" in op else 2
    x = torch.randn(16, 4, *((64 * 64,) if rank == 1 else (64, 64)), requires_grad=gradients)
    w = torch.randn(4, 4, *(3,) * rank, requires_grad=gradients)

    def ours():
        y = getattr(myconv.functional, op)(x, w, **arguments)
        return torch.autograd.grad(y, (x, w), y.detach()) if gradients else y

    results = x.nbytes * (2 if gradients else 1)  # y, and gx
    spare = x.nbytes // 2
    assert peak_bytes(ours) < results * 1.1 + spare


def test_a_copy_would_be_seen():
    x, w = torch.randn(16, 4, 64, 64), torch.randn(4, 4, 3, 3)
    peak = peak_bytes(lambda: myconv.functional.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), w))
    assert peak > x.nbytes * 1.1 + x.nbytes // 2
