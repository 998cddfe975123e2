// Implicit GEMM for forward and backward_input in NHWC: dense and grouped convolutions of any kernel, stride, dilation.
//
// Both directions are gathers (gather.h), and a gather is a matrix product per phase and group whose one operand is
// never built: rows (register tile) are result pixels, columns (vectors) result channels, the depth taps x channels.
// Weights are packed once a call into panels [block][tap][channel][width]; activations are read where they lie:
//
//   by lines      short sums: the lines that a block of result lines reads are copied once with their padding, or lie in
//                 place where there is none; then all pixels of a line read at one distance, in runs of terms
//   by pointers   the others: one for each (tap, pixel); a pixel in the padding points to a row of zeros
//
// Where all weights are finite, a line or a tile leaves out the taps that read nothing but padding, and tiles by pointers
// run along the axis that leaves out most. What is left is summed as before, and adding 0 changes nothing.
//
// 16-bit types are multiplied as words (microkernels.h), in which channels and terms count. Pixels are read where they
// lie if they are whole pairs; else lines are packed as they are copied, and pixels by pointers for each tile.
//
// Sums: blocks of at most kSumLength terms, each from a fresh accumulator, added in order; bias with the first. The
// order does not depend on the tile, so results do not depend on batch or threads.
// Declines: NCHW, types other than floating-point, empty sums, kernels above kMaxTaps, backward_input with a
// padding mode.
#include <algorithm>
#include <atomic>
#include <vector>

#include "cpu/algorithms.h"
#include "cpu/finite.h"
#include "cpu/gather.h"
#include "cpu/gemm_blocks.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace myconv::cpu {
namespace {

constexpr int64_t kMaxPhases = 65536;        // of backward_input: each costs a little set-up
constexpr int64_t kPointerBytes = 64 << 10;  // pointer list of the tiles that one task works on
constexpr int64_t kMaxTilesPerTask = 16;
constexpr int64_t kFewChannels = 16;
constexpr int64_t kLinesBytes = 128 << 10;  // of the lines that a block of result lines reads: they stay in L2
constexpr int64_t kOwnPanels = 128 << 10;   // up to here each thread packs all panels for itself

const char* decline(const ConvShape& s) {
  if (!is_floating_point(s.dtype)) return "only floating-point types";
  if (!s.channels_last()) return "only NHWC";
  if (s.in_per_group == 0 || s.out_per_group == 0 || s.in_pixels() == 0 || s.out_pixels() == 0)
    return "nothing to sum over";
  if (s.taps() > kMaxTaps) return "more than 16384 taps";
  return nullptr;
}

// Whether some result reads padding along the axis.
bool is_padded(const GatherAxis& axis) {
  for (int64_t t = 0; t < axis.taps(); ++t)
    if (axis.first_inside(t) > 0 || axis.last_inside(t) < axis.count) return true;
  return false;
}

// The gather of words: channels, and if these lie as they are multiplied, where they lie.
Gather in_words(const Gather& g, int64_t pair) {
  Gather words = g;
  words.from_per_group = ceil_div(g.from_per_group, pair);
  words.from_stride.batch /= pair;
  for (int64_t& stride : words.from_stride.axis) stride /= pair;
  return words;
}

// Lines that a block of result lines reads, of one group: [tap along d][line][position][channel]. All in words.
struct Lines {
  bool in_place;                                      // nothing is copied
  int64_t low[3] = {0, 0, 0}, reach[3] = {1, 1, 1};   // of the offsets: smallest, largest - smallest + 1
  int64_t width = 0, block = 0, count = 0, size = 0;  // positions of a line, result lines, lines of these, elements

  Lines(const Gather& g, const GatherPhase& phase, int64_t element_size, bool readable) {
    const GatherAxis* a = phase.axis;
    in_place = readable && !is_padded(a[0]) && !is_padded(a[1]) && !is_padded(a[2]) &&
               (g.groups == 1 || g.from_per_group >= kFewChannels);
    if (phase.taps() == 0) return;
    for (int d = 0; d < 3; ++d) {
      const auto [least, most] = std::minmax_element(a[d].offset.begin(), a[d].offset.end());
      if (static_cast<double>(*most) - static_cast<double>(*least) > kLinesBytes) return;
      low[d] = *least, reach[d] = *most - *least + 1;
    }
    width = (a[2].count - 1) * a[2].from_step + reach[2];
    const int64_t line = a[0].taps() * width * g.from_per_group, fit = kLinesBytes / element_size / line;
    if (fit < reach[1]) return;
    block = std::min(a[1].count, (fit - reach[1]) / a[1].from_step + 1);
    count = (block - 1) * a[1].from_step + reach[1];
    size = in_place ? 0 : count * line;
  }
};

// Whether a phase is worked on by lines, and not by pointers: sums of one block, and lines that make a tile.
bool takes_lines(const Gather& g, const GatherPhase& phase, int64_t rows, int64_t element_size, bool readable) {
  const GatherAxis* a = phase.axis;
  const bool long_enough = a[2].count >= rows / 2 || a[0].count * a[1].count == 1;
  return long_enough && phase.taps() * g.from_per_group <= kSumLength &&
         Lines(g, phase, element_size, readable).block > 0;
}

// What one call needs, in words. Packed weights are those of the pass that is being worked on.
struct Workspace {
  int64_t packed, zeros, lines;  // zeros: one pixel; lines: of a thread
  bool own_panels;               // each thread packs all panels for itself: to fetch them from another costs more

  template <typename T>
  Workspace(const Gather& g, const Kernels<T>& kernels, int64_t all_taps) {
    constexpr int64_t size = sizeof(Word<T>);
    const Gather words = in_words(g, kernels.pair);
    const Panels panels(g.to_per_group, kernels.lanes, kernels.vectors);
    const int64_t unit = all_taps * words.from_per_group * panels.width;
    packed = std::min(g.groups * panels.count, std::max<int64_t>(1, kPackedBytes / size / unit)) * unit;
    zeros = g.groups * g.from_per_group;
    lines = 0;
    const bool readable = reads_in_place(kernels, g.from_per_group);
    for (const GatherPhase& phase : g.phases)
      if (takes_lines(words, phase, kernels.rows, size, readable))
        lines = std::max(lines, Lines(words, phase, size, readable).size);
    own_panels = g.groups * panels.count * unit * size <= kOwnPanels;
  }
  int64_t elements(int threads) const {
    return std::max((own_panels ? threads : 1) * packed + threads * lines, packed + zeros);
  }
};

// A result pixel of a phase.
struct Pixel {
  int64_t n, d, h, w;
};

// The tiles of a phase. A tile is a run of pixels along one axis: the one that leaves out most products with padding,
// since a tap is left out where it reads nothing else for a whole tile. Where no tap is, pixels run on from line to
// line.
struct Tiles {
  enum Along { kAll, kBatch, kLine, kColumn } along = kAll;
  int64_t count, of_run, run;  // tiles, tiles of a run, pixels of a run
  int64_t rows, pixels, extent[4];

  Tiles(const Gather& g, const GatherPhase& phase, int64_t rows, bool skip_zeros) : rows(rows) {
    const GatherAxis* a = phase.axis;
    extent[0] = g.batch;
    double live[3];  // of all pairs of a position and a tap, those inside
    for (int d = 0; d < 3; ++d) {
      extent[d + 1] = a[d].count;
      double inside = 0;
      for (int64_t t = 0; t < a[d].taps(); ++t)
        inside += static_cast<double>(std::max<int64_t>(0, a[d].last_inside(t) - a[d].first_inside(t)));
      live[d] = inside / static_cast<double>(std::max<int64_t>(1, a[d].taps() * a[d].count));
    }
    pixels = g.batch * phase.pixels();
    run = pixels;
    // What a pixel costs for the products that are left: a tile of few rows costs no less than one of four.
    const auto cost = [&](int64_t length, double products) {
      const double tile = static_cast<double>(length) / static_cast<double>(ceil_div(length, rows));
      return products * (std::max(tile, 4.0) + 0.7) / tile;
    };
    // Of all pairs of a tile along axis d and a tap, those of which some pixel is inside.
    const auto live_tiles = [&](int d) {
      const int64_t tiles = ceil_div(a[d].count, rows);
      int64_t alive = 0;
      for (int64_t t = 0; t < a[d].taps(); ++t)
        for (int64_t i = 0; i < tiles; ++i)
          alive += std::max(a[d].first_inside(t), a[d].count * i / tiles) <
                   std::min(a[d].last_inside(t), a[d].count * (i + 1) / tiles);
      return static_cast<double>(alive) / static_cast<double>(std::max<int64_t>(1, a[d].taps() * tiles));
    };
    double least = cost(std::max<int64_t>(1, pixels), 1);
    const auto consider = [&](Along axis, int64_t length, double products) {
      if (cost(length, products) >= least) return;
      least = cost(length, products), along = axis, run = length;
    };
    if (skip_zeros && pixels > 0) {
      consider(kLine, a[2].count, live[0] * live[1] * live_tiles(2));
      consider(kColumn, a[1].count, live[0] * live[2] * live_tiles(1));
      consider(kBatch, g.batch, live[0] * live[1] * live[2]);
    }
    of_run = ceil_div(run, rows);
    count = run == 0 ? 0 : pixels / run * of_run;
  }
  // Of the tile, how many pixels precede it in its run.
  int64_t begin(int64_t tile) const {
    const int64_t i = tile % of_run;
    return along == kAll ? i * rows : run * i / of_run;
  }
  int64_t size(int64_t tile) const {
    const int64_t i = tile % of_run;
    return along == kAll ? std::min(rows, run - i * rows) : run * (i + 1) / of_run - run * i / of_run;
  }
  Pixel first(int64_t tile) const {
    int64_t at[4] = {0, 0, 0, 0}, rest = along == kAll ? begin(tile) : tile / of_run;
    const int inner = along == kBatch ? 0 : along == kColumn ? 2 : 3;
    for (int d = 3; d >= 0; --d)
      if (along == kAll || d != inner) at[d] = rest % extent[d], rest /= extent[d];
    if (along != kAll) at[inner] = begin(tile);
    return {at[0], at[1], at[2], at[3]};
  }
  void next(Pixel& p) const {
    if (along == kBatch) return void(++p.n);
    if (along == kColumn) return void(++p.h);
    if (++p.w < extent[3] || along == kLine) return;
    p.w = 0;
    if (++p.h < extent[2]) return;
    p.h = 0;
    if (++p.d < extent[1]) return;
    p.d = 0;
    ++p.n;
  }
};

// sources[t * stride] = where tap t of this pixel is read.
template <typename T>
void pixel_sources(const Gather& g, const GatherPhase& phase, const Pixel& at, const T* from, const T* zeros,
                   const T** sources, int64_t stride) {
  const GatherAxis* a = phase.axis;
  const T* image = from + at.n * g.from_stride.batch;
  for (int64_t td = 0; td < a[0].taps(); ++td) {
    const int64_t d = a[0].source(at.d, td);
    for (int64_t th = 0; th < a[1].taps(); ++th) {
      const int64_t h = a[1].source(at.h, th);
      const T* line = image + d * g.from_stride.axis[0] + h * g.from_stride.axis[1];
      for (int64_t tw = 0; tw < a[2].taps(); ++tw, sources += stride) {
        const int64_t w = a[2].source(at.w, tw);
        *sources = d < 0 || h < 0 || w < 0 ? zeros : line + w * g.from_stride.axis[2];
      }
    }
  }
}

template <typename T>
T* result_pixel(const Gather& g, const GatherPhase& phase, const Pixel& at, T* to) {
  const GatherAxis* a = phase.axis;
  return to + at.n * g.to_stride.batch + (a[0].to_start + at.d * a[0].to_step) * g.to_stride.axis[0] +
         (a[1].to_start + at.h * a[1].to_step) * g.to_stride.axis[1] +
         (a[2].to_start + at.w * a[2].to_step) * g.to_stride.axis[2];
}

// The taps that some pixel of a tile reads outside the padding. Moves their pointers to the front of sources, which is
// [taps][rows], and puts their numbers into live.
template <typename T>
void keep_live_taps(const T* zeros, int64_t taps, int64_t rows, const T** sources, std::vector<int64_t>& live) {
  live.clear();
  for (int64_t t = 0; t < taps; ++t) {
    const T** const of_tap = sources + t * rows;
    if (std::all_of(of_tap, of_tap + rows, [&](const T* source) { return source == zeros; })) continue;
    std::copy_n(of_tap, rows, sources + static_cast<int64_t>(live.size()) * rows);
    live.push_back(t);
  }
}

// The packed weights of a unit: one panel of one group, as [tap][channel][width].
template <typename T>
void pack_unit(const Gather& g, const GatherPhase& phase, const Kernels<T>& kernels, const Panels& panels,
               const T* weight, int64_t unit, const Block& block, Word<T>* target) {
  const int64_t group = unit / panels.count, panel = unit % panels.count, columns = panels.size(panel);
  const int64_t in_channels = g.from_per_group, taps = phase.taps(), first = block.channel * kernels.pair;
  const int64_t channels = std::min(block.channels * kernels.pair, in_channels - first);  // stored values
  const T* const source = weight + group * g.weight_group_stride + panels.begin(panel) * g.weight_to_stride;
  for (int64_t r = 0; columns < panels.width && r < block.terms(); ++r)
    std::fill(target + r * panels.width + columns, target + (r + 1) * panels.width, Word<T>(0));
  // How the terms of a result channel lie.
  bool taps_last = kernels.pair == 1, channels_last = g.weight_from_stride == 1 && in_channels % kernels.pair == 0;
  for (int64_t t = 0; t < taps; ++t) {
    const int64_t offset = g.weight_tap_offset(phase, t);
    taps_last = taps_last && offset == t;
    channels_last = channels_last && offset == t * in_channels;
  }
  if (channels_last)
    return pack_matrix(kernels, source + block.tap * in_channels + first, int64_t{1}, g.weight_to_stride,
                       channels * block.taps, columns, target, panels.width);
  if (taps_last && block.taps > 1) {
    for (int64_t c = 0; c < block.channels; ++c)
      kernels.transpose(source + block.tap + (first + c) * g.weight_from_stride, g.weight_to_stride, columns,
                        block.taps, target + c * panels.width, block.channels * panels.width);
    return;
  }
  for (int64_t t = 0; t < block.taps; ++t)
    pack_matrix(kernels, source + g.weight_tap_offset(phase, block.tap + t) + first * g.weight_from_stride,
                g.weight_from_stride, g.weight_to_stride, channels, columns, target + t * block.channels * panels.width,
                panels.width);
}

// The lines that `count` result lines read, from line h of depth d on, with their padding.
template <typename T>
void copy_lines(const Gather& g, const GatherPhase& phase, const Kernels<T>& kernels, const Lines& plan, const T* image,
                int64_t d, int64_t h, int64_t count, Word<T>* target) {
  using W = Word<T>;
  const GatherAxis* a = phase.axis;
  const int64_t values = g.from_per_group, channels = ceil_div(values, kernels.pair);
  const int64_t pixel = g.from_stride.axis[2], extent = a[2].from_extent;
  const int64_t first = std::clamp<int64_t>(-plan.low[2], 0, plan.width);
  const int64_t last = std::clamp<int64_t>(extent - plan.low[2], first, plan.width);
  const auto outside = [](int64_t at, const GatherAxis& axis) { return at < 0 || at >= axis.from_extent; };
  for (int64_t td = 0; td < a[0].taps(); ++td) {
    const int64_t from_d = a[0].source(d, td);
    W* to = target + td * plan.count * plan.width * channels;
    for (int64_t l = 0; l < (count - 1) * a[1].from_step + plan.reach[1]; ++l, to += plan.width * channels) {
      // What no tap reads may lie beyond any padding mode's reach.
      const int64_t from_h = padded_index(h * a[1].from_step + plan.low[1] + l, a[1].from_extent, a[1].mode);
      if (outside(from_d, a[0]) || outside(from_h, a[1])) {
        std::fill_n(to, plan.width * channels, W(0));
        continue;
      }
      const T* const line = image + from_d * g.from_stride.axis[0] + from_h * g.from_stride.axis[1];
      const auto copy = [&](int64_t at, int64_t i, int64_t pixels) {
        const bool dense = pixel == values && values % kernels.pair == 0;
        kernels.copy_rows(line + at * pixel, pixel, dense ? 1 : pixels, dense ? pixels * values : values,
                          to + i * channels, channels);
      };
      if (first < last) copy(plan.low[2] + first, first, last - first);
      for (int64_t i = 0; i < plan.width; ++i) {
        if (i == first) i = last;
        if (i >= plan.width) break;
        const int64_t at = padded_index(plan.low[2] + i, extent, a[2].mode);
        if (outside(at, a[2]))
          std::fill_n(to + i * channels, channels, W(0));
        else
          copy(at, i, 1);
      }
    }
  }
}

// Terms in runs that are contiguous in a line: all taps of a kernel line, or one tap.
struct Runs {
  int64_t depth;
  c10::SmallVector<Term, 32> all;
  c10::SmallVector<int64_t, 32> d, h;  // taps of each run

  // Offsets from what a result's first tap reads; step: of an axis of what is read.
  Runs(const Gather& g, const GatherPhase& phase, const Lines& plan, const int64_t step[3], int64_t width) {
    const GatherAxis* a = phase.axis;
    bool joined = step[2] == g.from_per_group;
    for (int64_t t = 1; t < a[2].taps(); ++t) joined = joined && a[2].offset[t] == a[2].offset[t - 1] + 1;
    depth = g.from_per_group * (joined ? a[2].taps() : 1);
    int64_t b = 0;
    for (int64_t td = 0; td < a[0].taps(); ++td)
      for (int64_t th = 0; th < a[1].taps(); ++th)
        for (int64_t tw = 0; tw < (joined ? 1 : a[2].taps()); ++tw, b += depth * width) {
          const int64_t at_d = plan.in_place ? a[0].offset[td] - plan.low[0] : td;
          all.push_back(
              {at_d * step[0] + (a[1].offset[th] - plan.low[1]) * step[1] + (a[2].offset[tw] - plan.low[2]) * step[2],
               b});
          d.push_back(td), h.push_back(th);
        }
  }
};

// By lines: result lines [begin, end) of all samples, units [unit0, unit1), whose panels begin at `packed`.
template <typename T>
struct ByLines {
  using W = Word<T>;
  const Gather& g;
  const Gather words;
  const GatherPhase& phase;
  const Kernels<T>& kernels;
  const Panels panels;
  const Lines plan;
  int64_t step[3];
  const Runs runs;

  ByLines(const Gather& g, const GatherPhase& phase, const Kernels<T>& kernels)
      : g(g),
        words(in_words(g, kernels.pair)),
        phase(phase),
        kernels(kernels),
        panels(g.to_per_group, kernels.lanes, kernels.vectors),
        plan(words, phase, sizeof(W), reads_in_place(kernels, g.from_per_group)),
        step{plan.in_place ? words.from_stride.axis[0] : plan.count * plan.width * words.from_per_group,
             plan.in_place ? words.from_stride.axis[1] : plan.width * words.from_per_group,
             plan.in_place ? words.from_stride.axis[2] : words.from_per_group},
        runs(words, phase, plan, step, panels.width) {}

  void multiply(const T* from, const W* bias, T* to, const W* packed, W* scratch, int64_t begin, int64_t end,
                int64_t unit0, int64_t unit1, bool skip_zeros) const {
    const GatherAxis* a = phase.axis;
    const int64_t unit_size = runs.depth * static_cast<int64_t>(runs.all.size()) * panels.width;
    const bool may_skip = skip_zeros && a[0].mode == PaddingMode::kZeros;
    c10::SmallVector<Term, 32> kept;
    for (int64_t at = begin; at < end;) {
      const int64_t h = at % a[1].count, d = at / a[1].count % a[0].count, n = at / a[1].count / a[0].count;
      const int64_t lines = std::min({plan.block, a[1].count - h, end - at});
      int64_t copied = -1;  // group
      for (int64_t unit = unit0; unit < unit1; ++unit, packed += unit_size) {
        const int64_t group = unit / panels.count, panel = unit % panels.count;
        const int64_t column = group * g.to_per_group + panels.begin(panel);
        const T* const image = from + n * g.from_stride.batch + group * g.from_per_group;
        if (!plan.in_place && copied != group) {
          copy_lines(g, phase, kernels, plan, image, d, h, lines, scratch);
          copied = group;
        }
        const W* const origin = plan.in_place ? as_words(image) + (plan.low[0] + d * a[0].from_step) * step[0] +
                                                    (plan.low[1] + h * a[1].from_step) * step[1] + plan.low[2] * step[2]
                                              : scratch;
        for (int64_t l = 0; l < lines; ++l) {
          const Term* run = runs.all.data();
          auto count = static_cast<int64_t>(runs.all.size());
          if (may_skip) {
            kept.clear();
            for (int64_t r = 0; r < count; ++r)
              if (a[0].source(d, runs.d[r]) >= 0 && a[1].source(h + l, runs.h[r]) >= 0) kept.push_back(run[r]);
            run = kept.data(), count = static_cast<int64_t>(kept.size());
          }
          multiply_rows(kernels,
                        {.tiles = 0,
                         .runs = count,
                         .depth = runs.depth,
                         .run = run,
                         .a = origin + l * a[1].from_step * step[1],
                         .a_row = a[2].from_step * step[2],
                         .b = packed,
                         .ldb = panels.width,
                         .c = to + n * g.to_stride.batch + (a[0].to_start + d * a[0].to_step) * g.to_stride.axis[0] +
                              (a[1].to_start + (h + l) * a[1].to_step) * g.to_stride.axis[1] +
                              a[2].to_start * g.to_stride.axis[2] + column,
                         .c_row = a[2].to_step * g.to_stride.axis[2],
                         .cols = panels.size(panel),
                         .column_bias = bias ? bias + column : nullptr,
                         .accumulate = false},
                        a[2].count);
        }
      }
      packed -= (unit1 - unit0) * unit_size;
      at += lines;
    }
  }
};

// By pointers: any shape.
template <typename T>
void multiply_by_pointers(const Gather& g, const GatherPhase& phase, const Kernels<T>& kernels, const T* from,
                          const Word<T>* bias, T* to, const Word<T>* packed, const T* zeros, int64_t first,
                          int64_t last, int threads, bool skip_zeros) {
  using W = Word<T>;
  const int64_t channels = ceil_div(g.from_per_group, kernels.pair), taps = phase.taps(), depth = taps * channels;
  const bool in_place = reads_in_place(kernels, g.from_per_group);
  const Blocks blocks = reduction_blocks(channels, taps, /*taps_inside=*/false);
  const Panels panels(g.to_per_group, kernels.lanes, kernels.vectors);
  const int64_t unit_size = depth * panels.width;
  const Tiles cut(g, phase, kernels.rows, skip_zeros);
  const int64_t pixels = cut.pixels, tiles = cut.count;
  const int64_t fit = std::max<int64_t>(1, kPointerBytes / (std::max<int64_t>(taps, 1) * kernels.rows * sizeof(T*)));
  const int64_t per_task = std::clamp<int64_t>(tiles / (4 * threads), 1, std::min(fit, kMaxTilesPerTask));
  const int64_t chunks = round_up(ceil_div(tiles, per_task), threads);

  const int64_t splits = std::clamp<int64_t>(ceil_div(2 * threads, chunks), 1, last - first);
  const double macs = static_cast<double>(pixels) * depth * (last - first) * panels.width / (chunks * splits);
  parallel_tasks(chunks * splits, macs, [&](int64_t begin, int64_t end) {
    std::vector<const T*> sources(per_task * kernels.rows * taps);
    std::vector<T*> results(per_task * kernels.rows);
    std::vector<std::vector<int64_t>> live(skip_zeros ? per_task : 0);  // taps, of each tile
    std::vector<int64_t> b_offsets(skip_zeros ? taps : 0);
    const bool in_parts = kIsHalf<T> && blocks.size() > 1;  // sums that are rounded at their end
    std::vector<W> sums(in_parts ? per_task * kernels.rows * panels.width : 0);
    std::vector<W> words(in_place ? 0 : kernels.rows * std::min(depth, kSumLength));  // what a tile reads, packed
    std::vector<const W*> a(in_place ? 0 : taps * kernels.rows);
    int64_t prepared = -1;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t chunk = i / splits, split = i % splits;
      const int64_t tile0 = tiles * chunk / chunks, tile1 = tiles * (chunk + 1) / chunks;
      if (prepared != chunk) {
        for (int64_t tile = tile0; tile < tile1; ++tile) {
          Pixel at = cut.first(tile);
          for (int64_t r = 0, rows = cut.size(tile); r < rows; ++r, cut.next(at)) {
            const int64_t slot = (tile - tile0) * kernels.rows;
            pixel_sources(g, phase, at, from, zeros, sources.data() + slot * taps + r, rows);
            results[slot + r] = result_pixel(g, phase, at, to);
          }
        }
        if (skip_zeros)
          for (int64_t tile = tile0; tile < tile1; ++tile)
            keep_live_taps(zeros, taps, cut.size(tile), sources.data() + (tile - tile0) * kernels.rows * taps,
                           live[tile - tile0]);
        prepared = chunk;
      }
      const int64_t unit0 = first + (last - first) * split / splits,
                    unit1 = first + (last - first) * (split + 1) / splits;
      const auto block_count = static_cast<int64_t>(blocks.size());
      for (int64_t j = 0; j < block_count * (unit1 - unit0); ++j) {
        // All panels for a block; sums that are rounded at their end, all blocks for a panel.
        const Block& block = blocks[in_parts ? j % block_count : j / (unit1 - unit0)];
        const int64_t unit = unit0 + (in_parts ? j / block_count : j % (unit1 - unit0));
        const int64_t group = unit / panels.count, panel = unit % panels.count;
        const int64_t column = group * g.to_per_group + panels.begin(panel);
        for (int64_t tile = tile0; tile < tile1; ++tile) {
          const int64_t rows = cut.size(tile), slot = (tile - tile0) * kernels.rows;
          T* c[kMaxRows];
          for (int64_t r = 0; r < rows; ++r) c[r] = results[slot + r] + column;
          int64_t first_tap = block.tap, tap_count = block.taps;
          if (skip_zeros) {
            const std::vector<int64_t>& of_tile = live[tile - tile0];
            const auto begin = std::lower_bound(of_tile.begin(), of_tile.end(), block.tap);
            const auto end = std::lower_bound(begin, of_tile.end(), block.tap + block.taps);
            first_tap = begin - of_tile.begin();
            tap_count = end - begin;
            for (int64_t t = 0; t < tap_count; ++t)
              b_offsets[t] = (begin[t] - block.tap) * block.channels * panels.width;
          }
          const int64_t channel = group * g.from_per_group + block.channel * kernels.pair;
          const T* const* const pixel = sources.data() + slot * taps + first_tap * rows;
          for (int64_t k = 0; !in_place && k < tap_count * rows; ++k) {
            a[k] = words.data() + k * block.channels;
            kernels.copy_rows(pixel[k] + channel, 0, 1,
                              std::min(block.channels * kernels.pair, g.from_per_group - block.channel * kernels.pair),
                              words.data() + k * block.channels, 0);
          }
          kernels.gemm[rows - 1]({.taps = tap_count,
                                  .depth = block.channels,
                                  .a = in_place ? reinterpret_cast<const W* const*>(pixel) : a.data(),
                                  .a_offset = in_place ? channel / kernels.pair : 0,
                                  .a_step = 1,
                                  .b = packed + (unit - first) * unit_size + block.start * panels.width,
                                  .b_offsets = skip_zeros ? b_offsets.data() : nullptr,
                                  .ldb = panels.width,
                                  .c = c,
                                  .cols = panels.size(panel),
                                  .row_bias = nullptr,
                                  .column_bias = bias ? bias + column : nullptr,
                                  .accumulate = block.start > 0,
                                  .partial = sums.data() + slot * panels.width,
                                  .partial_step = panels.width,
                                  .unfinished = block.start + block.terms() < depth});
        }
      }
    }
  });
}

template <typename T>
void run_phase(const Gather& g, const GatherPhase& phase, const Kernels<T>& kernels, const T* from, const T* weight,
               const Word<T>* bias, T* to, const Workspace& sizes, Word<T>* workspace, int threads, bool skip_zeros) {
  using W = Word<T>;
  const GatherAxis* a = phase.axis;
  const Gather words = in_words(g, kernels.pair);
  const int64_t depth = phase.taps() * words.from_per_group;
  const Blocks blocks = reduction_blocks(words.from_per_group, phase.taps(), /*taps_inside=*/false);
  const Panels panels(g.to_per_group, kernels.lanes, kernels.vectors);
  const bool padded = is_padded(a[0]) || is_padded(a[1]) || is_padded(a[2]);
  const bool look = !skip_zeros && padded && a[0].mode == PaddingMode::kZeros;
  const int64_t units = g.groups * panels.count, unit_size = depth * panels.width;
  const auto block_count = static_cast<int64_t>(blocks.size());

  // Packs pieces [begin, end) of the panels from unit `first` on, a piece being a block of a panel. Whether they are
  // known to be finite.
  const auto pack = [&](int64_t first, int64_t begin, int64_t end, W* packed) {
    bool finite = look;
    for (int64_t i = begin; i < end; ++i) {
      const Block& block = blocks[i % block_count];
      const int64_t unit = i / block_count;
      W* const target = packed + unit * unit_size + block.start * panels.width;
      pack_unit(g, phase, kernels, panels, weight, first + unit, block, target);
      finite = finite && kernels.all_finite(target, block.terms() * panels.width);
    }
    return finite;
  };

  const bool by_lines =
      !skip_zeros && takes_lines(words, phase, kernels.rows, sizeof(W), reads_in_place(kernels, g.from_per_group));
  const int64_t lines = g.batch * a[0].count * a[1].count, tiles = lines * ceil_div(a[2].count, kernels.rows);
  const int64_t chunks = std::clamp<int64_t>(tiles / 4, 1, std::min<int64_t>(lines, 16 * threads));
  const double line_macs = static_cast<double>(a[2].count) * unit_size;
  if (by_lines && sizes.own_panels && chunks >= threads) {
    const ByLines<T> work(g, phase, kernels);
    parallel_tasks(lines, line_macs * units, [&](int64_t begin, int64_t end) {
      W* const packed = workspace + at::get_thread_num() * (sizes.packed + sizes.lines);
      const bool finite = pack(0, 0, units * block_count, packed);
      work.multiply(from, bias, to, packed, packed + sizes.packed, begin, end, 0, units, finite);
    });
    return;
  }

  W* const packed = workspace;
  W* const scratch = packed + sizes.packed;
  if (!by_lines) std::fill_n(scratch, sizes.zeros, W(0));
  const int64_t units_per_pass = std::clamp<int64_t>(sizes.packed / std::max<int64_t>(unit_size, 1), 1, units);
  for (int64_t first = 0; first < units; first += units_per_pass) {
    const int64_t last = std::min(units, first + units_per_pass);
    std::atomic<bool> finite = true;
    parallel_tasks((last - first) * block_count, 2.0 * unit_size / block_count, [&](int64_t begin, int64_t end) {
      if (!pack(first, begin, end, packed)) finite = false;
    });
    if (!by_lines) {
      multiply_by_pointers(g, phase, kernels, from, bias, to, packed, reinterpret_cast<const T*>(scratch), first, last,
                           threads, skip_zeros || finite);
      continue;
    }
    const ByLines<T> work(g, phase, kernels);
    const int64_t splits = std::clamp<int64_t>(ceil_div(2 * threads, chunks), 1, last - first);
    parallel_tasks(chunks * splits, line_macs * lines * (last - first) / (chunks * splits),
                   [&](int64_t begin, int64_t end) {
                     W* const copied = scratch + at::get_thread_num() * sizes.lines;
                     for (int64_t i = begin; i < end; ++i) {
                       const int64_t chunk = i / splits, split = i % splits;
                       const int64_t unit0 = first + (last - first) * split / splits;
                       const int64_t unit1 = first + (last - first) * (split + 1) / splits;
                       work.multiply(from, bias, to, packed + (unit0 - first) * unit_size, copied,
                                     lines * chunk / chunks, lines * (chunk + 1) / chunks, unit0, unit1, finite);
                     }
                   });
  }
}

template <typename T>
void run(const ConvShape& s, Direction direction, const void* from, const ConvPointers& p, void* workspace,
         int threads) {
  Gather g = make_gather(s, direction);
  const Kernels<T>& kernels = dense_kernels<T>();
  const Workspace sizes(g, kernels, s.taps());
  const auto* const weight = static_cast<const T*>(p.weight);
  const bool skip_zeros = works_on_padding(s) && all_finite(s, weight);
  if (skip_zeros) drop_idle_taps(g);
  const Bias<T> bias(microkernels(), p.bias, g.groups * g.to_per_group);
  for (const GatherPhase& phase : g.phases)
    run_phase(g, phase, kernels, static_cast<const T*>(from), weight, bias.get(), static_cast<T*>(p.result), sizes,
              static_cast<Word<T>*>(workspace), threads, skip_zeros);
}

void run_any(const ConvShape& s, Direction direction, const void* from, const ConvPointers& p, void* workspace,
             int threads) {
  with_type(s.dtype, [&](auto type) { run<decltype(type)>(s, direction, from, p, workspace, threads); });
}

int64_t workspace(const ConvShape& s, Direction direction, int threads) {
  return with_type(s.dtype, [&](auto type) {
    using T = decltype(type);
    const Workspace sizes(make_gather(s, direction), dense_kernels<T>(), s.taps());
    return sizes.elements(threads) * static_cast<int64_t>(sizeof(Word<T>));
  });
}

}  // namespace

const char* implicit_gemm_forward_decline(const ConvShape& s) { return decline(s); }

const char* implicit_gemm_backward_input_decline(const ConvShape& s) {
  if (s.padding_mode != PaddingMode::kZeros) return "the adjoint of a padding mode";
  double phases = 1;
  for (int d = 0; d < 3; ++d) phases *= static_cast<double>(std::min(s.stride[d], s.in[d]));
  if (phases > kMaxPhases) return "more than 65536 phases";
  return decline(s);
}

int64_t implicit_gemm_forward_workspace(const ConvShape& s, int threads) {
  return workspace(s, Direction::kForward, threads);
}

int64_t implicit_gemm_backward_input_workspace(const ConvShape& s, int threads) {
  return workspace(s, Direction::kBackwardInput, threads);
}

void implicit_gemm_forward(const ConvShape& s, const ConvPointers& p, void* workspace, int threads) {
  run_any(s, Direction::kForward, p.input, p, workspace, threads);
}

void implicit_gemm_backward_input(const ConvShape& s, const ConvPointers& p, void* workspace, int threads) {
  run_any(s, Direction::kBackwardInput, p.grad_output, p, workspace, threads);
}

}  // namespace myconv::cpu
