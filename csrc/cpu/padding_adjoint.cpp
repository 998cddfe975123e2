// backward_input of the padding modes: the gradient of a padded copy that is never made.
//
// A forward call in a padding mode is one without padding on an input that the mode has extended. So gx is the gradient
// with respect to the extended input, of which what lies outside is added to the positions that it was copied from:
//
//     inside = backward_input in zeros mode, into gx                          all of the image: the row that is best at it
//     for each border: strip = backward_input in zeros mode, of the border    low and high along D, H, W: a few pixels wide
//                      gx[padded_index(position)] += strip[position]
//
// The borders of an axis are as long as the extended input along the axes behind it and as the image along those before
// it, so that each position outside belongs to one of them; what takes more than kStripBytes a sample is cut into pieces.
// A border is a problem of its own: the same taps and the same gy, told another size and pad (its first position r is
// i = 0: o * stride + t * dilation = i + pad + r).
//
// Sums: those of the rows that run, then the borders in order. Samples are taken a few at a time, as many as have borders
// of kStripBytes; that changes no sum. Zeros mode multiplies what it reads outside gy by the weights, which is nothing
// only if they are finite; if not, the reference computes all of it.
// Declines: zeros mode, types other than float32 and float64, extended inputs of more than kMostExtended.
#include "cpu/algorithms.h"
#include "cpu/finite.h"
#include "cpu/gemm_blocks.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/tables.h"

namespace myconv::cpu {
namespace {

constexpr int64_t kStripBytes = 8 << 20;
constexpr double kMostExtended = 2e9;     // bytes
constexpr int64_t kChannelsOfTask = 256;  // NHWC

ConvShape in_zeros_mode(const ConvShape& s) {
  ConvShape inside = s;
  inside.padding_mode = PaddingMode::kZeros;
  return inside;
}

// Positions [begin, begin + size) of the extended input.
struct Border {
  int64_t begin[3], size[3];
  int64_t pixels() const { return size[0] * size[1] * size[2]; }
};
using Borders = c10::SmallVector<Border, 6>;

// In pieces of which a sample takes kStripBytes at most.
void add_pieces(const ConvShape& s, Border border, Borders& found) {
  if (border.pixels() == 0) return;
  const int axis = static_cast<int>(std::max_element(border.size, border.size + 3) - border.size);
  if (s.in_channels() * border.pixels() * dtype_size(s.dtype) <= kStripBytes || border.size[axis] == 1)
    return found.push_back(border);
  Border rest = border;
  border.size[axis] /= 2;
  rest.begin[axis] += border.size[axis], rest.size[axis] -= border.size[axis];
  add_pieces(s, border, found);
  add_pieces(s, rest, found);
}

Borders borders(const ConvShape& s) {
  int64_t low[3], high[3];  // positions below 0, and beyond the input
  for (int d = 0; d < 3; ++d) {
    low[d] = s.pad[d];
    high[d] = std::max<int64_t>(
        0, source_index(s.out[d] - 1, s.stride[d], s.kernel[d] - 1, s.dilation[d], s.pad[d]) - (s.in[d] - 1));
  }
  Borders found;
  for (int d = 0; d < 3; ++d)
    for (const bool is_high : {false, true}) {
      Border border;
      for (int e = 0; e < 3; ++e) {
        border.begin[e] = e < d ? 0 : -low[e];
        border.size[e] = e < d ? s.in[e] : low[e] + s.in[e] + high[e];
      }
      border.begin[d] = is_high ? s.in[d] : -low[d], border.size[d] = is_high ? high[d] : low[d];
      add_pieces(s, border, found);
    }
  return found;
}

ConvShape shape_of(const ConvShape& s, const Border& border, int64_t samples) {
  ConvShape b = in_zeros_mode(s);
  b.batch = samples;
  for (int d = 0; d < 3; ++d) b.in[d] = border.size[d], b.pad[d] = s.pad[d] + border.begin[d];
  return b;
}

int64_t strip_values(const ConvShape& s, const Border& border) { return s.in_channels() * border.pixels(); }

int64_t samples_at_once(const ConvShape& s, const Border& border) {
  const int64_t fit = kStripBytes / (strip_values(s, border) * dtype_size(s.dtype));
  return std::clamp<int64_t>(fit, 1, std::max<int64_t>(s.batch, 1));
}

const Algorithm* row_of(const ConvShape& s) { return first_fast(table(Direction::kBackwardInput), s); }

// Adds the strip of some samples to what the mode copied it from. Each task has positions in the same order.
template <typename T>
void add_strip(const ConvShape& s, const Kernels<T>& kernels, const Border& border, int64_t samples, const T* strip,
               T* gx) {
  const int64_t channels = s.in_channels();
  const ActivationStrides from = activation_strides(s.layout, channels, border.size);
  const ActivationStrides to = activation_strides(s.layout, channels, s.in);
  const int64_t together = s.channels_last() ? std::min(channels, kChannelsOfTask) : 1;
  const int64_t parts = ceil_div(channels, together);
  const auto target = [&](int d, int64_t i) { return padded_index(border.begin[d] + i, s.in[d], s.padding_mode); };
  // What lies inside along W is a run.
  const int64_t first = std::clamp<int64_t>(-border.begin[2], 0, border.size[2]);
  const int64_t last = std::clamp(s.in[2] - border.begin[2], first, border.size[2]);
  parallel_tasks(samples * parts, 2.0 * static_cast<double>(border.pixels()) * together,
                 [&](int64_t begin, int64_t end) {
                   for (int64_t task = begin; task < end; ++task) {
                     const int64_t n = task / parts, channel = task % parts * together,
                                   count = std::min(together, channels - channel);
                     const T* const source = strip + n * from.batch + channel * from.channel;
                     T* const result = gx + n * to.batch + channel * to.channel;
                     for (int64_t d = 0; d < border.size[0]; ++d)
                       for (int64_t h = 0; h < border.size[1]; ++h) {
                         const T* const line = source + d * from.axis[0] + h * from.axis[1];
                         T* const to_line = result + target(0, d) * to.axis[0] + target(1, h) * to.axis[1];
                         for (int64_t w = 0; w < border.size[2]; ++w) {
                           T* const sums = to_line + target(2, w) * to.axis[2];
                           if (w == first && !s.channels_last() && last > first) {
                             kernels.add_rows(sums, line + w, 0, 1, last - first);
                             w = last - 1;
                             continue;
                           }
                           kernels.add_rows(sums, line + w * from.axis[2], 0, 1, count);
                         }
                       }
                   }
                 });
}

template <typename T>
void run(const ConvShape& s, const ConvPointers& p, void* workspace, int threads) {
  if (!all_finite(s, static_cast<const T*>(p.weight))) return reference_backward_input(s, p, workspace, threads);
  const Kernels<T>& kernels = kernels_of<T>(microkernels());
  const ConvShape inside = in_zeros_mode(s);
  row_of(inside)->run(inside, p, workspace, threads);
  const int64_t of_gy = s.out_channels() * s.out_pixels(), of_gx = s.in_channels() * s.in_pixels();
  for (const Border& border : borders(s)) {
    const int64_t step = samples_at_once(s, border);
    T* const strip = static_cast<T*>(workspace);
    T* const scratch = strip + round_up(step * strip_values(s, border), 16);
    for (int64_t n = 0; n < s.batch; n += step) {
      const int64_t samples = std::min(step, s.batch - n);
      const ConvShape shape = shape_of(s, border, samples);
      row_of(shape)->run(
          shape, {.weight = p.weight, .grad_output = static_cast<const T*>(p.grad_output) + n * of_gy, .result = strip},
          scratch, threads);
      add_strip(s, kernels, border, samples, strip, static_cast<T*>(p.result) + n * of_gx);
    }
  }
}

}  // namespace

const char* padding_adjoint_decline(const ConvShape& s) {
  if (s.padding_mode == PaddingMode::kZeros) return "zeros mode";
  if (s.dtype != Dtype::kFloat32 && s.dtype != Dtype::kFloat64) return "only float32 and float64";
  if (s.in_per_group == 0 || s.out_per_group == 0 || s.in_pixels() == 0 || s.out_pixels() == 0)
    return "nothing to sum over";
  // The lengths first: a product of them may not fit.
  double extended = static_cast<double>(s.in_channels() * dtype_size(s.dtype));
  for (int d = 0; d < 3; ++d)
    extended *= static_cast<double>(s.pad[d] + s.in[d]) +
                static_cast<double>(s.out[d]) * static_cast<double>(s.stride[d]) +
                static_cast<double>(s.kernel[d]) * static_cast<double>(s.dilation[d]);
  if (extended > kMostExtended) return "an extended input of more than 2 GiB a sample";
  if (!row_of(in_zeros_mode(s))) return "no fast row in zeros mode";
  for (const Border& border : borders(s)) {
    if (strip_values(s, border) * dtype_size(s.dtype) > kStripBytes) return "pixels of more than 8 MiB";
    if (!row_of(shape_of(s, border, 1))) return "no fast row for a border";
  }
  return nullptr;
}

int64_t padding_adjoint_workspace(const ConvShape& s, int threads) {
  const ConvShape inside = in_zeros_mode(s);
  int64_t bytes = row_of(inside)->workspace(inside, threads);
  for (const Border& border : borders(s)) {
    const int64_t samples = samples_at_once(s, border);
    const int64_t strip = round_up(samples * strip_values(s, border), 16) * dtype_size(s.dtype);
    for (const int64_t n : {samples, s.batch % samples}) {
      if (n == 0) continue;
      const ConvShape shape = shape_of(s, border, n);
      bytes = std::max(bytes, strip + row_of(shape)->workspace(shape, threads));
    }
  }
  return bytes;
}

void padding_adjoint(const ConvShape& s, const ConvPointers& p, void* workspace, int threads) {
  s.dtype == Dtype::kFloat64 ? run<double>(s, p, workspace, threads) : run<float>(s, p, workspace, threads);
}

}  // namespace myconv::cpu
