// Weight gradients of depthwise convolutions: the tiles of depthwise.cpp turned round. gy stays in registers, and what is
// read is multiplied by each gy that it was multiplied into:
//
//     for each walked tap, for each line (NCHW) or pixel (NHWC) that the tile reads: one load
//       sum[k] += loaded * gy[result]                                   up to K multiply-adds
//
// Small planes of NCHW are transposed, vectors of channels of x and gy, and done as NHWC.
//
// Sums are made in three steps: R terms a lane in registers, up to kSumLength tiles in memory, and totals of those. The
// totals of a chunk of the lines (NCHW: samples) are one sum, and chunks are added up in order: there are more than one
// where the channels alone are too few tasks, or where a line of all channels is better read by one thread.
// The lanes of NCHW are added last.
#include <algorithm>
#include <optional>
#include <type_traits>
#include <vector>

#include "cpu/algorithms.h"
#include "cpu/bias_sums.h"
#include "cpu/depthwise_plan.h"

namespace myconv::cpu {
namespace {

using namespace depthwise;

constexpr int64_t kSmallPlanes = 2048;  // NCHW, backward_weight: values of both planes that may be transposed;
constexpr int64_t kManyTaps = 25;       // from so many taps on, four times as many

// At most so many tiles for results of an axis.
int64_t most_tiles(int64_t results) { return results / 7 + 3; }

// The sums of the tiles that are run one after the other, and their totals: `count` values each.
template <typename W>
class WeightSums {
 public:
  WeightSums(const Kernels<W>& kernels, W* sums, W* totals, int64_t count)
      : kernels_(kernels), sums_(sums), totals_(totals), count_(count) {
    std::fill_n(sums_, count_, W(0));
  }
  // Before so many more tiles are added to the sums.
  void reserve(int64_t tiles) {
    if (tiles_ + tiles > kSumLength && tiles_ > 0) {
      finish();
      std::fill_n(sums_, count_, W(0));
    }
    tiles_ += tiles;
  }
  void finish() {
    if (first_)
      std::copy_n(sums_, count_, totals_);
    else
      kernels_.add_rows(totals_, sums_, 0, 1, count_);
    first_ = false;
    tiles_ = 0;
  }

 private:
  const Kernels<W>& kernels_;
  W *sums_, *totals_;
  int64_t count_, tiles_ = 0;
  bool first_ = true;
};

// Where the gradient of a filter's taps goes.
struct WeightTarget {
  bool dense;  // the taps of a filter lie together, in order, and filters too
  c10::SmallVector<int64_t, 64> taps;
  int64_t filter;

  explicit WeightTarget(const ConvShape& s) : filter(s.weight_stride[0]) {
    for (int64_t d = 0; d < s.kernel[0]; ++d)
      for (int64_t h = 0; h < s.kernel[1]; ++h)
        for (int64_t w = 0; w < s.kernel[2]; ++w)
          taps.push_back(d * s.weight_stride[2] + h * s.weight_stride[3] + w * s.weight_stride[4]);
    dense = filter == s.taps();
    for (int64_t t = 0; t < s.taps(); ++t) dense = dense && taps[t] == t;
  }
};

// How lines are summed up: planes that are done together, chunks of the samples, and scratch of a thread, in words.
struct WeightLines {
  int64_t together, chunks, strip, sums;

  WeightLines(const ConvShape& s, const GatherPhase& phase, int64_t size, int64_t lanes) {
    const int64_t word = std::max<int64_t>(4, size), of_plane = s.taps() * lanes;
    strip = LineScratch(phase, size, lanes).strip;
    const int64_t planes = kPlanesBytes / std::max<int64_t>(1, s.in_pixels() * size);
    together = strip > 0 || s.out_per_group > 1 ? 1 : std::clamp<int64_t>(kPlanesBytes / (of_plane * word), 1, 64);
    if (together > 1) together = std::clamp<int64_t>(planes, 1, together);
    together = std::min(together, s.out_channels());
    chunks = std::clamp<int64_t>(kTasks / s.out_channels(), 1, s.batch);
    sums = together * of_plane;
  }
  int64_t thread_words(int64_t) const { return round_up(strip, 16) + 3 * sums; }
  int64_t shared_words(const ConvShape& s, int64_t lanes) const {
    return chunks > 1 ? chunks * s.out_channels() * s.taps() * lanes : 0;
  }
};

template <typename T>
void weight_lines(const ConvShape& s, const Kernels<T>& kernels, const ConvPointers& p, Word<T>* workspace) {
  using W = Word<T>;
  const auto *const gy = static_cast<const T*>(p.grad_output), *const x = static_cast<const T*>(p.input);
  auto* const gw = static_cast<T*>(p.result);
  const Kernels<W>& words = kernels_of<W>(microkernels());
  const Phase phase = phases_of(s, Direction::kForward)[0];
  const StripPlan strip(phase, sizeof(T), kStripBytes);
  const int64_t taps = s.taps(), lanes = kernels.lanes, of_plane = taps * lanes, filters = s.out_channels();
  const WeightLines cut(s, phase, sizeof(T), lanes);
  const bool copies = cut.strip > 0;
  const int64_t line_step[] = {s.in[1] * s.in[2], s.in[2], 1},
                strip_step[] = {strip.strip_lines * strip.pitch, strip.pitch, 1};
  const int64_t sum_step[] = {s.kernel[1] * s.kernel[2] * lanes, s.kernel[2] * lanes, lanes};
  const Plan plan(copies ? strip_phase(phase, strip) : phase, /*lines=*/true, copies ? strip_step : line_step, sum_step,
                  lanes);
  std::optional<BlockRuns> runs;
  if (copies) runs.emplace(phase, strip);
  const int64_t vectors = ceil_div(s.out[2], lanes), in = s.in_pixels(), out = s.out_pixels();
  const int64_t fit = std::max<int64_t>(1, kSumLength / vectors - 3) * 7;  // lines of at most kSumLength tiles
  const int64_t step = copies ? std::min(fit, strip.block_lines) : fit;
  const WeightTarget target(s);
  BiasSums<T> bias(s, p, cut.chunks);
  const int64_t all_lines = s.batch * s.out[0] * s.out[1];
  W* const shared = workspace;
  W* const scratch = workspace + round_up(cut.shared_words(s, lanes), 16);

  // The lanes of some filters' totals, added up in order.
  const auto store = [&](int64_t filter, int64_t planes, const W* totals, W* summed) {
    const int64_t count = planes * taps;
    words.sum_lanes(totals, count, summed);
    if (target.dense) return kernels.store_rows(summed, 0, 1, count, gw + filter * taps, 0);
    for (int64_t i = 0; i < count; ++i)
      kernels.store_rows(summed + i, 0, 1, 1, gw + (filter + i / taps) * target.filter + target.taps[i % taps], 0);
  };

  const double macs = 2.0 * s.macs() / (cut.chunks * filters);
  parallel_tasks(cut.chunks * filters, macs, [&](int64_t begin, int64_t end) {
    W* const mine = scratch + at::get_thread_num() * cut.thread_words(0);
    T* const lines_copy = reinterpret_cast<T*>(mine);
    W* const sums = mine + round_up(cut.strip, 16);
    for (int64_t i = begin, planes; i < end; i += planes) {
      const int64_t chunk = i / filters, f = i % filters;
      planes = std::min({cut.together, end - i, filters - f});
      W* const totals = cut.chunks > 1 ? shared + i * of_plane : sums + cut.sums;
      WeightSums<W> all(words, sums, totals, planes * of_plane);
      for (int64_t n = chunk * s.batch / cut.chunks; n < (chunk + 1) * s.batch / cut.chunks; ++n) {
        const T* const plane = x + (n * s.groups + f / s.out_per_group) * in;
        for (int64_t d = 0; d < s.out[0]; ++d)
          for (int64_t h = 0; h < s.out[1]; h += copies ? strip.block_lines : step) {
            if constexpr (!kIsHalf<T>)
              if (copies) runs->fill(d, h, plane, kernels, lines_copy);
            const int64_t last = copies ? std::min(s.out[1], h + strip.block_lines) : std::min(s.out[1], h + step);
            for (int64_t l = h; l < last; l += step) {
              const int64_t lines = std::min(step, last - l);
              DepthwiseTile<T> tile{};
              tile.planes = planes;
              tile.from_plane = in, tile.to_plane = out, tile.sums_plane = of_plane;
              tile.lists = 1;
              tile.from = copies ? lines_copy : plane;
              tile.extent = plan.axis(2).from_extent;
              tile.gy = gy + (n * filters + f) * out + (d * s.out[1] + l) * s.out[2];
              tile.to_step = tile.length = s.out[2];
              tile.sums = sums;
              tile.rolls = true;
              tile.ahead = copies ? 0 : s.in[2];
              all.reserve(most_tiles(lines) * vectors);
              plan.run(kernels.depthwise, copies ? 0 : d, 0, copies ? l - h : l, lines, tile);
              const int64_t line = (n * s.out[0] + d) * s.out[1] + l;
              bias.add(chunk, line, line + lines, all_lines, f, planes);
            }
          }
      }
      all.finish();
      if (cut.chunks == 1) store(f, planes, totals, sums + 2 * cut.sums);
    }
  });
  bias.store();
  if (cut.chunks == 1) return;
  const int64_t all = filters * of_plane;
  words.add_rows(shared, shared + all, all, cut.chunks - 1, all);
  for (int64_t f = 0; f < filters; ++f) store(f, 1, shared + f * of_plane, scratch);
}

// Small planes of NCHW: vectors of channels are transposed, x and gy of a sample, and done as NHWC. Then no lane is empty,
// and lanes are not added up. Where lines roll, and fill more than half of a vector, they are faster as they lie.
bool transposes_weight(const ConvShape& s, int64_t lanes) {
  const int64_t most = s.taps() >= kManyTaps ? 4 * kSmallPlanes : kSmallPlanes;
  if (lines_roll(s, Direction::kBackwardWeight) && 2 * s.out[2] > lanes) return false;
  return !s.channels_last() && s.out_per_group == 1 && s.groups >= lanes && s.in[0] == 1 && s.out[0] == 1 &&
         s.in_pixels() + s.out_pixels() <= most;
}

// How pixels are summed up: chunks of the lines (where planes are transposed: of the samples), times parts of the vectors
// of filters. Threads meet in the sums of chunks only, so there are few of those, and none where there is little to sum
// over.
struct WeightPixels {
  bool turns;
  int64_t vectors, unit, units, chunks, parts, of_part, images;  // unit: lines; of_part: sums; images: pixels

  WeightPixels(const ConvShape& s, int64_t word, int64_t lanes) : turns(transposes_weight(s, lanes)) {
    constexpr int64_t kChunkPixels = 256, kMostShared = 4 << 20, kPartBytes = 64 << 10;
    const int64_t of_vector = s.taps() * lanes;
    vectors = ceil_div(s.out_channels(), lanes);
    unit = turns ? s.out[1] : 1;
    units = s.batch * s.out[0] * s.out[1] / unit;
    images = turns ? s.in_pixels() + s.out_pixels() : 0;
    const int64_t most = std::min({kTasks, units, kMostShared / (vectors * of_vector * word)});
    const int64_t wanted = turns ? kTasks / vectors : units * s.out[2] / kChunkPixels;
    chunks = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, most));
    const int64_t least = std::max(ceil_div(kTasks, chunks), ceil_div(vectors * of_vector * word, kPartBytes));
    parts = turns ? vectors : std::clamp<int64_t>(least, 1, vectors);
    of_part = ceil_div(vectors, parts) * of_vector;
  }
  int64_t thread_words(int64_t lanes) const { return 2 * of_part + images * lanes; }
  int64_t shared_words(const ConvShape& s, int64_t lanes) const {
    return chunks > 1 ? chunks * vectors * s.taps() * lanes : 0;
  }
};

template <typename T>
void weight_pixels(const ConvShape& s, const Kernels<T>& kernels, const ConvPointers& p, Word<T>* workspace) {
  using W = Word<T>;
  const auto *const gy = static_cast<const T*>(p.grad_output), *const x = static_cast<const T*>(p.input);
  auto* const gw = static_cast<T*>(p.result);
  const Kernels<W>& words = kernels_of<W>(microkernels());
  const int64_t taps = s.taps(), lanes = kernels.lanes, of_vector = taps * lanes, filters = s.out_channels();
  const int64_t multiplier = s.out_per_group, width = s.out[2], in = s.in_pixels(), out = s.out_pixels();
  const WeightPixels cut(s, sizeof(W), lanes);
  const auto x_stride = activation_strides(Layout::kChannelsLast, cut.turns ? lanes : s.groups, s.in);
  const int64_t sum_step[] = {s.kernel[1] * s.kernel[2] * lanes, s.kernel[2] * lanes, lanes};
  const Plan plan(phases_of(s, Direction::kForward)[0], /*lines=*/false, x_stride.axis, sum_step, lanes);
  std::vector<DepthwiseMove> moves;
  if (multiplier > 1) moves = multiplier_moves(filters, multiplier, lanes);
  // Strips of lines whose part of the vectors stays in L2, where a line is read by several tiles.
  const int64_t line_bytes = (s.stride[1] * x_stride.axis[1] + width * filters) * sizeof(T) / cut.parts;
  const bool strips = s.kernel[2] >= 5 && !cut.turns;
  const int64_t columns = std::min(width, (kSumLength - 3) * 7), line_tiles = most_tiles(columns);
  int64_t fit =
      std::min(kSumLength / line_tiles, strips ? std::max<int64_t>(1, kPixelsBytes / line_bytes) : kSumLength);
  const bool rolls = plan.rolled(kernels.depthwise, true) && moves.empty();
  if (rolls) {
    const int64_t step = x_stride.axis[1] * static_cast<int64_t>(sizeof(T));
    if (const int64_t most = rolled_lines(s.out[1], s.stride[1], step); most < kRolledLines) fit = std::min(fit, most);
  }
  const bool streams = !cut.turns && (!rolls || bytes_moved<T>(make_gather(s, Direction::kForward)) > kStreamed);
  const WeightTarget target(s);
  BiasSums<T> bias(s, p, cut.chunks);
  const int64_t all_pixels = s.batch * out;
  W* const shared = workspace;
  W* const scratch = workspace + cut.shared_words(s, lanes);

  const auto store = [&](int64_t vector, const W* totals) {
    const int64_t f = vector * lanes, count = std::min(lanes, filters - f);
    if (target.dense) return kernels.store_transposed(totals, lanes, taps, count, gw + f * taps, taps);
    for (int64_t t = 0; t < taps; ++t)
      for (int64_t c = 0; c < count; ++c)
        kernels.store_rows(totals + t * lanes + c, 0, 1, 1, gw + (f + c) * target.filter + target.taps[t], 0);
  };

  // Vectors [first, last) of lines [begin, end) of a chunk, which are whole samples where planes are transposed.
  const auto sum_up = [&](WeightSums<W>& all, auto from, auto of_gy, const auto& tiles, int64_t chunk, int64_t first,
                          int64_t last, int64_t begin, int64_t end, W* sums) {
    using S = std::remove_const_t<std::remove_pointer_t<decltype(from)>>;
    const int64_t pixel = cut.turns ? lanes : filters;
    for (int64_t line = begin, lists; line < end; line += lists) {
      const int64_t h = line % s.out[1], d = line / s.out[1] % s.out[0], n = line / (s.out[1] * s.out[0]);
      lists = std::min({fit, end - line, s.out[1] - h});
      for (int64_t at = 0; at < width; at += columns) {
        const int64_t count = std::min(columns, width - at);
        all.reserve(lists * most_tiles(count));
        DepthwiseTile<S> tile{};
        tile.planes = last - first;
        tile.from_plane = tile.to_plane = lanes;
        tile.sums_plane = of_vector;
        tile.lists = lists;
        tile.from = from + (cut.turns ? 0 : n * x_stride.batch + (moves.empty() ? first * lanes : 0));
        tile.moves = moves.empty() ? nullptr : moves.data() + first;
        tile.gy = of_gy + ((cut.turns ? h : line) * width + at) * pixel + (cut.turns ? 0 : first * lanes);
        tile.list_step = width * pixel;
        tile.to_step = pixel;
        tile.length = filters - first * lanes;
        tile.sums = sums;
        tile.rolls = moves.empty();
        tile.ahead = streams ? s.stride[1] * x_stride.axis[1] : 0;
        plan.run(tiles, d, h, at, count, tile);
        const int64_t pixels = line * width + at, filter = first * lanes;
        bias.add(chunk, pixels, pixels + (lists - 1) * width + count, all_pixels, filter,
                 std::min(last * lanes, filters) - filter);
      }
    }
  };

  const int64_t tasks = cut.chunks * cut.parts;
  parallel_tasks(tasks, 2.0 * s.macs() / tasks, [&](int64_t begin, int64_t end) {
    W* const sums = scratch + at::get_thread_num() * cut.thread_words(lanes);
    W *const image = sums + 2 * cut.of_part, *const gy_image = image + in * lanes;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t chunk = i / cut.parts, part = i % cut.parts;
      const int64_t first = part * cut.vectors / cut.parts, last = (part + 1) * cut.vectors / cut.parts;
      const int64_t begin_unit = chunk * cut.units / cut.chunks, end_unit = (chunk + 1) * cut.units / cut.chunks;
      W* const totals = cut.chunks > 1 ? shared + (chunk * cut.vectors + first) * of_vector : sums + cut.of_part;
      WeightSums<W> all(words, sums, totals, (last - first) * of_vector);
      if (cut.turns)
        for (int64_t n = begin_unit; n < end_unit; ++n) {
          const int64_t c = n * filters + first * lanes, count = std::min(lanes, filters - first * lanes);
          kernels.transpose(x + c * in, in, count, in, image, lanes);
          kernels.transpose(gy + c * out, out, count, out, gy_image, lanes);
          const W *const from = image, *const of_gy = gy_image;
          sum_up(all, from, of_gy, words.depthwise, chunk, first, last, n * cut.unit, (n + 1) * cut.unit, sums);
        }
      else
        sum_up(all, x, gy, kernels.depthwise, chunk, first, last, begin_unit, end_unit, sums);
      all.finish();
      if (cut.chunks == 1)
        for (int64_t v = first; v < last; ++v) store(v, totals + (v - first) * of_vector);
    }
  });
  bias.store();
  if (cut.chunks == 1) return;
  parallel_tasks(cut.vectors, 4.0 * cut.chunks * of_vector, [&](int64_t begin, int64_t end) {
    const int64_t of_chunk = cut.vectors * of_vector;
    W* const totals = shared + begin * of_vector;
    words.add_rows(totals, totals + of_chunk, of_chunk, cut.chunks - 1, (end - begin) * of_vector);
    for (int64_t v = begin; v < end; ++v) store(v, shared + v * of_vector);
  });
}

}  // namespace

const char* depthwise_backward_weight_decline(const ConvShape& s) {
  return s.batch == 0 ? "nothing to sum over" : decline(s, Direction::kBackwardWeight);
}
const char* depthwise_backward_weight_yield(const ConvShape& s) {
  const bool one_line = s.kernel[0] * s.kernel[1] == 1;
  const int64_t enough = s.channels_last() ? 2 : is_short(s) ? 16 : one_line ? 4 : 8;
  return s.groups == 1 && s.out_per_group >= enough ? "one channel, filters enough for a product" : nullptr;
}

int64_t depthwise_backward_weight_workspace(const ConvShape& s, int threads) {
  const int64_t size = dtype_size(s.dtype), word = std::max<int64_t>(4, size), lanes = lanes_of(size);
  const auto bytes = [&](const auto& cut) {
    return (round_up(cut.shared_words(s, lanes), 16) + threads * cut.thread_words(lanes)) * word;
  };
  return s.channels_last() || transposes_weight(s, lanes)
             ? bytes(WeightPixels(s, word, lanes))
             : bytes(WeightLines(s, phases_of(s, Direction::kForward)[0], size, lanes));
}

void depthwise_backward_weight(const ConvShape& s, const ConvPointers& p, void* workspace, int) {
  with_type(s.dtype, [&](auto type) {
    using T = decltype(type);
    const Kernels<T>& kernels = kernels_of<T>(microkernels());
    (s.channels_last() || transposes_weight(s, kernels.lanes)
         ? weight_pixels<T>
         : weight_lines<T>)(s, kernels, p, static_cast<Word<T>*>(workspace));
  });
}

}  // namespace myconv::cpu
