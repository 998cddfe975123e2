// bfloat16 and float16, forward and backward_input: widened to float32 a slab at a time, computed by a float32 row, and
// rounded once. A slab is a number of whole samples, or where one is too large, some lines of its result:
//
//     for each slab:  from' = float(what the slab reads)   to' = convolution(from', float(w), float(bias))   to = round(to')
//
// A slab of lines is a convolution of its own: the same taps over the lines that it reads, with another pad along H. In
// forward these lines hold their padding, so that every padding mode works; in backward_input there is none, and a sample in
// a padding mode is not cut.
//
// Slabs of about kSlabBytes stay in the cache. Sums: those of the float32 row. How many samples a slab has does not
// change them, and how many lines it has depends on a sample alone. Declines: other types, and what no float32 row but
// the reference takes.
#include "cpu/algorithms.h"
#include "cpu/gemm_blocks.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/tables.h"

namespace myconv::cpu {
namespace {

constexpr int64_t kSlabBytes = 8 << 20;    // of float32, read and written, by whole samples
constexpr int64_t kLinesBytes = 24 << 20;  // above it a sample is cut into lines

// Result lines [first, first + lines) of some samples, which read lines [read, read + shape's) of what is read.
struct Slab {
  ConvShape shape;  // in float32
  int64_t first, read;
};

int64_t weight_extent(const ConvShape& s, int64_t d) {
  return d == 0 ? s.out_channels() : d == 1 ? s.in_per_group : s.kernel[d - 2];
}

// Whether the weight lies without gaps, in whatever order, and is widened as it lies.
bool keeps_strides(const ConvShape& s) {
  int64_t span = 1, values = 1;
  for (int64_t d = 0; d < 5; ++d) span += (weight_extent(s, d) - 1) * s.weight_stride[d], values *= weight_extent(s, d);
  return span <= values;
}

Slab make_slab(const ConvShape& s, Direction direction, int64_t samples, int64_t first, int64_t lines) {
  Slab slab{s, first, 0};
  ConvShape& f = slab.shape;
  f.dtype = Dtype::kFloat32;
  f.batch = samples;
  if (!keeps_strides(s))
    for (int64_t d = 4, stride = 1; d >= 0; --d) {  // [out][in][tap]
      f.weight_stride[d] = stride;
      stride *= weight_extent(s, d);
    }
  const int64_t reach = (s.kernel[1] - 1) * s.dilation[1];
  if (direction == Direction::kForward && lines < s.out[1]) {
    slab.read = first * s.stride[1] - s.pad[1];
    f.out[1] = lines, f.in[1] = (lines - 1) * s.stride[1] + reach + 1, f.pad[1] = 0;
  } else if (direction == Direction::kBackwardInput && lines < s.in[1]) {
    const int64_t low = std::max<int64_t>(0, first + s.pad[1] - reach);
    slab.read = std::min(ceil_div(low, s.stride[1]), s.out[1] - 1);
    const int64_t end = std::min((first + lines - 1 + s.pad[1]) / s.stride[1] + 1, s.out[1]);
    f.in[1] = lines, f.out[1] = std::max<int64_t>(1, end - slab.read);
    f.pad[1] = s.pad[1] + first - slab.read * s.stride[1];
  }
  return slab;
}

int64_t in_elements(const ConvShape& f) { return f.batch * f.in_channels() * f.in_pixels(); }
int64_t out_elements(const ConvShape& f) { return f.batch * f.out_channels() * f.out_pixels(); }
int64_t bytes(const ConvShape& f) { return (in_elements(f) + out_elements(f)) * dtype_size(f.dtype); }

int64_t lines_of_slab(const ConvShape& s, Direction direction) {
  int64_t lines = direction == Direction::kForward ? s.out[1] : s.in[1];
  if (direction == Direction::kBackwardInput && s.padding_mode != PaddingMode::kZeros) return lines;
  while (lines > 1 && bytes(make_slab(s, direction, 1, 0, lines).shape) > kLinesBytes) lines = ceil_div(lines, 2);
  return lines;
}

const Algorithm* float32_row(const ConvShape& f, Direction direction) { return first_fast(table(direction), f); }

// How a problem is cut, and the float32 scratch of one slab, in elements.
struct Plan {
  int64_t all_lines, samples, lines;
  int64_t from = 0, to = 0, row = 0, weight, bias;

  Plan(const ConvShape& s, Direction direction, int threads) {
    const bool forward = direction == Direction::kForward;
    all_lines = forward ? s.out[1] : s.in[1];
    const int64_t sample = bytes(make_slab(s, direction, 1, 0, all_lines).shape);
    samples = std::clamp<int64_t>(kSlabBytes / std::max<int64_t>(1, sample), 1, std::max<int64_t>(1, s.batch));
    lines = lines_of_slab(s, direction);
    for (int64_t first = 0; first < all_lines; first += lines) {
      const ConvShape f = make_slab(s, direction, samples, first, std::min(lines, all_lines - first)).shape;
      from = std::max(from, forward ? in_elements(f) : out_elements(f));
      to = std::max(to, forward ? out_elements(f) : in_elements(f));
      for (const int64_t n : {samples, s.batch % samples}) {
        if (n == 0) continue;
        const ConvShape slab = make_slab(s, direction, n, first, std::min(lines, all_lines - first)).shape;
        row = std::max(row, ceil_div(float32_row(slab, direction)->workspace(slab, threads), sizeof(float)));
      }
    }
    weight = s.out_channels() * s.in_per_group * s.taps();
    bias = forward ? s.out_channels() : s.in_channels();
  }
  static int64_t padded(int64_t elements) { return round_up(elements, 16); }
  int64_t bytes_needed() const {
    return (padded(from) + padded(to) + padded(weight) + padded(bias) + row) * static_cast<int64_t>(sizeof(float));
  }
};

// Calls f(element of the tensor, element of the scratch, lines) for runs of whole lines of a slab: `read` counts in the
// tensor, whose lines are extent[1], and may lie in the padding; those are filled by `zero` instead.
template <typename F, typename Zero>
void each_run(const ConvShape& s, int64_t sample, int64_t samples, int64_t channels, const int64_t (&extent)[3],
              int64_t read, int64_t lines, const F& f, const Zero& zero) {
  const int64_t volumes = samples * (s.channels_last() ? 1 : channels) * extent[0];
  const int64_t line = extent[2] * (s.channels_last() ? channels : 1);
  const int64_t first = sample * (volumes / samples);
  parallel_tasks(volumes, 4.0 * lines * line, [&](int64_t begin, int64_t end) {
    for (int64_t v = begin; v < end; ++v)
      for (int64_t l = 0; l < lines;) {
        const int64_t at = padded_index(read + l, extent[1], s.padding_mode);
        int64_t stop = l + 1;
        while (stop < lines && at >= 0 && padded_index(read + stop, extent[1], s.padding_mode) == at + stop - l) ++stop;
        const int64_t scratch = (v * lines + l) * line;
        if (at < 0)
          zero(scratch, (stop - l) * line);
        else
          f(((first + v) * extent[1] + at) * line, scratch, (stop - l) * line);
        l = stop;
      }
  });
}

void run(const ConvShape& s, Direction direction, const void* from, const ConvPointers& p, void* workspace,
         int threads) {
  const bool forward = direction == Direction::kForward;
  const Plan plan(s, direction, threads);
  const Widening& convert = microkernels().widening[s.dtype == Dtype::kFloat16];
  float* const from32 = static_cast<float*>(workspace);
  float* const to32 = from32 + Plan::padded(plan.from);
  float* const weight32 = to32 + Plan::padded(plan.to);
  float* const bias32 = weight32 + Plan::padded(plan.weight);
  float* const scratch = bias32 + Plan::padded(plan.bias);
  const auto* const source = static_cast<const uint16_t*>(from);
  auto* const target = static_cast<uint16_t*>(p.result);

  const auto* const weight = static_cast<const uint16_t*>(p.weight);
  const int64_t row = s.kernel[2];
  if (keeps_strides(s))
    parallel_tasks(plan.weight, 1.0,
                   [&](int64_t begin, int64_t end) { convert.widen(weight + begin, end - begin, weight32 + begin); });
  else
    parallel_tasks(plan.weight / row, 16.0 * row, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t h = i % s.kernel[1], d = i / s.kernel[1] % s.kernel[0];
        const int64_t c = i / (s.kernel[1] * s.kernel[0]) % s.in_per_group;
        const int64_t k = i / (s.kernel[1] * s.kernel[0] * s.in_per_group);
        const uint16_t* const taps =
            weight + k * s.weight_stride[0] + c * s.weight_stride[1] + d * s.weight_stride[2] + h * s.weight_stride[3];
        for (int64_t w = 0; w < row; ++w) convert.widen(taps + w * s.weight_stride[4], 1, weight32 + i * row + w);
      }
    });
  if (p.bias) convert.widen(static_cast<const uint16_t*>(p.bias), plan.bias, bias32);

  for (int64_t sample = 0; sample < s.batch; sample += plan.samples)
    for (int64_t first = 0; first < plan.all_lines; first += plan.lines) {
      const int64_t samples = std::min(plan.samples, s.batch - sample);
      const Slab slab = make_slab(s, direction, samples, first, std::min(plan.lines, plan.all_lines - first));
      const ConvShape& f = slab.shape;
      each_run(
          s, sample, samples, forward ? s.in_channels() : s.out_channels(), forward ? s.in : s.out, slab.read,
          forward ? f.in[1] : f.out[1],
          [&](int64_t at, int64_t scratch_at, int64_t count) {
            convert.widen(source + at, count, from32 + scratch_at);
          },
          [&](int64_t scratch_at, int64_t count) { std::fill_n(from32 + scratch_at, count, 0.0f); });
      ConvPointers pointers{.weight = weight32, .bias = p.bias ? bias32 : nullptr, .result = to32};
      (forward ? pointers.input : pointers.grad_output) = from32;
      float32_row(f, direction)->run(f, pointers, scratch, threads);
      each_run(
          s, sample, samples, forward ? s.out_channels() : s.in_channels(), forward ? s.out : s.in, first,
          forward ? f.out[1] : f.in[1],
          [&](int64_t at, int64_t scratch_at, int64_t count) { convert.narrow(to32 + scratch_at, count, target + at); },
          [](int64_t, int64_t) {});
    }
}

const char* decline(const ConvShape& s, Direction direction) {
  if (s.dtype != Dtype::kBFloat16 && s.dtype != Dtype::kFloat16) return "only bfloat16 and float16";
  if (s.in_per_group == 0 || s.out_per_group == 0 || s.in_pixels() == 0 || s.out_pixels() == 0)
    return "nothing to sum over";
  const int64_t all_lines = direction == Direction::kForward ? s.out[1] : s.in[1];
  if (bytes(make_slab(s, direction, 1, 0, lines_of_slab(s, direction)).shape) > kLinesBytes &&
      lines_of_slab(s, direction) == all_lines && all_lines > 1)
    return "the adjoint of a padding mode, of samples above 24 MiB";
  for (int64_t lines : {all_lines, lines_of_slab(s, direction)})
    if (!float32_row(make_slab(s, direction, 1, 0, lines).shape, direction)) return "no fast row in float32";
  return nullptr;
}

}  // namespace

template <Direction direction>
Algorithm widened() {
  return {"widened",
          [](const ConvShape& s) { return decline(s, direction); },
          [](const ConvShape& s, int threads) { return Plan(s, direction, threads).bytes_needed(); },
          [](const ConvShape& s, const ConvPointers& p, void* workspace, int threads) {
            run(s, direction, direction == Direction::kForward ? p.input : p.grad_output, p, workspace, threads);
          },
          {"all tensors, widened to float32", "all tensors, widened to float32"}};
}

template Algorithm widened<Direction::kForward>();
template Algorithm widened<Direction::kBackwardInput>();

}  // namespace myconv::cpu
