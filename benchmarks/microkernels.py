"""Time the microkernels of csrc/cpu alone, on one tile in cache, as a share of the processor's peak.

    python benchmarks/microkernels.py
    python benchmarks/microkernels.py --isa avx512 --dtype float32 --depth 128

One thread. The peak is a loop of multiply-adds in registers, of the same instruction set and type, timed in turn with
the tile. The bar is libtorch's own tile kernel, brgemm; it takes the widest instruction set whatever --isa says.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from typing import NamedTuple

import torch
from ceilings import Loop, NotBuilt, long_enough, loops, native
from common import (
    ROOT,
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

KERNELS = ("gemm", "outer", "brgemm")
DTYPES = ("float32", "float64", "bfloat16")
ISAS = [isa for isa in myconv._C.isas() if isa != "avx512_bf16"]  # whose kernels of these types are avx512's
BRGEMM_ROWS = (8, 16, 32, 64)
BRGEMM_COLS = (16, 32, 48, 64)


class Tile(NamedTuple):
    """C [rows][cols] = A * B, reduced over depth."""

    kernel: str
    isa: str
    dtype: str
    rows: int
    cols: int
    depth: int


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__, 0.03, "a tile")
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=KERNELS, help="default: all")
    parser.add_argument(
        "--isa", nargs="+", choices=ISAS, default=ISAS[::-1], help="default: all"
    )
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES, help="default: all; bfloat16 is brgemm's")
    parser.add_argument("--depth", nargs="+", type=int, default=[64, 128, 512], help="default: 64 128 512")
    parser.add_argument("--tail", type=int, default=0, help="columns that are missing in the last vector (default: 0)")
    return parser.parse_args()


@cache
def library() -> ctypes.CDLL:
    kernels = sorted((ROOT / "csrc" / "cpu").glob("microkernels_*.cpp"))
    found = native("microkernels", ["benchmarks/microkernels.cpp", *kernels])
    found.run_gemm.restype = found.run_outer.restype = None
    found.run_brgemm.restype = ctypes.c_bool
    return found


def register_tile(isa: str, dtype: str) -> tuple[int, int, int]:
    """Rows, lanes and vectors."""
    tile = (ctypes.c_int * 3)()
    library().tile_of(isa.encode(), dtype == "float64", tile)
    return tuple(tile)


def loop_of(isa: str, dtype: str) -> Loop | None:
    return next((loop for loop in loops() if (loop.isa, loop.dtype) == (isa, dtype)), None)


def all_tiles(arguments: argparse.Namespace) -> Iterator[Tile]:
    """Of every kernel, in each number of rows and vectors that it has. A tile of brgemm is many of its own."""
    for dtype in arguments.dtype:
        if "brgemm" in arguments.kernel and dtype != "float64":
            isa = [loop.isa for loop in loops() if loop.dtype == dtype][-1:]
            depths = [depth for depth in arguments.depth if dtype == "float32" or depth % 2 == 0]
            yield from (Tile("brgemm", *t) for t in product(isa, [dtype], BRGEMM_ROWS, BRGEMM_COLS, depths))
        for isa in arguments.isa if dtype != "bfloat16" else ():
            most_rows, lanes, vectors = register_tile(isa, dtype)
            names = [name for name in arguments.kernel if name != "brgemm"]
            cols = [v * lanes - arguments.tail for v in range(1, vectors + 1) if arguments.tail < lanes]
            yield from map(Tile._make, product(names, [isa], [dtype], range(1, most_rows + 1), cols, arguments.depth))


def caller(tile: Tile, a: Tensor, b: Tensor, c: Tensor) -> Callable[[int], object]:
    """The kernel, as a function of the number of calls. It computes a @ b, in its own layout of both."""
    if tile.kernel == "outer":
        a = a.t().contiguous()
    if tile.dtype == "bfloat16":  # pairs of rows side by side
        b = b.view(tile.depth // 2, 2, tile.cols).transpose(1, 2).contiguous()
    which = [tile.isa.encode(), tile.dtype == "float64"] if tile.kernel != "brgemm" else [tile.dtype == "bfloat16"]
    function = getattr(library(), f"run_{tile.kernel}")
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (a, b, c)]

    def run(times: int, keep: tuple = (a, b, c)) -> object:
        return function(*which, tile.rows, tile.cols, tile.depth, *pointers, ctypes.c_int64(times))

    return run


def measure(tile: Tile, budget: float) -> dict | None:
    """None if this torch or this machine does not have the kernel."""
    dtype, loop = getattr(torch, tile.dtype), loop_of(tile.isa, tile.dtype)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, generator=generator).to(dtype) for n in ((tile.rows, tile.depth), (tile.depth, tile.cols)))
    c = torch.zeros(tile.rows, tile.cols, dtype=torch.float32 if tile.dtype == "bfloat16" else dtype)
    run = caller(tile, a, b, c)
    if run(1) is False:
        return None
    error, failed = check(c, a @ b, a.double() @ b.double(), dtype)
    times, call = long_enough(run)
    rounds, peak = long_enough(loop.run)
    seconds, peak_seconds = interleave([call, peak], budget)
    flops = 2 * tile.rows * tile.cols * tile.depth * times / seconds
    peak_flops = loop.flops * rounds / peak_seconds
    return tile._asdict() | {
        "gflops": flops / 1e9,
        "peak_gflops": peak_flops / 1e9,
        "share": 0.0 if failed else flops / peak_flops,
        "error": error,
        "failed": failed,
    }


def report(rows: list[dict], plain: bool) -> None:
    """A table for each instruction set and type, with a line for each number of rows."""
    for isa, dtype in dict.fromkeys((row["isa"], row["dtype"]) for row in rows):
        part = [row for row in rows if (row["isa"], row["dtype"]) == (isa, dtype)]
        share = {tuple(row[key] for key in ("kernel", "rows", "cols", "depth")): row["share"] for row in part}
        sizes = sorted({(row["cols"], row["depth"]) for row in part})
        lines = [
            [
                kernel,
                f"{count}",
                *("" if (s := share.get((kernel, count, *size))) is None else f"{s:.0%}" for size in sizes),
            ]
            for kernel, count in dict.fromkeys((row["kernel"], row["rows"]) for row in part)
        ]
        peak = max(row["peak_gflops"] for row in part)
        title = f"{isa}, {dtype}: share of the peak of {peak:.0f} GFLOP/s a core, by columns x depth"
        print_table(title, ["kernel ", "rows", *(f"{cols}x{depth}" for cols, depth in sizes)], lines, plain)


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
