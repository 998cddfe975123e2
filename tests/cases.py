"""Named convolution problems, shared by the tests and the benchmarks. Imports torch only.

A Case describes one call of torch.nn.functional; `Case.problem` is the same call as the operators see it.
Adding a case here adds it to every test that runs over all cases.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from typing import NamedTuple

import torch
import torch.nn.functional as F

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")  # the index is the operators' padding_mode
DIRECTIONS = ("forward", "backward_input", "backward_weight")
LAYOUTS = ("contiguous", "channels_last", "sliced", "expanded", "transposed")
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by number of dimensions


class Problem(NamedTuple):
    """A convolution in full: sizes, then parameters in the operators' order. `padding` is the low side."""

    input_size: tuple[int, ...]
    weight_size: tuple[int, ...]
    output_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: int

    @property
    def parameters(self) -> tuple:
        return self[3:]


@dataclass(frozen=True)
class Case:
    """One call. `input` is (N, C, *spatial); an int stands for the same value in every spatial dimension."""

    name: str
    op: str
    input: tuple[int, ...]
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...] = 1
    padding: tuple[int | tuple[int, int], ...] | str = 0
    dilation: tuple[int, ...] = 1
    groups: int = 1
    bias: bool = True
    padding_mode: str = "zeros"
    output_padding: tuple[int, ...] = 0

    def __post_init__(self) -> None:
        for field in ("kernel_size", "stride", "padding", "dilation", "output_padding"):
            value = getattr(self, field)
            if isinstance(value, int):
                object.__setattr__(self, field, (value,) * self.rank)

    @property
    def rank(self) -> int:
        return len(self.input) - 2

    @property
    def transposed(self) -> bool:
        return "transpose" in self.op

    @property
    def weight_shape(self) -> tuple[int, ...]:
        if self.transposed:
            return (self.input[1], self.out_channels // self.groups, *self.kernel_size)
        return (self.out_channels, self.input[1] // self.groups, *self.kernel_size)

    @property
    def pads(self) -> list[tuple[int, int]]:
        """(low, high) padding of every spatial dimension."""
        if self.padding == "valid":
            return [(0, 0)] * self.rank
        totals = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        if self.padding == "same":  # the high side gets the odd one
            return [(total // 2, total - total // 2) for total in totals]
        if self.padding == "causal":
            return [(total, 0) for total in totals]
        return [(p, p) if isinstance(p, int) else p for p in self.padding]

    @property
    def output_shape(self) -> tuple[int, ...]:
        columns = (self.kernel_size, self.stride, self.pads, self.dilation, self.output_padding)
        rows = zip(self.input[2:], *columns, strict=True)
        if self.transposed:
            sizes = [(n - 1) * s - low - high + d * (k - 1) + 1 + o for n, k, s, (low, high), d, o in rows]
        else:
            sizes = [(n + low + high - d * (k - 1) - 1) // s + 1 for n, k, s, (low, high), d, _ in rows]
        return (self.input[0], self.out_channels, *sizes)

    @property
    def problem(self) -> Problem:
        full, reduced = (self.output_shape, self.input) if self.transposed else (self.input, self.output_shape)
        low = tuple(low for low, _ in self.pads)
        mode = PADDING_MODES.index(self.padding_mode)
        sizes = (tuple(full), self.weight_shape, tuple(reduced[2:]))
        return Problem(*sizes, self.stride, low, self.dilation, self.groups, mode)

    @property
    def arguments(self) -> dict:
        """Keyword arguments of the functional call, after input, weight and bias."""
        names = ["stride", "padding", "dilation", "groups"]
        if self.transposed:
            names.append("output_padding")
        if self.padding_mode != "zeros":
            names.append("padding_mode")
        return {name: getattr(self, name) for name in names}

    def with_batch(self, batch: int) -> Case:
        return replace_fields(self, input=(batch, *self.input[1:]))


# ---------------------------------------------------------------------------------------------- the cases

TAIL_SIZES = (1, 5, 6, 7, 8, 13, 14, 15, 16, 17, 31, 33)  # around vector widths and register tiles

TAILS = [
    *[Case(f"in_channels_{n}", "conv2d", (2, n, 5, 6), 8, 3, padding=1) for n in TAIL_SIZES],
    *[Case(f"out_channels_{n}", "conv2d", (2, 6, 5, 6), n, 3, padding=1) for n in TAIL_SIZES],
    *[Case(f"width_{n}", "conv2d", (2, 3, 4, n), 7, 3, padding=1) for n in TAIL_SIZES],
    *[Case(f"length_{n}", "conv1d", (2, 5, n), 9, 3, padding=1) for n in (1, 7, 16, 33)],
    Case("to_one_channel", "conv2d", (2, 40, 5, 9), 1, 3, padding=1, bias=False),
    Case("from_one_channel", "conv2d", (2, 1, 5, 9), 40, 3, padding=1),
    Case("depth_tail", "conv3d", (2, 5, 7, 3, 17), 6, 3, padding=1),
    Case("all_tails", "conv2d", (3, 17, 13, 31), 15, 3, padding=1),
    # Either side of where small planes end: a padded plane of 34 x 34, strips of 512 KiB (float32), 512 taps.
    Case("plane_32", "conv2d", (1, 5, 32, 32), 9, 3, padding=1),
    Case("plane_33", "conv2d", (1, 5, 32, 33), 9, 3, padding=1),
    Case("strips_512k", "conv2d", (1, 1310, 8, 8), 3, 3, padding=1, groups=1),
    Case("strips_above_512k", "conv2d", (1, 1312, 8, 8), 3, 3, padding=1, groups=1),
    Case("taps_529", "conv2d", (1, 2, 24, 23), 3, 23, padding=1),
    # Panels of 3 + 2 vectors, long runs of one vector, borders wider than one pixel, several blocks of a sum.
    Case("panels_uneven", "conv2d", (2, 40, 6, 19), 80, (1, 5), padding=(0, 2)),
    Case("borders_wide", "conv2d", (1, 24, 12, 35), 16, 5, stride=(1, 2), padding=4),
]

STRIDES = [
    Case("stride_2", "conv2d", (2, 8, 9, 10), 8, 3, stride=2, padding=1),
    Case("stride_2_odd_leftover", "conv2d", (2, 4, 8, 10), 5, 3, stride=2),
    Case("stride_1_3", "conv2d", (2, 4, 7, 11), 6, 3, stride=(1, 3), padding=1),
    Case("stride_3_2", "conv2d", (2, 4, 11, 9), 6, (3, 5), stride=(3, 2), padding=(1, 2)),
    Case("stride_beyond_kernel", "conv2d", (2, 3, 14, 15), 4, 3, stride=5),
    Case("stride_beyond_kernel_padded", "conv2d", (1, 3, 11, 12), 4, 2, stride=(4, 3), padding=1),
    Case("stride_leaves_input_unread", "conv2d", (2, 3, 12, 13), 4, 3, stride=8),
    Case("stride_4_1d", "conv1d", (2, 6, 37), 8, 7, stride=4, padding=3),
    Case("stride_2_3d", "conv3d", (2, 3, 5, 6, 7), 4, 3, stride=2, padding=1),
    Case("stride_16_phases", "conv2d", (1, 3, 33, 18), 4, (18, 17), stride=(16, 17), padding=(8, 1)),
    Case("stride_mixed_3d", "conv3d", (1, 3, 4, 9, 8), 4, 3, stride=(1, 3, 2), padding=(1, 0, 2)),
]

DILATIONS = [
    Case("dilation_2", "conv2d", (2, 6, 9, 10), 8, 3, padding=2, dilation=2),
    Case("dilation_1_4", "conv2d", (2, 4, 7, 16), 8, 3, padding=(1, 4), dilation=(1, 4)),
    Case("dilation_3_stride_2", "conv2d", (2, 4, 15, 14), 5, 3, stride=2, padding=3, dilation=3),
    Case("dilation_2_3_uneven", "conv2d", (2, 20, 11, 13), 17, 3, padding=(2, 3), dilation=(2, 3)),
    Case("dilation_reaches_only_padding", "conv2d", (2, 4, 5, 5), 6, 3, padding=12, dilation=12),
    Case("dilation_mostly_padding", "conv2d", (2, 5, 9, 11), 19, 3, padding=(7, 8), dilation=(7, 8)),
    Case("groups_of_16", "conv2d", (2, 48, 9, 14), 48, 3, padding=1, groups=3),
    Case("dilation_one_row_inside", "conv2d", (1, 4, 40, 3), 6, (3, 1), padding=(38, 0), dilation=(38, 1), groups=2),
    Case("padding_beyond_image", "conv2d", (2, 4, 3, 3), 6, 3, stride=4, padding=9),
    Case("dilation_causal_1d", "conv1d", (2, 8, 40), 8, 2, padding=16, dilation=16),
    Case("dilation_2_3d", "conv3d", (1, 4, 6, 7, 6), 4, 3, padding=2, dilation=2),
]

GROUPS = [
    Case("groups_2", "conv2d", (2, 6, 7, 8), 10, 3, padding=1, groups=2),
    Case("groups_4_of_16", "conv2d", (2, 64, 6, 6), 64, 3, padding=1, groups=4),
    Case("groups_3_stride_2", "conv2d", (2, 9, 9, 9), 6, 3, stride=2, padding=1, groups=3),
    Case("groups_5_of_17", "conv2d", (1, 85, 4, 5), 35, 1, groups=5),
    Case("groups_narrowing", "conv2d", (2, 12, 6, 6), 4, 3, padding=1, groups=4),
    Case("groups_of_4", "conv2d", (2, 72, 7, 9), 72, 3, padding=1, groups=18),
    # Shorter vectors, edges of lines as tiles, groups a page apart, taps left out vector by vector.
    Case("groups_of_24_stride_2", "conv2d", (2, 72, 13, 28), 72, 3, stride=2, padding=1, groups=3),
    Case("groups_of_40_wide_padding", "conv2d", (1, 80, 5, 30), 80, (3, 7), padding=(1, 3), groups=2),
    Case("groups_a_page_apart", "conv2d", (2, 1024, 3, 9), 64, 3, padding=1, groups=64),
    Case("groups_padded_copies", "conv2d", (1, 512, 13, 14), 512, 3, stride=2, padding=1, groups=32),
    Case("groups_padded_copies_reflect", "conv2d", (1, 512, 6, 9), 64, 3, 2, (2, 1), groups=32, padding_mode="reflect"),
    Case("stride_of_20_phases", "conv2d", (1, 24, 17, 14), 18, 6, stride=(5, 4), padding=(2, 1)),
    Case("stride_of_20_phases_few_taps", "conv2d", (2, 32, 11, 9), 32, 2, stride=(5, 4), groups=2),
    Case("panels_of_threads", "conv2d", (1, 64, 8, 8), 128, 4, stride=2, padding=1),
    Case("one_line", "conv2d", (1, 40, 5, 60), 40, (5, 1)),
    Case("depthwise_pieces_of_columns", "conv2d", (1, 520, 6, 30), 520, 3, padding=1, groups=520),
    Case("depthwise_pieces_of_columns_stride_2", "conv2d", (1, 520, 9, 37), 520, 3, 2, 1, groups=520),
    Case("groups_of_16_two_bands", "conv2d", (2, 96, 40, 29), 96, 3, stride=2, padding=1, groups=6),
    Case("dilation_12_in_three_vectors", "conv2d", (1, 9, 28, 28), 11, 3, padding=12, dilation=12),
    # Few out channels: x and gy change places in the weight gradient.
    Case("to_3_channels", "conv2d", (2, 20, 9, 14), 3, 3, padding=1),
    Case("to_7_channels_uneven", "conv2d", (2, 9, 8, 21), 7, (5, 2), padding=(1, 0), dilation=(1, 3)),
    Case("to_2_channels_3d", "conv3d", (1, 5, 4, 5, 6), 2, (2, 3, 3), padding=(0, 1, 2)),
    Case("groups_of_8_stride_2", "conv2d", (2, 40, 11, 10), 40, 3, stride=2, padding=1, groups=5),
    Case("groups_of_5_dilated", "conv2d", (2, 20, 9, 8), 20, (3, 5), padding=2, dilation=(1, 2), groups=4),
    Case("groups_of_3_to_6", "conv2d", (2, 15, 6, 7), 30, 5, padding=2, groups=5),
    Case("groups_of_4_to_2_1x1", "conv2d", (2, 8, 14, 14), 4, 1, groups=2),
    Case("groups_of_20_to_40_1x1", "conv2d", (2, 60, 7, 7), 120, 1, groups=3),
    Case("groups_of_8", "conv2d", (2, 128, 9, 13), 128, 3, padding=1, groups=16),
    Case("groups_of_8_half_a_vector_left", "conv2d", (2, 40, 9, 13), 40, 3, padding=1, groups=5),
    Case("groups_of_8_to_4_one_left", "conv2d", (2, 56, 8, 7), 28, 3, padding=1, groups=7),
    Case("groups_of_4_to_8", "conv2d", (2, 24, 8, 7), 48, 3, padding=1, groups=6),
    Case("groups_of_8_3d", "conv3d", (1, 32, 3, 6, 7), 32, 3, padding=1, groups=4),
    Case("groups_of_2", "conv2d", (2, 38, 9, 13), 38, 3, padding=1, groups=19),
    Case("groups_of_2_stride_2", "conv2d", (2, 38, 12, 19), 38, 3, stride=2, padding=1, groups=19),
    Case("groups_of_2_13x4", "conv2d", (1, 34, 15, 9), 34, (4, 13), stride=(2, 1), padding=(1, 6), groups=17),
    Case("groups_of_2_1x1", "conv2d", (2, 36, 5, 11), 36, 1, groups=18),
    Case("groups_of_2_dilated_3d", "conv3d", (1, 6, 4, 7, 9), 6, 3, padding=2, dilation=(1, 2, 2), groups=3),
    Case("groups_of_4_stride_2", "conv2d", (2, 76, 11, 18), 76, 3, stride=2, padding=1, groups=19),
    Case("groups_of_4_stride_2_reflect", "conv2d", (2, 36, 9, 14), 36, 5, 2, 2, groups=9, padding_mode="reflect"),
    Case("groups_1d", "conv1d", (2, 8, 19), 12, 5, padding=2, groups=4),
    Case("groups_3d", "conv3d", (1, 6, 4, 5, 6), 9, 3, padding=1, groups=3),
    Case("depthwise", "conv2d", (2, 17, 9, 10), 17, 3, padding=1, groups=17),
    Case("depthwise_times_2", "conv2d", (2, 7, 8, 9), 14, 3, padding=1, groups=7),
    Case("depthwise_times_3", "conv2d", (2, 5, 8, 9), 15, 3, stride=2, padding=1, groups=5),
    Case("depthwise_stride_2", "conv2d", (2, 16, 9, 11), 16, 3, stride=2, padding=1, groups=16),
    Case("depthwise_dilation_2", "conv2d", (2, 8, 9, 9), 8, 3, padding=2, dilation=2, groups=8),
    Case("depthwise_5x5", "conv2d", (1, 33, 8, 15), 33, 5, padding=2, groups=33, bias=False),
    Case("depthwise_7x7_plane", "conv2d", (2, 35, 7, 7), 35, 7, padding=3, groups=35),
    Case("depthwise_7x7_stride_2", "conv2d", (1, 18, 13, 35), 18, 7, stride=2, padding=3, groups=18),
    Case("depthwise_13x13_plane", "conv2d", (2, 19, 15, 14), 19, 13, padding=6, groups=19),
    Case("depthwise_9x9_stride_2_plane", "conv2d", (2, 18, 21, 26), 18, 9, stride=2, padding=4, groups=18),
    Case("reflect_depthwise_plane", "conv2d", (2, 17, 20, 11), 17, 7, padding=3, padding_mode="reflect", groups=17),
    Case("depthwise_5x5_stride_2", "conv2d", (2, 17, 14, 34), 17, 5, stride=2, padding=2, groups=17, bias=False),
    Case("depthwise_stride_3", "conv2d", (2, 9, 11, 20), 9, 3, stride=3, padding=1, groups=9),
    Case("depthwise_stride_1_2", "conv2d", (2, 9, 8, 19), 9, 3, stride=(1, 2), padding=1, groups=9),
    Case("depthwise_9x9", "conv2d", (1, 6, 15, 18), 6, 9, padding=4, groups=6),
    Case("depthwise_tall", "conv2d", (2, 20, 5, 9), 20, (19, 3), padding=(9, 1), groups=20),
    Case("depthwise_9x11", "conv2d", (2, 19, 13, 18), 19, (9, 11), padding=(4, 5), groups=19),
    Case("depthwise_11x9", "conv2d", (1, 17, 12, 21), 34, (11, 9), padding=(5, 3), groups=17),
    Case("depthwise_12x16", "conv2d", (2, 5, 15, 20), 5, (12, 16), padding=(6, 7), groups=5),
    Case("depthwise_wide", "conv2d", (2, 20, 9, 5), 20, (3, 23), padding=(1, 11), groups=20, bias=False),
    Case("depthwise_tall_stride_2", "conv2d", (1, 17, 9, 20), 17, (15, 2), (2, 1), padding=(14, 0), groups=17),
    Case("pointwise_small_planes", "conv2d", (3, 256, 3, 3), 256, 1),
    Case("depthwise_4x6", "conv2d", (1, 6, 9, 18), 6, (4, 6), padding=(2, 3), groups=6),
    Case("depthwise_times_5", "conv2d", (2, 9, 7, 9), 45, 3, stride=(1, 2), padding=1, groups=9),
    Case("depthwise_times_2_5x5", "conv2d", (2, 5, 14, 14), 10, 5, padding=2, groups=5),
    Case("depthwise_dilation_2_stride_2", "conv2d", (2, 8, 13, 21), 8, 3, 2, padding=2, dilation=2, groups=8),
    # Stride 2 undone: lines of several vectors, even paddings, a third axis; few channels, whose samples are chunks.
    Case("depthwise_stride_2_lines", "conv2d", (2, 3, 22, 71), 3, 3, stride=2, padding=1, groups=3),
    Case("depthwise_stride_2_unpadded", "conv2d", (2, 18, 16, 17), 18, 3, stride=2, groups=18),
    Case("depthwise_7x7_stride_2_pad_2", "conv2d", (1, 5, 20, 40), 5, 7, stride=2, padding=2, groups=5),
    Case("depthwise_stride_2_3d", "conv3d", (1, 6, 5, 7, 10), 6, 3, stride=2, padding=1, groups=6),
    Case("depthwise_times_2_stride_2", "conv2d", (2, 5, 13, 14), 10, 5, stride=2, padding=2, groups=5),
    # Lines that roll, with filters enough for `direct`.
    Case("depthwise_times_12_rolling", "conv2d", (2, 2, 9, 46), 24, 3, padding=1, groups=2),
    Case("depthwise_of_1_rolling", "conv2d", (2, 1, 11, 61), 18, 3, padding=(0, 1)),
    Case("depthwise_few_channels", "conv2d", (5, 2, 30, 37), 2, 3, padding=1, groups=2),
    Case("depthwise_rolling", "conv2d", (2, 18, 15, 130), 18, 3, padding=1, groups=18),
    Case("depthwise_rolling_pieces", "conv2d", (1, 17, 80, 113), 17, 3, padding=(2, 1), groups=17, bias=False),
    Case("depthwise_rolling_dilation_1_2", "conv2d", (1, 17, 9, 37), 17, 3, padding=(1, 2), dilation=(1, 2), groups=17),
    Case("depthwise_rolling_dilation_2_1", "conv2d", (1, 17, 9, 37), 17, 3, padding=(2, 1), dilation=(2, 1), groups=17),
    Case("depthwise_rolling_3d", "conv3d", (2, 17, 4, 6, 21), 17, (1, 3, 3), padding=(0, 1, 1), groups=17),
    Case("depthwise_rolling_3d_stride", "conv3d", (1, 17, 5, 9, 37), 17, (1, 3, 3), 2, padding=(0, 1, 1), groups=17),
    Case("depthwise_rolling_3d_hw_stride", "conv3d", (1, 17, 3, 8, 38), 17, (1, 3, 3), (1, 2, 2), groups=17),
    Case("depthwise_rolling_3d_d_stride", "conv3d", (1, 17, 5, 4, 20), 17, (1, 3, 3), (2, 1, 1), (1, 1, 1), groups=17),
    Case("depthwise_rolling_stride_2", "conv2d", (2, 35, 15, 131), 35, 3, 2, padding=1, groups=35),
    Case("depthwise_rolling_stride_2_even", "conv2d", (1, 20, 18, 66), 20, 3, 2, padding=(2, 0), groups=20),
    Case("depthwise_rolling_stride_2_lines", "conv2d", (1, 64, 33, 64), 64, 3, 2, padding=(0, 1), groups=64),
    Case("depthwise_rolling_3d_rest", "conv3d", (1, 17, 3, 7, 20), 17, (2, 3, 3), 2, padding=(0, 1, 1), groups=17),
    Case("depthwise_rolling_stride_2_wide", "conv2d", (1, 3, 9, 259), 3, 3, 2, padding=(1, 2), groups=3),
    Case("depthwise_rolling_stride_2_small", "conv2d", (3, 20, 5, 10), 20, 3, 2, padding=1, groups=20),
    Case("depthwise_rolling_stride_2_padding", "conv2d", (1, 17, 2, 3), 17, 3, 2, padding=5, groups=17),
    # Beyond 6 MB in channels_last; single samples are less.
    Case("depthwise_in_order", "conv2d", (8, 66, 23, 71), 66, 3, padding=1, groups=66),
    Case("depthwise_in_order_stride_2", "conv2d", (8, 66, 43, 71), 66, 3, 2, padding=(2, 1), groups=66),
    Case("depthwise_in_order_channels", "conv2d", (8, 530, 11, 19), 530, 3, padding=1, groups=530),
    # Pixels of channels_last a multiple of 2 KiB apart.
    Case("depthwise_pixels_meet", "conv2d", (2, 512, 5, 11), 512, 3, padding=1, groups=512),
    Case("depthwise_pixels_meet_stride_2", "conv2d", (2, 1024, 6, 39), 1024, 3, 2, padding=(2, 1), groups=1024),
    # Kernels in pieces, of which a tile leaves taps out.
    Case("depthwise_27x27", "conv2d", (1, 5, 14, 15), 5, 27, padding=13, groups=5),
    Case("depthwise_29x12", "conv2d", (2, 4, 17, 9), 4, (29, 12), padding=(14, 9), groups=4),
    Case("depthwise_of_padding", "conv2d", (1, 8, 2, 3), 8, 5, padding=6, groups=8),
    Case("depthwise_1d", "conv1d", (2, 9, 21), 9, 4, padding=3, groups=9),
    Case("depthwise_3d", "conv3d", (1, 8, 4, 5, 6), 8, 3, padding=1, groups=8),
]

KERNELS = [
    Case("1x1", "conv2d", (2, 16, 7, 9), 24, 1),
    Case("1x1_1101_channels", "conv2d", (2, 1101, 3, 7), 20, 1),
    Case("1x1_1100_channels", "conv2d", (2, 1100, 5, 9), 50, 1),
    Case("1x1_600_channels_7x7", "conv2d", (3, 40, 7, 7), 600, 1),  # and one pixel more than three vectors
    Case("1x1_no_bias", "conv2d", (2, 33, 5, 5), 17, 1, bias=False),
    Case("1x1_stride_2", "conv2d", (2, 8, 8, 9), 16, 1, stride=2),
    Case("7x7_results", "conv2d", (9, 140, 13, 13), 20, 3, stride=2, padding=1),  # samples share columns
    Case("7x7_results_grouped", "conv2d", (5, 20, 14, 14), 40, 2, stride=2, groups=2, bias=False),
    Case("7x6_results_1x1", "conv2d", (7, 520, 13, 12), 17, 1, stride=2),
    Case("3_by_4_results", "conv3d", (11, 20, 4, 6, 8), 24, 3, stride=2, padding=1),
    Case("1x1_padded", "conv2d", (2, 5, 4, 4), 6, 1, padding=1),
    Case("1x1_of_1x1", "conv2d", (4, 31, 1, 1), 10, 1),
    Case("1_1d", "conv1d", (2, 12, 15), 8, 1),
    Case("1x1x1_3d", "conv3d", (2, 7, 3, 4, 5), 9, 1),
    Case("7x7", "conv2d", (2, 3, 11, 12), 8, 7, padding=3),
    Case("11x11", "conv2d", (1, 3, 13, 14), 6, 11, padding=5),
    Case("31x31_depthwise", "conv2d", (1, 5, 16, 17), 5, 31, padding=15, groups=5),
    Case("1x7", "conv2d", (2, 8, 6, 9), 8, (1, 7), padding=(0, 3)),
    Case("7x1", "conv2d", (2, 8, 9, 6), 8, (7, 1), padding=(3, 0)),
    Case("64x1", "conv2d", (1, 3, 70, 3), 5, (64, 1)),
    Case("2x2", "conv2d", (2, 6, 7, 8), 8, 2, padding=1),
    Case("4x4_stride_2", "conv2d", (2, 4, 9, 10), 6, 4, stride=2, padding=1),
    Case("6x3", "conv2d", (2, 4, 9, 8), 6, (6, 3), padding=(2, 1)),
    Case("patches", "conv2d", (2, 3, 16, 12), 8, 4, stride=4),
    Case("patches_with_leftover", "conv2d", (2, 3, 18, 17), 8, 4, stride=4),
    Case("patches_of_whole_lines", "conv2d", (2, 5, 6, 4), 7, (2, 4), stride=(2, 1)),
    Case("kernel_is_input", "conv2d", (2, 8, 6, 5), 12, (6, 5)),
    Case("same_even", "conv2d", (2, 4, 6, 7), 6, (4, 2), padding="same"),
    Case("same_even_dilated", "conv2d", (2, 4, 8, 7), 6, (2, 4), padding="same", dilation=(3, 1)),
    Case("same_even_1d", "conv1d", (2, 4, 13), 5, 8, padding="same"),
    Case("same_even_3d", "conv3d", (1, 3, 4, 5, 6), 4, (2, 3, 4), padding="same"),
    Case("valid", "conv2d", (2, 4, 6, 7), 6, 3, padding="valid"),
    Case("padding_beyond_kernel", "conv2d", (2, 3, 4, 5), 6, 3, padding=(5, 4)),
    Case("padding_beyond_kernel_stride_3", "conv2d", (1, 3, 4, 5), 4, 2, stride=3, padding=6),
]

MODES = [
    Case("reflect_1d", "conv1d", (2, 4, 11), 6, 5, padding=2, padding_mode="reflect"),
    Case("reflect_2d", "conv2d", (2, 4, 6, 7), 6, 3, padding=1, padding_mode="reflect"),
    Case("reflect_widest", "conv2d", (1, 3, 5, 6), 4, 3, padding=(4, 5), padding_mode="reflect"),
    Case("reflect_per_dimension", "conv2d", (2, 3, 6, 8), 4, (3, 5), padding=(0, 3), padding_mode="reflect"),
    Case("reflect_3d", "conv3d", (1, 3, 4, 5, 6), 4, 3, padding=(1, 2, 3), padding_mode="reflect"),
    Case("reflect_same_even", "conv2d", (2, 3, 6, 7), 4, 4, padding="same", padding_mode="reflect"),
    Case("replicate_1d", "conv1d", (2, 4, 9), 6, 3, padding=12, padding_mode="replicate"),
    Case("replicate_2d", "conv2d", (2, 8, 5, 6), 6, 3, stride=2, padding=1, padding_mode="replicate"),
    Case("replicate_beyond_input", "conv2d", (1, 3, 2, 3), 4, 3, padding=(4, 5), padding_mode="replicate"),
    Case("replicate_3d", "conv3d", (1, 3, 3, 4, 5), 4, 3, padding=(2, 0, 1), padding_mode="replicate"),
    Case("circular_1d", "conv1d", (2, 4, 10), 6, 4, padding=3, padding_mode="circular"),
    Case("circular_2d", "conv2d", (2, 4, 6, 7), 6, 3, padding=(2, 1), padding_mode="circular"),
    Case("circular_widest", "conv2d", (1, 3, 3, 4), 4, 3, padding=(3, 4), padding_mode="circular"),
    Case("circular_3d", "conv3d", (1, 3, 4, 3, 5), 4, 3, padding=(1, 3, 2), padding_mode="circular"),
    Case("circular_depthwise", "conv2d", (2, 9, 6, 7), 9, 5, padding=2, groups=9, padding_mode="circular"),
    Case("circular_depthwise_lines", "conv2d", (1, 3, 5, 45), 3, 7, padding=3, groups=3, padding_mode="circular"),
    Case("circular_depthwise_far", "conv2d", (1, 3, 5, 70), 3, 7, 2, padding=(3, 9), groups=3, padding_mode="circular"),
    Case("circular_depthwise_stride_2", "conv2d", (1, 3, 9, 71), 3, 5, 2, padding=2, groups=3, padding_mode="circular"),
    Case("reflect_depthwise_lines", "conv2d", (1, 3, 9, 37), 3, 5, padding=2, groups=3, padding_mode="reflect"),
    Case("reflect_depthwise_rolling", "conv2d", (1, 17, 9, 52), 17, 3, padding=2, groups=17, padding_mode="reflect"),
    Case(
        "reflect_depthwise_stride_2_rolling", "conv2d", (1, 17, 9, 53), 17, 3, 2, 1, groups=17, padding_mode="reflect"
    ),
    Case(
        "circular_depthwise_stride_2_rolling", "conv2d", (2, 17, 8, 52), 17, 3, 2, 1, groups=17, padding_mode="circular"
    ),
    Case("reflect_depthwise_in_order", "conv2d", (8, 66, 23, 71), 66, 3, padding=1, groups=66, padding_mode="reflect"),
    Case("circular_depthwise_rolling", "conv2d", (2, 17, 10, 52), 17, 3, padding=1, groups=17, padding_mode="circular"),
    Case("reflect_depthwise_stride_2", "conv2d", (1, 4, 9, 38), 4, 7, 2, padding=3, groups=4, padding_mode="reflect"),
    Case("replicate_depthwise_times_2", "conv2d", (1, 3, 7, 19), 6, 3, padding=1, groups=3, padding_mode="replicate"),
    Case("replicate_dilated", "conv2d", (2, 3, 7, 8), 4, 3, padding=2, dilation=2, padding_mode="replicate"),
    Case("reflect_stride_drops_padding", "conv2d", (1, 3, 6, 6), 4, 2, 5, 2, padding_mode="reflect"),
]

EMPTY = [
    Case("batch_0", "conv2d", (0, 3, 5, 6), 4, 3, padding=1),
    Case("batch_0_1d", "conv1d", (0, 3, 8), 4, 3),
    Case("batch_0_3d", "conv3d", (0, 3, 4, 5, 6), 4, 3),
    Case("batch_0_transposed", "conv_transpose2d", (0, 3, 5, 6), 4, 3, stride=2),
    Case("batch_0_grouped", "conv2d", (0, 4, 5, 6), 6, 3, groups=2, bias=False),
]

NETWORKS = [  # real layers with fewer channels and pixels
    Case("resnet_stem", "conv2d", (1, 3, 30, 30), 16, 7, stride=2, padding=3, bias=False),
    Case("resnet_3x3", "conv2d", (2, 32, 14, 14), 32, 3, padding=1, bias=False),
    Case("resnet_downsample", "conv2d", (2, 32, 14, 14), 48, 1, stride=2, bias=False),
    Case("vgg_3x3", "conv2d", (1, 64, 7, 7), 64, 3, padding=1),
    Case("resnext_grouped", "conv2d", (2, 32, 10, 10), 32, 3, padding=1, groups=8, bias=False),
    Case("mobilenet_depthwise", "conv2d", (1, 32, 14, 14), 32, 3, stride=2, padding=1, groups=32, bias=False),
    Case("mobilenet_pointwise", "conv2d", (1, 32, 7, 7), 64, 1, bias=False),
    Case("convnext_depthwise", "conv2d", (1, 24, 14, 14), 24, 7, padding=3, groups=24),
    Case("stem_wide", "conv2d", (2, 3, 9, 41), 16, 3, 2, 1, bias=False),
    Case("strided_odd_chunks", "conv2d", (1, 601, 8, 9), 9, 3, 2, 1),
    Case("strided_chunks", "conv2d", (1, 600, 12, 12), 9, 3, 2, 1),
    Case("long_lines", "conv1d", (2, 3, 1300), 5, 3, 2, 1),
    Case("stride_4_overlapping", "conv2d", (1, 3, 23, 37), 10, 7, 4, 2),
    Case("short_lines_per_tap", "conv2d", (2, 12, 8, 8), 20, (1, 5), padding=(0, 2)),
    Case("tiles_along_columns", "conv2d", (1, 80, 9, 17), 24, (1, 7), padding=(0, 3)),
    Case("tiles_along_lines", "conv2d", (1, 80, 17, 9), 24, (7, 1), padding=(3, 0)),
    Case("tiles_in_chunks", "conv2d", (3, 8, 30, 45), 40, 3, padding=1),
    Case("tiles_of_stride_2", "conv2d", (2, 40, 21, 27), 36, 3, stride=2, padding=1),
    Case("tiles_of_stride_2_3d", "conv3d", (1, 18, 3, 13, 17), 20, 3, stride=(1, 2, 2), padding=(1, 0, 2)),
    Case("tiles_in_chunks_of_groups", "conv2d", (2, 36, 33, 41), 66, (1, 3), padding=(0, 1), groups=2),
    Case("tiles_along_batch", "conv2d", (9, 60, 5, 5), 20, 3, padding=1),
    Case("lines_as_frames_7x7", "conv2d", (2, 20, 9, 15), 17, 7, padding=3),
    Case("lines_as_frames_strided", "conv2d", (2, 18, 13, 11), 36, 3, stride=(2, 1), padding=(0, 1), groups=2),
    Case("lines_as_frames_dilated", "conv2d", (1, 33, 12, 23), 20, (4, 5), padding=(3, 4), dilation=(2, 3)),
    Case("lines_as_frames_reflected", "conv2d", (2, 12, 8, 14), 10, (2, 3), padding=(1, 2), padding_mode="reflect"),
    Case("patch_embedding", "conv2d", (2, 3, 32, 32), 24, 16, stride=16),
    Case("patch_embedding_14", "conv2d", (2, 3, 42, 28), 9, 14, stride=14),
    Case("stride_4_padded", "conv2d", (2, 3, 29, 141), 9, (5, 11), stride=4, padding=(2, 5)),
    Case("stride_8_padded", "conv2d", (2, 17, 20, 61), 6, 8, stride=8, padding=3),
    Case("kernel_covers_height", "conv2d", (2, 5, 22, 19), 7, (22, 3)),
    Case("kernel_nearly_covers_height", "conv2d", (2, 3, 13, 20), 6, (11, 4), stride=(1, 3), padding=(1, 2)),
    Case("kernel_nearly_covers_volume", "conv3d", (2, 3, 7, 6, 5), 4, (6, 5, 3)),
    Case("patches_of_many_pixels", "conv2d", (1, 2, 6, 1080), 70, (3, 2), stride=(3, 2)),
    Case("patches_3d_in_groups", "conv3d", (2, 6, 4, 6, 16), 12, (2, 3, 8), stride=(2, 3, 8), groups=3),
    Case("aspp_dilated", "conv2d", (1, 16, 14, 14), 16, 3, padding=6, dilation=6, bias=False),
    Case("inception_1x7", "conv2d", (1, 16, 12, 12), 16, (1, 7), padding=(0, 3), bias=False),
    Case("unet_up", "conv_transpose2d", (1, 16, 7, 7), 8, 2, stride=2),
    Case("dcgan_up", "conv_transpose2d", (2, 16, 5, 5), 8, 4, stride=2, padding=1, bias=False),
    Case("wav2vec_feature", "conv1d", (2, 16, 50), 16, 3, stride=2, bias=False),
    Case("wav2vec_position", "conv1d", (1, 16, 24), 16, 16, padding=8, groups=4),
    Case("wavenet_dilated", "conv1d", (1, 16, 40), 32, 2, dilation=8),
    Case("vocoder_up", "conv_transpose1d", (1, 12, 11), 6, 16, stride=8, padding=4),
    Case("video_r2plus1d", "conv3d", (1, 8, 6, 8, 8), 12, (3, 1, 1), padding=(1, 0, 0), bias=False),
    Case("video_stem", "conv3d", (1, 3, 5, 16, 16), 8, (3, 7, 7), stride=(1, 2, 2), padding=(1, 3, 3)),
    Case("video_3x3x3", "conv3d", (1, 16, 4, 7, 7), 16, 3, padding=1),
]

TRANSPOSED = [
    Case("transposed_of_1x1", "conv_transpose2d", (3, 10, 1, 1), 6, 4),
    Case("transposed_patches", "conv_transpose2d", (2, 6, 3, 4), 5, (2, 3), stride=(2, 3)),
    Case("transposed_doubling", "conv_transpose2d", (2, 20, 17, 33), 9, 2, stride=2),
    Case("transposed_1d", "conv_transpose1d", (2, 5, 9), 7, 3),
    Case("transposed_1d_stride_3", "conv_transpose1d", (2, 6, 9), 8, 5, 3, 1, output_padding=2),
    Case("transposed_2d", "conv_transpose2d", (2, 6, 5, 6), 7, 3, padding=1),
    Case("transposed_stride_2", "conv_transpose2d", (2, 8, 5, 6), 8, 3, 2, 1, output_padding=1),
    Case("transposed_stride_beyond_kernel", "conv_transpose2d", (2, 4, 4, 5), 6, 2, stride=4, output_padding=3),
    Case("transposed_stride_1_2", "conv_transpose2d", (2, 4, 5, 6), 6, 3, (1, 2), (0, 1), output_padding=(0, 1)),
    Case(
        "transposed_output_padding_by_dilation",
        "conv_transpose2d",
        (1, 3, 4, 5),
        4,
        3,
        1,
        0,
        3,
        output_padding=2,
    ),
    Case("transposed_1x1_output_padding", "conv_transpose2d", (1, 3, 4, 5), 4, 1, stride=3, output_padding=2),
    Case("transposed_groups", "conv_transpose2d", (2, 6, 5, 6), 4, 3, stride=2, groups=2),
    Case("transposed_depthwise", "conv_transpose2d", (2, 9, 5, 6), 9, 4, stride=2, padding=1, groups=9),
    Case("transposed_depthwise_3x3", "conv_transpose2d", (2, 17, 9, 18), 17, 3, stride=2, padding=1, groups=17),
    Case("transposed_depthwise_times_2", "conv_transpose2d", (1, 5, 5, 6), 10, 3, stride=2, padding=1, groups=5),
    # A kernel smaller than its stride: lines of the input gradient that read nothing, in a tensor above 2 MB.
    Case("depthwise_lines_unread", "conv2d", (4, 80, 41, 40), 80, (1, 3), stride=(3, 1), groups=80),
    Case("transposed_3_to_each", "conv_transpose2d", (2, 51, 5, 18), 17, 3, padding=1, groups=17),
    Case("transposed_2_to_each_stride_2", "conv_transpose2d", (2, 8, 5, 6), 4, 3, stride=2, padding=1, groups=4),
    Case("transposed_2_to_each_1d", "conv_transpose1d", (2, 8, 20), 4, 4, stride=3, groups=4),
    Case("transposed_crops_all_borders", "conv_transpose2d", (2, 4, 6, 6), 5, 3, padding=3),
    Case("transposed_wide", "conv_transpose2d", (1, 33, 5, 6), 17, 3, stride=2, padding=1),
    Case("transposed_3d", "conv_transpose3d", (1, 4, 3, 4, 5), 6, 3, 2, 1, output_padding=1),
    Case("transposed_3d_grouped", "conv_transpose3d", (1, 6, 3, 4, 3), 6, 2, (1, 2, 2), groups=3, bias=False),
]

CASES = [*TAILS, *STRIDES, *DILATIONS, *GROUPS, *KERNELS, *MODES, *EMPTY, *NETWORKS, *TRANSPOSED]
BY_NAME = {case.name: case for case in CASES}
assert len(BY_NAME) == len(CASES), "case names must be unique"

# A selection that reaches every kind of problem, for tests that multiply cases by much else.
CORE = [
    BY_NAME[name]
    for name in (
        "in_channels_1 in_channels_17 out_channels_13 width_31 length_7 depth_tail all_tails stride_2 "
        "stride_3_2 stride_beyond_kernel_padded dilation_2 dilation_3_stride_2 groups_2 groups_5_of_17 "
        "depthwise depthwise_times_3 depthwise_1d 1x1 1x1_stride_2 7x7 64x1 same_even padding_beyond_kernel "
        "reflect_per_dimension replicate_3d circular_1d batch_0 resnet_3x3 transposed_1d_stride_3 "
        "transposed_stride_2 transposed_output_padding_by_dilation transposed_groups transposed_3d"
    ).split()
]

BATCH = 8
# Shapes that tempt a kernel to look at the batch: few pixels, many channels, tails, and enough work to share.
INVARIANCE = [
    BY_NAME[name].with_batch(BATCH)
    for name in (
        "in_channels_17 out_channels_33 all_tails width_1 stride_2 stride_3_2 dilation_2 dilation_mostly_padding "
        "groups_4_of_16 groups_of_2_stride_2 groups_of_4_stride_2 depthwise depthwise_stride_2 1x1 1x1_of_1x1 "
        "1x1_stride_2 7x7 kernel_is_input reflect_2d circular_depthwise depthwise_7x7_plane depthwise_13x13_plane "
        "depthwise_9x9_stride_2_plane reflect_depthwise_plane depthwise_times_2_5x5 depthwise_times_5 "
        "31x31_depthwise circular_depthwise_lines depthwise_5x5_stride_2 depthwise_stride_2_lines "
        "transposed_depthwise_3x3 depthwise_in_order depthwise_in_order_stride_2 depthwise_in_order_channels "
        "resnet_stem resnet_3x3 vgg_3x3 wav2vec_feature video_3x3x3 unet_up transposed_stride_2 "
        "transposed_1d_stride_3"
    ).split()
]
# Smallest and oddest, the ends, and an unaligned start.
PARTS = [slice(0, 1), slice(7, 8), slice(3, 4), slice(0, 2), slice(1, 4), slice(5, 8)]


# ---------------------------------------------------------------------------------------------- tensors


class Tensors(NamedTuple):
    """x, w, b as the functional call takes them, gy the gradient of its output."""

    x: torch.Tensor
    w: torch.Tensor
    b: torch.Tensor | None
    gy: torch.Tensor


def convolution_roles(case: Case, tensors: Tensors) -> tuple[torch.Tensor, ...]:
    """(x, w, b, y) of the convolution: a transposed case runs it backward, from y to x."""
    x, w, b, gy = tensors
    return (gy, w, b, x) if case.transposed else (x, w, b, gy)


def lay_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values (but for 'expanded') in another memory layout.

    'sliced' lies inside a larger tensor, full of NaN where the dtype has one; 'expanded' repeats the first
    sample with stride 0; 'transposed' swaps channels and the last dimension in memory.
    """
    if layout == "contiguous":
        return tensor.contiguous()
    if layout == "channels_last" and tensor.dim() in CHANNELS_LAST:
        return tensor.contiguous(memory_format=CHANNELS_LAST[tensor.dim()])
    if layout in ("channels_last", "transposed"):
        return tensor.transpose(1, -1).contiguous().transpose(1, -1)
    if layout == "expanded":
        return tensor[:1].expand_as(tensor)
    if layout == "sliced":
        filler = float("nan") if tensor.is_floating_point() or tensor.is_complex() else 1
        larger = tensor.new_full([*[n + 1 for n in tensor.shape[:-1]], 2 * tensor.shape[-1] + 1], filler)
        inner = larger[(*[slice(1, None)] * (tensor.dim() - 1), slice(1, None, 2))]
        return inner.copy_(tensor)
    raise ValueError(f"unknown layout {layout}")


def random_tensor(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, integers: bool
) -> torch.Tensor:
    if dtype.is_complex or (dtype.is_floating_point and not integers):
        wide = torch.complex128 if dtype.is_complex else torch.float64
        return torch.randn(shape, dtype=wide, generator=generator).to(dtype)
    low = 0 if dtype in (torch.uint8, torch.bool) else -3
    return torch.randint(low, 4, shape, generator=generator).to(dtype)


def make_tensors(
    case: Case,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    seed: int = 0,
    integers: bool = False,
    device: str = "cpu",
) -> Tensors:
    """Random tensors of a case, equal in every layout. `integers` draws from -3..3: sums are exact."""
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode(), seed))  # torch reads 32 bits
    shapes = (case.input, case.weight_shape, (case.out_channels,), case.output_shape)
    x, w, b, gy = (random_tensor(shape, dtype, generator, integers).to(device) for shape in shapes)
    others = "contiguous" if layout == "expanded" else layout
    return Tensors(lay_out(x, layout), lay_out(w, others), b if case.bias else None, lay_out(gy, layout))


def layout_is_ambiguous(tensor: torch.Tensor) -> bool:
    """Whether the tensor reads as contiguous and as channels last at once, size-1 dimensions aside."""
    return tensor.shape[1] <= 1 or max(tensor.shape[2:]) <= 1 or not tensor.numel()


# ------------------------------------------------------------------------------- what torch makes of a case


def torch_conv(case: Case, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
    """torch.nn.functional's answer, in the dtype of the arguments."""
    function, arguments = getattr(F, case.op), case.arguments
    if arguments.pop("padding_mode", None):
        arguments["padding"] = 0
        x = F.pad(x, [amount for pair in reversed(case.pads) for amount in pair], case.padding_mode)
    return function(x, w, b, **arguments)


def reference_forward(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, problem: Problem) -> torch.Tensor:
    """conv_forward through torch: the input is padded or cropped to just what the told output size reads."""
    low, high = list(problem.padding), []
    for n, k, out, s, p, d in zip(
        x.shape[2:],
        w.shape[2:],
        problem.output_size,
        problem.stride,
        problem.padding,
        problem.dilation,
        strict=True,
    ):
        high.append((out - 1) * s + d * (k - 1) + 1 - n - p)
    pads = [amount for pair in reversed(list(zip(low, high, strict=True))) for amount in pair]
    mode = "constant" if problem.padding_mode == 0 else PADDING_MODES[problem.padding_mode]
    wide = F.pad(x, [max(amount, 0) for amount in pads], mode)
    wide = F.pad(wide, [min(amount, 0) for amount in pads])
    return getattr(F, f"conv{x.dim() - 2}d")(wide, w, b, problem.stride, 0, problem.dilation, problem.groups)


def torch_operator(
    direction: str,
    x: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor | None,
    y: torch.Tensor,
    problem: Problem,
) -> torch.Tensor:
    """One operator through torch. x, w and y are the convolution's input, weight and output (gradient)."""
    if direction == "forward":
        return reference_forward(x, w, b, problem)
    x, w = x.detach(), w.detach()
    wanted = (x if direction == "backward_input" else w).requires_grad_()
    (result,) = torch.autograd.grad(reference_forward(x, w, None, problem), wanted, y)
    return result if b is None else result + b.reshape(-1, *[1] * (x.dim() - 2))


# Pairs of pieces whose product counts, smallest first, see split().
PIECE_PAIRS = ((2, 0), (1, 1), (0, 2), (1, 0), (0, 1), (0, 0))


def split(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Three tensors that add up to a float64 (complex128) one, the first two of 20 bits in fixed point.

    Sums of products of such pieces are exact in float64, so that the sum over PIECE_PAIRS is off by about one
    rounding, however long the convolution's sums are: a reference to measure float64 kernels against.
    """
    rest = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    pieces = []
    for unit in (2.0**-17, 2.0**-37):
        pieces.append(torch.round(rest / unit) * unit)
        rest = rest - pieces[-1]
    pieces.append(rest)
    return [torch.view_as_complex(p) for p in pieces] if tensor.is_complex() else pieces


def reference_operator(
    direction: str,
    x: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor | None,
    y: torch.Tensor,
    problem: Problem,
) -> torch.Tensor:
    """torch_operator in float64, in pieces where the tensors are float64."""
    precise = x.dtype == torch.float64
    x, w, y = (t.detach().double().contiguous() for t in (x, w, y))
    b = None if b is None else b.double()
    if not precise:
        return torch_operator(direction, x, w, b, y, problem)
    xs, ws, ys = split(x), split(w), split(y)
    parts = [
        torch_operator(direction, xs[i if direction == "forward" else j], ws[j], None, ys[i], problem)
        for i, j in PIECE_PAIRS
    ]
    return sum(parts) if b is None else sum(parts) + b.reshape(-1, *[1] * (x.dim() - 2))
