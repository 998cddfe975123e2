"""The operators in PyTorch's machinery: schemas, fake tensors, compile, torch.func, tracing, overrides."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.overrides import TorchFunctionMode

import myconv
from cases import BY_NAME, CASES, CORE, DIRECTIONS, Case, make_tensors, torch_conv
from conftest import bias_for, convolution_roles, noting, our_conv, run_operator

LAYOUTS = ["contiguous", "channels_last", "sliced"]
KINDS = [
    BY_NAME[name]
    for name in (
        "length_7 stride_2 depthwise groups_2 same_even circular_2d stride_2_3d transposed_1d_stride_3 "
        "transposed_stride_2 transposed_groups transposed_3d"
    ).split()
]


def leaves_of(case: Case, dtype: torch.dtype = torch.float32, layout: str = "contiguous", seed: int = 0):
    return [t.detach().requires_grad_() for t in make_tensors(case, dtype, layout, seed)[:3] if t is not None]


def close(actual, expected) -> None:
    """Equal structure and, in float64, the same numbers but for rounding."""
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


# ------------------------------------------------------------------------------------------------ opcheck


def sample_arguments(case: Case, dtype: torch.dtype, layout: str, requires_grad: bool, seed: int) -> dict[str, tuple]:
    """The arguments of each operator."""
    x, w, b, y = convolution_roles(case, make_tensors(case, dtype, layout, seed))
    x, w, y = (t.detach().requires_grad_(requires_grad) for t in (x, w, y))
    p = case.problem
    bias = {
        d: t if (t := bias_for(case, d, b)) is None else t.clone().requires_grad_(requires_grad) for d in DIRECTIONS
    }
    samples = {
        "conv_forward": (x, w, bias["forward"], p.output_size, *p.parameters),
        "conv_backward_input": (y, w, bias["backward_input"], p.input_size[2:], *p.parameters),
        "conv_backward_weight": (y, x, w.shape[2:], *p.parameters),
    }
    if not requires_grad:  # autograd differentiates the other three; this one is called from their backward
        samples["conv_backward"] = (y, x, w, *p.parameters, [True, True, True])
    return samples


@pytest.mark.parametrize(
    "dtype, layout, requires_grad",
    [
        (torch.float32, "contiguous", False),
        (torch.float32, "channels_last", False),
        (torch.float64, "contiguous", True),
        (torch.float64, "channels_last", True),
        (torch.float32, "sliced", True),
        (torch.bfloat16, "contiguous", False),
    ],
)
@pytest.mark.parametrize("name", ["stride_2", "depthwise", "length_7", "circular_2d", "transposed_3d"])
def test_opcheck(name, dtype, layout, requires_grad, seed):
    """Schema (nothing mutated or aliased), autograd registration, fake tensors, AOT dispatch."""
    for operator, arguments in sample_arguments(BY_NAME[name], dtype, layout, requires_grad, seed).items():
        with noting(operator=operator):
            opcheck(getattr(torch.ops.myconv, operator).default, arguments)


def test_every_operator_has_its_kernels():
    """An operator without an Autograd kernel would drop gradients with no more than a warning."""
    for operator in ("conv_forward", "conv_backward_input", "conv_backward_weight", "conv_backward"):
        for key in ("CPU", "Meta", "Autograd"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"myconv::{operator}", key), (
                operator,
                key,
            )


# ------------------------------------------------------------------------------------ fake and meta tensors


def description(result) -> list[tuple]:
    results = result if isinstance(result, (tuple, list)) else [result]
    return [None if t is None else (tuple(t.shape), t.stride(), t.dtype) for t in results]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_fake_tensors_tell_the_truth(case, layout, seed):
    """Shape, strides and dtype of every result without data: what the compiler plans memory by."""
    for operator, arguments in sample_arguments(case, torch.float32, layout, False, seed).items():
        function = getattr(torch.ops.myconv, operator)
        real = description(function(*arguments))
        with FakeTensorMode() as mode:
            fake = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
            with noting(operator=operator):
                assert description(function(*fake)) == real
        meta = [
            torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="meta") if isinstance(a, torch.Tensor) else a
            for a in arguments
        ]
        with noting(operator=operator, device="meta"):
            assert description(function(*meta)) == real


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CORE)
def test_functional_calls_on_fake_tensors(case, layout, seed):
    tensors = [t for t in make_tensors(case, torch.float32, layout, seed)[:3] if t is not None]
    real = description(our_conv(case, *tensors, *[None] * (3 - len(tensors))))
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in tensors]
        assert description(our_conv(case, *fake, *[None] * (3 - len(fake)))) == real


@pytest.mark.parametrize("mask", [[True, False, False], [False, True, True], [False, False, False]])
def test_fake_fused_backward_with_mask(mask, seed):
    arguments = sample_arguments(BY_NAME["stride_2"], torch.float32, "channels_last", False, seed)["conv_backward"]
    arguments = (*arguments[:-1], mask)
    real = description(torch.ops.myconv.conv_backward(*arguments))
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        assert description(torch.ops.myconv.conv_backward(*fake)) == real


def test_meta_modules():
    """A model on the meta device: shapes without memory."""
    with torch.device("meta"):
        model = torch.nn.Sequential(myconv.Conv2d(3, 8, 3, 2, 1), myconv.ConvTranspose2d(8, 4, 2, 2))
        assert model(torch.empty(2, 3, 16, 18)).shape == (2, 4, 16, 18)


# ---------------------------------------------------------------------------------------------- compile


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function, **options):
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", KINDS)
def test_compile(case, layout, seed):
    """No graph break, forward and backward; the numbers and strides of eager mode."""
    gy = make_tensors(case, torch.float32, layout, seed).gy
    eager, leaves = leaves_of(case, layout=layout, seed=seed), leaves_of(case, layout=layout, seed=seed)
    expected = our_conv(case, *eager)
    actual = compiled(lambda x, w, b: our_conv(case, x, w, b))(*leaves)
    assert description(actual) == description(expected)
    assert torch.equal(actual, expected)
    gy = torch.empty_like(expected).copy_(gy)  # the compiler brings it to these strides
    expected.backward(gy)
    actual.backward(gy)
    for a, e, exact in zip(leaves, eager, (True, True, False), strict=True):
        # The bias gradient follows gy's layout, and some compilers change that.
        assert torch.equal(a.grad, e.grad) if exact else torch.allclose(a.grad, e.grad, rtol=1e-5, atol=1e-5)
        assert a.grad.stride() == e.grad.stride()


MODULES = [
    ("Conv1d", (2, 4, 12), {"kernel_size": 3, "padding": "same", "padding_mode": "reflect"}),
    ("Conv2d", (2, 4, 9, 8), {"kernel_size": 3, "stride": 2, "padding": 1, "groups": 2}),
    ("Conv3d", (1, 4, 4, 5, 6), {"kernel_size": 2, "bias": False}),
    ("ConvTranspose2d", (2, 4, 5, 6), {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1}),
]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name, shape, arguments", MODULES, ids=[name for name, _, _ in MODULES])
def test_compile_modules(name, shape, arguments, seed):
    torch.manual_seed(seed)
    module, x = getattr(myconv, name)(4, 6, **arguments), torch.randn(shape)
    expected = torch.relu(module(x))
    expected.sum().backward()
    gradients = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    actual = compiled(lambda x: torch.relu(module(x)))(x)
    actual.sum().backward()
    assert torch.equal(actual, expected)
    for parameter, gradient in zip(module.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("op", ["conv2d", "conv_transpose2d"])
def test_compile_dynamic_shapes(op, seed):
    """One graph for all sizes: sizes and groups stay symbols."""
    case = Case("dynamic", op, (2, 4, 9, 8), 4, 3, stride=2, padding=1)
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(
        lambda x, w, b: our_conv(case, x, w, b).relu(), fullgraph=True, dynamic=True, backend=counter
    )
    _, w, b = leaves_of(case, seed=seed)
    for shape in ((2, 4, 9, 8), (3, 4, 12, 7), (5, 4, 6, 21)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        y = function(x, w, b)
        assert torch.equal(y, our_conv(case, x, w, b).relu())
        y.sum().backward()
    assert counter.frame_count == 1


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("case", [BY_NAME["stride_2"], BY_NAME["transposed_stride_2"]])
def test_compiled_autograd(case, seed):
    """The backward pass itself traced: the nodes tell the compiler what they read."""
    from torch._dynamo import compiled_autograd

    gy = make_tensors(case, seed=seed).gy
    eager, leaves = leaves_of(case, seed=seed), leaves_of(case, seed=seed)
    our_conv(case, *eager).backward(gy)
    for _ in range(2):  # the second time from the cache
        for leaf in leaves:
            leaf.grad = None
        with compiled_autograd._enable(lambda graph: torch.compile(graph, backend="eager", fullgraph=True)):
            our_conv(case, *leaves).backward(gy)
        for a, e in zip(leaves, eager, strict=True):
            assert torch.equal(a.grad, e.grad)


# ------------------------------------------------------------------------------------------ torch.func

FUNC_KINDS = [
    ("conv2d", {"stride": 2, "padding": 1}),
    ("conv2d", {"padding": 1, "groups": 2}),
    ("conv_transpose2d", {"stride": 2, "padding": 1}),
    ("conv_transpose2d", {"groups": 2}),
]
FUNC_IDS = [op + "".join(f"-{k}{v}" for k, v in arguments.items()) for op, arguments in FUNC_KINDS]
FUNCTIONS = pytest.mark.parametrize("op, arguments", FUNC_KINDS, ids=FUNC_IDS)


def small(op: str, groups: int, seed: int, extra: tuple[int, ...] = ()) -> list[torch.Tensor]:
    """x, w, b in float64 with 4 channels in and out, and leading dimensions of their own."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, 4, 5, 4), (4, 4 // groups, 3, 2), (4,))
    return [torch.randn((*extra, *shape), dtype=torch.float64, generator=generator) for shape in shapes]


@pytest.mark.parametrize(
    "in_dims",
    [
        (x, w, b)
        for x in (None, 0, 1, -1)
        for w in (None, 0, 2)
        for b in (None, 0, 1)
        if (x, w, b) != (None, None, None)
    ],
    ids=str,
)
@FUNCTIONS
def test_vmap(op, arguments, in_dims, seed):
    """Every choice of batched arguments, against a loop, with and without a bias."""
    batched = small(op, arguments.get("groups", 1), seed, extra=(3,))
    whole = [t if d is not None else t[0] for t, d in zip(batched, in_dims, strict=True)]
    whole = [t if d is None else t.movedim(0, d) for t, d in zip(whole, in_dims, strict=True)]
    ours, theirs = getattr(myconv.functional, op), getattr(F, op)
    for count in (2, 3):
        if all(d is None for d in in_dims[:count]):
            continue
        with noting(bias=count == 3):
            actual = torch.func.vmap(lambda *a: ours(*a, **arguments), in_dims[:count])(*whole[:count])
            loop = [
                theirs(
                    *[t if d is None else t.select(d, i) for t, d in zip(whole[:count], in_dims[:count], strict=True)],
                    **arguments,
                )
                for i in range(3)
            ]
            close(actual, torch.stack(loop))


@pytest.mark.parametrize("out_dim", [0, 2, -1])
def test_vmap_out_dims_and_nesting(out_dim, seed):
    x, w, b = small("conv2d", 1, seed, extra=(2, 3))

    def nest(conv):
        inner = torch.func.vmap(lambda x, w: conv(x, w, b[0, 0], padding=1), out_dims=out_dim)
        return torch.func.vmap(inner)(x, w)

    close(nest(myconv.functional.conv2d), nest(F.conv2d))


def test_vmap_chunked_and_random_samples(seed):
    x, w, b = small("conv2d", 1, seed, extra=(5,))
    for options in ({"chunk_size": 2}, {"randomness": "different"}):

        def run(conv, options=options):
            return torch.func.vmap(lambda x: conv(x, w[0], b[0]), **options)(x)

        close(run(myconv.functional.conv2d), run(F.conv2d))


TRANSFORMS = {
    "grad": lambda f, a, t: torch.func.grad(lambda *a: f(*a).sin().sum(), argnums=(0, 1, 2))(*a),
    "vjp": lambda f, a, t: torch.func.vjp(f, *a)[1](f(*a)),
    "jvp": lambda f, a, t: torch.func.jvp(f, tuple(a), tuple(t)),
    "linearize": lambda f, a, t: torch.func.linearize(f, *a)[1](*t),
    "jacrev": lambda f, a, t: torch.func.jacrev(f, argnums=(0, 1, 2))(*a),
    "jacfwd": lambda f, a, t: torch.func.jacfwd(f, argnums=(0, 1, 2))(*a),
    "hessian": lambda f, a, t: torch.func.hessian(lambda x, w: f(x, w, a[2]).pow(3).sum(), argnums=(0, 1))(*a[:2]),
    "jvp of grad": lambda f, a, t: torch.func.jvp(
        torch.func.grad(lambda *a: f(*a).pow(3).sum(), argnums=(0, 1, 2)), tuple(a), tuple(t)
    ),
    "per-sample gradients": lambda f, a, t: torch.func.vmap(
        torch.func.grad(lambda w, b, x: f(x.unsqueeze(0), w, b).pow(2).sum(), argnums=(0, 1)),
        in_dims=(None, None, 0),
    )(a[1], a[2], a[0]),
    "ensemble": lambda f, a, t: torch.func.vmap(f, in_dims=(None, 0, 0))(
        a[0], torch.stack([a[1], t[1]]), torch.stack([a[2], t[2]])
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@FUNCTIONS
def test_transforms(op, arguments, transform, seed):
    groups = arguments.get("groups", 1)
    values, tangents = small(op, groups, seed), small(op, groups, seed + 1)
    results = [
        TRANSFORMS[transform](lambda *a: getattr(space, op)(*a, **arguments), values, tangents)  # noqa: B023
        for space in (myconv.functional, F)
    ]
    close(*results)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("op", ["conv2d", "conv_transpose2d"])
def test_compile_transforms(op, transform, seed):
    """torch.func inside a compiled function, without a graph break."""

    def transformed(space):
        return lambda *arguments: TRANSFORMS[transform](
            lambda *a: getattr(space, op)(*a, stride=2, padding=1), *arguments
        )

    ours, theirs = transformed(myconv.functional), transformed(F)
    arguments = small(op, 1, seed), small(op, 1, seed + 1)
    try:
        actual = compiled(ours)(*arguments)
    except TorchDynamoException as refusal:
        with pytest.raises(type(refusal)):
            compiled(theirs)(*arguments)
        pytest.skip(f"this torch does not trace {transform} of its own convolutions either")
    close(actual, theirs(*arguments))


@pytest.mark.parametrize("transform", ["grad", "jvp", "jacrev", "per-sample gradients"])
@pytest.mark.parametrize("rank", [1, 3])
def test_transforms_of_other_ranks(rank, transform, seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, 2, *(4, 3, 3)[:rank]), (3, 2, *[2] * rank), (3,))
    values, tangents = (
        [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes] for _ in range(2)
    )
    op = f"conv{rank}d"
    close(*[TRANSFORMS[transform](getattr(space, op), values, tangents) for space in (myconv.functional, F)])


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("transform", ["grad", "jvp", "hessian", "per-sample gradients", "ensemble"])
def test_transforms_with_padding_modes(transform, mode, seed):
    values, tangents = small("conv2d", 1, seed), small("conv2d", 1, seed + 1)

    def theirs(x, w, b):
        return F.conv2d(F.pad(x, (1, 1, 2, 2), mode), w, b)

    def ours(x, w, b):
        return myconv.functional.conv2d(x, w, b, padding=(2, 1), padding_mode=mode)

    close(*[TRANSFORMS[transform](function, values, tangents) for function in (ours, theirs)])


@pytest.mark.parametrize("case", KINDS)
def test_functionalize_and_make_fx(case, seed):
    """Traced to a graph of our operators, forward and backward, with the same numbers."""
    tensors = make_tensors(case, torch.float64, seed=seed)
    x, w, b, gy = (tensors.x, tensors.w, tensors.b, tensors.gy)

    def step(x, w, b, gy):
        y, pull = torch.func.vjp(lambda *a: our_conv(case, *a), x, w, b)
        return y, *pull(gy)

    graph = make_fx(torch.func.functionalize(step))(x, w, b, gy)
    names = {str(node.target) for node in graph.graph.nodes}
    assert any(name.startswith("myconv.conv_") for name in names), names
    assert not any("aten.convolution" in name for name in names)
    close(graph(x, w, b, gy), step(x, w, b, gy))


def test_make_fx_symbolic(seed):
    case = BY_NAME["stride_2"]
    x, w, b, _ = make_tensors(case, torch.float64, seed=seed)
    graph = make_fx(lambda x, w, b: our_conv(case, x, w, b), tracing_mode="symbolic")(x, w, b)
    other = torch.randn(5, *x.shape[1:-1], 21, dtype=x.dtype)
    close(graph(other, w, b), torch_conv(case, other, w, b))


# ------------------------------------------------------------------------------- overrides and tracing

FUNCTIONAL = ["conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"]


def tiny(op: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rank = int(op[-2])
    return torch.ones(1, 2, *[4] * rank), torch.ones(2, 2, *[3] * rank), torch.ones(2)


@pytest.mark.parametrize("op", FUNCTIONAL)
def test_torch_function_mode(op):
    """A mode sees the call under its own name and may answer it."""
    function, calls = getattr(myconv.functional, op), []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, called, types, args=(), kwargs=None):
            calls.append(getattr(called, "__name__", str(called)))
            return called(*args, **(kwargs or {}))

    class Answer(TorchFunctionMode):
        def __torch_function__(self, called, types, args=(), kwargs=None):
            return "answered"

    expected = function(*tiny(op), padding=1)
    with Mode():
        actual = function(*tiny(op), padding=1)
    assert any(op in name or "conv_forward" in name or "conv_backward_input" in name for name in calls), calls
    assert torch.equal(actual, expected)
    with torch.device("cpu"), Mode():
        assert torch.equal(function(*tiny(op), padding=1), expected)
    arguments = tiny(op)
    with Answer():
        assert function(*arguments) == "answered"


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("op", FUNCTIONAL)
def test_tensor_subclass(op, position):
    """A subclass in any argument sees the call, and the result is of the subclass."""
    calls = []

    class Traced(torch.Tensor):
        @classmethod
        def __torch_function__(cls, called, types, args=(), kwargs=None):
            calls.append(called)
            return super().__torch_function__(called, types, args, kwargs or {})

    arguments = list(tiny(op))
    arguments[position] = arguments[position].as_subclass(Traced)
    result = getattr(myconv.functional, op)(*arguments, padding=1)
    assert calls
    assert type(result) is Traced
    assert torch.equal(result.as_subclass(torch.Tensor), getattr(F, op)(*tiny(op), padding=1))


@pytest.mark.parametrize("op", FUNCTIONAL)
def test_parameters_buffers_and_duck_types(op):
    """Parameters take the same way as tensors; an object that only knows the protocol is asked."""
    x, w, b = tiny(op)
    function = getattr(myconv.functional, op)
    assert torch.equal(function(x, torch.nn.Parameter(w), torch.nn.Parameter(b)), function(x, w, b))

    class Duck:
        @classmethod
        def __torch_function__(cls, called, types, args=(), kwargs=None):
            return "quack"

    assert function(Duck(), w) == "quack"


@pytest.mark.parametrize("case", KINDS)
def test_inference_mode(case, seed):
    x, w, b, _ = make_tensors(case, seed=seed)
    expected = our_conv(case, x, w, b)
    w.requires_grad_()
    with torch.inference_mode():
        y = our_conv(case, x, w, b)
        again = our_conv(case, x.clone(), w.clone(), b.clone())
    assert y.is_inference()
    assert not y.requires_grad
    assert torch.equal(y.clone(), expected)
    assert torch.equal(again.clone(), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name, shape, arguments", MODULES, ids=[name for name, _, _ in MODULES])
def test_jit_trace(name, shape, arguments, seed, tmp_path):
    torch.manual_seed(seed)
    module, x = getattr(myconv, name)(4, 6, **arguments).eval(), torch.randn(shape)
    traced = torch.jit.trace(module, x)
    assert torch.equal(traced(x), module(x))
    assert "myconv::conv" in str(traced.inlined_graph)
    traced.save(str(tmp_path / "module.pt"))
    assert torch.equal(torch.jit.load(str(tmp_path / "module.pt"))(x), module(x))


def test_symbolic_fx_trace_of_modules(seed):
    """torch.fx keeps the modules whole, as it does torch.nn's."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(myconv.Conv2d(3, 4, 3), torch.nn.ReLU())
    traced = torch.fx.symbolic_trace(model)
    x = torch.randn(1, 3, 6, 6)
    assert torch.equal(traced(x), model(x))


@pytest.mark.parametrize("op", FUNCTIONAL)
def test_symbolic_fx_trace_of_functions(op):
    """A function is one node of the graph, under its own name."""
    function = getattr(myconv.functional, op)
    traced = torch.fx.symbolic_trace(lambda x, w, b: function(x, w, b, padding=1))
    assert [node.target for node in traced.graph.nodes if node.op == "call_function"] == [function]
    assert torch.equal(traced(*tiny(op)), function(*tiny(op), padding=1))


def test_views_and_strides_of_results_allow_in_place_use(seed):
    """A result owns its memory: in-place work on it touches no argument."""
    for case in CORE:
        for layout in LAYOUTS:
            x, w, b, y = convolution_roles(case, make_tensors(case, layout=layout, seed=seed))
            for direction in DIRECTIONS:
                with noting(case=case.name, layout=layout, direction=direction):
                    result = run_operator(direction, x, w, bias_for(case, direction, b), y, case.problem)
                    assert result._base is None
                    assert result.untyped_storage().data_ptr() not in {
                        t.untyped_storage().data_ptr() for t in (x, w, y) if t.numel()
                    }
