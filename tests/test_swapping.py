"""The three ways to swap, and lazy modules, against the tools that people use on models."""

import contextlib
import copy
import functools
import io
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.ao import quantization
from torch.ao.nn.intrinsic import ConvReLU2d
from torch.ao.quantization.quantize_fx import prepare_fx
from torch.fx.experimental.optimization import fuse as fx_fuse
from torch.nn.utils import parametrizations
from torch.optim import swa_utils
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import myconv
from conftest import SEED
from test_convert import EAGER, LAZY, LEFT, NORMS, OURS, Custom, Tagged, kind

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning"),
]

# What to do with a model, and the region to run it in.
WAYS = {
    "replace": (myconv.replace, contextlib.nullcontext),
    "patch": (myconv.patch, contextlib.nullcontext),
    "override": (lambda model: None, myconv.override),
}
EACH_WAY = pytest.mark.parametrize("way", WAYS)
CONVERTED = pytest.mark.parametrize("way", ["replace", "patch"])  # the model itself changes
FUNCTIONS = myconv.functional.__all__


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(SEED)


class Seen(TorchDispatchMode):
    """The names of the convolution operators that run, gradients included."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "conv" in str(function):
            self.names.add(str(function))
        return function(*args, **(kwargs or {}))

    @property
    def spaces(self):
        return {name.split(".")[0] for name in self.names}


def spaces(function, *args):
    """The namespaces of the convolutions that run in a call."""
    with Seen() as seen:
        function(*args)
    return seen.spaces


def outcome(model, x):
    """The output, and the gradients of input and parameters."""
    x = x.detach().requires_grad_()
    y = model(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]  # fusion makes parameters that do not
    return [y, *torch.autograd.grad((y * weights).sum(), leaves)]


def assert_same(ours, theirs, x, way):
    """Same output and gradients, and every convolution was myconv's."""
    expected = outcome(theirs, x)
    with WAYS[way][1](), Seen() as seen:
        actual = outcome(ours, x)
    assert seen.spaces == {"myconv"}
    torch.testing.assert_close(actual, expected)


def net():
    """Convolutions with all that fusion looks for."""
    torch.manual_seed(SEED)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, padding=1, groups=2, padding_mode="reflect"),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 4, 3, stride=2, bias=False),
        nn.BatchNorm2d(4),
    )
    for norm in (model[1], model[6]):
        for tensor in (norm.running_mean, norm.running_var, norm.weight.data, norm.bias.data):
            tensor.uniform_(0.5, 1.5)
    return model.double().eval()


def image():
    return torch.randn(2, 3, 8, 7, dtype=torch.float64)


def swapped(way, model=None):
    model = net() if model is None else model
    WAYS[way][0](model)
    return model


def of_kind(model, kinds):
    return [type(module) for module in model.modules() if isinstance(module, kinds)]


CONVS = nn.modules.conv._ConvNd


# ---- patch itself


def test_patch_keeps_the_type():
    model, x = net(), image()
    before = [set(vars(module)) for module in model]
    report = myconv.patch(model)
    assert report.model is model and report.swapped == ["0", "3", "5"] and report.left == []
    assert of_kind(model, CONVS) == [nn.Conv2d, nn.Conv2d, nn.ConvTranspose2d]
    assert repr(model) == repr(net()) and list(model.state_dict()) == list(net().state_dict())
    assert_same(model, net(), x, "patch")
    assert myconv.patch(model).left == [(name, "already patched") for name in ("0", "3", "5")]
    assert myconv.replace(model).left == [(name, "already patched") for name in ("0", "3", "5")]
    assert myconv.restore(model).swapped == ["0", "3", "5"]
    assert [set(vars(module)) for module in model] == before
    assert spaces(model, x) == {"aten"}
    myconv.replace(model)
    assert {reason for _, reason in myconv.patch(model).left} == {"already a myconv module"}


@pytest.mark.parametrize("cls", EAGER, ids=lambda cls: cls.__name__)
def test_patch_of_each_class(cls):
    torch.manual_seed(SEED)
    theirs = cls(2, 4, 3, padding=1, stride=2, dtype=torch.float64)
    ours = myconv.patch(theirs, inplace=False).model
    assert type(ours) is cls and spaces(theirs, x := torch.randn(1, 2, *[5] * len(theirs.stride)).double()) == {"aten"}
    assert_same(ours, theirs, x, "patch")


def test_patch_takes_output_size():
    conv, x = nn.ConvTranspose2d(4, 4, 3, stride=2), torch.randn(1, 4, 5, 5)
    expected = conv(x, output_size=[12, 12])
    myconv.patch(conv)
    torch.testing.assert_close(conv(x, output_size=[12, 12]), expected)
    with pytest.raises(ValueError, match="requested an output size"):
        conv(x, [99, 99])


class Doubling(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


class Scaling(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight * 2, bias)


def test_patch_takes_subclasses_that_inherit():
    model = nn.Sequential(Custom(3, 4, 3), Doubling(4, 4, 1), Scaling(4, 4, 1), nn.Conv1d(1, 1, 1)).double()
    report = myconv.patch(model, types=nn.Conv2d)
    assert report.swapped == ["0"] and type(model[0]) is Custom
    assert [reason.split(":")[0] for _, reason in report.left] == [
        "a subclass with its own forward",
        "a subclass with its own _conv_forward",
        "not among types",
    ]
    x = image()
    assert_same(model[0], myconv.restore(model[0], inplace=False).model, x, "patch")


@pytest.mark.parametrize("cls, left", [(nn.Conv2d, False), (nn.ConvTranspose2d, True)], ids=["conv", "transposed"])
def test_forward_wrapped_after_patch(cls, left):
    """A wrapper around a patched ``forward`` keeps it; the forward of a convolution is torch's."""
    module, x = myconv.patch(cls(3, 4, 3).double()).model, image()
    module.forward = functools.partial(lambda forward, x: forward(x) + 1, module.forward)
    assert spaces(module, x) == {"myconv"}
    assert myconv.restore(module).left == ([("", "its forward was replaced")] if left else [])
    assert spaces(module, x) == ({"myconv"} if left else {"aten"})
    del module.forward
    myconv.restore(module)
    assert vars(module).keys() == vars(cls(3, 4, 3)).keys()


LEFT_BY_PATCH = [case for case, (_, reason) in LEFT.items() if not reason.startswith("a subclass")]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", LEFT_BY_PATCH)
def test_patch_leaves_what_replace_leaves(case):
    odd = LEFT[case][0]()
    held = set(vars(odd))
    replaced, patched = myconv.replace(odd), myconv.patch(odd)
    assert replaced.left == patched.left and len(patched.left) == 1
    assert set(vars(odd)) == held


def test_patched_module_in_graphs():
    torch._dynamo.reset()
    theirs, ours, x = net(), swapped("patch"), image()
    graphs = []

    def backend(graph, inputs):
        graphs.append(targets(graph))
        return graph

    compiled = torch.compile(ours, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x), theirs(x))
    exported = torch.export.export(ours, (x,))
    graphs.append(targets(exported))
    torch.testing.assert_close(exported.module()(x), theirs(x))
    assert all(len(graph) == 3 and all("myconv" in name for name in graph) for graph in graphs) and len(graphs) == 2
    traced = torch.jit.trace(ours, x)
    assert "aten::_convolution" not in str(traced.inlined_graph) and "myconv::" in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), theirs(x))
    with pytest.raises(RuntimeError, match=r"use myconv\.replace instead"):
        torch.jit.script(ours)
    for change in (myconv.restore, myconv.replace):
        change(ours)
        torch.testing.assert_close(torch.jit.script(ours)(x), theirs(x))


def targets(graph):
    return [str(n.target) for n in graph.graph.nodes if n.op == "call_function" and "conv" in str(n.target)]


# ---- fusion

PARTS = [["0", "1", "2"], ["3", "4"]]


@EACH_WAY
@pytest.mark.parametrize("order", ["swap first", "fuse first"])
def test_fuse_modules(way, order):
    """torch.ao looks for the exact types: what is replaced cannot be fused any more."""
    theirs, ours = quantization.fuse_modules(net(), PARTS), net()
    if order == "swap first":
        WAYS[way][0](ours)
        if way == "replace":
            with pytest.raises((AssertionError, NotImplementedError), match="did not find fuser method"):
                quantization.fuse_modules(ours, PARTS)
            return
    ours = quantization.fuse_modules(ours, PARTS)
    if order == "fuse first":
        WAYS[way][0](ours)
    assert of_kind(ours, (ConvReLU2d, nn.BatchNorm2d)) == [ConvReLU2d, ConvReLU2d, nn.BatchNorm2d]
    assert_same(ours, theirs, image(), way)


@EACH_WAY
@pytest.mark.parametrize("first, transposed", [(0, False), (5, True)])
def test_fuse_conv_bn_eval(way, first, transposed):
    theirs, ours = net(), swapped(way)
    made = [nn.utils.fuse_conv_bn_eval(m[first], m[first + 1], transpose=transposed) for m in (theirs, ours)]
    assert type(made[1]) is type(ours[first])
    assert_same(made[1], made[0], torch.randn(2, theirs[first].in_channels, 6, 5).double(), way)


@EACH_WAY
def test_fx_fuse(way):
    """It looks for the exact types, in models traced down to them: what is replaced keeps its norms."""
    theirs, ours = fx_fuse(net()), fx_fuse(swapped(way))
    fused = {"replace": 2}.get(way, 1)
    assert len(of_kind(theirs, nn.BatchNorm2d)) == 1 and len(of_kind(ours, nn.BatchNorm2d)) == fused
    expected, x = theirs(x := image()), x
    with WAYS[way][1](), Seen() as seen:
        torch.testing.assert_close(ours(x), expected)
    assert seen.spaces == {"myconv"}


# ---- reparametrizations


@pytest.mark.parametrize(
    "order, way", [(o, w) for o in ("swap first", "norm first") for w in ("replace", "patch")] + [(None, "override")]
)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("cls", [nn.Conv2d, nn.ConvTranspose2d], ids=lambda cls: cls.__name__)
def test_reparametrized(cls, norm, order, way):
    wrap, unwrap = NORMS[norm]
    theirs = nn.Sequential(cls(4, 6, 3)).double()
    ours, x = copy.deepcopy(theirs), torch.randn(2, 4, 7, 6, dtype=torch.float64)
    steps = [lambda: WAYS[way][0](ours), lambda: wrap(ours[0])]
    for step in steps if order == "swap first" else reversed(steps):
        torch.manual_seed(SEED)
        step()
    torch.manual_seed(SEED)
    wrap(theirs[0])
    for _ in range(2):
        assert_same(ours, theirs, x, way)
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    for model in (ours, theirs):
        unwrap(model.eval()[0])
    assert_same(ours, theirs, x, way)
    assert type(ours[0]) is (OURS[cls] if way == "replace" else cls)
    myconv.restore(ours)
    assert type(ours[0]) is cls and vars(ours[0]).keys() == vars(theirs[0]).keys()
    torch.testing.assert_close(ours(x), theirs(x))


def test_parametrized_and_patched_is_copied():
    ours = myconv.patch(parametrizations.weight_norm(nn.Conv2d(4, 4, 3))).model
    clone, x = copy.deepcopy(ours), torch.randn(1, 4, 5, 5)
    with torch.no_grad():
        clone.parametrizations.weight.original0.mul_(2)
    assert spaces(clone, x) == {"myconv"} and not torch.allclose(clone(x), ours(x))
    assert myconv.restore(clone).swapped == [""] and kind(clone) is nn.Conv2d


# ---- quantization


@CONVERTED
def test_prepared_for_quantization_is_left(way):
    model, x = net().float(), image().float()
    model.qconfig = quantization.default_qconfig
    mapping = quantization.QConfigMapping().set_global(quantization.default_qconfig)
    for prepared in (quantization.prepare(model), prepare_fx(net().float(), mapping, (x,))):
        report = WAYS[way][0](prepared)
        assert report.swapped == []
        assert [reason for _, reason in report.left] == ["prepared for quantization"] * 3


@EACH_WAY
def test_swapped_before_quantization(way):
    """Patched modules are observed and then quantized, as torch's are; replaced ones stay in float."""
    model, x = swapped(way, net().float()[3:5]), torch.randn(2, 6, 8, 7)
    expected = net().float()[3:5](x)
    model.qconfig = quantization.default_qconfig
    prepared = quantization.prepare(model)
    with WAYS[way][1](), Seen() as seen:
        torch.testing.assert_close(prepared(x), expected)
    assert seen.spaces == {"myconv"}
    assert hasattr(prepared[0], "activation_post_process") is (way != "replace")
    ended = quantization.convert(prepared)
    assert type(ended[0]) is (myconv.Conv2d if way == "replace" else torch.ao.nn.quantized.Conv2d)


# ---- averages, checkpoints, copies


@EACH_WAY
def test_averaged_models(way):
    def averages(model):
        averaged = [
            swa_utils.AveragedModel(model),
            swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.7), use_buffers=True),
        ]
        optimizer = torch.optim.SGD(model.train().parameters(), lr=0.05)
        torch.manual_seed(SEED)
        data = [image() for _ in range(3)]
        for x in data:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            for average in averaged:
                average.update_parameters(model)
        swa_utils.update_bn(data, averaged[0])
        return averaged

    theirs = averages(net())
    with WAYS[way][1](), Seen() as seen:
        ours = averages(swapped(way))
    assert seen.spaces == {"myconv"}
    for mine, reference in zip(ours, theirs):
        torch.testing.assert_close(mine.state_dict(), reference.state_dict())
        assert_same(mine.eval(), reference.eval(), image(), way)


@CONVERTED
def test_checkpoints_move_both_ways(way):
    theirs, ours = net(), swapped(way)
    for source, target in ((theirs, ours), (ours, theirs)):
        with torch.no_grad():
            for parameter in source.parameters():
                parameter.uniform_(-1, 1)
        target.load_state_dict(dict(source.state_dict()), strict=True)  # without the metadata, as old files are
        assert_same(ours, theirs, image(), way)


@EACH_WAY
@pytest.mark.parametrize("cls", [nn.Conv2d, nn.ConvTranspose2d], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("order", ["swap first", "pickle first"])
def test_old_pickles(order, cls, way):
    """Those of before padding modes lack an attribute, which torch adds as it loads them."""
    theirs, x = cls(3, 4, 3, dtype=torch.float64), image()
    ours = copy.deepcopy(theirs)
    if order == "swap first":
        WAYS[way][0](ours)
    del ours.padding_mode, ours._reversed_padding_repeated_twice
    ours = pickle.loads(pickle.dumps(ours))
    if order == "pickle first":
        WAYS[way][0](ours)
    assert_same(ours, theirs, x, way)


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "old pickle": lambda model: pickle.loads(pickle.dumps(model, protocol=2)),
    "save": saved_and_loaded,
}


@CONVERTED
@pytest.mark.parametrize("how", COPIES)
def test_copies(how, way):
    """A copy is swapped, and what happens to it later happens to it alone."""
    ours, theirs, x = swapped(way), net(), image()
    made = COPIES[how](ours)
    assert_same(made, theirs, x, way)
    for model in (made, changed := net()):
        model[3].weight.data.mul_(2)
        model[5].weight = nn.Parameter(model[5].weight.detach() + 1)
        model[3].stride = (2, 1)
        model[5].dilation = (2, 2)
    assert_same(made, changed, x, way)
    assert_same(ours, theirs, x, way)
    assert myconv.restore(made).swapped == ["0", "3", "5"]
    torch.testing.assert_close(made(x), changed(x))
    assert spaces(made, x) == {"aten"}


@EACH_WAY
def test_channels_last(way):
    theirs, x = net().to(memory_format=torch.channels_last), image().to(memory_format=torch.channels_last)
    ours = swapped(way, copy.deepcopy(theirs))
    assert_same(ours, theirs, x, way)
    with WAYS[way][1]():
        assert ours[0](x).is_contiguous(memory_format=torch.channels_last)


@EACH_WAY
def test_shared_modules_and_parameters(way):
    theirs = nn.Sequential(conv := nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), conv, nn.Conv2d(4, 4, 3)).double()
    theirs[3].weight = conv.weight
    ours = swapped(way, copy.deepcopy(theirs))
    assert ours[0] is ours[2] and ours[3].weight is ours[0].weight
    assert_same(ours, theirs, torch.randn(2, 4, 6, 6).double(), way)


@EACH_WAY
def test_hooks_run_once(way):
    theirs, seen = net(), []
    for module in theirs:
        module.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        module.register_forward_hook(lambda module, args, output: seen.append(module) or output + 1)
    ours = swapped(way, copy.deepcopy(theirs))
    assert_same(ours, theirs, image(), way)
    assert seen == [*theirs, *ours]


# ---- override

CASES = {
    "plain": {"stride": 2, "padding": 1},
    "groups": {"groups": 2, "dilation": 2},
}


def operands(op, dtype=torch.float64):
    rank = int(op[-2])
    return torch.randn(2, 4, *[7] * rank).to(dtype), torch.randn(4, 4, *[3] * rank).to(dtype), torch.randn(4).to(dtype)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("namespace", [torch, F], ids=["torch", "functional"])
@pytest.mark.parametrize("op", FUNCTIONS)
def test_override_answers_functions(op, namespace, case):
    x, w, b = operands(op)
    w = w[:, : 4 // CASES[case].get("groups", 1)]
    run = functools.partial(getattr(namespace, op), x, w, **CASES[case])
    expected = run(bias=b)
    assert spaces(run) == {"aten"}
    with myconv.override():
        assert spaces(run) == {"myconv"}
        torch.testing.assert_close(run(bias=b), expected)
    assert spaces(run) == {"aten"}


def conv(x, w, b=None):
    return F.conv2d(x, w, b, padding=1)


def test_override_nests_and_ends_with_exceptions():
    arguments = operands("conv2d")
    region = myconv.override()
    with region:
        with region, myconv.override():
            assert spaces(conv, *arguments) == {"myconv"}
        with pytest.raises(ZeroDivisionError), myconv.override():
            raise ZeroDivisionError
        with pytest.raises(RuntimeError, match="to have 4 channels"):
            conv(arguments[0][:, :3], arguments[1])
        assert spaces(conv, *arguments) == {"myconv"}
    assert spaces(conv, *arguments) == {"aten"}


def test_override_as_decorator():
    arguments = operands("conv2d")
    assert spaces(myconv.override()(conv), *arguments) == {"myconv"}
    assert spaces(conv, *arguments) == {"aten"}
    model = net()
    model.forward = myconv.override()(model.forward)
    assert spaces(model, image()) == {"myconv"}


def test_override_with_other_modes():
    class Count(TorchFunctionMode):
        calls = 0

        def __torch_function__(self, function, types, args=(), kwargs=None):
            self.calls += getattr(function, "__name__", "") == "conv2d"
            return function(*args, **(kwargs or {}))

    arguments = operands("conv2d")
    for enter in ((Count, myconv.override), (myconv.override, Count)):
        with enter[0]() as outer, enter[1]() as inner:
            assert spaces(conv, *arguments) == {"myconv"}
            assert next(mode for mode in (outer, inner) if isinstance(mode, Count)).calls == 1
    with torch.device("meta"), myconv.override():
        assert spaces(lambda: conv(torch.empty(1, 4, 5, 5), torch.empty(4, 4, 3, 3))) == {"myconv"}


def test_override_leaves_what_myconv_does_not_take():
    x, w, b = (t.float() for t in operands("conv2d"))
    tagged = x.as_subclass(Tagged)
    with myconv.override():
        assert spaces(conv, tagged, w) == {"aten"} and type(conv(tagged, w)) is Tagged
        assert spaces(lambda: F.conv2d(input=tagged, weight=w)) == {"aten"}
        if torch.backends.mkldnn.is_available():
            y = conv(x.to_mkldnn(), w.to_mkldnn(), b.to_mkldnn())
            assert y.is_mkldnn
            torch.testing.assert_close(y.to_dense(), conv(x, w, b))


def test_override_under_transforms():
    x, w, b = operands("conv2d")

    def loss(w, x):
        return conv(x.unsqueeze(0), w, b).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
    expected = per_sample(w, x)
    with myconv.override():
        torch.testing.assert_close(per_sample(w, x), expected)
        assert spaces(per_sample, w, x) == {"myconv"}
    assert spaces(torch.func.vmap(torch.func.grad(myconv.override()(loss)), in_dims=(None, 0)), w, x) == {"myconv"}


def test_override_under_autocast():
    arguments = [t.float() for t in operands("conv2d")]
    with torch.autocast("cpu", dtype=torch.bfloat16), myconv.override():
        assert conv(*arguments).dtype == torch.bfloat16 and spaces(conv, *arguments) == {"myconv"}


def test_override_holds_for_its_thread():
    arguments, found = operands("conv2d"), []
    with myconv.override():
        for function in (conv, myconv.override()(conv)):
            thread = threading.Thread(target=lambda f=function: found.append(spaces(f, *arguments)))
            thread.start()
            thread.join()
        assert spaces(conv, *arguments) == {"myconv"}
    assert found == [{"aten"}, {"myconv"}]


def test_override_and_checkpointing():
    """The backward pass leaves the region to recompute: the region belongs into what is recomputed."""
    model, x = net(), image().requires_grad_()
    inside = myconv.override()(model)
    assert spaces(lambda: checkpoint(inside, x, use_reentrant=False).sum().backward()) == {"myconv"}
    with myconv.override():
        assert spaces(lambda: checkpoint(model, x, use_reentrant=False).sum().backward()) == {"myconv", "aten"}


def test_override_of_traces():
    model, x = net(), image()
    with myconv.override():
        traced, exported = torch.jit.trace(model, x), torch.export.export(model, (x,))
    assert "myconv::" in str(traced.inlined_graph) and "aten::_convolution" not in str(traced.inlined_graph)
    assert all("myconv" in name for name in targets(exported)) and len(targets(exported)) == 3
    torch.testing.assert_close([traced(x), exported.module()(x)], [model(x)] * 2)


# ---- override and torch.compile


def graphs_of(run, x):
    """The convolutions in the compiled graphs of a call and its backward pass, and the result."""
    torch._dynamo.reset()
    names = []

    def note(graph, inputs):
        names.append(targets(graph))
        return make_boxed_func(graph)

    compiler = aot_autograd(fw_compiler=note, bw_compiler=note)
    compile = functools.partial(torch.compile, backend=compiler, fullgraph=True)
    y = run(compile, x.requires_grad_())
    y.square().mean().backward()
    return y, names


def around_the_call(model, compile, x):
    compiled = compile(model)
    with myconv.override():
        return compiled(x)


def around_compile_and_call(model, compile, x):
    with myconv.override():
        return compile(model)(x)


def inside(model, compile, x):
    def run(x):
        with myconv.override():
            return model(x)

    return compile(run)(x)


def decorated(model, compile, x):
    return compile(myconv.override()(model.forward))(x)


def around_nothing(model, compile, x):
    with myconv.override():
        compiled = compile(model)
    return compiled(x)


@pytest.mark.parametrize(
    "place, expected",
    [
        (around_the_call, "myconv"),
        (around_compile_and_call, "myconv"),
        (inside, "myconv"),
        (decorated, "myconv"),
        (around_nothing, "aten"),  # torch.compile traces in the first call
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_override_and_compile(place, expected):
    model, x = net(), image()
    y, graphs = graphs_of(functools.partial(place, model), x)
    assert len(graphs) == 2 and all(len(graph) >= 3 for graph in graphs)
    assert {name.split(".")[0] for graph in graphs for name in graph} == {expected}
    torch.testing.assert_close(y, model(x))


def test_compiled_model_enters_and_leaves_the_region():
    model, x = net(), image()

    def run(compile, x):
        compiled = compile(model)
        results = [compiled(x)]
        with myconv.override():
            results.append(compiled(x))
        results.append(compiled(x))
        return torch.stack(results)

    y, graphs = graphs_of(run, x)
    assert [{name.split(".")[0] for name in graph} for graph in graphs[:2]] == [{"aten"}, {"myconv"}]
    torch.testing.assert_close(y, torch.stack([model(x)] * 3))


# ---- lazy modules


@pytest.mark.parametrize("cls", LAZY, ids=lambda cls: cls.__name__)
def test_lazy(cls):
    """As torch's before the first call, which makes it the class that is not lazy."""
    name, x = cls.__name__, torch.randn(2, 4, *[6] * int(cls.__name__[-2]), dtype=torch.float64)
    arguments = {"kernel_size": 3, "stride": 2, "groups": 2, "dtype": torch.float64}
    ours, theirs = getattr(myconv, name)(8, **arguments), cls(8, **arguments)
    assert isinstance(ours, cls) and isinstance(ours, getattr(myconv, name.removeprefix("Lazy")))
    assert repr(ours) == repr(theirs) and list(ours.state_dict()) == list(theirs.state_dict())
    assert ours.has_uninitialized_params() and isinstance(ours.weight, nn.UninitializedParameter)
    results = []
    for model in (ours, theirs):
        torch.manual_seed(SEED)
        results.append(model(x))
    assert type(ours) is getattr(myconv, name.removeprefix("Lazy"))
    assert spaces(ours, x) == {"myconv"} and repr(ours) == repr(theirs)
    torch.testing.assert_close(*results)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    loaded = getattr(myconv, name)(8, **arguments)
    loaded.load_state_dict(theirs.state_dict())
    assert not loaded.has_uninitialized_params()
    torch.testing.assert_close(loaded(x), theirs(x))
    assert type(loaded) is type(ours)


@pytest.mark.parametrize("cls", LAZY, ids=lambda cls: cls.__name__)
@EACH_WAY
def test_lazy_is_swapped(way, cls):
    x = torch.randn(2, 4, *[6] * int(cls.__name__[-2]), dtype=torch.float64)
    theirs = nn.Sequential(cls(6, 3, dtype=torch.float64))
    ours = swapped(way, copy.deepcopy(theirs))
    assert isinstance(ours[0].weight, nn.UninitializedParameter)
    assert type(ours[0]) is (OURS[cls] if way == "replace" else cls)
    with WAYS[way][1]():
        for model in (ours, theirs):
            torch.manual_seed(SEED)
            model(x)
    base = cls.cls_to_become
    assert type(ours[0]) is (OURS[base] if way == "replace" else base)
    assert_same(ours, theirs, x, way)
    myconv.restore(ours)
    assert type(ours[0]) is base
    torch.testing.assert_close(ours(x), theirs(x))


@CONVERTED
def test_lazy_is_restored_before_its_first_call(way):
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyConvTranspose1d(4, 3, bias=False))
    before, state = [set(vars(module)) for module in model], list(model.state_dict())
    assert WAYS[way][0](model).swapped == myconv.restore(model).swapped == ["0", "1"]
    assert [type(module) for module in model] == [nn.LazyConv2d, nn.LazyConvTranspose1d]
    assert [set(vars(module)) for module in model] == before and list(model.state_dict()) == state
    assert model[0](torch.randn(1, 3, 5, 5)).shape == (1, 4, 3, 3) and type(model[0]) is nn.Conv2d
