"""The CUDA kernels, run on the CPU by tests/emulator, and the emulator itself. See docs/emulator.md."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch

import emulated
from cases import (
    BY_NAME,
    CORE,
    DIRECTIONS,
    MODES,
    Case,
    Problem,
    lay_out,
    make_tensors,
    random_tensor,
    reference_operator,
)
from conftest import assert_accurate, bias_for, convolution_roles, forced, guarded, noting, run_operator, threads
from emulated import CONVOLUTIONS, DTYPES, SCHEDULES, KernelError, run_row
from mutants import FEW_BLOCKS

ROWS = ("direct",)
LAYOUTS = ("contiguous", "channels_last")
FLOATS = tuple(dtype for dtype in DTYPES if dtype.is_floating_point)
# Without those of the most weights, each of which is a block.
SMALL = [case for case in CORE if case.name not in ("resnet_3x3", "all_tails", "in_channels_17")]
FEW = [
    BY_NAME[name]
    for name in (
        "length_7 stride_3_2 dilation_3_stride_2 groups_2 depthwise_times_3 1x1 same_even padding_beyond_kernel "
        "reflect_per_dimension replicate_3d circular_1d batch_0 transposed_output_padding_by_dilation transposed_3d"
    ).split()
]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The references are too small to share."""
    with threads(1):
        yield


@pytest.fixture(scope="module")
def kernels() -> ctypes.CDLL:
    return emulated.library(*CONVOLUTIONS)


@pytest.fixture(scope="module")
def probes() -> ctypes.CDLL:
    return emulated.library("tests/emulator/probes.cu")


@pytest.fixture(scope="module")
def products() -> ctypes.CDLL:
    return emulated.library("tests/emulator/mma.cu")


def reference(direction: str, *call: torch.Tensor | Problem | None) -> torch.Tensor:
    """The row that the CPU kernels are held to as well. It computes integers modulo 2**64, so in int64 as in any."""
    *tensors, problem = call
    dtype = tensors[0].dtype
    if not dtype.is_floating_point:  # of which transposed convolutions take int64 alone
        tensors = [None if t is None else t.long() for t in tensors]
    with forced(direction, "reference", "portable"):
        return run_operator(direction, *tensors, problem).to(dtype)


def operands(case: Case, direction: str, *arguments: object, **options: object) -> tuple:
    """What run_operator and run_row take: x, w, b, y, problem."""
    x, w, b, y = convolution_roles(case, make_tensors(case, *arguments, **options))
    return x, w, bias_for(case, direction, b), y, case.problem


# ---------------------------------------------------------------------------------------------- the kernels' results


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("case", [*SMALL, *MODES])
def test_accurate_and_the_same_bits_in_every_schedule(case, row, direction, layout, kernels, seed):
    call = operands(case, direction, torch.float32, layout, seed)
    results = []
    for schedule in SCHEDULES:
        with noting(schedule=schedule):
            results.append(
                run_row(
                    kernels, row, direction, *call, channels_last=layout != "contiguous", schedule=schedule, seed=seed
                )
            )
            assert torch.equal(results[-1], results[0])
    assert_accurate(results[0], reference_operator(direction, *call))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("case", FEW)
def test_dtypes(case, row, direction, dtype, kernels, seed):
    """Exact on small integers in both layouts, with weights of any strides; accurate on floats."""
    for layout, weights in (("contiguous", "sliced"), ("channels_last", "transposed")):
        x, w, *others = operands(case, direction, dtype, layout, seed, integers=True)
        call = (x, lay_out(w, weights), *others)
        with noting(layout=layout, weights=weights):
            actual = run_row(kernels, row, direction, *call, channels_last=layout != "contiguous")
            assert torch.equal(actual, reference(direction, *call))
    if dtype in FLOATS:
        call = operands(case, direction, dtype, "contiguous", seed)
        assert_accurate(run_row(kernels, row, direction, *call), reference_operator(direction, *call))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int8, torch.uint8])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("row", ROWS)
def test_integers_wrap(row, direction, dtype, kernels, seed):
    generator = torch.Generator().manual_seed(seed)
    limits = torch.iinfo(dtype)
    x, w, b, y, problem = operands(BY_NAME["stride_2"], direction, dtype)
    call = [
        None if t is None else torch.randint(limits.min, limits.max, t.shape, dtype=dtype, generator=generator)
        for t in (x, w, b, y)
    ]
    assert torch.equal(run_row(kernels, row, direction, *call, problem), reference(direction, *call, problem))


TOLD = {  # the operators are told sizes and the low padding: any will do in zeros mode
    "one more": lambda p: p._replace(output_size=tuple(n + 1 for n in p.output_size)),
    "one less": lambda p: p._replace(output_size=tuple(n - 1 for n in p.output_size)),
    "none": lambda p: p._replace(output_size=(0, *p.output_size[1:])),
    "low padding": lambda p: p._replace(padding=(5, 0)),
    "far padding": lambda p: p._replace(padding=(2**40, 2**61), dilation=(2**39, 2**60)),
    "far stride": lambda p: p._replace(stride=(2**58, 2**31)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("told", TOLD)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("row", ROWS)
def test_told_sizes(row, direction, told, layout, kernels, seed):
    x, w, b, _, problem = operands(BY_NAME["stride_3_2"], direction, torch.float32, layout, seed, integers=True)
    problem = TOLD[told](problem)
    y = torch.randint(-3, 4, (x.shape[0], w.shape[0], *problem.output_size)).float()
    call = (x, w, b, lay_out(y, layout), problem)
    actual = run_row(kernels, row, direction, *call, channels_last=layout != "contiguous")
    assert torch.equal(actual, reference(direction, *call))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("case", [BY_NAME["stride_3_2"], BY_NAME["replicate_2d"]])
def test_infinities_meet_the_padding(case, row, direction, kernels, seed):
    x, w, b, y, problem = operands(case, direction, torch.float32, seed=seed, integers=True)
    for t in (x, w, y):
        t.view(-1)[::7] = float("inf")
        t.view(-1)[::11] = float("-inf")
    call = (x, w, b, y, problem)
    torch.testing.assert_close(
        run_row(kernels, row, direction, *call), reference(direction, *call), rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("direction", ["forward", "backward_input"])
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", ["all_tails", "depthwise_stride_2", "circular_2d", "transposed_stride_2"])
def test_any_batch(name, row, direction, layout, kernels, seed):
    case = BY_NAME[name].with_batch(5)
    x, w, b, y, problem = operands(case, direction, torch.float32, layout, seed)
    options = {"channels_last": layout != "contiguous"}
    whole = run_row(kernels, row, direction, x, w, b, y, problem, **options)
    for part in (slice(0, 1), slice(4, 5), slice(1, 4)):
        size = (part.stop - part.start, *problem.input_size[1:])
        call = (x[part], w, b, y[part], problem._replace(input_size=size))
        with noting(samples=part):
            assert torch.equal(run_row(kernels, row, direction, *call, **options), whole[part])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_blocks_that_take_several_turns(direction, schedule, seed):
    few = emulated.library(*CONVOLUTIONS, edits=[FEW_BLOCKS])
    call = operands(BY_NAME["groups_2"], direction, torch.float32, seed=seed, integers=True)
    actual = run_row(few, "direct", direction, *call, schedule=schedule, seed=seed)
    assert torch.equal(actual, reference(direction, *call))


# ------------------------------------------------------------------------------------------------- 16-bit floats


def convert(probes: ctypes.CDLL, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """To float32 or from it, by load() and store() of device.cuh."""
    result = torch.empty(values.shape, dtype=dtype)
    widens = dtype == torch.float32
    small, wide = (values, result) if widens else (result, values)
    pointers = (ctypes.c_void_p(small.data_ptr()), ctypes.c_void_p(wide.data_ptr()))
    emulated.call(probes, "convert", small.dtype == torch.float16, widens, *pointers, values.numel())
    return result


def same_values(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Zeros by their sign too; any NaN is as good as another."""
    bits = {2: torch.int16, 4: torch.int32}[actual.element_size()]
    numbers = ~expected.isnan()
    same = torch.equal(actual[numbers].view(bits), expected[numbers].view(bits))
    return same and bool(actual[~numbers].isnan().all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_float(dtype, probes):
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    wide = convert(probes, values, torch.float32)
    assert same_values(wide, values.float())
    assert same_values(convert(probes, wide, dtype), values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_to_16_bits(dtype, probes, seed):
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**31), 2**31, (2**17,), generator=generator).to(torch.int32)
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).float()
    neighbours = torch.cat([values[1:], values[-1:]])
    ties = ((values.double() + neighbours.double()) / 2).float()  # exact
    around = [torch.nextafter(ties, torch.full_like(ties, end)) for end in (float("inf"), float("-inf"))]
    for wide in (bits.view(torch.float32), ties, *around):
        assert same_values(convert(probes, wide, dtype), wide.to(dtype))


# -------------------------------------------------------------------------------------------------- the emulator


PRODUCTS = ("gathered float16", "gathered bfloat16", "staged float16", "staged bfloat16", "gathered float32")


def product_operands(kind: str, seed: int, integers: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Three pairs of matrices."""
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, kind.split()[1])
    a, b = (random_tensor((3, *size), dtype, generator, integers) for size in ((16, 32), (32, 8)))
    return a, b


def multiply(products: ctypes.CDLL, kind: str, a: torch.Tensor, b: torch.Tensor, schedule: str) -> torch.Tensor:
    end = SCHEDULES.index(schedule) % 2 == 0
    a, b, c = guarded(a, end), guarded(b, end), guarded(torch.full((len(a), 16, 8), torch.nan), end)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (a, b, c)]
    emulated.call(products, "multiply", kind.encode(), *pointers, len(a), schedule=schedule)
    return c.clone()


def as_tf32(t: torch.Tensor) -> torch.Tensor:
    return ((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", PRODUCTS)
def test_matrix_products_of_a_warp(kind, schedule, products, seed):
    a, b = product_operands(kind, seed, integers=True)
    assert torch.equal(multiply(products, kind, a, b, schedule).double(), a.double() @ b.double())
    a, b = product_operands(kind, seed)
    exact = a.double() @ b.double() if a.dtype != torch.float32 else as_tf32(a).double() @ as_tf32(b).double()
    assert_accurate(multiply(products, kind, a, b, schedule), exact)


def probe(probes: ctypes.CDLL, name: str, schedule: str = "forward", n: int = 6) -> torch.Tensor:
    out = guarded(torch.arange(64.0 * n), end=True)
    emulated.call(probes, "probe", name.encode(), ctypes.c_void_p(out.data_ptr()), n, schedule=schedule)
    return out.clone().reshape(64, n)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_collectives(schedule, probes):
    lane, warp = torch.arange(64) % 32, torch.arange(64) // 32
    shuffles = [
        torch.full((64,), 5),
        lane // 8 * 8 + (lane + 1) % 8,
        torch.where(lane >= 3, lane - 3, lane),
        torch.where(lane % 16 + 3 < 16, lane + 3, lane),
        lane ^ 1,
        torch.where(lane < 16, lane ^ 2, lane ^ 4),
    ]
    expected = torch.stack(shuffles, 1) + 32 * warp[:, None]
    assert torch.equal(probe(probes, "shuffles", schedule), expected.float())
    third = torch.arange(64) % 3 == 0
    ballots = [int((third[32 * i : 32 * i + 16] * 2 ** torch.arange(16)).sum()) for i in (0, 1)]
    votes = [torch.tensor(ballots)[warp], warp, 1 - warp, *(torch.full((64,), n) for n in (int(third.sum()), 1, 2))]
    assert torch.equal(probe(probes, "votes", schedule), torch.stack(votes, 1).float())


FAULTS = {  # and what is said of them
    "leaves_before_the_barrier": r"block \(0, 0, 0\): thread \(\d+, 0, 0\) waits at \S+:\d+ for threads that never",
    "two_barriers": r"thread \(\d+, 0, 0\) is at \S+:\d+, where it meets a thread from",
    "leaves_before_the_shuffle": r"thread \(\d+, 0, 0\) waits at \S+:\d+ for threads that never come",
    "not_in_the_mask": "is not in the mask",
    "writes_behind_shared": "written outside a shared array of 256 bytes",
    "writes_before_shared": "written outside a shared array of 256 bytes",
    "too_much_shared": "wants 49160 bytes of shared memory",
    "reads_behind": r"thread \(\d+, 0, 0\) touches memory that is not its own",
    "copies_from_an_odd_address": "not a multiple of the size",
    "too_many_threads": "1 blocks of 1025 threads",
    "no_blocks": "0 blocks of 64 threads",
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_named(name, schedule, probes):
    with pytest.raises(KernelError, match=FAULTS[name]):
        probe(probes, name, schedule)
    probe(probes, "shuffles", schedule)  # and the next launch is as good as new


def test_writes_outside_a_tensor(probes):
    out = guarded(torch.zeros(64), end=False)
    with pytest.raises(KernelError, match="touches memory that is not its own"):
        emulated.call(probes, "probe", b"writes_before", ctypes.c_void_p(out.data_ptr()), 1)


@pytest.mark.parametrize(
    "name",
    [
        "reads_a_lane_outside_the_mask",
        "no_barrier",
        "reads_behind_shared",
        "shared_of_the_block_before",
        "copies_without_wait",
    ],
)
def test_what_was_not_written_is_poison(name, probes):
    assert any(probe(probes, name, schedule).isnan().any() for schedule in SCHEDULES)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_copies_fill_with_zeros(schedule, probes):
    actual = probe(probes, "copies", schedule)
    thread = torch.arange(64)
    assert torch.equal(actual[:, 1], torch.where(thread % 2 == 1, 6.0 * thread, 0.0))


def test_atomics_do_not_compile():
    edit = ("sums[thread] = sum.value();", "atomicAdd(&sums[thread], sum.value());")
    with pytest.raises(RuntimeError, match="deleted function.*atomicAdd"):
        emulated.library(*CONVOLUTIONS, edits=[edit])
