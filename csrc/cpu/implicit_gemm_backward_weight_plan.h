// The plan of implicit_gemm_backward_weight.cpp: which side of the problem is in which role (Problem), how the pixels are cut
// and the operands reached (Plan), and how threads share the work (Split).
#pragma once

#include <algorithm>

#include "cpu/gather.h"
#include "cpu/gemm_blocks.h"
#include "cpu/microkernels.h"

namespace myconv::cpu::weight_gradient {

inline constexpr int64_t kFoldChannels = 7;  // up to so many in channels the rows of a tile are of several taps
inline constexpr int64_t kFoldedPointers = 64 << 10;  // to the rows of a chunk; above it nothing is folded
inline constexpr int64_t kStripBytes = 512 << 10;     // copied lines of a chunk, aimed at
inline constexpr int64_t kPanelBytes = 2 << 20;       // gy of a chunk, packed
inline constexpr int64_t kChunkBytes = 512 << 10;     // x and gy of a chunk, where they lie
inline constexpr int64_t kTileBytes = 256 << 10;      // x of a chunk, packed
inline constexpr int64_t kConflict = 2 << 10;         // where pixels are multiples of it apart
inline constexpr int64_t kTotalBytes = 16 << 20;      // totals of all threads together, unless one tile of each is more
inline constexpr int64_t kMostSlabs = 16;
inline constexpr int64_t kLeastSlabPixels = 512;
inline constexpr int64_t kSlabValues = 128 << 10;  // totals of all slabs together: threads fetch them from each other

// The problem with its sides in their roles: the channels of x are rows, those of gy columns. Exchanged, x and gy have
// changed places. A pointwise convolution of stride 1 has all pixels in one line (NHWC), or a line for each sample.
// Few out channels of stride 1 would fill a few lanes of a vector. Exchanged, they are folded as few in channels are: gy
// is what taps read, from the last one to the first.
struct Problem {
  ConvShape s;
  int64_t weight_group;  // between groups of the result
  bool exchanged = false;
  int64_t first_tap = 0;      // mirrored: where it is in the result
  bool strided = false;       // what is in the place of gy has gaps
  ActivationStrides columns;  // and these strides

  Problem(const ConvShape& shape, int tile_rows, int lanes, int vectors, int pair, bool may_mirror)
      : s(shape), weight_group(shape.out_per_group * shape.weight_stride[0]) {
    if (may_mirror && can_mirror()) {
      mirror();
      columns = activation_strides(s.layout, s.out_channels(), s.out);
      return;
    }
    bool pointwise = s.taps() == 1, merges = true;
    for (int d = 0; d < 3; ++d) {
      merges = merges && s.stride[d] == 1;
      pointwise = pointwise && s.pad[d] == 0 &&  // nor is there padding behind the last pixel, or more than is read
                  (s.stride[d] == 1 ? s.in[d] == s.out[d] : source_index(s.out[d] - 1, s.stride[d], 0, 0, 0) < s.in[d]);
    }
    if (pointwise && merges) {
      const int64_t pixels = s.out_pixels() * (s.channels_last() ? s.batch : 1);
      if (s.channels_last()) s.batch = 1;
      for (int d = 0; d < 3; ++d) s.in[d] = s.out[d] = d < 2 ? 1 : pixels;
    }
    exchanged = pointwise && (s.groups == 1 || 2 * std::min(s.in_per_group, s.out_per_group) > lanes) &&
                cost(s.out_per_group, s.in_per_group, s.weight_stride[1], tile_rows, lanes, vectors, pair, !merges) <
                    cost(s.in_per_group, s.out_per_group, s.weight_stride[0], tile_rows, lanes, vectors, pair, false);
    columns = activation_strides(s.layout, s.out_channels(), s.out);
    if (!exchanged) return;
    strided = !merges;
    columns = activation_strides(s.layout, s.in_channels(), s.in);
    for (int d = 0; d < 3; ++d) columns.axis[d] *= s.stride[d], s.stride[d] = 1, s.in[d] = s.out[d];
    std::swap(s.in_per_group, s.out_per_group);
    std::swap(s.weight_stride[0], s.weight_stride[1]);
  }

  bool mirrored() const { return exchanged && s.taps() > 1; }
  bool can_mirror() const {
    bool can = s.groups == 1 && s.taps() > 1 && s.padding_mode == PaddingMode::kZeros &&
               s.out_per_group <= kFoldChannels && s.out_per_group < s.in_per_group;
    for (int d = 0; d < 3; ++d) can = can && s.stride[d] == 1 && s.pad[d] <= (s.kernel[d] - 1) * s.dilation[d];
    return can;
  }
  void mirror() {
    exchanged = true;
    std::swap(s.in_per_group, s.out_per_group);
    std::swap(s.weight_stride[0], s.weight_stride[1]);
    for (int d = 0; d < 3; ++d) {
      std::swap(s.in[d], s.out[d]);
      s.pad[d] = (s.kernel[d] - 1) * s.dilation[d] - s.pad[d];
      first_tap += (s.kernel[d] - 1) * s.weight_stride[d + 2];
      s.weight_stride[d + 2] = -s.weight_stride[d + 2];
    }
  }

  // About how many cycles a group of a pointwise convolution takes.
  double cost(int64_t rows, int64_t columns, int64_t weight_step, int tile_rows, int lanes, int vectors, int pair,
              bool gaps) const {
    const Panels panels(columns, lanes, vectors);
    const bool in_place = s.channels_last() && dtype_size(s.dtype) > 2;
    const double packing = gaps ? s.channels_last() ? 3 : 40 : in_place ? 0.5 : 5;
    const double tile = 0.5 / pair * std::max(panels.width == lanes ? 1.3 : 1.0, 8.0 / tile_rows);
    const double pixels = static_cast<double>(s.batch * s.out_pixels()), writing = weight_step == 1 ? 2 : 10;
    // Columns are fetched ahead in the order of memory; rows that lie far apart come back from far away for each panel.
    const double again = in_place && panels.count > 1 ? 0.3 : 0;
    return static_cast<double>(panels.vectors) * (pixels * (tile * rows + packing) + writing * rows) +
           pixels * rows * again;
  }
};

// Pixels [begin, end) of the lines [first, last); a line is (n, d, h), and only a single line is ever cut.
struct Chunk {
  int64_t first, last, begin, end;
  int64_t lines() const { return last - first; }
  int64_t length() const { return end - begin; }
  int64_t pixels() const { return lines() * length(); }
};

// How the sum is cut, and how its operands are reached: by the shape and the width of a vector.
struct Plan {
  bool folded, lanes;                        // rows of several taps; lanes of several groups
  int64_t pair;                              // pixels of a word, which follow each other in a line
  bool copies, packs, tiles;                 // x is copied by lines; gy is packed; so is x, a tile of rows at a time
  int64_t groups, rows, taps, columns;       // rows and columns of a group; with lanes, all columns are one group
  int64_t unit;                              // columns of a vector
  int64_t lines, line_length;                // of gy
  int64_t lines_per_chunk, pixels_per_line;  // the largest chunk
  int64_t chunks_per_line, chunks, slabs;
  int64_t line_taps, strip_lines, strip_length;  // of the copies of the largest chunk

  bool at_once() const { return folded || lanes; }             // all channels are copied together
  bool padded() const { return folded || lanes || pair > 1; }  // the copies have their padding

  Plan(const Problem& problem, int64_t word_size, int64_t vector, int64_t pair_of_type) {
    const ConvShape& s = problem.s;
    const bool half = is_half(s.dtype);
    groups = s.groups, rows = s.in_per_group, taps = s.taps(), columns = s.out_per_group, unit = vector;
    lines = s.batch * s.out[0] * s.out[1], line_length = s.out[2];
    line_taps = s.kernel[0] * s.kernel[1];
    const double reach = static_cast<double>(s.kernel[2] - 1) * static_cast<double>(s.dilation[2]) + 1;
    const auto touched = [&](int64_t pixels) {
      if (pair > 1) return s.kernel[2] * ceil_div(pixels, pair);
      const double all = static_cast<double>(pixels - 1) * static_cast<double>(s.stride[2]) + reach;
      if (padded()) return static_cast<int64_t>(std::min(all, 1e12));
      if (s.padding_mode != PaddingMode::kZeros) return s.in[2];
      return static_cast<int64_t>(std::min(all, static_cast<double>(s.in[2])));
    };
    const int64_t together = std::min(groups, vector / columns);  // groups of a vector
    lanes = groups > 1 && (together > 1 ? together * rows <= vector : together == 1 && taps > 1);
    folded = !lanes && rows <= kFoldChannels && taps > 1;
    pair = lanes ? 1 : pair_of_type;
    const int64_t channels = lanes ? together * rows : rows;  // that are copied together
    const int64_t room = kStripBytes / word_size / channels / line_taps;
    // Lines too long, or too many taps, are not copied.
    if (at_once() && (touched(std::min<int64_t>(16, line_length)) > room || rows * taps > kFoldedPointers))
      lanes = folded = false, pair = pair_of_type;
    packs = half || lanes || problem.strided || !s.channels_last() || s.out_channels() * word_size >= 2048;
    if (lanes) unit = together * columns, columns *= groups, groups = 1;

    // Lanes: lines of x and gy stay in L1 for all taps and channels of a vector.
    const int64_t most =
        lanes   ? kSumLength / 2
        : packs ? std::clamp<int64_t>(kPanelBytes * pair / (columns * word_size), 64, kSumLength)
                : std::clamp<int64_t>(kChunkBytes / ((rows + columns) * word_size), kSumLength / 4, kSumLength);
    pixels_per_line = std::min(line_length, most);
    while (at_once() && pixels_per_line > 16 && touched(pixels_per_line) > room) pixels_per_line /= 2;
    chunks_per_line = ceil_div(line_length, pixels_per_line);
    pixels_per_line = round_up(ceil_div(line_length, chunks_per_line), pair);
    chunks_per_line = ceil_div(line_length, pixels_per_line);
    int64_t fit = most / line_length;
    if (at_once()) fit = std::min({fit, room / touched(pixels_per_line), kFoldedPointers / (rows * taps)});
    lines_per_chunk = chunks_per_line > 1 ? 1 : std::clamp<int64_t>(fit, 1, lines);
    chunks = chunks_per_line * ceil_div(lines, lines_per_chunk);
    // As many slabs as there are pixels and room for, a power of two, and chunks of nearly equal size for each.
    const double values = static_cast<double>(groups * rows * taps) * static_cast<double>(columns);
    const double pixels = static_cast<double>(lines) * static_cast<double>(line_length);
    slabs = 1;
    while (slabs < kMostSlabs && 2 * slabs <= chunks && pixels >= 2.0 * slabs * kLeastSlabPixels &&
           values * 2 * slabs <= kSlabValues)
      slabs *= 2;
    if (chunks_per_line == 1) {
      lines_per_chunk = ceil_div(lines, std::min(lines, round_up(chunks, slabs)));
      chunks = ceil_div(lines, lines_per_chunk);
    }
    slabs = std::min(slabs, chunks);
    copies = padded() || half;
    // Pixels at such distances meet in few sets of the second cache.
    tiles = !copies && s.channels_last() && taps == 1 && lines == 1 && s.in_channels() * word_size % kConflict == 0 &&
            columns >= 2 * vector;
    // Neighbouring lines share those they touch, inside a sample.
    const int64_t reach_h = std::min((s.kernel[1] - 1) * std::min(s.dilation[1], s.in[1]) + 1, s.in[1]);
    const int64_t planes = std::min(lines_per_chunk, (lines_per_chunk - 1) / s.out[1] + 2);
    const int64_t shared = s.kernel[0] * (lines_per_chunk * std::min(s.stride[1], s.in[1]) + planes * reach_h);
    strip_lines = std::min(line_taps * lines_per_chunk, shared) + 1;
    strip_length = touched(pixels_per_line);
  }

  int64_t pixels() const { return lines_per_chunk * pixels_per_line; }                 // of the largest chunk
  int64_t words() const { return lines_per_chunk * ceil_div(pixels_per_line, pair); }  // of a column of it

  Chunk chunk(int64_t i) const {
    const int64_t first = i / chunks_per_line * lines_per_chunk, begin = i % chunks_per_line * pixels_per_line;
    return {first, std::min(lines, first + lines_per_chunk), begin, std::min(line_length, begin + pixels_per_line)};
  }
};

// How the work is split into tasks, and the scratch of a thread, in words.
struct Split {
  bool in_place;          // totals are the result itself
  int64_t rows, columns;  // of one task
  int64_t row_tasks, column_tasks, tasks;
  int64_t block;                        // channels whose lines are copied at a time
  int64_t panels, strip, totals, slab;  // scratch; totals of a slab

  Split(const Problem& problem, const Plan& plan, int64_t tile_rows, int64_t vector, int64_t vectors, int64_t word_size,
        int threads) {
    const ConvShape& s = problem.s;
    const int64_t lanes = plan.unit, row_tiles = plan.at_once() ? 1 : ceil_div(plan.rows, tile_rows);
    const int64_t column_vectors = ceil_div(plan.columns, lanes);
    const int64_t problems = plan.groups * plan.slabs;
    in_place = plan.slabs == 1 && plan.taps == 1 && s.weight_stride[0] == 1 && dtype_size(s.dtype) > 2;
    const auto settle = [&](int64_t row_parts, int64_t column_parts) {
      rows = plan.at_once() ? plan.rows : std::min(plan.rows, ceil_div(row_tiles, row_parts) * tile_rows);
      columns = std::min(plan.columns, ceil_div(column_vectors, column_parts) * lanes);
      if (plan.lanes && !s.channels_last()) columns = lanes;  // planes are read from beginning to end
      row_tasks = ceil_div(plan.rows, rows), column_tasks = ceil_div(plan.columns, columns);
      tasks = problems * row_tasks * column_tasks;
    };
    // The cost of the thread with most to do.
    const auto cost = [&] {
      const Panels of_task(columns, lanes, plan.lanes ? 1 : vectors);
      const double tile = of_task.width == lanes ? 1.3 : 1.0;
      const double each = 0.5 * tile * static_cast<double>(rows * plan.taps * of_task.vectors) +
                          (plan.packs ? 5.0 : 0.0) * of_task.vectors + (plan.copies ? 2.0 : 0.2) * rows / 16;
      return each * static_cast<double>(ceil_div(tasks, threads));
    };
    settle(1, 1);
    double best = cost();
    int64_t row_parts = 1, column_parts = 1;
    if (problems < 4 * threads)
      for (int64_t c = 1; c <= std::min<int64_t>(column_vectors, 2 * threads); ++c)
        for (int64_t r = ceil_div(threads, problems * c); r <= row_tiles; r += threads) {
          settle(r, c);
          if (cost() < 0.97 * best) best = cost(), row_parts = r, column_parts = c;
          if (r > threads) break;
        }
    settle(row_parts, column_parts);
    const auto totals_of = [&] { return in_place || plan.slabs > 1 ? 0 : rows * plan.taps * columns; };
    while (totals_of() * word_size * threads > kTotalBytes && (row_parts < row_tiles || columns > lanes)) {
      if (row_parts < row_tiles)
        row_parts *= 2;
      else
        column_parts *= 2;
      settle(row_parts, column_parts);
    }
    block = plan.lanes ? lanes / s.out_per_group * s.in_per_group : rows;
    if (plan.tiles)
      block = std::min(rows, round_up(std::max<int64_t>(kTileBytes / word_size / plan.pixels(), 1), tile_rows));
    if (plan.copies && !plan.at_once())
      block = std::clamp<int64_t>(kStripBytes / word_size / (plan.strip_lines * plan.strip_length), 1, block);
    panels = plan.packs ? plan.words() * (plan.lanes ? 1 : ceil_div(columns, lanes)) * vector : 0;
    strip = plan.copies ? plan.strip_lines * plan.strip_length * block : plan.tiles ? block * plan.pixels() : 0;
    totals = totals_of();
    slab = plan.slabs > 1 ? plan.groups * plan.rows * plan.taps * plan.columns : 0;
  }
  int64_t of_thread() const { return panels + strip + totals + 1; }  // and a zero
};

}  // namespace myconv::cpu::weight_gradient
