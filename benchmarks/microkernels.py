"""Time the microkernels of csrc/cpu alone, on one tile in cache, as a share of what the processor can do.

    python benchmarks/microkernels.py
    python benchmarks/microkernels.py --isa avx512 --dtype float32 --depth 128

One thread. The peak is a loop of multiply-adds in registers, of the same instruction set and type, timed in turn with
the tile; for Winograd's transforms, which loads and stores bound, it is a copy inside the first cache. The bar is
libtorch's own tile kernel, brgemm; it takes the widest instruction set whatever --isa says.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import sys
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from ceilings import Loop, NotBuilt, long_enough, loops, native
from common import (
    check,
    describe,
    exit_status,
    interleave,
    make_parser,
    output_path,
    print_table,
    progress,
    start,
    stop,
    write_record,
)
from torch import Tensor

import myconv
from myconv import _build

# Kernels that are reported together.
FAMILIES = {
    "matrix product": ("gemm", "gemm_rows", "strip", "dot", "winograd_product", "groups", "brgemm"),
    "depthwise": ("lines", "lines_stride_2", "pixels", "pixels_stride_2"),
    "depthwise, rolling or in order": (
        "rolling_lines",
        "rolling_lines_stride_2",
        "rolling_pixels",
        "rolling_pixels_stride_2",
        "pixels_in_order",
        "pixels_in_order_stride_2",
    ),
    "Winograd's transforms": ("winograd_input", "winograd_weight", "winograd_output"),
}
PRODUCT, DEPTHWISE, ROLLING, WINOGRAD = FAMILIES
FAMILY = {kernel: family for family, kernels in FAMILIES.items() for kernel in kernels}
DTYPES = ("float32", "float64", "bfloat16")
ISAS = [isa for isa in myconv._C.isas() if isa != "avx512_bf16"]  # whose kernels of these types are avx512's
BRGEMM_ROWS = (8, 16, 32, 64)
BRGEMM_COLS = (16, 32, 48, 64)
DEPTHWISE_ROWS = (7, 8)
DEPTHWISE_TAPS = (9, 25, 49, 81, 121)
ROLLING_ROWS = (14, 56)  # results along the walk
ROLLING_LINES = 7  # of pixels, together
PANEL_ROWS = (8, 32)  # of a product of Winograd's weight gradient, and of one of groups
WINOGRAD_ROWS = (2, 4)
CHANNELS = 64  # of a Winograd tile, and of a depthwise tile of pixels
COPIED = 1536  # values of a copy: 24 KiB read and written in float64


class Tile(NamedTuple):
    """A tile of results [rows][cols], each a sum of depth terms.

    A Winograd transform is that of a tile of rows x rows results, of cols channels; it reads or writes depth positions.
    """

    kernel: str
    isa: str
    dtype: str
    rows: int
    cols: int
    depth: int


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__, 0.03, "a tile")
    parser.add_argument("--kernel", nargs="+", choices=FAMILY, default=list(FAMILY), help="default: all")
    parser.add_argument("--isa", nargs="+", choices=ISAS, default=ISAS[::-1], help="default: all")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES, help="default: all; bfloat16 is brgemm's")
    parser.add_argument(
        "--depth", nargs="+", type=int, default=[64, 128, 512], help="of a product (default: 64 128 512)"
    )
    parser.add_argument("--tail", type=int, default=0, help="columns that are missing in the last vector (default: 0)")
    return parser.parse_args()


@cache
def library() -> ctypes.CDLL:
    portable = ["-DMYCONV_PORTABLE_ONLY"] if _build.ISA_BUILD == "portable" else []
    # The microkernels are those of the package. Linked, not loaded with RTLD_GLOBAL, which would offer its symbols to
    # every library of the process.
    found = native("microkernels", ["benchmarks/microkernels.cpp"], portable, [myconv._C.__file__])
    for kernel in (*FAMILY, "copy"):
        getattr(found, f"run_{kernel}").restype = ctypes.c_bool
    return found


def register_tile(isa: str, dtype: str) -> tuple[int, int, int]:
    """Rows, lanes and vectors."""
    tile = (ctypes.c_int * 3)()
    library().tile_of(isa.encode(), dtype == "float64", tile)
    return tuple(tile)


def loop_of(isa: str, dtype: str) -> Loop | None:
    return next((loop for loop in loops() if (loop.isa, loop.dtype) == (isa, dtype)), None)


def sizes(kernel: str, isa: str, dtype: str, arguments: argparse.Namespace) -> Iterator[tuple[int, int, int]]:
    """Rows, cols and depth: of gemm every number of rows and vectors that there is."""
    most_rows, lanes, vectors = register_tile(isa, dtype)
    if arguments.tail >= lanes:
        return iter(())
    cols = [v * lanes - arguments.tail for v in range(1, vectors + 1)]
    if FAMILY[kernel] == DEPTHWISE:
        # Nine taps and more of a line are for the registers of AVX-512, and for stride 1.
        widest = 49 if lanes < 16 * 4 // getattr(torch, dtype).itemsize or kernel.endswith("stride_2") else math.inf
        return product(DEPTHWISE_ROWS, [CHANNELS - arguments.tail], [taps for taps in DEPTHWISE_TAPS if taps <= widest])
    if FAMILY[kernel] == ROLLING:
        return product(ROLLING_ROWS, [CHANNELS - arguments.tail], [9])
    if dtype == "float64" and (FAMILY[kernel] == WINOGRAD or kernel in ("winograd_product", "groups")):
        return iter(())
    if kernel in ("winograd_product", "groups"):  # whole vectors; half of one is a group
        depths = [lanes // 2] if kernel == "groups" else arguments.depth
        return product(PANEL_ROWS, [v * lanes for v in range(1, vectors + 1)], depths)
    if FAMILY[kernel] == WINOGRAD:
        # Weights are transformed in whole vectors.
        tail = 0 if kernel == "winograd_weight" else arguments.tail
        return ((rows, CHANNELS - tail, (rows + 2) ** 2) for rows in WINOGRAD_ROWS)
    if kernel == "dot":
        return product([lanes], [1, lanes], arguments.depth)
    return product([most_rows] if kernel == "strip" else range(1, most_rows + 1), cols, arguments.depth)


def all_tiles(arguments: argparse.Namespace) -> Iterator[Tile]:
    """A tile of brgemm is many of its own."""
    for dtype in arguments.dtype:
        if "brgemm" in arguments.kernel and dtype != "float64":
            isa = [loop.isa for loop in loops() if loop.dtype == dtype][-1:]
            depths = [depth for depth in arguments.depth if dtype == "float32" or depth % 2 == 0]
            yield from (Tile("brgemm", *t) for t in product(isa, [dtype], BRGEMM_ROWS, BRGEMM_COLS, depths))
        for isa in arguments.isa if dtype != "bfloat16" else ():
            for kernel in (name for name in arguments.kernel if name != "brgemm"):
                yield from (Tile(kernel, isa, dtype, *size) for size in sizes(kernel, isa, dtype, arguments))


def function_of(tile: Tile, *tensors: Tensor) -> Callable[[int], object]:
    """The kernel on these operands and result, as a function of the number of calls."""
    which = [tile.isa.encode(), tile.dtype == "float64"] if tile.kernel != "brgemm" else [tile.dtype == "bfloat16"]
    function = getattr(library(), f"run_{tile.kernel}")
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in tensors]

    def run(times: int, keep: tuple = tensors) -> object:
        return function(*which, tile.rows, tile.cols, tile.depth, *pointers, ctypes.c_int64(times))

    return run


class Problem(NamedTuple):
    run: Callable[[int], object]  # so many times
    result: Tensor  # is written by it
    expected: Callable[[torch.dtype], Tensor]  # computed by torch
    flops: int = 0
    bytes: int = 0  # where those are what counts


def matrix_product(tile: Tile, draw: Callable[..., Tensor]) -> Problem:
    a, b = draw(tile.rows, tile.cols if tile.kernel == "groups" else tile.depth), draw(tile.depth, tile.cols)
    c = torch.zeros(tile.rows, tile.cols, dtype=torch.float32 if tile.dtype == "bfloat16" else a.dtype)
    ours_a, ours_b = a, b
    if tile.kernel == "dot":
        ours_b = b.t().contiguous()
    elif tile.kernel == "winograd_product":
        ours_a = a.t().contiguous()
    elif tile.kernel == "strip":  # its last vector is read whole
        ours_b = torch.cat([b.flatten(), b.new_zeros(64)])
    elif tile.dtype == "bfloat16":  # pairs of rows side by side
        ours_b = b.view(tile.depth // 2, 2, tile.cols).transpose(1, 2).contiguous()

    def expected(dtype: torch.dtype) -> Tensor:
        if tile.kernel != "groups":
            return a.to(dtype) @ b.to(dtype)
        of_group = (-1, tile.cols // tile.depth, tile.depth)
        return torch.einsum("rgk,kgl->rgl", a.to(dtype).view(of_group), b.to(dtype).view(of_group)).reshape(c.shape)

    return Problem(function_of(tile, ours_a, ours_b, c), c, expected, 2 * tile.rows * tile.cols * tile.depth)


def depthwise(tile: Tile, draw: Callable[..., Tensor]) -> Problem:
    side, stride = math.isqrt(tile.depth), 2 if tile.kernel.endswith("stride_2") else 1
    is_lines = "lines" in tile.kernel  # else channels come last
    lines = ROLLING_LINES if FAMILY[tile.kernel] == ROLLING and not is_lines else 1
    y = torch.zeros(lines * tile.rows, tile.cols, dtype=getattr(torch, tile.dtype))

    def reach(results: int) -> int:
        return (results - 1) * stride + side

    def expected(dtype: torch.dtype) -> Tensor:
        image, kernel = (t if is_lines else t.permute(2, 0, 1) for t in (x.to(dtype), w.to(dtype)))
        channels = 1 if is_lines else tile.cols
        found = F.conv2d(image.view(1, channels, *image.shape[-2:]) if is_lines else image[None],
                         kernel.reshape(channels, 1, side, side), stride=stride, groups=channels)  # fmt: skip
        return found.view(y.shape) if is_lines else found.view(tile.cols, -1).t()

    if is_lines:
        x, w = draw(reach(tile.rows), reach(tile.cols)), draw(side, side)
    else:
        x, w = draw(reach(lines), reach(tile.rows), tile.cols), draw(side, side, tile.cols)
    return Problem(function_of(tile, x, w, y), y, expected, 2 * y.numel() * tile.depth)


def winograd(tile: Tile, draw: Callable[..., Tensor]) -> Problem:
    """A transform is right if all three of them make a convolution."""
    channels, positions, results = tile.cols, tile.depth, tile.rows**2
    x, w = draw(positions, channels), draw(9, CHANNELS)  # weights of whole vectors
    v, y = (x.new_zeros(n, channels) for n in (positions, results))
    u = x.new_zeros(positions, CHANNELS)
    transform = function_of(tile._replace(kernel="winograd_input"), x, x, v)
    transform_weight = function_of(tile._replace(kernel="winograd_weight", cols=CHANNELS), w, w, u)
    transform(1)
    transform_weight(1)
    m = v * u[:, :channels]
    transform_back = function_of(tile._replace(kernel="winograd_output"), m, m, y)
    transform_back(1)

    def expected(dtype: torch.dtype) -> Tensor:
        sides = (x, tile.rows + 2), (w[:, :channels], 3)
        image, kernel = (t.to(dtype).t().reshape(channels, -1, n, n) for t, n in sides)
        return F.conv2d(image.view(1, channels, *image.shape[-2:]), kernel, groups=channels).view(channels, -1).t()

    size = x.element_size() * channels
    run, moved = {
        "winograd_input": (transform, 2 * positions),
        "winograd_weight": (transform_weight, 9 + positions),
        "winograd_output": (transform_back, positions + results),
    }[tile.kernel]
    return Problem(run, y, expected, bytes=moved * size)


PROBLEMS = {PRODUCT: matrix_product, DEPTHWISE: depthwise, ROLLING: depthwise, WINOGRAD: winograd}


@cache
def copy_loop(isa: str, dtype: str) -> tuple[Callable[[int], object], int]:
    """A copy that stays in the first cache, and the bytes that it reads and writes."""
    values = torch.ones(COPIED, dtype=getattr(torch, dtype))
    return function_of(Tile("copy", isa, dtype, 1, COPIED, 1), values, values, values.clone()), 2 * values.nbytes


def measure(tile: Tile, budget: float) -> dict | None:
    """None if this torch or this machine does not have the kernel."""
    dtype = getattr(torch, tile.dtype)
    generator = torch.Generator().manual_seed(0)
    problem = PROBLEMS[FAMILY[tile.kernel]](tile, lambda *shape: torch.randn(shape, generator=generator).to(dtype))
    if problem.run(1) is False:
        return None
    error, failed = check(problem.result, problem.expected(dtype), problem.expected(torch.float64), dtype)
    if problem.bytes:
        name, amount, (loop, most) = "gbytes", problem.bytes, copy_loop(tile.isa, tile.dtype)
    else:
        found = loop_of(tile.isa, tile.dtype)
        name, amount, loop, most = "gflops", problem.flops, found.run, found.flops
    times, call = long_enough(problem.run)
    rounds, peak = long_enough(loop)
    seconds, peak_seconds = interleave([call, peak], budget)
    rate, peak_rate = amount * times / seconds, most * rounds / peak_seconds
    return tile._asdict() | {
        name: rate / 1e9,
        f"peak_{name}": peak_rate / 1e9,
        "share": 0.0 if failed else rate / peak_rate,
        "error": error,
        "failed": failed,
    }


def report(rows: list[dict], plain: bool) -> None:
    """A table for each instruction set, type and family, with a line for each number of rows."""
    for isa, dtype, family in dict.fromkeys((row["isa"], row["dtype"], FAMILY[row["kernel"]]) for row in rows):
        part = [row for row in rows if (row["isa"], row["dtype"], FAMILY[row["kernel"]]) == (isa, dtype, family)]
        share = {tuple(row[key] for key in ("kernel", "rows", "cols", "depth")): row["share"] for row in part}
        shapes = sorted({(row["cols"], row["depth"]) for row in part})
        lines = [
            [
                kernel,
                f"{count}",
                *("" if (s := share.get((kernel, count, *shape))) is None else f"{s:.0%}" for shape in shapes),
            ]
            for kernel, count in dict.fromkeys((row["kernel"], row["rows"]) for row in part)
        ]
        if "gflops" in part[0]:
            limit = f"the peak of {max(row['peak_gflops'] for row in part):.0f} GFLOP/s a core"
        else:
            limit = f"a copy in the first cache, {max(row['peak_gbytes'] for row in part):.0f} GB/s read and written"
        title = f"{isa}, {dtype}, {family}: share of {limit}, by columns x depth"
        print_table(title, ["kernel ", "rows", *(f"{cols}x{depth}" for cols, depth in shapes)], lines, plain)


def main() -> int:
    arguments = parse_arguments()
    start(arguments, threads=1)
    record = describe("microkernels") | {"budget_s": arguments.budget}
    path = output_path(record, "microkernels", arguments.json, arguments.record)
    try:
        tiles = list(all_tiles(arguments))
    except NotBuilt as error:
        stop(str(error))
    if not tiles:
        stop("no tile matches these options")
    rows = [row for tile in progress(tiles, arguments.plain) if (row := measure(tile, arguments.budget))]
    report(rows, arguments.plain)
    write_record(path, record, rows)
    return exit_status(rows)


if __name__ == "__main__":
    sys.exit(main())
