"""myconv's modules against torch.nn's: everything but the functional call is inherited."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import myconv
from conftest import SEED, assert_same_state
from myconv import functional

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch's side

CONVS = ["Conv1d", "Conv2d", "Conv3d"]
TRANSPOSED = ["ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"]
CLASSES = CONVS + TRANSPOSED
PADDED_MODES = ["reflect", "replicate", "circular"]

BOTH = {
    "plain": {"kernel_size": 3},
    "one_by_one": {"kernel_size": 1},
    "no_bias": {"kernel_size": 3, "padding": 1, "bias": False},
    "strided": {"kernel_size": 3, "stride": 2, "padding": 1},
    "dilated": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "grouped": {"kernel_size": 3, "groups": 2},
    "depthwise": {"kernel_size": 3, "padding": 1, "groups": 4},
}
ONLY_CONV = {
    "valid": {"kernel_size": 3, "padding": "valid"},
    "same": {"kernel_size": 3, "padding": "same"},
    "same_even": {"kernel_size": 4, "padding": "same"},
    "same_dilated": {"kernel_size": 2, "padding": "same", "dilation": 3},
}
ONLY_TRANSPOSED = {"output_padding": {"kernel_size": 3, "stride": 3, "padding": 1, "output_padding": 2}}
CASES = [(cls, case) for cls in CLASSES for case in BOTH]
CASES += [(cls, case) for cls in CONVS for case in ONLY_CONV]
CASES += [(cls, case) for cls in TRANSPOSED for case in ONLY_TRANSPOSED]
ARGUMENTS = BOTH | ONLY_CONV | ONLY_TRANSPOSED


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(SEED)


def rank_of(name):
    return int(name[-2])


def pair(name, *args, **kwargs):
    """torch's module and ours, each made under the same seed."""
    made = []
    for namespace in (nn, myconv):
        torch.manual_seed(SEED)
        made.append(getattr(namespace, name)(*args, **kwargs))
    return made


def pair_of_case(name, case="strided"):
    return pair(name, 4, 8, dtype=torch.float64, **ARGUMENTS[case])


def sample(name, batch=2):
    shape = (4, 9, 8, 7)[: 1 + rank_of(name)]
    return torch.randn(*([] if batch is None else [batch]), *shape, dtype=torch.float64)


def outcome(function):
    """The result, or the exception's type and text."""
    try:
        return function()
    except Exception as error:
        return type(error), str(error)


def assert_same_computation(ours, theirs, x, *args):
    """Same output and same gradients of the input and of every parameter."""
    results = []
    for module in (ours, theirs):
        leaf = x.detach().clone().requires_grad_()
        y = module(leaf, *args)
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
        parameters = dict(module.named_parameters())
        gradients = torch.autograd.grad((y * weights).sum(), [leaf, *parameters.values()])
        results.append({"output": y, "input": gradients[0], **dict(zip(parameters, gradients[1:]))})
    assert results[0].keys() == results[1].keys()
    for key in results[0]:
        mine, reference = results[0][key], results[1][key]
        torch.testing.assert_close(mine, reference, msg=lambda text, key=key: f"{key}: {text}")


# ---- what is inherited


@pytest.mark.parametrize("name", CLASSES)
def test_interface(name):
    ours, theirs = getattr(myconv, name), getattr(nn, name)
    assert issubclass(ours, theirs) and ours.__name__ == theirs.__name__
    # Names, order, kinds and defaults; our types are wider.
    parameters = [
        [p.replace(annotation=p.empty) for p in inspect.signature(cls).parameters.values()] for cls in (ours, theirs)
    ]
    assert parameters[0] == parameters[1]
    for method in ("forward", "_conv_forward"):
        assert inspect.signature(getattr(ours, method)) == inspect.signature(getattr(theirs, method))
    assert ours.__constants__ == theirs.__constants__
    assert inspect.getdoc(ours)


@pytest.mark.parametrize("name, case", CASES)
def test_same_state(name, case):
    theirs, ours = pair_of_case(name, case)
    assert_same_state(ours, theirs)
    assert repr(ours) == repr(theirs)
    assert vars(ours).keys() == vars(theirs).keys()
    for key, value in vars(theirs).items():
        assert key == "_parameters" or vars(ours)[key] == value, key
    for key in ("weight", "bias"):
        mine, reference = getattr(ours, key), getattr(theirs, key)
        assert type(mine) is type(reference)
        if mine is not None:
            assert (mine.stride(), mine.requires_grad) == (reference.stride(), reference.requires_grad)


@pytest.mark.parametrize(
    "name, kwargs",
    [(n, kwargs) for n in CLASSES for kwargs in ({"groups": 0}, {"groups": 3})]
    + [
        (n, kwargs)
        for n in CONVS
        for kwargs in ({"padding": "full"}, {"padding": "same", "stride": 2}, {"padding_mode": "mirror"})
    ],
    ids=str,
)
def test_same_constructor_errors(name, kwargs):
    expected = outcome(lambda: getattr(nn, name)(4, 8, 3, **kwargs))
    assert expected[0] is ValueError
    assert outcome(lambda: getattr(myconv, name)(4, 8, 3, **kwargs)) == expected


@pytest.mark.parametrize("name", CLASSES)
def test_device_and_dtype(name):
    theirs, ours = pair(name, 4, 8, 3, device="meta", dtype=torch.bfloat16)
    x = torch.empty(2, *(9 for _ in range(rank_of(name) + 1)), device="meta", dtype=torch.bfloat16)[:, :4]
    y, reference = ours(x), theirs(x)
    assert (y.shape, y.dtype, y.device) == (reference.shape, reference.dtype, reference.device)
    skipped = nn.utils.skip_init(getattr(myconv, name), 4, 8, kernel_size=3, dtype=torch.float64)
    assert type(skipped) is getattr(myconv, name) and skipped.weight.dtype == torch.float64
    assert skipped.weight.device.type == "cpu"
    assert ours.to_empty(device="cpu").half().weight.dtype == torch.float16


@pytest.mark.parametrize("name", CLASSES)
def test_copies(name):
    theirs, ours = pair_of_case(name)
    ours.note = ["kept"]
    x = sample(name)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for clone in (
        copy.deepcopy(ours),
        copy.copy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(file, weights_only=False),
    ):
        assert type(clone) is type(ours) and clone.note == ["kept"]
        assert_same_state(clone, theirs)
        torch.testing.assert_close(clone(x), theirs(x))


@pytest.mark.parametrize("name", CLASSES)
def test_state_dict_moves_both_ways(name):
    theirs, ours = pair_of_case(name)
    for source, target in ((theirs, ours), (ours, theirs)):
        with torch.no_grad():
            source.weight.normal_()
            source.bias.normal_()
        assert str(target.load_state_dict(source.state_dict())) == "<All keys matched successfully>"
        assert_same_state(target, source)


# ---- what is computed


@pytest.mark.parametrize("batch", [2, None], ids=["batched", "unbatched"])
@pytest.mark.parametrize("name, case", CASES)
def test_computes_what_torch_computes(name, case, batch):
    theirs, ours = pair_of_case(name, case)
    assert_same_computation(ours, theirs, sample(name, batch))


@pytest.mark.parametrize("batch", [2, None], ids=["batched", "unbatched"])
@pytest.mark.parametrize("case", ["plain", "strided", "dilated", "depthwise", *ONLY_CONV])
@pytest.mark.parametrize("mode", PADDED_MODES)
@pytest.mark.parametrize("name", CONVS)
def test_padding_modes(name, mode, case, batch):
    theirs, ours = pair(name, 4, 8, dtype=torch.float64, padding_mode=mode, **ARGUMENTS[case])
    assert_same_computation(ours, theirs, sample(name, batch))


@pytest.mark.parametrize("name", CONVS)
def test_padding_differs_by_dimension(name):
    padding = (3, 0, 2)[: rank_of(name)]
    for mode in ["zeros", *PADDED_MODES]:
        theirs, ours = pair(name, 4, 8, 3, padding=padding, padding_mode=mode, dtype=torch.float64)
        assert_same_computation(ours, theirs, sample(name))


@pytest.mark.parametrize("batch", [2, None], ids=["batched", "unbatched"])
@pytest.mark.parametrize("name", TRANSPOSED)
def test_output_size(name, batch):
    theirs, ours = pair_of_case(name, "strided")
    x = sample(name, batch)
    smallest = list(theirs(x).shape[-rank_of(name) :])
    larger = [size + 1 for size in smallest]
    for size in (smallest, larger, torch.Size(larger), list(x.shape[: -rank_of(name)]) + larger):
        assert_same_computation(ours, theirs, x, size)
        assert list(ours(x, output_size=size).shape[-rank_of(name) :]) == list(size[-rank_of(name) :])
    for size in ([size + 2 for size in smallest], [size - 1 for size in smallest], smallest + [1] * 5, []):
        expected = outcome(lambda size=size: theirs(x, size))
        assert expected[0] is ValueError
        assert outcome(lambda size=size: ours(x, size)) == expected


@pytest.mark.parametrize("name", TRANSPOSED)
def test_transposed_errors_after_construction(name):
    theirs, ours = pair_of_case(name)
    theirs.padding = ours.padding = 1
    expected = outcome(lambda: theirs(sample(name)))
    assert expected[0] is AssertionError
    assert outcome(lambda: ours(sample(name))) == expected


@pytest.mark.parametrize("name", CLASSES)
def test_torch_convolution_is_not_called(name, monkeypatch):
    theirs, ours = pair_of_case(name)
    expected = theirs(sample(name)).shape

    def fail(*args, **kwargs):
        raise AssertionError("torch's convolution was called")

    for rank in (1, 2, 3):
        monkeypatch.setattr(nn.functional, f"conv{rank}d", fail)
        monkeypatch.setattr(nn.functional, f"conv_transpose{rank}d", fail)
    with pytest.raises(AssertionError, match="was called"):
        theirs(sample(name))
    assert ours(sample(name)).shape == expected


@pytest.mark.parametrize("name", CLASSES)
def test_functional_gets_the_modules_own_objects(name, monkeypatch):
    _, ours = pair_of_case(name)
    calls = []
    function = f"conv_transpose{name[-2:]}" if name in TRANSPOSED else name.lower()
    monkeypatch.setattr(functional, function, lambda *args, **kwargs: calls.append((args, kwargs)))
    x = sample(name)
    ours(x)
    ((args, kwargs),) = calls
    if name in TRANSPOSED:
        last = (ours.output_padding, ours.groups, ours.dilation)
    else:
        last = (ours.dilation, ours.groups)
    expected = (x, ours.weight, ours.bias, ours.stride, ours.padding, *last)
    assert len(args) == len(expected) and not kwargs
    assert all(a is b for a, b in zip(args, expected))
    if name in TRANSPOSED:  # the C entry takes tuples
        ours(x, [size * 2 for size in x.shape[2:]])
        assert calls[1][0][5] == (1,) * rank_of(name)


@pytest.mark.parametrize("case", ["strided", "same", "same_even", "same_dilated"])
@pytest.mark.parametrize("name", CONVS)
def test_padding_modes_are_padded_by_the_operator(name, case, monkeypatch):
    theirs, ours = pair(name, 4, 8, dtype=torch.float64, padding_mode="circular", **ARGUMENTS[case])
    expected, padded = theirs(sample(name)).shape, []
    real = getattr(functional, name.lower())

    def spy(*args, padding_mode):
        padded.append(padding_mode)
        return real(*args, padding_mode=padding_mode)

    monkeypatch.setattr(functional, name.lower(), spy)
    assert ours(sample(name)).shape == expected
    assert padded == ["circular"]


# ---- what users do to a module


def assign(**attributes):
    def change(module):
        for attribute, value in attributes.items():
            setattr(module, attribute, value)

    change.__name__ = "-".join(attributes)
    return change


ASSIGNMENTS = [
    assign(padding=(2, 0)),
    assign(padding="same"),
    assign(stride=(1, 2), dilation=(2, 1)),
    assign(padding_mode="circular"),
    assign(padding_mode="reflect", padding=(2, 2)),
    assign(padding_mode="reflect", _reversed_padding_repeated_twice=[2, 0, 1, 3]),
    assign(padding_mode="replicate", _reversed_padding_repeated_twice=(-1, -1, 2, 2)),
    assign(padding_mode="replicate", _reversed_padding_repeated_twice=(1, 2, 1, 2)),
    assign(padding_mode="circular", padding="same", stride=(2, 1)),
    assign(padding_mode="circular", _reversed_padding_repeated_twice=[1, 2, 1, 1], stride=(2, 1)),
]


@pytest.mark.parametrize("change", ASSIGNMENTS, ids=lambda change: change.__name__)
def test_attributes_assigned_later(change):
    theirs, ours = pair("Conv2d", 4, 8, (3, 4), padding=1, dtype=torch.float64)
    change(theirs)
    change(ours)
    assert_same_computation(ours, theirs, sample("Conv2d"))


def test_subclass_may_override_conv_forward():
    class Doubled(myconv.Conv2d):
        def _conv_forward(self, input, weight, bias):
            return super()._conv_forward(input, weight * 2, bias)

    class Reference(nn.Conv2d):
        def _conv_forward(self, input, weight, bias):
            return super()._conv_forward(input, weight * 2, bias)

    torch.manual_seed(SEED)
    ours = Doubled(4, 8, 3, dtype=torch.float64)
    torch.manual_seed(SEED)
    theirs = Reference(4, 8, 3, dtype=torch.float64)
    assert_same_computation(ours, theirs, sample("Conv2d"))


def test_instance_may_override_conv_forward():
    _, ours = pair_of_case("Conv2d")
    ours._conv_forward = lambda input, weight, bias: (weight, bias)
    weight, bias = ours(sample("Conv2d"))
    assert weight is ours.weight and bias is ours.bias


def test_weight_may_be_a_property():
    class Normed:
        @property
        def weight(self):
            weight = self._parameters["weight"]
            return weight / weight.norm()

    def make(base):
        cls = type("NormedConv", (Normed, base), {})
        module = cls.__new__(cls)
        reference = base(4, 8, 3, dtype=torch.float64)
        module.__dict__.update(reference.__dict__)
        return module

    made = []
    for base in (nn.Conv2d, myconv.Conv2d, nn.ConvTranspose2d, myconv.ConvTranspose2d):
        torch.manual_seed(SEED)
        made.append(make(base))
    assert_same_computation(made[1], made[0], sample("Conv2d"))
    assert_same_computation(made[3], made[2], sample("Conv2d"))


@pytest.mark.parametrize("name", ["Conv2d", "ConvTranspose2d"])
def test_weight_may_be_a_buffer_or_a_plain_tensor(name):
    x = sample(name)
    theirs, ours = pair_of_case(name)
    for module in (theirs, ours):
        weight = module.weight.detach()
        del module.weight
        module.register_buffer("weight", weight)
    assert_same_computation(ours, theirs, x)
    for module in (theirs, ours):
        weight = module.weight * 2
        del module.weight
        module.weight = weight
    assert_same_computation(ours, theirs, x)
    theirs, ours = pair_of_case(name)
    for module in (theirs, ours):  # nn.Module finds the plain attribute before the parameter
        module.__dict__["bias"] = torch.ones(8, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("name", CLASSES)
def test_missing_weight_is_torchs_error(name):
    theirs, ours = pair_of_case(name)
    del theirs.weight
    del ours.weight
    expected = outcome(lambda: theirs(sample(name)))
    assert expected[0] is AttributeError
    assert outcome(lambda: ours(sample(name))) == expected


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize(
    "wrap",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        lambda module: prune.l1_unstructured(module, "weight", 0.5),
    ],
    ids=["weight_norm", "spectral_norm", "old_weight_norm", "old_spectral_norm", "prune"],
)
@pytest.mark.parametrize("name", ["Conv2d", "ConvTranspose1d"])
def test_reparametrized(name, wrap):
    theirs, ours = pair_of_case(name)
    for module in (theirs, ours):
        torch.manual_seed(SEED)
        wrap(module)
        module.eval()  # spectral_norm updates its vectors in training
    assert_same_state(ours, theirs)
    assert_same_computation(ours, theirs, sample(name))


@pytest.mark.parametrize("name", ["Conv2d", "ConvTranspose2d"])
def test_hooks_and_functional_call(name):
    theirs, ours = pair_of_case(name)
    x, seen = sample(name), []
    ours.register_forward_pre_hook(lambda module, args: seen.append("before") or (args[0] * 2,))
    ours.register_forward_hook(lambda module, args, output: seen.append("after") or -output)
    torch.testing.assert_close(ours(x), -theirs(x * 2))
    assert seen == ["before", "after"]
    theirs, ours = pair_of_case(name)
    other = {key: value.detach() * 3 for key, value in theirs.state_dict().items()}
    torch.testing.assert_close(
        torch.func.functional_call(ours, other, (x,)), torch.func.functional_call(theirs, other, (x,))
    )


def test_batch_norm_fusion():
    theirs, ours = pair_of_case("Conv2d")
    norm = nn.BatchNorm2d(8, dtype=torch.float64)
    norm.running_mean.normal_()
    norm.eval()
    fused = nn.utils.fuse_conv_bn_eval(ours.eval(), norm)
    assert type(fused) is myconv.Conv2d
    x = sample("Conv2d")
    torch.testing.assert_close(fused(x), norm(theirs(x)))


# ---- programs made from modules


SCRIPTED = [(name, ARGUMENTS[case]) for name, case in CASES]
SCRIPTED += [
    (name, ARGUMENTS[case] | {"padding_mode": mode})
    for name in CONVS
    for case, mode in (("strided", "reflect"), ("same_even", "replicate"), ("valid", "circular"))
]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")
@pytest.mark.parametrize("name, kwargs", SCRIPTED, ids=str)
def test_script(name, kwargs):
    theirs, ours = pair(name, 4, 8, dtype=torch.float64, **kwargs)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Sequential(ours)), file)
    assert type(ours) is getattr(myconv, name)
    file.seek(0)
    scripted = torch.jit.load(file)
    assert_same_state(scripted, nn.Sequential(theirs))
    for batch in (2, None):
        x = sample(name, batch)
        torch.testing.assert_close(scripted(x), theirs(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", TRANSPOSED)
def test_script_output_size(name):
    theirs, ours = pair_of_case(name)
    x = sample(name)
    size = [n + 1 for n in theirs(x).shape[2:]]
    torch.testing.assert_close(torch.jit.script(ours)(x, size), theirs(x, size))


ONE_FOR_ALL = [
    ("Conv2d", {"stride": (2,), "dilation": (2,), "padding": (1,)}),
    ("Conv2d", {"dilation": (2,), "padding": "same"}),
    ("Conv3d", {"stride": (2,), "padding": 1, "padding_mode": "reflect"}),
    ("ConvTranspose2d", {"stride": (2,), "dilation": (2,), "padding": (1,), "output_padding": (1,)}),
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name, kwargs", ONE_FOR_ALL, ids=str)
def test_one_value_for_all_axes(name, kwargs):
    theirs, ours = (getattr(library, name)(4, 6, 3, **kwargs) for library in (nn, myconv))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 4, *[8] * len(theirs.kernel_size))
    for module in (ours, torch.jit.script(ours)):
        torch.testing.assert_close(module(x), theirs(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")
@pytest.mark.parametrize("padding", [(2, 0), "valid", "same", ((1, 2), (0, 3)), (1, (0, 2))], ids=str)
def test_script_follows_assigned_padding(padding):
    for case in ("plain", "same"):
        _, ours = pair_of_case("Conv2d", case)
        ours.padding = padding
        x = sample("Conv2d")
        assert torch.equal(torch.jit.script(ours)(x), ours(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")
def test_script_calls_overridden_conv_forward():
    class Shifted(myconv.Conv2d):
        def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None):
            return input + weight.sum()

    ours = Shifted(4, 4, 3, dtype=torch.float64)
    x = sample("Conv2d")
    assert torch.equal(torch.jit.script(ours)(x), ours(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", CLASSES)
def test_trace(name):
    theirs, ours = pair_of_case(name)
    traced = torch.jit.trace(nn.Sequential(ours), sample(name))
    assert_same_state(traced, nn.Sequential(theirs))
    x = sample(name)
    torch.testing.assert_close(traced(x), theirs(x))


def small_nets(namespace):
    """Modules that Dynamo must trace whole: each way to read a weight, each way to pad."""
    torch.manual_seed(SEED)
    arguments = {"dtype": torch.float64}
    return {
        "convs": nn.Sequential(
            namespace.Conv2d(4, 6, 3, padding=1, bias=False, **arguments),
            namespace.Conv2d(6, 8, 4, padding="same", padding_mode="reflect", **arguments),
            namespace.ConvTranspose2d(8, 4, 3, stride=2, output_padding=1, **arguments),
        ),
        "parametrized": parametrizations.weight_norm(namespace.Conv2d(4, 8, 3, **arguments)),
        "pruned": prune.l1_unstructured(namespace.Conv2d(4, 8, 3, **arguments), "weight", 0.5),
    }


@pytest.mark.parametrize("net", small_nets(nn))
def test_compile(net):
    torch._dynamo.reset()
    theirs, ours = small_nets(nn)[net], small_nets(myconv)[net]
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    assert_same_computation(compiled._orig_mod, theirs, sample("Conv2d"))
    x = sample("Conv2d")
    torch.testing.assert_close(compiled(x), theirs(x))


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    theirs, ours = small_nets(nn)["convs"], small_nets(myconv)["convs"]
    x = sample("Conv2d")
    program = torch.export.export(ours, (x,), strict=strict)
    assert program.state_dict.keys() == theirs.state_dict().keys()
    torch.testing.assert_close(program.module()(x), theirs(x))


def test_symbolic_trace():
    theirs, ours = small_nets(nn)["convs"], small_nets(myconv)["convs"]
    x = sample("Conv2d")
    torch.testing.assert_close(torch.fx.symbolic_trace(ours)(x), theirs(x))
    torch.testing.assert_close(torch.fx.symbolic_trace(ours[0])(x), theirs[0](x))
