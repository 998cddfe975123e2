"""replace and restore: what is swapped, what is kept, what is left and why."""

import copy
import functools
import pickle
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import myconv
from conftest import SEED

OURS = {getattr(nn, name): getattr(myconv, name) for name in myconv.modules.__all__}
LAZY = [cls for cls in OURS if issubclass(cls, nn.modules.lazy.LazyModuleMixin)]
EAGER = [cls for cls in OURS if cls not in LAZY]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(SEED)


class Block(nn.Module):
    def __init__(self, channels, groups=1):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, groups=groups, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 1),
        )

    def forward(self, x):
        return x + self.body(x)


class Net(nn.Module):
    """An encoder and decoder with normalised, shared and keyed convolutions."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 5, stride=2, padding=2, padding_mode="reflect")
        self.blocks = nn.ModuleList([Block(8), Block(8, groups=8)])
        self.normed = parametrizations.weight_norm(nn.Conv2d(8, 8, 3, padding="same"))
        self.shared = nn.Conv2d(8, 8, 3, padding=1)
        self.again = nn.Sequential(nn.ReLU(), self.shared)
        self.up = nn.ConvTranspose2d(8, 8, 4, stride=2, padding=1)
        self.heads = nn.ModuleDict({"mask": nn.Conv2d(8, 1, 1), "edge": nn.Sequential(nn.Conv2d(8, 2, 3))})
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.series = nn.Conv1d(8, 4, 3)
        self.double()

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = self.again(self.shared(self.normed(x)))
        flat = x.flatten(2)
        attended = self.attention(*[flat.transpose(1, 2)] * 3)[0].transpose(1, 2)
        series = self.series(attended)
        x = self.up(x)
        return self.heads["mask"](x).mean() + self.heads["edge"](x).square().mean() + series.mean()


NET_CONVOLUTIONS = [
    "stem",
    "blocks.0.body.0",
    "blocks.0.body.3",
    "blocks.1.body.0",
    "blocks.1.body.3",
    "normed",
    "shared",
    "up",
    "heads.mask",
    "heads.edge.0",
    "series",
]


def net_input():
    return torch.randn(2, 3, 12, 10, dtype=torch.float64)


def kind(module):
    """The class a module computes with: that of a parametrized module is derived from it."""
    return parametrize.type_before_parametrizations(module)


def kinds(model):
    return [kind(module) for module in model.modules()]


def everything(module):
    """All that a module holds, by identity."""
    return {key: id(value) for key, value in vars(module).items()}


def train(model, x, steps=3):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(x)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def two_convs(**kwargs):
    return nn.Sequential(nn.Conv2d(4, 6, 3, **kwargs), nn.Conv2d(6, 4, 3, **kwargs)).double()


# ---- the whole model


def test_net_is_swapped_and_restored():
    net, x = Net(), net_input()
    before, expected = kinds(net), net(x)
    held = [everything(module) for module in net.modules()]
    assert [name for name, m in net.named_modules() if kind(m) in OURS] == NET_CONVOLUTIONS

    report = myconv.replace(net)
    assert report.model is net
    assert report.swapped == NET_CONVOLUTIONS and report.left == []
    assert kinds(net) == [OURS.get(cls, cls) for cls in before]
    assert [everything(module) for module in net.modules()] == held
    torch.testing.assert_close(net(x), expected)

    report = myconv.restore(net)
    assert report.model is net
    assert report.swapped == NET_CONVOLUTIONS and report.left == []
    assert kinds(net) == before
    assert [everything(module) for module in net.modules()] == held
    assert torch.equal(net(x), expected)


def test_swapped_net_trains_as_torchs():
    theirs, x = Net(), net_input()
    ours = myconv.replace(theirs, inplace=False).model
    torch.testing.assert_close(train(ours, x), train(theirs, x))
    for (name, mine), reference in zip(ours.state_dict().items(), theirs.state_dict().values()):
        torch.testing.assert_close(mine, reference, msg=lambda text, name=name: f"{name}: {text}")


def test_swap_in_the_middle_of_training():
    theirs, x = Net(), net_input()
    ours = copy.deepcopy(theirs)
    losses = []
    for model in (theirs, ours):
        optimizer = torch.optim.Adam(model.parameters())
        for step in range(4):
            if model is ours:
                (myconv.replace if step % 2 else myconv.restore)(model)
            optimizer.zero_grad()
            loss = model(x)
            loss.backward()
            optimizer.step()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[1], losses[0])


def test_copy():
    net = Net()
    classes, held = kinds(net), [everything(module) for module in net.modules()]
    report = myconv.replace(net, inplace=False)
    assert report.model is not net and report.swapped == NET_CONVOLUTIONS
    assert kinds(net) == classes and [everything(module) for module in net.modules()] == held
    assert kinds(report.model) == [OURS.get(cls, cls) for cls in classes]
    assert not {*map(id, net.parameters())} & {*map(id, report.model.parameters())}
    assert report.model.shared is report.model.again[1]

    back = myconv.restore(report.model, inplace=False)
    assert back.model is not report.model and kinds(back.model) == classes
    assert kinds(report.model) == [OURS.get(cls, cls) for cls in classes]


def test_repeated():
    net = Net()
    myconv.replace(net)
    classes = [type(module) for module in net.modules()]
    again = myconv.replace(net)
    assert again.swapped == []
    assert again.left == [(name, "already a myconv module") for name in NET_CONVOLUTIONS]
    assert [type(module) for module in net.modules()] == classes
    myconv.restore(net)
    again = myconv.restore(net)
    assert again.swapped == []
    assert again.left == [(name, "not a myconv module") for name in NET_CONVOLUTIONS]
    assert myconv.replace(net).swapped == NET_CONVOLUTIONS


@pytest.mark.parametrize("cls", EAGER, ids=lambda cls: cls.__name__)
def test_model_that_is_a_convolution(cls):
    model = cls(2, 4, 3, padding=1, dtype=torch.float64)
    x = torch.randn(1, 2, *[5] * int(cls.__name__[-2]), dtype=torch.float64)
    expected = model(x)
    assert myconv.replace(model).swapped == [""]
    assert type(model) is OURS[cls]
    torch.testing.assert_close(model(x), expected)
    assert myconv.restore(model).swapped == [""]
    assert type(model) is cls


def test_model_without_convolutions():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.MultiheadAttention(4, 2))
    classes = kinds(model)
    for report in (myconv.replace(model), myconv.restore(model)):
        assert (report.swapped, report.left) == ([], [])
    assert kinds(model) == classes


def test_model_that_contains_itself():
    model = two_convs()
    model[0].parent = model
    assert myconv.replace(model).swapped == ["0", "1"]


@pytest.mark.parametrize("convert", [myconv.replace, myconv.restore])
def test_not_a_module(convert):
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got list"):
        convert([nn.Conv2d(1, 1, 1)])


# ---- choosing


@pytest.mark.parametrize(
    "chosen, expected",
    [
        ({"types": nn.Conv1d}, ["series"]),
        ({"types": (nn.Conv1d, nn.ConvTranspose2d)}, ["up", "series"]),
        ({"types": []}, []),
        ({"names": "blocks.*.0"}, ["blocks.0.body.0", "blocks.1.body.0"]),
        ({"names": ["stem", "heads.*"]}, ["stem", "heads.mask", "heads.edge.0"]),
        ({"names": "again.*"}, ["shared"]),  # the other name of a shared module
        ({"names": "*", "types": nn.ConvTranspose2d}, ["up"]),
        ({"names": "nothing"}, []),
        (
            {"filter": lambda name, module: module.kernel_size == (1, 1)},
            ["blocks.0.body.3", "blocks.1.body.3", "heads.mask"],
        ),
        ({"filter": lambda name, module: name == "again.1"}, ["shared"]),
        ({"names": "blocks.*", "filter": lambda name, module: module.groups > 1}, ["blocks.1.body.0"]),
        ({"types": nn.Conv2d, "names": "normed"}, ["normed"]),  # parametrized: a derived class
    ],
    ids="-".join,
)
def test_choice(chosen, expected):
    net, x = Net(), net_input()
    value = net(x)
    report = myconv.replace(net, **chosen)
    assert report.swapped == expected
    assert [name for name, m in net.named_modules() if kind(m) in OURS.values()] == expected
    assert [name for name, _ in report.left] == [name for name in NET_CONVOLUTIONS if name not in expected]
    assert {reason for _, reason in report.left} <= {
        "not among types",
        "no match in names",
        "declined by filter",
    }
    torch.testing.assert_close(net(x), value)
    assert myconv.replace(net).swapped == [name for name in NET_CONVOLUTIONS if name not in expected]


def test_filter_sees_only_what_could_be_swapped():
    seen = []
    net = nn.Sequential(nn.Conv2d(1, 1, 1), Custom(1, 1, 1), nn.Linear(1, 1), nn.Conv1d(1, 1, 1))
    myconv.replace(net, types=nn.Conv2d, filter=lambda name, module: seen.append((name, module)))
    assert seen == [("0", net[0])]


def test_filter_that_raises_changes_nothing():
    net = Net()
    classes = [type(module) for module in net.modules()]
    with pytest.raises(AttributeError):
        myconv.replace(net, filter=lambda name, module: name == "stem" or module.nothing)
    assert [type(module) for module in net.modules()] == classes


@pytest.mark.parametrize("types", [nn.Linear, [nn.Conv2d, nn.Module], myconv.Conv2d])
def test_types_must_be_convolutions(types):
    with pytest.raises(ValueError, match="types must be among"):
        myconv.replace(Net(), types=types)


# ---- what is kept


def test_hooks_attributes_and_mode_are_kept():
    seen = []

    def note(what):
        return lambda *args, **kwargs: seen.append(what)

    model = two_convs()
    conv = model[0]
    conv.register_forward_pre_hook(note("pre"))
    conv.register_forward_hook(note("post"))
    conv.register_forward_hook(lambda module, args, kwargs, output: output * 2, with_kwargs=True)
    conv.register_full_backward_hook(note("backward"))
    conv.register_full_backward_pre_hook(note("backward pre"))
    conv.register_state_dict_pre_hook(note("state"))
    conv.register_load_state_dict_post_hook(note("load"))
    conv.weight.register_hook(note("gradient"))
    conv.register_buffer("calls", torch.zeros(1))
    conv.child = nn.Identity()
    conv.label = "first"
    conv.bias.requires_grad_(False)
    model.eval()

    def run():
        seen.clear()
        model.zero_grad()
        x = torch.ones(1, 4, 7, 7, dtype=torch.float64, requires_grad=True)
        y = model(x)
        y.sum().backward()
        model.load_state_dict(model.state_dict())
        return list(seen), y, x.grad, conv.weight.grad

    calls, *expected = run()
    assert set(calls) == {"pre", "post", "backward", "backward pre", "state", "load", "gradient"}
    assert myconv.replace(model).swapped == ["0", "1"]
    assert model[0] is conv
    calls_after, *values = run()
    assert calls_after == calls
    torch.testing.assert_close(values, expected)
    assert conv.label == "first" and not conv.training and not conv.bias.requires_grad
    assert list(conv.state_dict()) == ["weight", "bias", "calls"] and list(conv.children()) == [conv.child]


def test_memory_format_dtype_and_device_are_kept():
    model = two_convs(device="meta").to(memory_format=torch.channels_last).bfloat16()
    strides = [p.stride() for p in model.parameters()]
    assert strides != [p.stride() for p in two_convs().parameters()]
    assert myconv.replace(model).swapped == ["0", "1"]
    assert [p.stride() for p in model.parameters()] == strides
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.bfloat16, "meta")}


def test_shared_parameters_stay_shared():
    model = two_convs()
    model[0].bias = nn.Parameter(torch.zeros(6, dtype=torch.float64))
    model.append(nn.ConvTranspose2d(4, 6, 3).double())
    model[2].weight = model[1].weight = nn.Parameter(torch.randn(4, 6, 3, 3, dtype=torch.float64))
    myconv.replace(model)
    assert model[2].weight is model[1].weight


def test_repr_and_state_dict_are_torchs():
    net = Net()
    text, state = repr(net), net.state_dict()
    myconv.replace(net)
    assert repr(net) == text
    assert list(net.state_dict()) == list(state)
    net.load_state_dict(state)


def test_pickle():
    net = Net()
    net.normed = nn.Conv2d(8, 8, 1).double()  # torch does not pickle parametrized modules
    x = net_input()
    expected = net(x)
    myconv.replace(net)
    clone = pickle.loads(pickle.dumps(net))
    assert kinds(clone) == kinds(net)
    torch.testing.assert_close(clone(x), expected)
    assert myconv.restore(clone).swapped == NET_CONVOLUTIONS
    assert torch.equal(clone(x), expected)


# ---- reparametrized modules

NORMS = {
    "weight_norm": (parametrizations.weight_norm, lambda m: parametrize.remove_parametrizations(m, "weight")),
    "spectral_norm": (
        parametrizations.spectral_norm,
        lambda m: parametrize.remove_parametrizations(m, "weight"),
    ),
    "orthogonal": (parametrizations.orthogonal, lambda m: parametrize.remove_parametrizations(m, "weight")),
    "old_weight_norm": (nn.utils.weight_norm, nn.utils.remove_weight_norm),
    "old_spectral_norm": (nn.utils.spectral_norm, nn.utils.remove_spectral_norm),
    "prune": (lambda m: prune.l1_unstructured(m, "weight", 0.4), lambda m: prune.remove(m, "weight")),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize("cls", [nn.Conv2d, nn.ConvTranspose2d], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("norm", NORMS)
def test_normalised(norm, cls):
    wrap, unwrap = NORMS[norm]
    theirs, ours = (nn.Sequential(cls(4, 6, 3)).double() for _ in range(2))
    ours.load_state_dict(theirs.state_dict())
    for model in (theirs, ours):
        torch.manual_seed(SEED)
        wrap(model[0])
    assert myconv.replace(ours).swapped == ["0"]
    assert kind(ours[0]) is OURS[cls]
    assert type(ours[0]).__name__ == type(theirs[0]).__name__
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    loss = [train(nn.Sequential(model, nn.Flatten(0), Sum()), x) for model in (ours, theirs)]
    torch.testing.assert_close(*loss)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    for model in (ours, theirs):
        unwrap(model.eval()[0])
    assert type(ours[0]) is OURS[cls]
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    assert myconv.restore(ours).swapped == ["0"] and type(ours[0]) is cls


class Sum(nn.Module):
    def forward(self, x):
        return x.square().mean()


def test_parametrized_stays_parametrizable():
    conv = parametrizations.weight_norm(nn.Conv2d(4, 6, 3))
    sibling = copy.deepcopy(conv)  # torch gives it the same class
    myconv.replace(conv)
    assert type(sibling).__bases__ == (nn.Conv2d,) and type(conv).__bases__ == (myconv.Conv2d,)

    parametrize.register_parametrization(conv, "bias", nn.Tanh(), unsafe=True)
    assert conv.bias.abs().max() < 1 and "bias" not in vars(type(sibling))
    clone = copy.deepcopy(conv)
    assert type(clone) is type(conv)
    x = torch.randn(2, 4, 6, 6)
    assert torch.equal(clone(x), conv(x))
    with parametrize.cached():
        assert conv.weight is conv.weight

    assert myconv.restore(conv).swapped == [""]
    assert type(conv).__bases__ == (nn.Conv2d,) and type(clone).__bases__ == (myconv.Conv2d,)
    torch.testing.assert_close(conv(x), clone(x))
    parametrize.remove_parametrizations(conv, "weight")
    assert parametrize.is_parametrized(conv, "bias")
    parametrize.remove_parametrizations(conv, "bias")
    assert type(conv) is nn.Conv2d
    assert sibling(x).shape == conv(x).shape
    with pytest.raises(RuntimeError, match="only supported through state_dict"):
        pickle.dumps(clone)


def test_parametrized_after_replacing():
    model = two_convs()
    myconv.replace(model)
    parametrizations.orthogonal(model[0])
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    expected = model(x)
    assert myconv.restore(model).swapped == ["0", "1"]
    assert kinds(model[0])[0] is nn.Conv2d
    torch.testing.assert_close(model(x), expected)


# ---- what is left


class Custom(nn.Conv2d):
    pass


class CustomLazy(nn.LazyConv2d):
    pass


class Tagged(torch.Tensor):
    pass


def with_weight(make):
    conv = nn.Conv2d(4, 4, 1)
    weight = make(conv.weight.detach())
    del conv.weight
    conv.weight = weight
    return conv


def with_attribute(name, value):
    conv = nn.Conv2d(4, 4, 1)
    setattr(conv, name, value)
    return conv


def with_parametrized_subclass():
    conv = with_weight(lambda w: nn.Parameter(w.as_subclass(Tagged)))
    return parametrize.register_parametrization(conv, "weight", nn.Identity(), unsafe=True)


def with_derived_class():
    """As sharding does it: a class made for this module, after torch made one for its parametrization."""
    conv = parametrizations.weight_norm(nn.Conv2d(4, 4, 1))
    conv.__class__ = type("Sharded", (type(conv),), {})
    return conv


def with_nested_weight():
    return with_weight(lambda w: torch.nested.nested_tensor([w, w]))


LEFT = {
    "subclass": (lambda: Custom(4, 4, 1), rf"a subclass: {__name__}\.Custom"),
    "parametrized_subclass": (
        lambda: parametrizations.weight_norm(Custom(4, 4, 1)),
        "a subclass: .*ParametrizedCustom",
    ),
    "derived_from_parametrized": (with_derived_class, "a subclass: .*Sharded"),
    "lazy_subclass": (lambda: CustomLazy(4, 1), rf"a subclass: {__name__}\.CustomLazy"),
    "scripted": (lambda: torch.jit.script(nn.Conv2d(4, 4, 1)), "a scripted module"),
    "qat": (
        lambda: torch.ao.nn.qat.Conv2d(4, 4, 1, qconfig=torch.ao.quantization.default_qat_qconfig),
        "a quantized module.*",
    ),
    "quantized": (lambda: torch.ao.nn.quantized.Conv2d(4, 4, 1), "a quantized module.*"),
    "prepared": (lambda: with_attribute("qconfig", object()), "prepared for quantization"),
    "forward_replaced": (lambda: with_attribute("forward", lambda x: x), "its forward was replaced"),
    "conv_forward_replaced": (
        lambda: with_attribute("_conv_forward", lambda x, w, b: x),
        "its _conv_forward was replaced",
    ),
    "sparse": (lambda: with_weight(lambda w: w.to_sparse()), r"weight has layout torch\.sparse_coo"),
    "mkldnn": (lambda: with_weight(lambda w: w.to_mkldnn()), r"weight has layout torch\._mkldnn"),
    "quantized_weight": (
        lambda: with_weight(lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8)),
        "weight is quantized",
    ),
    "nested": (with_nested_weight, "weight is nested"),
    "tensor_subclass": (
        lambda: with_weight(lambda w: nn.Parameter(w.as_subclass(Tagged))),
        "weight is a Tagged",
    ),
    "parametrized_tensor_subclass": (with_parametrized_subclass, "weight is a Tagged"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("case", LEFT)
def test_left(case):
    make, reason = LEFT[case]
    odd = make()
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Sequential(odd))
    cls = type(odd)
    report = myconv.replace(model)
    assert report.swapped == ["0"] and type(odd) is cls
    ((name, said),) = report.left
    assert name == "1.0"
    assert re.fullmatch(reason, said), said
    assert myconv.restore(model).swapped == ["0"] and type(odd) is cls


def test_left_on_other_devices(monkeypatch):
    monkeypatch.setattr(myconv.convert, "_DEVICES", ("cpu",))
    report = myconv.replace(two_convs(device="meta"))
    assert report.left == [("0", "weight is on device meta"), ("1", "weight is on device meta")]


def test_wrapped_instance_forward_is_left_alone():
    """As offloading and instrumentation do it: the instance's forward calls the one it had."""
    model = two_convs()
    model[0].forward = functools.partial(lambda forward, x: forward(x) + 1, model[0].forward)
    x = torch.randn(1, 4, 6, 6, dtype=torch.float64)
    expected = model(x)
    assert myconv.replace(model).swapped == ["1"]
    torch.testing.assert_close(model(x), expected)
    myconv.replace(model[1])
    model[1].forward = model[1].forward
    report = myconv.restore(model)
    assert report.swapped == [] and report.left[1] == ("1", "its forward was replaced")


def test_fake_tensors_are_taken():
    with torch._subclasses.FakeTensorMode():
        assert myconv.replace(nn.Sequential(nn.Conv2d(1, 1, 1))).swapped == ["0"]


# ---- restore on its own


def test_restore_of_models_built_from_ours():
    class Doubled(myconv.Conv2d):
        pass

    model = nn.Sequential(myconv.Conv2d(4, 4, 3), Doubled(4, 4, 1), nn.Conv2d(4, 4, 1), myconv.ConvTranspose2d(4, 4, 3))
    report = myconv.restore(model)
    assert report.swapped == ["0", "3"]
    assert [type(module) for module in model] == [nn.Conv2d, Doubled, nn.Conv2d, nn.ConvTranspose2d]
    assert [name for name, _ in report.left] == ["1", "2"]
    assert report.left[0][1].startswith("a subclass: ") and report.left[1][1] == "not a myconv module"


# ---- the report, and compiled models


def test_report_text():
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Conv1d(1, 1, 1), myconv.Conv1d(1, 1, 1), myconv.Conv2d(1, 1, 1))
    report = myconv.replace(model, types=nn.Conv2d)
    lines = [
        "1 swapped, 3 left",
        "  swapped: 0",
        "  left (not among types): 1",
        "  left (already a myconv module): 2, 3",
    ]
    assert str(report) == repr(report) == "\n".join(lines)
    assert str(myconv.restore(model[0])) == "1 swapped, 0 left\n  swapped: (the model itself)"
    assert str(myconv.replace(nn.Linear(1, 1))) == "0 swapped, 0 left"


@pytest.mark.parametrize(
    "convert",
    [
        pytest.param(
            myconv.replace,
            marks=pytest.mark.skipif(
                torch.__version__ < (2, 13),
                reason="Dynamo of torch 2.11 does not guard on a module's class: replace, then compile",
            ),
        ),
        myconv.patch,
    ],
)
def test_compiled_model_sees_the_swap(convert):
    torch._dynamo.reset()
    model, graphs = two_convs(), []

    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    compiled = torch.compile(model, backend=backend)
    x = torch.randn(1, 4, 6, 6, dtype=torch.float64)
    expected = compiled(x)
    assert convert(compiled).swapped == ["_orig_mod.0", "_orig_mod.1"]
    torch.testing.assert_close(compiled(x), expected)
    assert len(graphs) == 2 and [name for name in graphs[1] if "conv" in name] == ["myconv.conv_forward"] * 2
    myconv.restore(compiled)
    assert torch.equal(compiled(x), expected)
