// Implicit GEMM for backward_weight:  gw[k, c, t] = sum over pixels p of  gy[p, k] * x[source(p, t), c]
//
//   rows (register tile)   columns (vectors)   depth     one product per group and tap
//   out channels           in channels         pixels
//
// With few in channels (stems, grouped convolutions) a vector of them would be mostly empty. Then the taps are folded
// into the columns: a row of [tap][in channel] is packed for each pixel of a chunk, and there is one product per group.
//
// Both operands are read with channels innermost: NHWC as they lie, through a pointer per pixel and tap (a row of
// zeros in the padding). NCHW: the lines of x and gy that a chunk of pixels touches are transposed into strips that
// fit L2, each once per chunk, not once per tap.
//
// Sums: pixels in chunks of at most kSumLength, cut by the shape alone; a chunk is summed from a fresh accumulator and
// added to the total in order. Threads split the result (groups, out channels, in channels, taps) and never a sum: no
// reduction between threads, and the bits do not depend on their number.
// Declines: types other than float32 and float64, empty sums, kernels above kMaxTaps.
#include <vector>

#include "cpu/algorithms.h"
#include "cpu/gather.h"
#include "cpu/gemm_blocks.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace myconv::cpu {
namespace {

constexpr int64_t kMaxCircular = 4096;      // a chunk touches both ends of a circular line, so its strip is the line
constexpr int64_t kStripBytes = 512 << 10;  // transposed x of one chunk and one panel of in channels
constexpr int64_t kTaskBytes = 1 << 20;     // strips of one task
constexpr int64_t kTotalBytes = 16 << 20;   // totals of all threads together, unless one tile of each is more
constexpr int64_t kFoldChannels = 8;        // up to so many in channels the taps are folded into the columns
constexpr int64_t kFoldedBytes = 1 << 20;   // packed rows of one chunk; above it nothing is folded

// Pixels [begin, end) of the lines [first, last); a line is (n, d, h), and only a single line is ever cut.
struct Chunk {
  int64_t first, last, begin, end;
  int64_t pixels() const { return (last - first) * (end - begin); }
};

struct Plan {
  bool folded;
  int64_t columns, tap_steps;                // of one product, and how many products
  int64_t lines, line_length;                // of gy
  int64_t lines_per_chunk, pixels_per_line;  // the largest chunk
  int64_t strip_lines, strip_length;         // what the largest chunk touches of x
  int64_t chunks_per_line, chunks;

  explicit Plan(const ConvShape& s) {
    lines = s.batch * s.out[0] * s.out[1];
    line_length = s.out[2];
    pixels_per_line = std::min(line_length, kSumLength);
    const int64_t reach = (s.kernel[2] - 1) * std::min(s.dilation[2], s.in[2]) + 1;
    const int64_t channel_bytes = std::min<int64_t>(s.in_per_group, 48) * dtype_size(s.dtype);
    const bool wraps = s.padding_mode == PaddingMode::kCircular;  // from either end to the other
    const auto touched = [&](int64_t pixels) {
      return wraps ? s.in[2] : std::min(s.in[2], (pixels - 1) * std::min(s.stride[2], s.in[2]) + reach);
    };
    while (pixels_per_line > 16 && touched(pixels_per_line) * channel_bytes > kStripBytes) pixels_per_line /= 2;
    chunks_per_line = ceil_div(line_length, pixels_per_line);
    pixels_per_line = ceil_div(line_length, chunks_per_line);
    strip_length = touched(pixels_per_line);
    // A line of gy touches kernel lines of x; neighbours share them where the stride is less than the kernel.
    const int64_t line_taps = s.kernel[0] * s.kernel[1];
    const int64_t fresh = s.kernel[0] * std::min(s.stride[1], s.kernel[1]);
    const int64_t fit = (kStripBytes / (strip_length * channel_bytes) - line_taps) / fresh + 1;
    lines_per_chunk = chunks_per_line > 1 ? 1 : std::clamp<int64_t>(std::min(kSumLength / line_length, fit), 1, lines);
    strip_lines = line_taps * lines_per_chunk;
    chunks = chunks_per_line * ceil_div(lines, lines_per_chunk);
    folded = s.in_per_group <= kFoldChannels && s.taps() > 1 &&
             pixels() * s.taps() * s.in_per_group * dtype_size(s.dtype) <= kFoldedBytes;
    columns = folded ? s.taps() * s.in_per_group : s.in_per_group;
    tap_steps = folded ? 1 : s.taps();
  }

  int64_t pixels() const { return lines_per_chunk * pixels_per_line; }  // of the largest chunk

  Chunk chunk(int64_t i) const {
    const int64_t first = i / chunks_per_line * lines_per_chunk, begin = i % chunks_per_line * pixels_per_line;
    return {first, std::min(lines, first + lines_per_chunk), begin, std::min(line_length, begin + pixels_per_line)};
  }
};

// How the result is split into tasks. Only the split depends on threads; what an element sums does not.
struct Split {
  int64_t rows, columns, taps;  // of one task
  int64_t row_tasks, column_tasks, tap_tasks, tasks;

  Split(const ConvShape& s, const Plan& plan, int64_t tile_rows, const Panels& panels, int threads) {
    const int64_t size = dtype_size(s.dtype);
    const int64_t row_tiles = ceil_div(s.out_per_group, tile_rows);
    const auto settle = [&](int64_t wanted) {
      row_tasks = std::min(row_tiles, wanted);
      column_tasks = plan.folded ? 1 : std::min(panels.count, ceil_div(wanted, row_tasks));
      tap_tasks = std::min(plan.tap_steps, ceil_div(wanted, row_tasks * column_tasks));
      if (!s.channels_last()) {  // strips of one task have a size limit
        const int64_t row_fit = std::max<int64_t>(1, kTaskBytes / (plan.pixels() * tile_rows * size));
        const int64_t column_fit =
            std::max<int64_t>(1, kTaskBytes / (plan.strip_lines * plan.strip_length * panels.width * size));
        row_tasks = std::max(row_tasks, ceil_div(row_tiles, row_fit));
        if (!plan.folded) column_tasks = std::max(column_tasks, ceil_div(panels.count, column_fit));
      }
      rows = ceil_div(row_tiles, row_tasks) * tile_rows;
      columns = std::min(panels.columns, ceil_div(panels.count, column_tasks) * panels.width);
      taps = ceil_div(plan.tap_steps, tap_tasks);
      row_tasks = ceil_div(s.out_per_group, rows);
      column_tasks = ceil_div(panels.columns, columns);
      tap_tasks = ceil_div(plan.tap_steps, taps);
    };
    const int64_t finest = row_tiles * (plan.folded ? 1 : panels.count) * plan.tap_steps;
    int64_t wanted = std::min<int64_t>(finest, ceil_div(2 * threads, s.groups));
    settle(wanted);
    while (wanted < finest && threads * rows * columns * taps * size > kTotalBytes)
      settle(wanted = std::min(finest, 2 * wanted));
    tasks = s.groups * row_tasks * column_tasks * tap_tasks;
  }
};

// Scratch of one thread, in elements.
struct Scratch {
  int64_t totals, gy, x, zeros, folded;
  Scratch(const ConvShape& s, const Plan& plan, const Split& split) {
    totals = split.rows * split.columns * split.taps;
    gy = s.channels_last() ? 0 : plan.pixels() * split.rows;
    x = s.channels_last() ? 0 : plan.strip_lines * plan.strip_length * std::min(split.columns, s.in_per_group);
    zeros = s.in_channels();
    folded = plan.folded ? plan.pixels() * plan.columns : 0;
  }
  int64_t size() const { return totals + gy + x + zeros + folded; }
};

// The lines of x that one chunk touches, transposed to [line][w][channel].
template <typename T>
class Strip {
 public:
  Strip(const ConvShape& s, const Kernels<T>& kernels, T* data, int64_t channels)
      : s_(s), kernels_(kernels), data_(data), channels_(channels) {}

  // Positions [lo, hi) of the lines; a new chunk forgets the old lines.
  void start(const T* x, int64_t lo, int64_t hi) {
    x_ = x, lo_ = lo, hi_ = hi;
    slots_.clear();
  }

  // Where position 0 of the line (n, d, h) would be.
  const T* line(int64_t n, int64_t d, int64_t h, int64_t channels) {
    const int64_t id = (n * s_.in[0] + d) * s_.in[1] + h;
    const auto found = std::find(slots_.rbegin(), slots_.rend(), id);
    int64_t slot = slots_.rend() - found - 1;
    T* target = data_ + slot * (hi_ - lo_) * channels_;
    if (found == slots_.rend()) {
      slot = static_cast<int64_t>(slots_.size());
      slots_.push_back(id);
      target = data_ + slot * (hi_ - lo_) * channels_;
      const int64_t plane = s_.in_pixels();
      const T* source = x_ + n * s_.in_channels() * plane + (d * s_.in[1] + h) * s_.in[2] + lo_;
      pack_matrix(kernels_, source, int64_t{1}, plane, hi_ - lo_, channels, target, channels_);
    }
    return target - lo_ * channels_;
  }

 private:
  const ConvShape& s_;
  const Kernels<T>& kernels_;
  T* data_;
  int64_t channels_;  // between two positions
  const T* x_ = nullptr;
  int64_t lo_ = 0, hi_ = 0;
  std::vector<int64_t> slots_;
};

template <typename T>
void run(const ConvShape& s, const T* gy, const T* x, T* gw, T* workspace, int threads) {
  const Kernels<T>& kernels = kernels_of<T>(microkernels());
  const Plan plan(s);
  const Panels panels(plan.columns, kernels.lanes, kernels.vectors);
  const Split split(s, plan, kernels.rows, panels, threads);
  const Scratch scratch(s, plan, split);
  const GatherAxis axis[3] = {forward_axis(s, 0), forward_axis(s, 1), forward_axis(s, 2)};
  const auto x_stride = activation_strides(s.layout, s.in_channels(), s.in);
  const auto y_stride = activation_strides(s.layout, s.out_channels(), s.out);

  parallel_tasks(split.tasks, s.macs() / split.tasks, [&](int64_t begin, int64_t end) {
    T* const totals = workspace + at::get_thread_num() * scratch.size();
    T* const gy_strip = totals + scratch.totals;
    T* const zeros = gy_strip + scratch.gy + scratch.x;
    T* const folded = zeros + scratch.zeros;  // [pixel][tap][in channel]
    std::fill_n(zeros, scratch.zeros, T(0));
    const int64_t strip_channels = std::min(split.columns, s.in_per_group);
    Strip<T> x_strip(s, kernels, gy_strip + scratch.gy, strip_channels);
    std::vector<const T*> sources(plan.pixels());
    const int64_t line_taps = s.kernel[0] * s.kernel[1];
    std::vector<const T*> x_lines(plan.lines_per_chunk * line_taps);

    for (int64_t task = begin; task < end; ++task) {
      const int64_t t0 = task % split.tap_tasks * split.taps, t1 = std::min(plan.tap_steps, t0 + split.taps);
      const int64_t c0 = task / split.tap_tasks % split.column_tasks * split.columns;
      const int64_t columns = std::min(plan.columns - c0, split.columns);
      const int64_t k0 = task / (split.tap_tasks * split.column_tasks) % split.row_tasks * split.rows;
      const int64_t rows = std::min(s.out_per_group - k0, split.rows);
      const int64_t group = task / (split.tap_tasks * split.column_tasks * split.row_tasks);
      const int64_t k_first = group * s.out_per_group + k0, c_first = group * s.in_per_group + c0;
      const int64_t channels = plan.folded ? s.in_per_group : columns;
      std::fill_n(totals, (t1 - t0) * rows * columns, T(0));

      for (int64_t i = 0; i < plan.chunks; ++i) {
        const Chunk chunk = plan.chunk(i);
        const int64_t length = chunk.end - chunk.begin;
        const T* a = gy + k_first + (chunk.first * plan.line_length + chunk.begin) * s.out_channels();
        int64_t lda = s.out_channels();
        if (!s.channels_last()) {
          int64_t lo = s.in[2], hi = 0;
          for (int64_t t = 0; t < axis[2].taps(); ++t)
            for (int64_t w = chunk.begin; w < chunk.end; ++w)
              if (const int64_t source = axis[2].source(w, t); source >= 0)
                lo = std::min(lo, source), hi = std::max(hi, source + 1);
          x_strip.start(x + c_first * x_stride.channel, std::min(lo, hi), hi);
        }
        // Where position 0 of the line of x is that each line of gy meets at each (td, th); nullptr in the padding.
        const T** x_line = x_lines.data();
        for (int64_t line = chunk.first; line < chunk.last; ++line) {
          const int64_t h = line % s.out[1], d = line / s.out[1] % s.out[0], n = line / (s.out[1] * s.out[0]);
          if (!s.channels_last())
            pack_matrix(kernels,
                        gy + n * y_stride.batch + k_first * y_stride.channel + d * y_stride.axis[0] +
                            h * y_stride.axis[1] + chunk.begin,
                        int64_t{1}, y_stride.channel, length, rows, gy_strip + (line - chunk.first) * length * rows,
                        rows);
          for (int64_t td = 0; td < s.kernel[0]; ++td)
            for (int64_t th = 0; th < s.kernel[1]; ++th) {
              const int64_t sd = axis[0].source(d, td), sh = axis[1].source(h, th);
              *x_line++ = sd < 0 || sh < 0 ? nullptr
                          : s.channels_last()
                              ? x + n * x_stride.batch + sd * x_stride.axis[0] + sh * x_stride.axis[1] + c_first
                              : x_strip.line(n, sd, sh, channels);
            }
        }
        if (!s.channels_last()) a = gy_strip, lda = rows;
        // The pixels of the chunk in runs that read tap t evenly: f(first pixel, pixels, where the first reads, step).
        const int64_t step = s.channels_last() ? x_stride.axis[2] : strip_channels;
        const auto each_run = [&](int64_t t, const auto& f) {
          const int64_t tw = t % s.kernel[2];
          const int64_t first = std::clamp(axis[2].first_inside(tw), chunk.begin, chunk.end);
          const int64_t last = std::clamp(axis[2].last_inside(tw), first, chunk.end);
          for (int64_t line = 0; line < chunk.last - chunk.first; ++line) {
            const T* const origin = x_lines[line * line_taps + t / s.kernel[2]];
            const int64_t pixel = line * length - chunk.begin;
            if (!origin) {
              f(pixel + chunk.begin, length, zeros, 0);
              continue;
            }
            const auto border = [&](int64_t begin, int64_t end) {
              if (begin == end) return;
              if (axis[2].mode == PaddingMode::kZeros) return f(pixel + begin, end - begin, zeros, 0);
              for (int64_t w = begin; w < end; ++w) f(pixel + w, 1, origin + axis[2].source(w, tw) * step, 0);
            };
            border(chunk.begin, first);
            f(pixel + first, last - first, origin + (axis[2].offset[tw] + first * axis[2].from_step) * step,
              axis[2].from_step * step);
            border(last, chunk.end);
          }
        };
        const auto find_sources = [&](int64_t t) {
          each_run(t, [&](int64_t pixel, int64_t count, const T* source, int64_t run_step) {
            for (int64_t p = 0; p < count; ++p) sources[pixel + p] = source + p * run_step;
          });
        };
        if (plan.folded) {
          for (int64_t t = 0; t < s.taps(); ++t)
            each_run(t, [&](int64_t pixel, int64_t count, const T* source, int64_t run_step) {
              kernels.copy_rows(source, run_step, count, channels, folded + pixel * plan.columns + t * channels,
                                plan.columns);
            });
          for (int64_t p = 0; p < chunk.pixels(); ++p) sources[p] = folded + p * plan.columns;
        }
        for (int64_t t = t0; t < t1; ++t) {
          if (!plan.folded) find_sources(t);
          T* const total = totals + (t - t0) * rows * columns;
          for (int64_t column = 0; column < columns; column += panels.width)
            for (int64_t row = 0; row < rows; row += kernels.rows) {
              const int64_t tile_rows = std::min<int64_t>(kernels.rows, rows - row);
              kernels.outer[tile_rows - 1]({.depth = chunk.pixels(),
                                            .a = a + row,
                                            .lda = lda,
                                            .b = sources.data(),
                                            .b_offset = column,
                                            .c = total + row * columns + column,
                                            .ldc = columns,
                                            .cols = std::min(panels.width, columns - column)});
            }
        }
      }
      const int64_t tap0 = plan.folded ? 0 : t0, tap1 = plan.folded ? s.taps() : t1;
      for (int64_t t = tap0; t < tap1; ++t) {
        const int64_t tw = t % s.kernel[2], th = t / s.kernel[2] % s.kernel[1], td = t / (s.kernel[2] * s.kernel[1]);
        T* const tap = gw + td * s.weight_stride[2] + th * s.weight_stride[3] + tw * s.weight_stride[4];
        const T* total = totals + (plan.folded ? t * s.in_per_group : (t - t0) * rows * columns);
        for (int64_t k = 0; k < rows; ++k) {
          T* const row = tap + (k_first + k) * s.weight_stride[0] + c0 * s.weight_stride[1];
          for (int64_t c = 0; c < channels; ++c) row[c * s.weight_stride[1]] = total[k * columns + c];
        }
      }
    }
  });
}

}  // namespace

const char* implicit_gemm_backward_weight_decline(const ConvShape& s) {
  if (s.dtype != Dtype::kFloat32 && s.dtype != Dtype::kFloat64) return "only float32 and float64";
  if (s.batch == 0 || s.in_pixels() == 0 || s.out_pixels() == 0) return "nothing to sum over";
  if (s.in_per_group == 0 || s.out_per_group == 0) return "nothing to sum over";
  if (s.taps() > kMaxTaps) return "more than 16384 taps";
  if (s.padding_mode == PaddingMode::kCircular && s.in[2] > kMaxCircular) return "circular lines above 4096 values";
  return nullptr;
}

int64_t implicit_gemm_backward_weight_workspace(const ConvShape& s, int threads) {
  const auto bytes = [&](const auto& kernels) {
    const Plan plan(s);
    const Panels panels(plan.columns, kernels.lanes, kernels.vectors);
    return threads * Scratch(s, plan, Split(s, plan, kernels.rows, panels, threads)).size() * dtype_size(s.dtype);
  };
  const Microkernels& m = microkernels();
  return s.dtype == Dtype::kFloat32 ? bytes(m.f32) : bytes(m.f64);
}

void implicit_gemm_backward_weight(const ConvShape& s, const ConvPointers& p, void* workspace, int threads) {
  const auto typed = [&](auto zero) {
    using T = decltype(zero);
    run<T>(s, static_cast<const T*>(p.grad_output), static_cast<const T*>(p.input), static_cast<T*>(p.result),
           static_cast<T*>(workspace), threads);
  };
  s.dtype == Dtype::kFloat32 ? typed(float{}) : typed(double{});
}

}  // namespace myconv::cpu
