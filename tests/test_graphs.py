"""Compilers, exporters, scripts, and the tools around autograd: on models, through the modules."""

from __future__ import annotations

import functools
import io

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import cpp_builder
from torch._inductor.exc import InvalidCxxCompiler
from torch._inductor.utils import fresh_cache
from torch.autograd import graph
from torch.export import Dim
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import myconv
from conftest import SEED, assert_accurate, noting

# torch's own notices: TorchScript is old, capture of a profile, precision hints of inductor
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
RANKS = {"Conv1d": 1, "Conv2d": 2, "Conv3d": 3, "ConvTranspose1d": 1, "ConvTranspose2d": 2, "ConvTranspose3d": 3}
OPERATORS = ["myconv.conv_forward.default", "myconv.conv_backward_input.default"]  # of the two layers of net()


def net(namespace=myconv) -> nn.Sequential:
    """A convolution and a transposed one, with something between that compilers like to fuse."""
    torch.manual_seed(SEED)
    down, up = namespace.Conv2d(4, 8, 3, stride=2, padding=1), namespace.ConvTranspose2d(8, 4, 2, stride=2)
    return nn.Sequential(down, nn.ReLU(), up)


def sample(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 4, 8, 10, generator=torch.Generator().manual_seed(SEED))


def gradients(function, model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The output, and the gradients of the input and of the model's parameters."""
    leaf = x.detach().requires_grad_()
    y = function(leaf)
    return y, *torch.autograd.grad(y.square().sum(), [leaf, *model.parameters()])


def assert_same_bits(actual, expected) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert (a.stride(), a.dtype) == (e.stride(), e.dtype)
        assert torch.equal(a, e)


def calls_in(graph_module: torch.fx.GraphModule) -> list[str]:
    """Convolutions of a graph, by name; torch's own too."""
    names = [str(node.target) for node in graph_module.graph.nodes if node.op == "call_function"]
    return [name for name in names if "conv" in name]


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def empty_cache():
    """Nothing that an earlier run compiled is used."""
    with fresh_cache():
        yield


@pytest.fixture
def inductor(fresh_compiler, empty_cache):
    try:
        cpp_builder.get_cpp_compiler()
    except InvalidCxxCompiler as missing:
        pytest.skip(f"inductor needs a C++ compiler at run time: {missing}")


# ------------------------------------------------------------------------------------------- torch.compile


@pytest.mark.usefixtures("inductor")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inductor(layout):
    """Bits and strides of eager calls, but for the bias gradients: those sums are inductor's."""
    model, x = net(), sample().to(memory_format=LAYOUTS[layout])
    expected = gradients(model, model, x)
    actual = gradients(torch.compile(model, fullgraph=True), model, x)
    exact, biases = [0, 1, 2, 4], [3, 5]
    assert_same_bits([actual[i] for i in exact], [expected[i] for i in exact])
    for i in biases:
        torch.testing.assert_close(actual[i], expected[i])


@pytest.mark.usefixtures("inductor")
def test_inductor_on_per_sample_gradients():
    model, x = net().double(), sample().double()

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x[None],)).square().sum()

    parameters = dict(model.named_parameters())
    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
    torch.testing.assert_close(torch.compile(per_sample, fullgraph=True)(parameters, x), per_sample(parameters, x))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("layer", [myconv.Conv2d, myconv.ConvTranspose2d])
@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_batch_that_depends_on_data(layer, padding_mode, memory_format):
    module = layer(4, 6, 3, padding=1, padding_mode=padding_mode)
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(lambda x, chosen: module(x[chosen]), fullgraph=True, backend=counter)
    x = torch.randn(6, 4, 8, 8).to(memory_format=memory_format).requires_grad_()
    for count in (3, 1, 6, 0):
        chosen = torch.arange(6) < count
        y, expected = function(x, chosen), module(x[chosen])
        assert torch.equal(y, expected) and (count == 0 or y.stride() == expected.stride())
        gradients = [torch.autograd.grad(result.sum(), x)[0] for result in (y, expected)]
        assert torch.equal(*gradients)
    assert counter.frame_count == 1


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_compilation_for_five_shapes(layout):
    model, counter = net(), CompileCounterWithBackend("aot_eager")
    function = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for shape in ((2, 4, 9, 10), (3, 4, 16, 7), (7, 4, 11, 12), (6, 4, 5, 5), (2, 4, 30, 21)):
        x = torch.randn(shape).to(memory_format=LAYOUTS[layout])
        assert_same_bits(gradients(function, model, x)[:2], gradients(model, model, x)[:2])
    assert counter.frame_count == 1


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("padding", [1, "same"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_space_that_depends_on_data(padding, memory_format):
    """Sizes that nobody may guard on: one graph, also for the sizes 0 and 1 that are otherwise special."""
    torch.manual_seed(SEED)
    model = nn.Sequential(myconv.Conv2d(4, 4, 3, padding=padding), myconv.ConvTranspose2d(4, 4, 3))
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(model, fullgraph=True, backend=counter)
    for size in ((8, 10), (1, 7), (12, 1)):
        x = torch.randn(2, 4, *size).to(memory_format=memory_format)
        torch._dynamo.decorators.mark_unbacked(x, 2)
        torch._dynamo.decorators.mark_unbacked(x, 3)
        assert torch.equal(function(x), model(x))
    assert counter.frame_count == 1
    with pytest.raises(RuntimeError):
        function(torch.randn(2, 4, 0, 5))


@pytest.mark.usefixtures("fresh_compiler")
def test_no_graph_break():
    explained = torch._dynamo.explain(net())(sample())
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)
    assert calls_in(explained.graphs[0]) == [name.removesuffix(".default") for name in OPERATORS]


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_checkpoint():
    model, x = net(), sample()
    function = torch.compile(
        lambda x: checkpoint(model, x, use_reentrant=False), fullgraph=True, backend="aot_eager_decomp_partition"
    )
    assert_same_bits(gradients(function, model, x), gradients(model, model, x))


# ----------------------------------------------------------------------------------- what graphs refuse

# (class, arguments, input, words of the refusal; None: legal)
NO_SPACE, TOO_LARGE = "Only zero batch or zero channel", "output padding must be smaller"
CHECKED = [
    ("Conv2d", (4, 6, 1, 1, 1), (2, 4, 0, 8), NO_SPACE),
    ("Conv2d", (4, 6, 1, 1, 1), (4, 0, 8), NO_SPACE),
    ("Conv2d", (4, 6, 1, 1, 1), (0, 4, 0, 8), None),
    ("Conv2d", (4, 6, 3, 1, "same"), (2, 4, 0, 8), "."),
    ("Conv1d", (4, 6, 2, 1, "same"), (2, 4, 0), "."),
    ("Conv1d", (4, 6, 2, 1, "same"), (2, 4, 1), None),
    ("Conv2d", (4, 6, 9), (2, 4, 8, 8), "."),
    ("ConvTranspose2d", (4, 6, 3, 1, 0, 1), (2, 4, 8, 8), TOO_LARGE),
    ("ConvTranspose2d", (4, 6, 3, (2, 1), 0, 1), (2, 4, 8, 8), TOO_LARGE),
    ("ConvTranspose2d", (4, 6, 3, 1, 0, 1, 1, True, 2), (2, 4, 8, 8), None),
    ("ConvTranspose2d", (4, 6, 3, 2, 0, 1), (2, 4, 0, 8), NO_SPACE),
    ("ConvTranspose2d", (4, 6, 3, 2, 0, 1), (0, 4, 0, 8), None),
    ("ConvTranspose1d", (4, 6, 3, 1, 9), (2, 4, 8), "."),
    ("ConvTranspose2d", (4, 0, 3), (2, 4, 8, 8), "expected weight to have out channels"),
]
PROGRAMS = {
    "eager": (lambda module: module, RuntimeError),
    "compile": (functools.partial(torch.compile, backend="eager", fullgraph=True), RuntimeError),
    "compile dynamic": (functools.partial(torch.compile, backend="eager", fullgraph=True, dynamic=True), RuntimeError),
    "compile with breaks": (functools.partial(torch.compile, backend="eager"), RuntimeError),
    "script": (torch.jit.script, torch.jit.Error),
}


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("name, arguments, shape, words", CHECKED, ids=str)
def test_graphs_refuse_what_eager_refuses(name, arguments, shape, words, program):
    module, x = getattr(myconv, name)(*arguments), torch.randn(shape)
    build, error = PROGRAMS[program]
    if words is None:
        assert build(module)(x).shape == getattr(nn, name)(*arguments)(x).shape
        return
    with pytest.raises(RuntimeError):
        getattr(nn, name)(*arguments)(x)
    with pytest.raises(error, match=words):
        build(module)(x)


# ------------------------------------------------------------------------------------------------- export


def exported(strict: bool = False) -> tuple[nn.Module, torch.export.ExportedProgram]:
    model = net().eval()
    return model, torch.export.export(model, (sample(),), dynamic_shapes=({0: Dim("batch")},), strict=strict)


def assert_runs_every_batch(program, model: nn.Module) -> None:
    with torch.no_grad():
        for batch in (1, 3, 8):
            assert_same_bits([program(sample(batch))], [model(sample(batch))])


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    """Operators stay whole, through decompositions and a file too, and the batch stays free."""
    model, program = exported(strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for version in (program, program.run_decompositions(), torch.export.load(file)):
        assert calls_in(version.graph_module) == OPERATORS
        assert_runs_every_batch(version.module(), model)


@pytest.mark.usefixtures("fresh_compiler")
def test_export_with_free_sizes():
    model = net().eval()
    free = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    program = torch.export.export(model, (sample(),), dynamic_shapes=(free,)).module()
    for shape in ((2, 4, 8, 10), (5, 4, 9, 21)):
        x = torch.randn(shape)
        assert torch.equal(program(x), model(x))


@pytest.mark.usefixtures("inductor")
def test_aot_inductor(tmp_path):
    model, program = exported()
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "net.pt2"))
    assert_runs_every_batch(torch._inductor.aoti_load_package(path), model)


# --------------------------------------------------------------------------------------------- TorchScript


@pytest.mark.parametrize("build", [torch.jit.script, lambda model: torch.jit.trace(model, sample())])
@pytest.mark.parametrize("finish", [torch.jit.freeze, torch.jit.optimize_for_inference])
def test_freeze(build, finish, tmp_path):
    """Frozen programs call the operators, and come back from a file and from a buffer."""
    model = net().eval()
    frozen = finish(build(model))
    kinds = [node.kind() for node in frozen.graph.nodes() if "conv" in node.kind()]
    assert kinds == ["myconv::conv_forward", "myconv::conv_backward_input"]
    buffer = io.BytesIO()
    torch.jit.save(frozen, buffer)
    buffer.seek(0)
    torch.jit.save(frozen, str(tmp_path / "net.pt"))
    for program in (frozen, torch.jit.load(buffer), torch.jit.load(str(tmp_path / "net.pt"))):
        assert torch.equal(program(sample()), model(sample()))


# ------------------------------------------------------------------------------ checkpoints and saved tensors


class Calls(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("policy, runs", [(CheckpointPolicy.MUST_SAVE, 1), (CheckpointPolicy.PREFER_RECOMPUTE, 2)])
def test_selective_checkpoint(policy, runs):
    """A policy that names our operator decides whether it runs again in backward."""
    torch.manual_seed(SEED)
    model, x = nn.Sequential(myconv.Conv2d(4, 4, 3), nn.SiLU()), sample()

    def choose(context, operator, *args, **kwargs):
        ours = operator == torch.ops.myconv.conv_forward.default
        return policy if ours else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, choose)
    with Calls() as calls:
        actual = gradients(lambda x: checkpoint(model, x, use_reentrant=False, context_fn=contexts), model, x)
    assert calls.names.count("myconv.conv_forward.default") == runs
    assert_same_bits(actual, gradients(model, model, x))


def test_saved_tensors_are_packed_and_unpacked():
    """Each convolution saves its input and its weight; what a hook gives back is what backward reads."""
    model, x = nn.Sequential(*net()[::2]), sample()
    packed, unpacked = [], []

    def pack(tensor):
        packed.append(tensor)
        return tensor.clone().numpy()

    def unpack(array):
        unpacked.append(array)
        return torch.from_numpy(array)

    expected = gradients(model, model, x)
    leaf = x.clone().requires_grad_()
    with graph.saved_tensors_hooks(lambda t: pack(t.detach()), unpack):
        y = model(leaf)
    middle = model[0](x).detach()
    assert_same_bits(packed, [leaf, model[0].weight, middle, model[1].weight])
    assert_same_bits(torch.autograd.grad(y, [leaf, *model.parameters()], 2 * y.detach()), expected[1:])
    assert len(unpacked) == len(packed)


def test_save_on_cpu():
    model, x = net(), sample()
    with graph.save_on_cpu():
        actual = gradients(model, model, x)
    assert_same_bits(actual, gradients(model, model, x))


# ------------------------------------------------------------------------------------------ hooks, anomalies


def test_hooks_on_outputs_and_modules():
    model, x, seen = net(), sample(), []
    y, z = model[0](x), model[0](2 * x)
    graph.register_multi_grad_hook((y, z), lambda grads: seen.append([g.shape for g in grads]))
    y.register_hook(lambda g: seen.append("tensor") or 2 * g)
    (plain,) = torch.autograd.grad((y + z).sum(), model[0].bias, retain_graph=True)
    assert sorted(map(str, seen)) == sorted(map(str, ["tensor", [y.shape, z.shape]]))
    torch.testing.assert_close(plain, torch.full_like(plain, 3.0 * y[:, 0].numel()))

    seen.clear()
    for layer in model:
        layer.register_full_backward_hook(lambda module, grad_input, grad_output: seen.append(type(module)))
    gradients(model, model, x)
    assert seen == [type(layer) for layer in reversed(model)]


@pytest.mark.parametrize("name", RANKS)
def test_node_names(name):
    """What a printed tensor, an anomaly and a picture of the graph call a convolution."""
    node = "ConvBackwardInputBackward" if "Transpose" in name else "ConvForwardBackward"
    module, x = getattr(myconv, name)(4, 4, 3), torch.randn(2, 4, *[5] * RANKS[name])
    y = module(x)
    assert y.grad_fn.name() == node
    assert f"grad_fn=<{node}>" in repr(y)
    with torch.autograd.detect_anomaly(check_nan=True), pytest.raises(RuntimeError, match=f"'{node}' returned nan"):
        module(x).backward(torch.full_like(y, torch.nan))


# ------------------------------------------------------------------------------------- counters and profiles

SETTINGS = {
    "plain": {},
    "groups": {"groups": 2},
    "strided": {"stride": 2, "dilation": 2, "padding": 2},
    "no_bias": {"bias": False},
}


def flops(namespace, name: str, setting: str, batch: tuple[int, ...], needs_x: bool) -> list[dict]:
    """Forward's and backward's, of each module and in all."""
    module = nn.Sequential(getattr(namespace, name)(4, 6, 3, **SETTINGS[setting]))
    x = torch.randn(*batch, 4, *(7, 6, 5)[: RANKS[name]], requires_grad=needs_x)
    with FlopCounterMode(display=False) as forward:
        y = module(x)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    return [{key: sum(ops.values()) for key, ops in c.get_flop_counts().items()} for c in (forward, backward)]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", RANKS)
def test_flops(name, setting):
    for batch in ((3,), ()):
        for needs_x in (True, False):
            with noting(batch=batch, needs_x=needs_x):
                ours, theirs = (flops(namespace, name, setting, batch, needs_x) for namespace in (myconv, nn))
                assert ours == theirs
                assert ours[0]["Global"] > 0


def test_flops_by_operator():
    """The three operators of a training step, each under its own name; their sum is torch's."""
    counts = []
    for namespace in (myconv, nn):
        with FlopCounterMode(display=False) as counter:
            net(namespace)(sample().requires_grad_()).sum().backward()
        counts.append({str(op): count for op, count in counter.get_flop_counts()["Global"].items()})
    ours, theirs = counts
    down, up = 2 * (2 * 8 * 4 * 5) * (4 * 9), 2 * (2 * 8 * 4 * 5) * (4 * 4)
    assert ours == {
        "myconv.conv_forward": down + up,  # the layer, and the input gradient of the other
        "myconv.conv_backward_input": up,
        "myconv.conv_backward_weight": up,
        "myconv.conv_backward": 2 * down,
    }
    assert sum(ours.values()) == sum(theirs.values())


def test_profile():
    """Operators show in a profile by name, with their shapes, in forward and in backward."""
    model, x = net(), sample()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        gradients(model, model, x)
    events = [(e.name, e.input_shapes[:2]) for e in profile.events() if e.name.startswith("myconv::")]
    middle, y = [2, 8, 4, 5], [2, 4, 8, 10]
    down, up = [8, 4, 3, 3], [8, 4, 2, 2]
    assert events == [
        ("myconv::conv_forward", [y, down]),
        ("myconv::conv_backward_input", [middle, up]),
        ("myconv::conv_forward", [y, up]),
        ("myconv::conv_backward_weight", [middle, y]),
        ("myconv::conv_backward", [middle, y]),
    ]
    names = {e.name for e in profile.events()}
    assert {"ConvForwardBackward", "ConvBackwardInputBackward"} <= names
    assert not any("aten::" in name and "conv" in name for name in names)


# ------------------------------------------------------------------------------------ parameters from outside


def test_ensemble_of_stacked_modules():
    """vmap over stacked states: one model's code, three models' parameters."""
    models = [net().double() for _ in range(3)]
    for scale, model in enumerate(models, 1):
        for parameter in model.parameters():
            parameter.data.mul_(scale)
    state, x = torch.func.stack_module_state(models), sample().double()

    def run(parameters, buffers, x):
        return torch.func.functional_call(models[0], (parameters, buffers), (x,))

    together = torch.func.vmap(run, in_dims=(0, 0, None))(*state, x)
    for actual, model in zip(together, models, strict=True):
        assert_accurate(actual, model(x))
