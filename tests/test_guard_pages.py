"""No kernel reads or writes a byte outside its tensors: each lies against a page that may not be touched.

All of it runs in child processes, since a stray access ends the process; a child says what it is about to do, so
the last line names the culprit. Inputs are placed by the test. Outputs and workspaces come from torch's allocator,
whose memory a preloaded library (guard_allocator.c) puts against such a page, once at its end and once at its
beginning.
"""

from __future__ import annotations

import ctypes
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch

from cases import BY_NAME, DIRECTIONS, make_tensors
from conftest import SEED, bias_for, convolution_roles, forced, guarded, kernels, run_operator

NAMES = (
    "in_channels_1 in_channels_13 in_channels_17 out_channels_5 out_channels_15 out_channels_33 width_1 "
    "width_7 width_15 width_17 width_33 length_7 length_33 depth_tail all_tails stride_2 stride_3_2 "
    "stride_beyond_kernel_padded dilation_3_stride_2 groups_5_of_17 groups_narrowing depthwise "
    "depthwise_times_2 depthwise_times_3 depthwise_5x5 depthwise_1d 1x1 1x1_stride_2 1x1_padded 7x7 "
    "31x31_depthwise depthwise_7x7_plane depthwise_5x5_stride_2 depthwise_stride_2_lines depthwise_stride_3 "
    "depthwise_9x9 depthwise_times_2_5x5 64x1 4x4_stride_2 same_even padding_beyond_kernel reflect_per_dimension "
    "replicate_3d circular_1d resnet_stem resnet_3x3 convnext_depthwise transposed_stride_2 "
    "transposed_1d_stride_3 transposed_3d to_one_channel from_one_channel transposed_3_to_each "
    "transposed_2_to_each_stride_2 depthwise_lines_unread"
).split()
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check(name: str, progress) -> None:
    """Every direction, layout, dtype, row and ISA of a case, all operands guarded: same bits as without."""
    case = BY_NAME[name]
    for dtype in DTYPES:
        for layout in ("contiguous", "channels_last", "sliced"):
            x, w, b, y = convolution_roles(case, make_tensors(case, dtype, layout, SEED, integers=True))
            for direction in DIRECTIONS:
                bias = bias_for(case, direction, b)
                available = kernels(direction, case.problem, (x, w, y), layout)
                for end in (True, False):
                    operands = [None if t is None else guarded(t, end) for t in (x, w, bias, y)]
                    where = f"{layout} {dtype} guard at the {'end' if end else 'start'}"
                    for row, isa in available:
                        progress(f"{name} {direction} row={row} isa={isa} {where}")
                        with forced(direction, row, isa):
                            actual = run_operator(direction, *operands, case.problem)
                            expected = run_operator(direction, x, w, bias, y, case.problem)
                        if not torch.equal(actual, expected):
                            raise AssertionError("the result differs from that of the same values elsewhere")


@pytest.fixture(scope="module")
def allocator(tmp_path_factory) -> pathlib.Path:
    """The library that guards what torch allocates."""
    source, library = (
        pathlib.Path(__file__).with_name("guard_allocator.c"),
        tmp_path_factory.mktemp("guard") / "guard.so",
    )
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if sys.platform != "linux" or compiler is None:
        pytest.skip("needs Linux and a C compiler, to build an allocator that guards outputs")
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl", "-lpthread"], check=True)
    return library


def run_child(allocator: pathlib.Path, side: str, arguments: list[str]) -> tuple[int, list[str]]:
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)), MYCONV_TEST_SEED=str(SEED))
    environment |= {"LD_PRELOAD": str(allocator), "GUARD_SIDE": side, "MYCONV_KEPT_MIB": "0"}
    command = [sys.executable, "-X", "faulthandler", __file__, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return done.returncode, [*done.stdout.splitlines(), *done.stderr.splitlines()]


@pytest.mark.parametrize("side", ["end", "start"])
def test_every_access_stays_inside(allocator, side):
    names = NAMES if side == "end" else NAMES[::4]  # a kernel that runs backwards out of an output is a rare thing
    status, lines = run_child(allocator, side, names)
    reached = [line for line in lines if line.startswith("case ")]
    last = reached[-1] if reached else "nothing"
    others = "\n".join(line for line in lines if not line.startswith("case "))
    assert status == 0, f"exit status {status} (negative: a signal) at: {last}\n{others[-3000:]}"
    assert len({line.split()[1] for line in reached}) == len(names)


@pytest.mark.parametrize("what", ["input", "output"])
@pytest.mark.parametrize("side", ["end", "start"])
def test_the_guard_guards(allocator, side, what):
    """An access one element outside must end the child, or the test above proves nothing."""
    status, lines = run_child(allocator, side, [f"stray-{side}-{what}"])
    assert status < 0, f"exit status {status}\n" + "\n".join(lines)
    assert "case the tensor itself was read" in lines


def stray(side: str, what: str) -> None:
    values = torch.arange(1000.0).reshape(1, 1, -1)
    tensor = guarded(values, end=side == "end")
    if what == "output":  # one that our operator has allocated
        tensor = torch.ops.myconv.conv_forward(values, torch.ones(1, 1, 1), None, [1000], [1], [0], [1], 1)
    assert tensor.sum() == 499500
    print("case the tensor itself was read", flush=True)
    address = tensor.data_ptr() + (tensor.nbytes if side == "end" else -tensor.element_size())
    print(ctypes.c_float.from_address(address).value)


if __name__ == "__main__":
    if sys.argv[1].startswith("stray-"):
        stray(*sys.argv[1].split("-")[1:])
    else:
        for name in sys.argv[1:]:
            check(name, lambda text: print("case", text, flush=True))
