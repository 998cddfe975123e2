"""Faults to plant in the CUDA kernels, one a row, and the problems that must show them. No tests."""

from __future__ import annotations

from dataclasses import dataclass

Edit = tuple[str, str]  # (what stands in the source once, what stands there instead)

FEW_BLOCKS: Edit = ("kMostBlocks = 1 << 24", "kMostBlocks = 3")


@dataclass(frozen=True)
class Mutant:
    fault: str
    direction: str
    problem: str  # the name of a case in cases.py, or the kind of a product in mma.cu
    old: str
    new: str
    few_blocks: bool = False

    @property
    def sound(self) -> list[Edit]:
        """What is edited apart from the fault."""
        return [FEW_BLOCKS] * self.few_blocks

    @property
    def edits(self) -> list[Edit]:
        return [(self.old, self.new), *self.sound]


DIRECT = [
    # Barriers: each of the source.
    Mutant("no barrier before the sum", "backward_weight", "stride_3_2", "sum.value();\n    __syncthreads();", "sum.value();"),
    Mutant("no barrier in the sum", "backward_weight", "stride_3_2", "sums[thread + half];\n      __syncthreads();", "sums[thread + half];"),
    Mutant("a barrier for some threads", "backward_weight", "stride_3_2", "if (thread < half) sums", "if (thread < half) __syncthreads(), sums"),
    # Indices.
    Mutant("taps swapped", "forward", "stride_3_2", "th * s.weight_stride[3] + tw *", "tw * s.weight_stride[3] + th *"),
    Mutant("taps swapped", "backward_weight", "stride_3_2", "element / s.kernel[2] % s.kernel[1],", "element / s.kernel[1] % s.kernel[1],"),
    Mutant("axes swapped", "forward", "replicate_3d", "pd * from_stride.axis[0] + ph *", "ph * from_stride.axis[0] + pd *"),
    Mutant("axes swapped", "backward_input", "transposed_3d", "pd * from_stride.axis[0] + ph *", "ph * from_stride.axis[0] + pd *"),
    Mutant("axes swapped", "backward_weight", "stride_3_2", "i / s.out[2] % s.out[1]", "i / s.out[1] % s.out[2]"),
    Mutant("channels last ignored", "forward", "stride_3_2", "if (layout == Layout::kChannelsLast) {", "if (false) {"),
    Mutant("samples all the first", "forward", "stride_3_2", "e.sample * from_stride.batch + ", ""),
    Mutant("samples all the first", "backward_weight", "stride_3_2", "gy_channel + n * y_stride.batch", "gy_channel"),
    Mutant("groups all the first", "forward", "groups_2", "group * from_per_group * from_stride.channel", "0"),
    Mutant("channel for group", "forward", "groups_2", "e.channel / to_per_group", "e.channel % s.groups"),
    Mutant("channel for group", "backward_weight", "groups_2", "k / s.out_per_group * s.in_per_group", "k % s.groups * s.in_per_group"),
    Mutant("weights of another group", "backward_input", "groups_2", "group * s.out_per_group * s.w", "group * s.in_per_group * s.w"),
    Mutant("bias of another group", "forward", "groups_2", "bias[e.channel]", "bias[e.channel % to_per_group]"),
    Mutant("wrong weight stride", "backward_input", "stride_3_2", "s.weight_stride[kForward ? 1 : 0]", "s.weight_stride[kForward ? 0 : 1]"),
    Mutant("wrong weight stride", "backward_weight", "stride_3_2", "t[0] * s.weight_stride[2] + t[1] *", "t[1] * s.weight_stride[2] + t[0] *"),
    # Parameters that have no effect.
    Mutant("no dilation", "forward", "dilation_2", "t, s.dilation[d], s.pad[d]), s.in[d]", "t, 1, s.pad[d]), s.in[d]"),
    Mutant("no dilation", "backward_input", "dilation_2", "(s.dilation[d]);\n      const uint64_t distance", "(1);\n      const uint64_t distance"),
    Mutant("no dilation", "backward_weight", "dilation_2", "t[d], s.dilation[d], s.pad[d]);", "t[d], 1, s.pad[d]);"),
    Mutant("no stride", "forward", "stride_3_2", "source_index(to, s.stride[d],", "source_index(to, 1,"),
    Mutant("no stride", "backward_input", "stride_3_2", "if (distance % static_cast<uint64_t>(s.stride[d]) != 0) continue;", ""),
    Mutant("no stride", "backward_weight", "stride_3_2", "source_index(o[d], s.stride[d],", "source_index(o[d], 1,"),
    Mutant("no padding", "forward", "stride_3_2", "s.dilation[d], s.pad[d]), s.in", "s.dilation[d], 0), s.in"),
    Mutant("no padding", "backward_input", "stride_3_2", "static_cast<uint64_t>(to + s.pad[d])", "static_cast<uint64_t>(to)"),
    Mutant("no padding", "backward_weight", "stride_3_2", "s.dilation[d], s.pad[d]);", "s.dilation[d], 0);"),
    Mutant("no padding mode", "forward", "reflect_2d", "s.in[d], s.padding_mode), t", "s.in[d], PaddingMode::kZeros), t"),
    Mutant("no padding mode", "backward_weight", "circular_2d", "s.in[d], s.padding_mode);", "s.in[d], PaddingMode::kZeros);"),
    Mutant("no padding mode", "backward_input", "circular_2d", "if (s.padding_mode == PaddingMode::kZeros) {", "if (true) {"),
    Mutant("no bias", "forward", "stride_3_2", "bias ? load(bias[e.channel]) : Compute<T>(0)", "Compute<T>(0)"),
    Mutant("no bias", "backward_input", "transposed_3d", "bias ? load(bias[e.channel]) : Compute<T>(0)", "Compute<T>(0)"),
    # What the padding modes send to an element.
    Mutant("nothing from behind", "backward_input", "reflect_2d", "from = 2 * last - to;", "from = to;"),
    Mutant("the edge reflected too", "backward_input", "reflect_2d", "from < 0 || from > last", "from <= 0 || from > last"),
    Mutant("nothing from before", "backward_input", "circular_2d", "from = to - extent;", "from = to;"),
    Mutant("nothing from behind", "backward_input", "replicate_2d", "if (i == 2) from = extent, until = kAll;", "if (i == 2) return false;"),
    Mutant("the border twice", "backward_input", "replicate_2d", "from = extent, until = kAll", "from = last, until = kAll"),
    # Ranges.
    Mutant("an element too many", "forward", "stride_3_2", "i < elements; i += step", "i <= elements; i += step"),
    Mutant("an element too many", "backward_weight", "stride_3_2", "element < elements; el", "element <= elements; el"),
    Mutant("a channel too many", "forward", "1x1", "c < from_per_group; ++c", "c <= from_per_group; ++c"),
    Mutant("a channel too few", "forward", "stride_3_2", "c < from_per_group; ++c", "c + 1 < from_per_group; ++c"),
    Mutant("a tap too few", "backward_input", "stride_3_2", "t < s.kernel[d]; ++t", "t + 1 < s.kernel[d]; ++t"),
    Mutant("a product too many", "backward_weight", "1x1", "i < s.batch * pixels", "i <= s.batch * pixels"),
    Mutant("a product too few", "backward_weight", "dilation_2", "i < s.batch * pixels; i += kThreads", "i < s.batch * pixels; i += kThreads + 1"),
    Mutant("an output too many", "backward_input", "replicate_2d", "if (end > s.out[d]) end = s.out[d];", ""),
    Mutant("half of the sums", "backward_weight", "dilation_2", "half = kThreads / 2;", "half = kThreads / 4;"),
    Mutant("a sum left out", "backward_weight", "stride_3_2", "half > 0; half /= 2", "half > 1; half /= 2"),
    Mutant("a sum too many", "backward_weight", "stride_3_2", "half = kThreads / 2;", "half = kThreads;"),
    Mutant("too little shared memory", "backward_weight", "stride_3_2", "sums, kThreads);", "sums, kThreads - 1);"),
    Mutant("the padding is read", "forward", "stride_3_2", "inside ? load(source[c", "true ? load(source[c"),
    Mutant("the padding is read", "backward_weight", "stride_3_2", "inside ? load(*v)", "true ? load(*v)"),
    # Blocks that take several turns.
    Mutant("no second turn", "forward", "groups_2", "i < elements; i += step", "i < elements; i = elements", few_blocks=True),
    Mutant("no second turn", "backward_weight", "stride_3_2", "element += gridDim.x", "element = elements", few_blocks=True),
    Mutant("turns too far apart", "forward", "groups_2", "(gridDim.x) * kThreads;", "(gridDim.x) * kThreads * 2;", few_blocks=True),
]

PRODUCTS = [
    Mutant("wrong row of A", "", "gathered float16", "a + (g + 8 * (j % 2)) * kDepth + k + 2 * i", "a + (g + 8 * (j / 2)) * kDepth + k + 2 * i"),
    Mutant("wrong columns of A", "", "gathered bfloat16", "k + 2 * i + 8 * (j / 2);", "k + 2 * i + 8 * (j % 2);"),
    Mutant("wrong row of B", "", "gathered float16", "b + (k + 2 * i + 8 * j)", "b + (k + i + 8 * j)"),
    Mutant("halves swapped", "", "gathered float16", "pair(from[0], from[kColumns])", "pair(from[kColumns], from[0])"),
    Mutant("wrong row of A", "", "gathered float32", "a[(g + 8 * (j % 2)) * kDepth", "a[(g + 8 * (j / 2)) * kDepth"),
    Mutant("wrong row of B", "", "gathered float32", "b[(k + i + 4 * j)", "b[(k + 2 * i + j)"),
    Mutant("wrong row of D", "", "gathered float32", "c[(g + 8 * (j / 2))", "c[(g + 8 * (j % 2))"),
    Mutant("rows of a matrix swapped", "", "staged float16", "lane % 16 * 2 + lane / 16]", "lane % 16 * 2 + 1 - lane / 16]"),
    Mutant("not transposed", "", "staged float16", "ldmatrix_transposed(", "ldmatrix("),
    Mutant("not all of the warp", "", "staged bfloat16", "    ldmatrix(fragment_a,", "    if (lane < 16) ldmatrix(fragment_a,"),
    Mutant("no barrier", "", "staged bfloat16", "__syncwarp();", ""),
    Mutant("copies not awaited", "", "staged float16", "cp_async_wait<0>", "cp_async_wait<1>"),
    Mutant("copies not closed", "", "staged float16", "    cp_async_commit();\n", ""),
    Mutant("a copy too many", "", "staged float16", "if (lane < 16) cp_async", "if (lane < 17) cp_async"),
]
