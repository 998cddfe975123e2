"""torch's own samples: its OpInfo and ModuleInfo entries of the convolutions, run through myconv.

The samples, dtypes and expected errors are those of the torch in use.
"""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.testing._internal import composite_compliance
from torch.testing._internal.common_dtype import all_types_and_complex_and
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db
from torch.testing._internal.common_utils import noncontiguous_like
from torch.utils._python_dispatch import TorchDispatchMode

import myconv
from cases import CHANNELS_LAST, Tensors
from conftest import SEED, assert_same_state, check_parity, noting

# torch warns of its padded copy for an even kernel, and that complex32 and quantization are prototypes.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated"),  # torch's own use
]

FUNCTIONS = {info.name.split(".")[-1]: info for info in op_db if info.name.startswith("nn.functional.conv")}
MODULES = {info.module_cls.__name__: info for info in module_db if re.match(r"nn\.(Lazy)?Conv", info.name)}


def by_dtype(infos: dict, wanted: Callable = lambda dtype: True) -> pytest.MarkDecorator:
    """Every function or module with each dtype that torch lists for it on CPU."""
    pairs = [(name, dtype) for name, info in infos.items() for dtype in sorted(info.supported_dtypes("cpu"), key=str)]
    return pytest.mark.parametrize("name, dtype", [(name, dtype) for name, dtype in pairs if wanted(dtype)])


def differentiable(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def precise(dtype: torch.dtype) -> bool:
    return dtype in (torch.float64, torch.complex128)


assert_identical = partial(torch.testing.assert_close, rtol=0, atol=0)  # torch.equal does not take complex32
by_function = pytest.mark.parametrize("name", FUNCTIONS)
by_module = pytest.mark.parametrize("name", MODULES)


def gradient_like(y: torch.Tensor) -> torch.Tensor:
    """Positive, since the samples have biases of one element: a sum near zero would have no relative error."""
    return torch.rand_like(y) + 0.5


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(SEED)


def test_every_convolution_has_samples():
    ranks = [f"{kind}{rank}d" for kind in ("conv", "conv_transpose") for rank in (1, 2, 3)]
    assert sorted(FUNCTIONS) == sorted(ranks)
    assert sorted(MODULES) == sorted(
        f"{lazy}{kind}{rank}d" for lazy in ("", "Lazy") for kind in ("Conv", "ConvTranspose") for rank in (1, 2, 3)
    )


# ---- functions


def calls(name: str, dtype: torch.dtype, transform: Callable = lambda sample: sample) -> Iterator[tuple]:
    """(ours, torch's, x, w, b) of every sample; the two functions take x, w and b."""
    count = 0
    for sample in FUNCTIONS[name].reference_inputs("cpu", dtype):
        with noting(sample=sample.summary()):
            sample = transform(sample)
            functions = (getattr(myconv.functional, name), FUNCTIONS[name].op)
            ours, theirs = (partial(function, **sample.kwargs) for function in functions)
            x, w, b = (sample.input, *sample.args, None)[:3]
            yield ours, theirs, x, w, b
        count += 1
    assert count


# Each keeps the values but for 'conj' and 'neg', which torch's answer sees too.
TRANSFORMS = {
    "plain": lambda sample: sample,
    "noncontiguous": lambda sample: sample.noncontiguous(),
    "conj": lambda sample: sample.transform(lambda t: t.conj() if isinstance(t, torch.Tensor) else t),
    "neg": lambda sample: sample.transform(lambda t: torch._neg_view(t) if isinstance(t, torch.Tensor) else t),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@by_dtype(FUNCTIONS)
def test_values_and_gradients(name, dtype, transform):
    for ours, theirs, x, w, b in calls(name, dtype, TRANSFORMS[transform]):
        expected = theirs(x, w, b)
        if differentiable(dtype):
            check_parity(ours, theirs, Tensors(x, w, b, gradient_like(expected)))
        else:
            actual = ours(x, w, b)
            assert actual.dtype == dtype and torch.equal(actual, expected)


@by_dtype(FUNCTIONS, precise)
def test_gradcheck(name, dtype):
    for ours, _, *tensors in calls(name, dtype):
        leaves = [t.requires_grad_() for t in tensors if t is not None]
        assert gradcheck(ours, leaves, check_forward_ad=True, fast_mode=True)
        assert gradgradcheck(ours, leaves, fast_mode=True)


def other_dtypes() -> list[tuple]:
    every = all_types_and_complex_and(torch.bool, torch.half, torch.bfloat16, torch.chalf, torch.uint16, torch.uint32)
    infos = FUNCTIONS.items()
    return [(n, d) for n, info in infos for d in sorted(set(every) - info.supported_dtypes("cpu"), key=str)]


def cast(dtype: torch.dtype, sample):
    return sample.transform(lambda value: value.to(dtype) if isinstance(value, torch.Tensor) else value)


def outcome(function: Callable, *tensors) -> torch.Tensor | Exception:
    try:
        return function(*tensors)
    except Exception as error:
        return error


@pytest.mark.parametrize("name, dtype", other_dtypes())
def test_other_dtypes(name, dtype):
    """What torch's list leaves out is refused with torch's exception, or has torch's values.

    Some of torch's paths take small integers and others do not; myconv takes them in every sample.
    """
    rows = [
        (outcome(ours, *tensors), outcome(theirs, *tensors))
        for ours, theirs, *tensors in calls(name, torch.int64, partial(cast, dtype))
    ]
    if all(isinstance(expected, Exception) for _, expected in rows):
        assert [type(actual) for actual, _ in rows] == [type(expected) for _, expected in rows]
        return
    assert all(isinstance(actual, torch.Tensor) for actual, _ in rows)
    for actual, expected in rows:
        if isinstance(expected, torch.Tensor):
            torch.testing.assert_close(actual, expected)


ERRORS = [
    pytest.param(name, error, id=f"{name}-{i}")
    for name, info in FUNCTIONS.items()
    if info.error_inputs_func
    for i, error in enumerate(info.error_inputs("cpu"))
]


@pytest.mark.parametrize("name, error", ERRORS)
def test_errors(name, error):
    sample = error.sample_input
    with noting(sample=sample.summary()), pytest.raises(error.error_type, match=error.error_regex) as caught:
        getattr(myconv.functional, name)(sample.input, *sample.args, **sample.kwargs)
    assert caught.type is error.error_type


@by_function
def test_fake_tensors_agree(name):
    """Every operator of the call and of its backward also runs on fake tensors: sizes, strides and dtypes agree."""
    for ours, _, *tensors in calls(name, torch.float32):
        leaves = [t.requires_grad_() for t in tensors if t is not None]
        with torch._subclasses.CrossRefFakeMode():
            torch.autograd.grad(ours(*leaves).sum(), leaves)


@by_function
def test_formulas_take_tensor_subclasses(name):
    """Backward and forward-mode formulas with every choice of arguments and tangents wrapped in a subclass."""
    for ours, _, *tensors in calls(name, torch.float64):
        leaves = tuple(t.requires_grad_() for t in tensors if t is not None)
        composite_compliance.check_backward_formula(ours, leaves, {}, assert_equal_fn=torch.testing.assert_close)
        composite_compliance.check_forward_ad_formula(ours, leaves, {}, assert_equal_fn=torch.testing.assert_close)


# ---- modules


def pairs(name: str, dtype: torch.dtype, training: bool = True, **factory) -> Iterator[tuple]:
    """(ours, torch's, x, sample) of every sample, the modules with the same parameters. Lazy ones are not run yet."""
    info = MODULES[name]
    for sample in info.module_inputs_func(info, "cpu", dtype, requires_grad=False, training=training):
        made, arguments = [], sample.constructor_input
        for cls in (getattr(myconv, name), info.module_cls):
            torch.manual_seed(SEED)
            module = cls(*arguments.args, **{"dtype": dtype, **arguments.kwargs, **factory}).train(training)
            made.append(module)
        (x,) = sample.forward_input.args
        with noting(arguments=(arguments.args, arguments.kwargs), input=tuple(x.shape)):
            yield *made, x, sample


def initialised(name: str, dtype: torch.dtype, training: bool = True) -> Iterator[tuple]:
    """The pairs after a call that tells lazy modules their number of channels."""
    for ours, theirs, x, sample in pairs(name, dtype, training):
        torch.manual_seed(SEED)
        ours(x)
        torch.manual_seed(SEED)
        theirs(x)
        yield ours, theirs, x, sample


def as_function(module: nn.Module) -> Callable:
    return lambda x, w, b: torch.func.functional_call(module, {"weight": w, "bias": b}, (x,))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@by_dtype(MODULES)
def test_module_values_and_gradients(name, dtype, training):
    for ours, theirs, x, sample in initialised(name, dtype, training):
        assert_same_state(ours, theirs)
        assert ours.training == training
        y = theirs(x)
        check_parity(as_function(ours), as_function(theirs), Tensors(x, ours.weight, ours.bias, gradient_like(y)))
        if sample.reference_fn:
            assert_identical(ours(x), sample.reference_fn(ours, x))


@by_dtype(MODULES)
def test_module_accumulates_gradients(name, dtype):
    for ours, _, x, _ in initialised(name, dtype):
        x.requires_grad_()
        y = ours(x)
        gradient = gradient_like(y)
        expected = torch.autograd.grad(y, [x, *ours.parameters()], gradient)
        for _ in range(2):
            ours(x).backward(gradient)
        for leaf, once in zip([x, *ours.parameters()], expected):
            torch.testing.assert_close(leaf.grad, 2 * once)


@by_dtype(MODULES, precise)
def test_module_gradcheck(name, dtype):
    for ours, _, x, _ in initialised(name, dtype):
        leaves = [x.requires_grad_(), ours.weight, ours.bias]
        assert gradcheck(as_function(ours), leaves, check_forward_ad=True, fast_mode=True)
        assert gradgradcheck(as_function(ours), leaves, fast_mode=True)


def saved_and_loaded(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@by_dtype(MODULES)
def test_module_copies(name, dtype):
    """Saved and deeply copied modules compute the same and own their parameters; repr and state are torch's."""
    for ours, theirs, x, _ in initialised(name, dtype):
        assert repr(ours) == repr(theirs)
        assert type(ours) is getattr(myconv, type(theirs).__name__)
        y = ours(x)
        for clone in (copy.deepcopy(ours), saved_and_loaded(ours)):
            assert type(clone) is type(ours)
            assert_same_state(clone, theirs)
            assert_identical(clone(x), y)
            clone.weight.data.zero_()
            assert_identical(ours(x), y)
        theirs.load_state_dict(ours.state_dict())
        ours.load_state_dict(theirs.state_dict())
        assert_identical(ours(x), y)


@by_module
def test_module_moves(name):
    """dtype= of the constructor, .to(dtype) before and after the first call, and the meta device."""
    for ours, theirs, x, _ in pairs(name, torch.float32):
        for dtype in (torch.float64, torch.bfloat16):
            for module in (ours, theirs):
                torch.manual_seed(SEED)
                module.to(dtype)(x.to(dtype))
            assert_same_state(ours, theirs)
            assert ours(x.to(dtype)).dtype == dtype
    for ours, theirs, x, _ in pairs(name, torch.float32, device="meta"):
        assert ours(x.to("meta")).shape == theirs(x.to("meta")).shape
        for module in (ours, theirs):
            module.to_empty(device="cpu")
            nn.init.ones_(module.weight)
            nn.init.ones_(module.bias)
        torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("which", ["input", "module", "both"])
@by_dtype(MODULES)
def test_module_memory_format(name, dtype, which):
    """ModuleInfo says that a channels_last module or input makes the output channels_last."""
    assert MODULES[name].module_memformat_affects_out
    for ours, _, x, _ in initialised(name, dtype):
        expected, memory_format = ours(x), CHANNELS_LAST.get(ours.weight.dim())
        if memory_format is None or x.dim() != ours.weight.dim():
            continue
        if which != "input":
            ours.to(memory_format=memory_format)
        if which != "module":
            x = x.to(memory_format=memory_format)
        y = ours(x)
        assert y.is_contiguous(memory_format=memory_format)
        torch.testing.assert_close(y, expected)


@by_dtype(MODULES)
def test_module_with_noncontiguous_tensors(name, dtype):
    for ours, theirs, x, _ in initialised(name, dtype):
        spread = [noncontiguous_like(t.detach()) for t in (x, ours.weight)]
        tensors = Tensors(*spread, ours.bias, gradient_like(theirs(x)))
        check_parity(as_function(ours), as_function(theirs), tensors)


# ---- both


class Convolutions(TorchDispatchMode):
    """Collects the operators that convolve."""

    def __init__(self):
        super().__init__()
        self.called = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "conv" in str(func):
            self.called.add(func.name().split(".")[0])
        return func(*args, **(kwargs or {}))


OURS = {"myconv::conv_forward", "myconv::conv_backward_input", "myconv::conv_backward_weight", "myconv::conv_backward"}


@pytest.mark.parametrize("name", [*FUNCTIONS, *MODULES])
def test_torchs_convolution_is_not_called(name):
    """Neither in forward nor in backward, nor in the first call of a lazy module."""
    samples = calls(name, torch.float32) if name in FUNCTIONS else pairs(name, torch.float32)
    for ours, theirs, x, *rest in samples:
        tensors = [x, *rest] if name in FUNCTIONS else [x]
        for function, mine in ((ours, True), (theirs, False)):
            with Convolutions() as convolutions:
                function(*[None if t is None else t.requires_grad_() for t in tensors]).sum().backward()
            assert convolutions.called and (convolutions.called <= OURS) == mine
