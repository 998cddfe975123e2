// Depthwise convolutions (one in and one out channel a group), all three directions, float32 and float64.
//
//   NCHW   vectors run along a line of one plane. The lines that a block of result lines reads are copied once into a
//          padded strip, after which every tap of every result line is a constant offset:
//
//              strip  [td][line][residue][position]     residue: w mod stride, so that strided taps are contiguous too
//
//   NHWC   vectors run along channels. Pixels whose taps all lie inside are constant offsets in x as it lies; pixels
//          that padding cuts go through a pointer for each tap, a row of zeros in the padding.
//
// forward and backward_input are gathers (gather.h): one loop nest. backward_weight reads the same strips and pointers
// and keeps a vector of sums per tap, up to 8 taps at a time.
//
// Sums: forward and backward_input: the taps in order, then the bias. backward_weight: at most kSumLength terms a
// lane, then added to the total in order; the lanes of NCHW last. Threads split planes, lines or channels, never a sum.
// Declines: more than one channel a group, strips above kStripLimit, backward_input with a padding mode.
#include <vector>

#include "cpu/algorithms.h"
#include "cpu/gather.h"
#include "cpu/gemm_blocks.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/strip.h"

namespace myconv::cpu {
namespace {

constexpr int64_t kStripLimit = 1 << 20;  // a strip that does not fit here is declined
constexpr int64_t kMaxDepthwiseKernel = 4096;

// --- NCHW ------------------------------------------------------------------------------------------------------------

// The runs of every block of result lines.
class BlockRuns {
 public:
  BlockRuns(const GatherPhase& phase, const StripPlan& plan)
      : plan_(plan), blocks_(ceil_div(phase.axis[1].count, plan.block_lines)), runs_(phase.axis[0].count * blocks_) {
    for (int64_t i = 0; i < static_cast<int64_t>(runs_.size()); ++i) {
      const int64_t h = i % blocks_ * plan.block_lines;
      strip_runs(phase, plan, i / blocks_, h, std::min(plan.block_lines, phase.axis[1].count - h), runs_[i]);
    }
  }

  template <typename T>
  void fill(int64_t d, int64_t h, const T* plane, const Kernels<T>& kernels, T* strip) const {
    const StripRuns& runs = runs_[d * blocks_ + h / plan_.block_lines];
    const int32_t all[] = {0, static_cast<int32_t>(runs.size())};
    kernels.pack(1, 1, plane, 0, runs.data(), all, strip, 0);
  }

 private:
  const StripPlan& plan_;
  int64_t blocks_;
  std::vector<StripRuns> runs_;
};

template <typename T>
void gather_lines(const Gather& g, const GatherPhase& phase, const Kernels<T>& kernels, const T* from, const T* weight,
                  const T* bias, T* to, T* workspace) {
  const GatherAxis* a = phase.axis;
  const int64_t taps = phase.taps();
  const StripPlan plan(phase, sizeof(T), kStripBytes);
  c10::SmallVector<int64_t, 64> offsets(taps), weight_offsets(taps);
  plan.tap_offsets(phase, offsets.data());
  for (int64_t t = 0; t < taps; ++t) weight_offsets[t] = g.weight_tap_offset(phase, t);
  const bool scatter = a[2].to_step != 1;
  const int64_t per_thread = plan.size + taps + kMaxDepthwiseRows * a[2].count;
  const BlockRuns runs(phase, plan);

  parallel_tasks(g.batch * g.groups, 2.0 * taps * phase.pixels(), [&](int64_t begin, int64_t end) {
    T* const strip = workspace + at::get_thread_num() * per_thread;
    T* const w = strip + plan.size;
    T* const kept = w + taps;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / g.groups, c = i % g.groups;
      const T* plane = from + n * g.from_stride.batch + c * g.from_stride.channel;
      T* const result = to + n * g.to_stride.batch + c * g.to_stride.channel;
      for (int64_t t = 0; t < taps; ++t) w[t] = weight[c * g.weight_group_stride + weight_offsets[t]];
      for (int64_t d = 0; d < a[0].count; ++d)
        for (int64_t h = 0; h < a[1].count; h += plan.block_lines) {
          const int64_t lines = std::min(plan.block_lines, a[1].count - h);
          runs.fill(d, h, plane, kernels, strip);
          for (int64_t l = 0; l < lines; l += kMaxDepthwiseRows) {
            const int64_t rows = std::min<int64_t>(kMaxDepthwiseRows, lines - l);
            T* const target = result + (a[0].to_start + d * a[0].to_step) * g.to_stride.axis[0] +
                              (a[1].to_start + (h + l) * a[1].to_step) * g.to_stride.axis[1] + a[2].to_start;
            const int64_t target_step = a[1].to_step * g.to_stride.axis[1];
            kernels.depthwise_lines[rows - 1]({.taps = taps,
                                               .length = a[2].count,
                                               .from = strip + l * a[1].from_step * plan.pitch,
                                               .row_step = a[1].from_step * plan.pitch,
                                               .offsets = offsets.data(),
                                               .pointers = nullptr,
                                               .weight = w,
                                               .weight_stride = 1,
                                               .bias = bias ? bias + c : nullptr,
                                               .to = scatter ? kept : target,
                                               .to_row_step = scatter ? a[2].count : target_step});
            if (scatter)
              for (int64_t r = 0; r < rows; ++r)
                for (int64_t j = 0; j < a[2].count; ++j)
                  target[r * target_step + j * a[2].to_step] = kept[r * a[2].count + j];
          }
        }
    }
  });
}

// --- NHWC ------------------------------------------------------------------------------------------------------------

// [first, last) of an axis: positions whose taps all read inside.
void all_inside(const GatherAxis& axis, int64_t& first, int64_t& last) {
  first = 0, last = axis.count;
  for (int64_t t = 0; t < axis.taps(); ++t)
    first = std::max(first, axis.first_inside(t)), last = std::min(last, axis.last_inside(t));
}

template <typename T>
void gather_pixels(const Gather& g, const GatherPhase& phase, const Kernels<T>& kernels, const T* from, const T* weight,
                   const T* bias, T* to, T* workspace) {
  const GatherAxis* a = phase.axis;
  const int64_t taps = phase.taps(), channels = g.groups;
  T* const packed = workspace;  // [tap][channel]
  T* const zeros = packed + taps * channels;
  for (int64_t t = 0; t < taps; ++t) {
    const T* source = weight + g.weight_tap_offset(phase, t);
    for (int64_t c = 0; c < channels; ++c) packed[t * channels + c] = source[c * g.weight_group_stride];
  }
  std::fill_n(zeros, channels, T(0));
  c10::SmallVector<int64_t, 64> offsets;
  for (int64_t td = 0; td < a[0].taps(); ++td)
    for (int64_t th = 0; th < a[1].taps(); ++th)
      for (int64_t tw = 0; tw < a[2].taps(); ++tw)
        offsets.push_back(a[0].offset[td] * g.from_stride.axis[0] + a[1].offset[th] * g.from_stride.axis[1] +
                          a[2].offset[tw] * g.from_stride.axis[2]);
  int64_t inside[3][2];
  for (int d = 0; d < 3; ++d) all_inside(a[d], inside[d][0], inside[d][1]);

  const int64_t lines = g.batch * a[0].count * a[1].count;
  parallel_tasks(lines, 2.0 * taps * a[2].count * channels, [&](int64_t begin, int64_t end) {
    c10::SmallVector<const T*, 512> pointers(taps * kMaxDepthwiseRows);
    for (int64_t line = begin; line < end; ++line) {
      const int64_t h = line % a[1].count, d = line / a[1].count % a[0].count, n = line / (a[1].count * a[0].count);
      const T* const image = from + n * g.from_stride.batch;
      const T* const source =
          image + d * a[0].from_step * g.from_stride.axis[0] + h * a[1].from_step * g.from_stride.axis[1];
      T* const target = to + n * g.to_stride.batch + (a[0].to_start + d * a[0].to_step) * g.to_stride.axis[0] +
                        (a[1].to_start + h * a[1].to_step) * g.to_stride.axis[1] + a[2].to_start * g.to_stride.axis[2];
      const bool line_inside = d >= inside[0][0] && d < inside[0][1] && h >= inside[1][0] && h < inside[1][1];
      const int64_t first = line_inside ? std::min(inside[2][0], a[2].count) : a[2].count;
      const int64_t last = line_inside ? std::max(inside[2][1], first) : a[2].count;
      const auto pixels = [&](int64_t w, int64_t limit, bool is_inside) {
        for (; w < limit; w += kMaxDepthwiseRows) {
          const int64_t rows = std::min<int64_t>(kMaxDepthwiseRows, limit - w);
          if (!is_inside) {
            const T** p = pointers.data();
            for (int64_t td = 0; td < a[0].taps(); ++td)
              for (int64_t th = 0; th < a[1].taps(); ++th) {
                const int64_t from_d = a[0].source(d, td), from_h = a[1].source(h, th);
                const T* from_line = image + from_d * g.from_stride.axis[0] + from_h * g.from_stride.axis[1];
                for (int64_t tw = 0; tw < a[2].taps(); ++tw)
                  for (int64_t r = 0; r < rows; ++r) {
                    const int64_t from_w = a[2].source(w + r, tw);
                    *p++ = from_d < 0 || from_h < 0 || from_w < 0 ? zeros : from_line + from_w * g.from_stride.axis[2];
                  }
              }
          }
          const auto& kernel = is_inside ? kernels.depthwise_pixels : kernels.depthwise_border;
          kernel[rows - 1]({.taps = taps,
                            .length = channels,
                            .from = source + w * a[2].from_step * g.from_stride.axis[2],
                            .row_step = a[2].from_step * g.from_stride.axis[2],
                            .offsets = offsets.data(),
                            .pointers = pointers.data(),
                            .weight = packed,
                            .weight_stride = channels,
                            .bias = bias,
                            .to = target + w * a[2].to_step * g.to_stride.axis[2],
                            .to_row_step = a[2].to_step * g.to_stride.axis[2]});
        }
      };
      pixels(0, first, false);
      pixels(first, last, true);
      pixels(last, a[2].count, false);
    }
  });
}

template <typename T>
void gather(const ConvShape& s, Direction direction, const void* from, const ConvPointers& p, void* workspace) {
  const Gather g = make_gather(s, direction);
  const auto f = s.channels_last() ? gather_pixels<T> : gather_lines<T>;
  for (const GatherPhase& phase : g.phases)
    f(g, phase, kernels_of<T>(microkernels()), static_cast<const T*>(from), static_cast<const T*>(p.weight),
      static_cast<const T*>(p.bias), static_cast<T*>(p.result), static_cast<T*>(workspace));
}

// --- backward_weight -------------------------------------------------------------------------------------------------

template <typename T>
void weight_lines(const ConvShape& s, const Kernels<T>& kernels, const T* gy, const T* x, T* gw, T* workspace) {
  const GatherPhase phase{{forward_axis(s, 0), forward_axis(s, 1), forward_axis(s, 2)}};
  const StripPlan plan(phase, sizeof(T), kStripBytes);
  const int64_t taps = s.taps(), lanes = kernels.lanes, in_plane = s.in_pixels(), out_plane = s.out_pixels();
  c10::SmallVector<int64_t, 64> offsets(taps);
  plan.tap_offsets(phase, offsets.data());
  const int64_t lines_per_sum = std::max<int64_t>(1, kSumLength / ceil_div(s.out[2], lanes));
  const int64_t per_thread = plan.size + taps * lanes;
  const BlockRuns runs(phase, plan);
  parallel_tasks(s.groups, 2.0 * s.macs() / s.groups, [&](int64_t begin, int64_t end) {
    T* const strip = workspace + at::get_thread_num() * per_thread;
    T* const sums = strip + plan.size;
    for (int64_t c = begin; c < end; ++c) {
      std::fill_n(sums, taps * lanes, T(0));
      for (int64_t n = 0; n < s.batch; ++n)
        for (int64_t d = 0; d < s.out[0]; ++d)
          for (int64_t h = 0; h < s.out[1]; h += plan.block_lines) {
            const int64_t lines = std::min(plan.block_lines, s.out[1] - h);
            runs.fill(d, h, x + (n * s.groups + c) * in_plane, kernels, strip);
            const T* const g = gy + (n * s.groups + c) * out_plane + (d * s.out[1] + h) * s.out[2];
            for (int64_t l = 0; l < lines; l += lines_per_sum)
              for (int64_t t = 0; t < taps; t += kMaxDepthwiseTaps)
                kernels.depthwise_weight_lines[std::min<int64_t>(kMaxDepthwiseTaps, taps - t) - 1](
                    {.count = std::min(lines_per_sum, lines - l),
                     .length = s.out[2],
                     .gy = g + l * s.out[2],
                     .gy_step = s.out[2],
                     .from = strip + l * s.stride[1] * plan.pitch,
                     .from_step = s.stride[1] * plan.pitch,
                     .offsets = offsets.data() + t,
                     .pointers = nullptr,
                     .pointer_taps = 0,
                     .offset = 0,
                     .sums = sums + t * lanes});
          }
      for (int64_t t = 0; t < taps; ++t) {
        T sum = 0;
        for (int64_t l = 0; l < lanes; ++l) sum += sums[t * lanes + l];
        const int64_t tw = t % s.kernel[2], th = t / s.kernel[2] % s.kernel[1], td = t / (s.kernel[2] * s.kernel[1]);
        gw[c * s.weight_stride[0] + td * s.weight_stride[2] + th * s.weight_stride[3] + tw * s.weight_stride[4]] = sum;
      }
    }
  });
}

template <typename T>
void weight_pixels(const ConvShape& s, const Kernels<T>& kernels, const T* gy, const T* x, T* gw, T* workspace) {
  const GatherAxis axis[3] = {forward_axis(s, 0), forward_axis(s, 1), forward_axis(s, 2)};
  const int64_t taps = s.taps(), lanes = kernels.lanes, channels = s.groups;
  const int64_t vectors = ceil_div(channels, lanes);
  const auto x_stride = activation_strides(s.layout, channels, s.in);
  const int64_t pixels = s.batch * s.out_pixels(), chunk = std::clamp<int64_t>(32768 / taps, 1, kSumLength);
  T* const sums = workspace;  // [vector][tap][lane]
  T* const zeros = sums + vectors * taps * lanes;
  std::fill_n(zeros, channels, T(0));
  parallel_tasks(vectors, 2.0 * s.macs() / vectors, [&](int64_t begin, int64_t end) {
    std::fill_n(sums + begin * taps * lanes, (end - begin) * taps * lanes, T(0));
    std::vector<const T*> pointers(chunk * taps);
    for (int64_t first = 0; first < pixels; first += chunk) {
      const int64_t count = std::min(chunk, pixels - first);
      const T** p = pointers.data();
      for (int64_t i = first; i < first + count; ++i) {
        const int64_t w = i % s.out[2], h = i / s.out[2] % s.out[1], d = i / (s.out[2] * s.out[1]) % s.out[0];
        const T* image = x + i / s.out_pixels() * x_stride.batch;
        for (int64_t td = 0; td < s.kernel[0]; ++td)
          for (int64_t th = 0; th < s.kernel[1]; ++th) {
            const int64_t from_d = axis[0].source(d, td), from_h = axis[1].source(h, th);
            const T* line = image + from_d * x_stride.axis[0] + from_h * x_stride.axis[1];
            for (int64_t tw = 0; tw < s.kernel[2]; ++tw) {
              const int64_t from_w = axis[2].source(w, tw);
              *p++ = from_d < 0 || from_h < 0 || from_w < 0 ? zeros : line + from_w * x_stride.axis[2];
            }
          }
      }
      for (int64_t v = begin; v < end; ++v)
        for (int64_t t = 0; t < taps; t += kMaxDepthwiseTaps)
          kernels.depthwise_weight_pixels[std::min<int64_t>(kMaxDepthwiseTaps, taps - t) - 1](
              {.count = count,
               .length = std::min(lanes, channels - v * lanes),
               .gy = gy + first * channels + v * lanes,
               .gy_step = channels,
               .from = nullptr,
               .from_step = 0,
               .offsets = nullptr,
               .pointers = pointers.data() + t,
               .pointer_taps = taps,
               .offset = v * lanes,
               .sums = sums + (v * taps + t) * lanes});
    }
    for (int64_t c = begin * lanes; c < std::min(channels, end * lanes); ++c)
      for (int64_t t = 0; t < taps; ++t) {
        const int64_t tw = t % s.kernel[2], th = t / s.kernel[2] % s.kernel[1], td = t / (s.kernel[2] * s.kernel[1]);
        gw[c * s.weight_stride[0] + td * s.weight_stride[2] + th * s.weight_stride[3] + tw * s.weight_stride[4]] =
            sums[(c / lanes * taps + t) * lanes + c % lanes];
      }
  });
}

const char* decline(const ConvShape& s, Direction direction) {
  if (s.in_per_group != 1 || s.out_per_group != 1) return "more than one channel a group";
  if (s.dtype != Dtype::kFloat32 && s.dtype != Dtype::kFloat64) return "only float32 and float64";
  if (s.in_pixels() == 0 || s.out_pixels() == 0) return "nothing to sum over";
  if (s.taps() > kMaxDepthwiseKernel) return "more than 4096 taps";
  if (direction == Direction::kBackwardInput) {
    if (s.padding_mode != PaddingMode::kZeros) return "the adjoint of a padding mode";
    for (int d = 0; d < 3; ++d)
      if (s.stride[d] > 64) return "a stride above 64";
  }
  if (s.channels_last()) return nullptr;
  for (int d = 0; d < 3; ++d)
    if ((s.kernel[d] - 1) > kStripLimit / s.dilation[d]) return "a strip of padded lines above 1 MiB";
  for (const GatherPhase& phase : make_gather(s, direction).phases)
    if (StripPlan(phase, dtype_size(s.dtype), kStripBytes).size > kStripLimit / dtype_size(s.dtype))
      return "a strip of padded lines above 1 MiB";
  return nullptr;
}

int64_t gather_workspace(const ConvShape& s, Direction direction, int threads) {
  int64_t elements = (s.taps() + 1) * s.groups;
  if (!s.channels_last()) {
    elements = 0;
    for (const GatherPhase& phase : make_gather(s, direction).phases)
      elements = std::max(elements, threads * (StripPlan(phase, dtype_size(s.dtype), kStripBytes).size + phase.taps() +
                                               kMaxDepthwiseRows * phase.axis[2].count));
  }
  return elements * dtype_size(s.dtype);
}

}  // namespace

const char* depthwise_forward_decline(const ConvShape& s) { return decline(s, Direction::kForward); }
const char* depthwise_backward_input_decline(const ConvShape& s) { return decline(s, Direction::kBackwardInput); }
const char* depthwise_backward_weight_decline(const ConvShape& s) {
  return s.batch == 0 ? "nothing to sum over" : decline(s, Direction::kBackwardWeight);
}

int64_t depthwise_forward_workspace(const ConvShape& s, int threads) {
  return gather_workspace(s, Direction::kForward, threads);
}
int64_t depthwise_backward_input_workspace(const ConvShape& s, int threads) {
  return gather_workspace(s, Direction::kBackwardInput, threads);
}
int64_t depthwise_backward_weight_workspace(const ConvShape& s, int threads) {
  constexpr int64_t kMostLanes = 64;  // of any ISA, in bytes
  if (s.channels_last()) return (s.taps() + 1) * (s.groups * dtype_size(s.dtype) + kMostLanes);
  return gather_workspace(s, Direction::kForward, threads) + threads * s.taps() * kMostLanes;
}

void depthwise_forward(const ConvShape& s, const ConvPointers& p, void* workspace, int) {
  (s.dtype == Dtype::kFloat32 ? gather<float> : gather<double>)(s, Direction::kForward, p.input, p, workspace);
}

void depthwise_backward_input(const ConvShape& s, const ConvPointers& p, void* workspace, int) {
  (s.dtype == Dtype::kFloat32 ? gather<float> : gather<double>)(s, Direction::kBackwardInput, p.grad_output, p,
                                                                workspace);
}

void depthwise_backward_weight(const ConvShape& s, const ConvPointers& p, void* workspace, int) {
  const auto typed = [&](auto zero) {
    using T = decltype(zero);
    (s.channels_last() ? weight_pixels<T> : weight_lines<T>)(s, kernels_of<T>(microkernels()),
                                                             static_cast<const T*>(p.grad_output),
                                                             static_cast<const T*>(p.input), static_cast<T*>(p.result),
                                                             static_cast<T*>(workspace));
  };
  s.dtype == Dtype::kFloat32 ? typed(float{}) : typed(double{});
}

}  // namespace myconv::cpu
