// Direct convolution of small planes: forward with stride 1 and backward_input, NCHW, float32 and float64.
//
// Packing a panel for every tap, as implicit_gemm does, costs more than the arithmetic when there are few result
// channels to share it. Here the padded plane of every in channel is copied once (strip.h), and all taps read it at
// constant offsets. The result plane is computed at the pitch of the padded plane, so that its lines are one run of
// columns:
//
//      strip            result at its pitch      columns = (lines - 1) * pitch + line
//      . . . . . .      y y y y - -              y: kept      -: computed, never stored
//      . x x x x .      y y y y - -
//      . x x x x .
//      . . . . . .      y[k][j] = sum over t, c of  w[k][c][t] * strip[c][offset(t) + j]
//
// It is a matrix product with result channels as rows, pixels as columns and a depth of taps x channels, whose operands
// are both read where they lie; backward_input has one for each phase of the stride (gather.h).
//
// Sums: blocks of channels with at most kSumLength terms, each from a fresh accumulator, added in order; inside a block
// taps outermost; the bias with the first block. Threads split samples, groups and result channels.
// Declines: NHWC, a stride in forward, planes whose strips do not stay in L2, a single tap, 3d, a padding mode's
// adjoint.
#include "cpu/algorithms.h"
#include "cpu/gather.h"
#include "cpu/gemm_blocks.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/strip.h"

namespace myconv::cpu {
namespace {

constexpr int64_t kStripsBytes = 512 << 10;  // strips of all in channels of a group: they stay in L2
constexpr int64_t kMaxPlane =
    1156;  // padded: 32 x 32 and a border of 1. Above, lines are long enough for implicit_gemm

// Values of the largest padded plane of any phase, and the result at its pitch, which is no larger.
int64_t padded_plane(const ConvShape& s, Direction direction) {
  int64_t values = 1;
  for (int d = 1; d < 3; ++d) {
    const int64_t reach = (s.kernel[d] - 1) * s.dilation[d];
    values *= direction == Direction::kForward ? s.out[d] + reach
                                               : ceil_div(s.in[d], s.stride[d]) + ceil_div(reach, s.stride[d]);
  }
  return values;
}

// Scratch in elements: weights as rows of [in channel][tap] unless they lie so; of each thread the strips of all in
// channels and the result rows of one register tile.
struct Plan {
  bool in_rows;
  int64_t packed, strips, kept;

  Plan(const ConvShape& s, Direction direction) {
    const bool forward = direction == Direction::kForward;
    const int64_t plane = padded_plane(s, direction);
    in_rows = forward && lies_as_rows(s);
    packed = in_rows ? 0 : s.groups * s.in_per_group * s.out_per_group * s.taps();
    strips = (forward ? s.in_per_group : s.out_per_group) * plane;
    kept = kMaxRows * plane;
  }
  int64_t elements(int threads) const { return packed + threads * (strips + kept); }
};

template <typename T>
void run_phase(const Gather& g, const GatherPhase& phase, const Plan& sizes, const Kernels<T>& kernels, const T* from,
               const T* weight, const T* bias, T* to, T* workspace, int threads) {
  const GatherAxis* a = phase.axis;
  const int64_t taps = phase.taps(), depth = taps * g.from_per_group, channels = g.to_per_group;
  const int64_t lines = a[1].count, line = a[2].count;
  const StripPlan strip(phase, 1, kMaxPlane);
  StripRuns runs;
  strip_runs(phase, strip, 0, 0, lines, runs);
  const int32_t all_runs[] = {0, static_cast<int32_t>(runs.size())};
  const Blocks blocks = reduction_blocks(g.from_per_group, taps, /*taps_inside=*/true);
  const Panels panels((lines - 1) * strip.pitch + line, kernels.lanes, kernels.vectors);
  c10::SmallVector<int64_t, 64> offsets(taps), weight_offsets(taps);
  strip.tap_offsets(phase, offsets.data());
  for (int64_t t = 0; t < taps; ++t) weight_offsets[t] = g.weight_tap_offset(phase, t);
  T* const packed = workspace;
  if (!sizes.in_rows)
    parallel_tasks(g.groups * channels, 8.0 * depth, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const T* row = weight + i / channels * g.weight_group_stride + i % channels * g.weight_to_stride;
        for (int64_t c = 0; c < g.from_per_group; ++c)
          for (int64_t t = 0; t < taps; ++t)
            packed[i * depth + c * taps + t] = row[weight_offsets[t] + c * g.weight_from_stride];
      }
    });

  const int64_t row_tiles = ceil_div(channels, kernels.rows), problems = g.batch * g.groups;
  const int64_t splits = std::clamp<int64_t>(ceil_div(2 * threads, problems), 1, row_tiles);
  const double macs = static_cast<double>(panels.columns) * depth * channels / splits;
  parallel_tasks(problems * splits, macs, [&](int64_t begin, int64_t end) {
    T* const strips = workspace + sizes.packed + at::get_thread_num() * (sizes.strips + sizes.kept);
    T* const kept = strips + sizes.strips;
    c10::SmallVector<const T*, kMaxRows * 16> w(taps * kernels.rows);
    int64_t filled = -1;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t split = i % splits, problem = i / splits, group = problem % g.groups, n = problem / g.groups;
      if (filled != problem) {
        const T* const image = from + n * g.from_stride.batch + group * g.from_per_group * g.from_stride.channel;
        kernels.pack(g.from_per_group, 1, image, g.from_stride.channel, runs.data(), all_runs, strips, strip.size);
        filled = problem;
      }
      for (int64_t tile = row_tiles * split / splits; tile < row_tiles * (split + 1) / splits; ++tile) {
        const int64_t first = tile * kernels.rows, rows = std::min<int64_t>(kernels.rows, channels - first);
        for (int64_t r = 0; r < rows; ++r) {
          const T* row = sizes.in_rows ? weight + group * g.weight_group_stride + (first + r) * g.weight_to_stride
                                       : packed + (group * channels + first + r) * depth;
          for (int64_t t = 0; t < taps; ++t) w[t * rows + r] = row + t;
        }
        for (int64_t panel = 0; panel < panels.count; ++panel) {
          T* c[kMaxRows];
          for (int64_t r = 0; r < rows; ++r) c[r] = kept + r * panels.columns + panels.begin(panel);
          for (const Block& block : blocks)
            kernels.gemm[rows - 1]({.taps = block.taps,
                                    .depth = block.channels,
                                    .a = w.data(),
                                    .a_offset = block.start,
                                    .a_step = taps,
                                    .b = strips + block.channel * strip.size + panels.begin(panel),
                                    .b_offsets = offsets.data(),
                                    .ldb = strip.size,
                                    .c = c,
                                    .cols = panels.size(panel),
                                    .row_bias = bias ? bias + group * channels + first : nullptr,
                                    .column_bias = nullptr,
                                    .accumulate = block.start > 0});
        }
        for (int64_t r = 0; r < rows; ++r) {
          T* const target = to + n * g.to_stride.batch + (group * channels + first + r) * g.to_stride.channel +
                            a[1].to_start * g.to_stride.axis[1] + a[2].to_start;
          const T* const source = kept + r * panels.columns;
          const int64_t target_step = a[1].to_step * g.to_stride.axis[1];
          if (a[2].to_step == 1) {
            kernels.copy_rows(source, strip.pitch, lines, line, target, target_step);
            continue;
          }
          for (int64_t h = 0; h < lines; ++h)
            for (int64_t j = 0; j < line; ++j) target[h * target_step + j * a[2].to_step] = source[h * strip.pitch + j];
        }
      }
    }
  });
}

template <typename T>
void run(const ConvShape& s, Direction direction, const void* from, const ConvPointers& p, void* workspace,
         int threads) {
  const Gather g = make_gather(s, direction);
  const Plan sizes(s, direction);
  for (const GatherPhase& phase : g.phases)
    run_phase(g, phase, sizes, kernels_of<T>(microkernels()), static_cast<const T*>(from),
              static_cast<const T*>(p.weight), static_cast<const T*>(p.bias), static_cast<T*>(p.result),
              static_cast<T*>(workspace), threads);
}

const char* decline(const ConvShape& s, Direction direction) {
  if (s.dtype != Dtype::kFloat32 && s.dtype != Dtype::kFloat64) return "only float32 and float64";
  if (s.channels_last()) return "only NCHW";
  if (s.in_per_group == 0 || s.out_per_group == 0 || s.in_pixels() == 0 || s.out_pixels() == 0)
    return "nothing to sum over";
  if (s.in[0] != 1 || s.out[0] != 1 || s.kernel[0] != 1 || s.pad[0] != 0) return "a third axis";
  if (s.taps() == 1) return "a single tap: nothing to share";
  if (s.taps() > kSumLength) return "more than 512 taps";
  const bool forward = direction == Direction::kForward;
  if (!forward && s.padding_mode != PaddingMode::kZeros) return "the adjoint of a padding mode";
  for (int d = 1; d < 3; ++d) {
    if (forward && s.stride[d] != 1) return "a stride";
    if (s.stride[d] > 16) return "a stride above 16";
    if (s.in[d] > kMaxPlane || s.out[d] > kMaxPlane || s.kernel[d] - 1 > kMaxPlane / s.dilation[d])
      return "planes above 1156 values";
  }
  const int64_t plane = padded_plane(s, direction);
  if (plane > kMaxPlane) return "planes above 1156 values";
  if ((forward ? s.in_per_group : s.out_per_group) * plane * dtype_size(s.dtype) > kStripsBytes)
    return "strips above 512 KiB";
  if (s.groups * s.in_per_group * s.out_per_group * s.taps() > kPackedBytes / dtype_size(s.dtype))
    return "weights above 32 MiB";
  return nullptr;
}

}  // namespace

const char* direct_forward_decline(const ConvShape& s) { return decline(s, Direction::kForward); }
const char* direct_backward_input_decline(const ConvShape& s) { return decline(s, Direction::kBackwardInput); }

int64_t direct_forward_workspace(const ConvShape& s, int threads) {
  return Plan(s, Direction::kForward).elements(threads) * dtype_size(s.dtype);
}
int64_t direct_backward_input_workspace(const ConvShape& s, int threads) {
  return Plan(s, Direction::kBackwardInput).elements(threads) * dtype_size(s.dtype);
}

void direct_forward(const ConvShape& s, const ConvPointers& p, void* workspace, int threads) {
  (s.dtype == Dtype::kFloat32 ? run<float> : run<double>)(s, Direction::kForward, p.input, p, workspace, threads);
}
void direct_backward_input(const ConvShape& s, const ConvPointers& p, void* workspace, int threads) {
  const Direction direction = Direction::kBackwardInput;
  (s.dtype == Dtype::kFloat32 ? run<float> : run<double>)(s, direction, p.grad_output, p, workspace, threads);
}

}  // namespace myconv::cpu
