// By rectangles: result pixels that read inside the image through the same taps, so that all rows of a tile lie at one
// distance and every tap at one offset. The other way is implicit_gemm_tiles.h.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/implicit_gemm_pixels.h"

namespace myconv::cpu::implicit_gemm {

inline constexpr int64_t kBandBytes = 256 << 10;  // of what a band of result lines reads for one block of a sum
inline constexpr int64_t kFewBytes = 256;         // a pixel's channels of a group, few of those that lie together
inline constexpr int64_t kSetBytes = 4096;        // apart, lines of memory are in one set of L1
inline constexpr double kConflicts = 1.5;         // how much longer reading takes then
inline constexpr int64_t kCopyBytes = 32 << 10;   // of such a copy: L1
inline constexpr double kCopyCycles = 2;          // of a pixel, and 2 for every vector of it
inline constexpr int64_t kPixelsAtOnce = 32;      // of runs of one tile each
inline constexpr int64_t kMostSegments = 64;      // of an axis, by rectangles
inline constexpr double kAcrossLines = 1.15;      // how much longer a tile across lines takes than one along a line
inline constexpr int64_t kConvertedBytes = 1536 << 10;  // of a thread: packed lines, if what is read has to be

// Positions [begin, end) of a result that read inside through taps [tap0, tap1), and no others. Or an edge: those of one
// tile, of which some read the padding instead.
struct Segment {
  int64_t begin, end, tap0, tap1;
  bool edge = false;
  int64_t length() const { return end - begin; }
  int64_t taps() const { return tap1 - tap0; }
};
using Segments = c10::SmallVector<Segment, 8>;

inline Segments segments(const GatherAxis& axis) {
  c10::SmallVector<int64_t, 16> cuts{0, axis.count};
  for (int64_t t = 0; t < axis.taps(); ++t)
    cuts.push_back(axis.first_inside(t)), cuts.push_back(std::max(axis.first_inside(t), axis.last_inside(t)));
  std::sort(cuts.begin(), cuts.end());
  cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
  Segments found;
  for (size_t i = 0; i + 1 < cuts.size(); ++i) {
    Segment s{cuts[i], cuts[i + 1], 0, 0};
    for (int64_t t = 0; t < axis.taps(); ++t) {
      if (axis.first_inside(t) > s.begin || axis.last_inside(t) < s.end) continue;
      if (s.taps() == 0) s.tap0 = t;
      s.tap1 = t + 1;
    }
    found.push_back(s);
  }
  return found;
}

// The same with as few tiles of so many positions as there can be: those at the edges of a line read zeros, too.
inline Segments segments_of_tiles(const GatherAxis& axis, int64_t rows) {
  int64_t first = 0, last = axis.count;  // from there and to there all taps are inside
  for (int64_t t = 0; t < axis.taps(); ++t)
    first = std::max(first, axis.first_inside(t)), last = std::min(last, axis.last_inside(t));
  const int64_t tiles = ceil_div(axis.count, rows);
  Segments found;
  for (int64_t i = 0; i < tiles; ++i) {
    const Segment s{axis.count * i / tiles, axis.count * (i + 1) / tiles, 0, axis.taps(),
                    axis.count * i / tiles < first || axis.count * (i + 1) / tiles > last};
    if (s.edge || found.empty() || found.back().edge)
      found.push_back(s);
    else
      found.back().end = s.end;
  }
  return found;
}

// By rectangles: what results between two cuts of each axis have in common is found once.
template <typename T>
class Rectangles {
 public:
  using W = Word<T>;

  // Whichever costs less: of what lies there, or of padded copies.
  static Rectangles best(const Gather& g, const GatherPhase& phase, const Kernels<T>& kernels) {
    const Rectangles lying(g, phase, kernels);
    if (!lying.can_pad()) return lying;
    Rectangles padded = lying;
    padded.pad();
    return padded.cost(true) < lying.cost(true) ? padded : lying;
  }

  Rectangles(const Gather& g, const GatherPhase& phase, const Kernels<T>& kernels)
      : g_(g),
        phase_(phase),
        kernels_(kernels),
        channels_(ceil_div(g.from_per_group, kernels.pair)),
        panels_(g.to_per_group, kernels.lanes, kernels.vectors),
        blocks_(reduction_blocks(channels_, phase.taps(), /*taps_inside=*/false)),
        in_place_(reads_in_place(kernels, g.from_per_group)),
        results_ahead_(g.groups == 1 &&
                       fetches_results(g.batch * g.to_pixels() * g.to_per_group * sizeof(T), panels_)) {
    const GatherAxis* a = phase.axis;
    const auto step = [&](int d) { return std::min(a[d].from_step, a[d].from_extent); };  // they may be huge
    const int64_t line = step(1) * a[2].count * step(2) * g.groups * std::min(channels_, kSumLength);
    band_ = std::max<int64_t>(g.groups > 1 ? 1 : kernels.rows,
                              kBandBytes / static_cast<int64_t>(sizeof(W)) / std::max<int64_t>(line, 1));
    for (int d = 0; d < 3; ++d) {
      segments_[d] = segments(a[d]);
      stride_[d] = g.from_stride.axis[d] / kernels.pair;
      to_step_[d] = a[d].to_step * g.to_stride.axis[d];
      if (a[d].taps() == 0) continue;
      const auto [least, most] = std::minmax_element(a[d].offset.begin(), a[d].offset.end());
      low_[d] = *least, reach_[d] = static_cast<double>(*most) - static_cast<double>(*least);
    }
    if (!in_place_) copy_columns(0, a[2].from_extent);
    settle();
  }

  // What a pixel costs, as a share of the products of a full tile.
  double cost(bool skip_zeros) const {
    const int64_t taps = phase_.taps();
    double sum = 0;
    for (const Segments& of_axis : segments_)
      if (static_cast<int64_t>(of_axis.size()) > kMostSegments) return 1e9;
    if (!fits()) return 1e9;
    const double call = call_terms(kernels_, panels_) * static_cast<double>(blocks_.size());
    const double idle = idle_sums(kernels_, panels_);
    for (const Segment& d : segments_[0])
      for (const Segment& h : segments_[1])
        for (const Segment& w : segments_[2]) {
          const int64_t lines = std::min(band_, h.length()), bands = ceil_div(h.length(), lines);
          const int64_t inside = d.taps() * h.taps() * w.taps();
          // What is not left out is done by pointers, anew for each panel.
          double terms = inside == taps || skip_zeros ? static_cast<double>(inside * channels_)
                                                      : static_cast<double>(taps * (channels_ + 16));
          if (w.edge) terms *= idle;
          const bool down = !w.edge && is_down(w.length(), lines);
          const int64_t length = down ? ceil_div(h.length(), bands) : w.length();
          const int64_t runs = down ? w.length() * bands : h.length();
          const int64_t calls = length <= kernels_.rows && !w.edge ? bands : runs;
          sum +=
              static_cast<double>(d.length()) *
              (static_cast<double>(runs) * run_cost(length, kernels_.rows) * terms + static_cast<double>(calls) * call);
        }
    if (in_place_ && conflicts()) sum *= kConflicts;
    if (padded_ && reads_in_place(kernels_, g_.from_per_group)) sum += copy_terms();
    return sum / std::max(1.0, static_cast<double>(taps * channels_) * static_cast<double>(phase_.pixels()));
  }

  // Whether pixels that follow each other meet in one set of the cache, the few channels of a group being all of it that
  // is used.
  bool conflicts() const {
    const int64_t step = std::min(phase_.axis[2].from_step, phase_.axis[2].from_extent) * stride_[2];
    return g_.groups > 1 && step * static_cast<int64_t>(sizeof(W)) % kSetBytes == 0 &&
           channels_ * static_cast<int64_t>(sizeof(W)) <= kFewBytes;
  }
  // What copies cost, in terms of a pixel.
  double copy_terms() const {
    double lines = 0;
    for (const Segment& h : segments_[1]) {
      const double bands = static_cast<double>(ceil_div(h.length(), std::min(band_, h.length())));
      const double again = std::max(0.0, reach_[1] + 1 - phase_.axis[1].from_step);
      lines += static_cast<double>(h.length() * phase_.axis[1].from_step) + bands * again;
    }
    const double pixel = kCopyCycles + 2.0 * static_cast<double>(ceil_div(channels_, kernels_.lanes));
    const double term = static_cast<double>(panels_.width * panels_.count) / kernels_.lanes;
    return static_cast<double>(phase_.axis[0].count) * lines * static_cast<double>(columns_) * pixel / term;
  }

  // Words of a thread: of the lines that a band reads, and of sums that are rounded at their end.
  int64_t converted() const { return in_place_ ? 0 : phase_.axis[0].taps() * stride_[0]; }
  bool fits() const { return converted() <= kConvertedBytes / static_cast<int64_t>(sizeof(W)); }
  int64_t sums() const {
    const int64_t pixels = std::min(band_, phase_.axis[1].count) * phase_.axis[2].count;
    return kIsHalf<T> && blocks_.size() > 1 ? pixels * panels_.width : 0;
  }

  // Result lines [begin, end) of all samples, units [unit0, unit1), whose panels begin at `packed`.
  void multiply(const Operands<T>& o, const W* packed, W* scratch, int64_t begin, int64_t end, int64_t unit0,
                int64_t unit1, bool finite) const {
    const GatherAxis* a = phase_.axis;
    Pieces pieces;
    std::vector<const W*> pixels;
    Band band{.lines = scratch, .sums = scratch + converted(), .pixels = &pixels};
    TileWords<T> words(kernels_, g_.from_per_group, kSumLength);
    const auto block_count = static_cast<int64_t>(blocks_.size()), units = unit1 - unit0;
    for (int64_t at = begin; at < end; at += band.count) {
      band.h = at % a[1].count, band.d = at / a[1].count % a[0].count, band.n = at / a[1].count / a[0].count;
      const Segment &of_d = find(0, band.d), &of_h = find(1, band.h);
      band.count = std::min({band_, of_h.end - band.h, end - at});
      int64_t found = -1, copied = -1;
      fetch_band(o, at + band.count, end, unit1 - unit0, band);
      for (int64_t j = 0; j < block_count * units; ++j) {
        // All panels for a block; sums that are rounded at their end, all blocks for a panel.
        const int64_t i = kIsHalf<T> ? j % block_count : j / units;
        const int64_t unit = unit0 + (kIsHalf<T> ? j / block_count : j % units);
        const Block& block = blocks_[i];
        if (found != i) {
          pieces = {};
          for (const Segment& of_w : segments_[2]) add_piece(of_d, of_h, of_w, band.count, block, finite, pieces);
          found = i;
        }
        if (!in_place_ && copied != unit / panels_.count) {
          copied = unit / panels_.count;
          copy_lines(o, of_d, copied, band);
        }
        const W* const b = packed + (unit - unit0) * unit_size() + block.start * panels_.width;
        for (const Piece& piece : pieces.list)
          if (piece.by_pointers)
            multiply_by_pointers(o, b, band, piece, block, unit, words);
          else if (piece.edge)
            multiply_edge(o, b, band, piece, pieces, block, unit);
          else
            multiply_runs(o, b, band, piece, pieces.terms.data(), block, unit);
      }
    }
  }

  const Panels& panels() const { return panels_; }
  void set_panels(const Panels& panels) { panels_ = panels; }
  const Blocks& blocks() const { return blocks_; }
  int64_t unit_size() const { return phase_.taps() * channels_ * panels_.width; }

 private:
  // Result lines [h, h + count) of depth d of a sample. Packed, what they read is [tap along d][line][pixel][channel]
  // from line `first` on; sums are [line][pixel][column].
  struct Band {
    W *lines, *sums;
    std::vector<const W*>* pixels;  // of an edge
    int64_t n = 0, d = 0, h = 0, count = 0, first = 0;
    const W *next = nullptr, *next_end = nullptr;  // what the next band reads, as far as it is not fetched yet
    int64_t next_step = 0;
    const W* ahead() const { return next < next_end ? next : nullptr; }
  };

  // Of a band of result lines, those positions whose terms are the same; or those of a tile, the terms being its taps,
  // whose pixels are at `reads` from the first one of the line, kOutside being in the padding.
  struct Piece {
    int64_t begin, end, first_run, runs, depth;
    bool down, by_pointers, edge;
    int64_t first_read;
  };
  struct Pieces {
    std::vector<Piece> list;
    std::vector<Term> terms;
    std::vector<int64_t> reads, taps;  // [tap][pixel], and where the weights of a tap are
  };
  static constexpr int64_t kOutside = INT64_MIN;

  // Whether tiles lie across lines: a page each, which must save much.
  bool is_down(int64_t width, int64_t lines) const {
    return kAcrossLines * static_cast<double>(width) * run_cost(lines, kernels_.rows) <
           static_cast<double>(lines) * run_cost(width, kernels_.rows);
  }
  const Segment& find(int axis, int64_t position) const {
    const Segment* found = segments_[axis].begin();
    while (found->end <= position) ++found;
    return *found;
  }
  bool unfinished(const Block& block) const { return block.start + block.terms() < channels_ * phase_.taps(); }

  void add_piece(const Segment& d, const Segment& h, const Segment& w, int64_t lines, const Block& block, bool finite,
                 Pieces& pieces) const {
    const GatherAxis* a = phase_.axis;
    const bool whole = d.taps() == a[0].taps() && h.taps() == a[1].taps() && w.taps() == a[2].taps();
    Piece piece{.begin = w.begin,
                .end = w.end,
                .first_run = static_cast<int64_t>(w.edge ? pieces.taps.size() : pieces.terms.size()),
                .runs = 0,
                .depth = block.channels,
                .down = !w.edge && is_down(w.length(), lines),
                .by_pointers = false,
                .edge = w.edge,
                .first_read = static_cast<int64_t>(pieces.reads.size())};
    piece.by_pointers = !whole && (!finite || a[2].mode != PaddingMode::kZeros);
    // Of a whole kernel line the taps are one run.
    const bool joined = joined_ && !w.edge && block.tap % a[2].taps() == 0 && block.taps % a[2].taps() == 0;
    if (joined) piece.depth = w.taps() * block.channels;
    for (int64_t td = d.tap0; td < d.tap1 && !piece.by_pointers; ++td)
      for (int64_t th = h.tap0; th < h.tap1; ++th)
        for (int64_t tw = w.tap0; tw < (joined ? std::min(w.tap0 + 1, w.tap1) : w.tap1); ++tw) {
          const int64_t tap = (td * a[1].taps() + th) * a[2].taps() + tw - block.tap;
          if (tap < 0 || tap >= block.taps) continue;
          const int64_t of_d = in_place_ ? a[0].offset[td] : td;
          const int64_t source = of_d * stride_[0] + a[1].offset[th] * stride_[1] +
                                 (a[2].offset[tw] - first_column_) * stride_[2] + block.channel;
          ++piece.runs;
          if (!w.edge) {
            pieces.terms.push_back({source, tap * block.channels * panels_.width});
            continue;
          }
          pieces.taps.push_back(tap * block.channels * panels_.width);
          for (int64_t i = w.begin; i < w.end; ++i)
            pieces.reads.push_back(a[2].source(i, tw) < 0 ? kOutside : source + i * from_step_[2]);
        }
    pieces.list.push_back(piece);
  }

  // Lines of a band are copied, columns [first, first + columns) of them.
  void copy_columns(int64_t first, int64_t columns) {
    const GatherAxis& h = phase_.axis[1];
    const double reads = static_cast<double>(std::min(band_, h.count) - 1) * h.from_step + reach_[1] + 1;
    const auto lines = static_cast<int64_t>(std::min(reads, static_cast<double>(h.from_extent)));
    first_column_ = first, columns_ = columns;
    stride_[2] = channels_, stride_[1] = columns_ * channels_, stride_[0] = lines * stride_[1];
  }

  // Lines with the padding to their left and right, all of a group's channels, fit into L1: further away, what is gained
  // by such copies is lost.
  double padded_columns() const {
    return static_cast<double>(phase_.axis[2].count - 1) * phase_.axis[2].from_step + reach_[2] + 1;
  }
  int64_t padded_lines() const {
    return static_cast<int64_t>(kCopyBytes / (padded_columns() * static_cast<double>(channels_ * sizeof(W))));
  }
  bool can_pad() const {
    return g_.groups > 1 && blocks_.size() == 1 && phase_.axis[0].taps() == 1 && phase_.taps() > 0 &&
           static_cast<double>(padded_lines()) > reach_[1];
  }
  void pad() {
    padded_ = true, in_place_ = false;
    band_ = (padded_lines() - static_cast<int64_t>(reach_[1]) - 1) / phase_.axis[1].from_step + 1;
    segments_[2] = {Segment{0, phase_.axis[2].count, 0, phase_.axis[2].taps()}};
    copy_columns(low_[2], static_cast<int64_t>(padded_columns()));
    settle();
  }

  // What follows from where things lie.
  void settle() {
    const GatherAxis* a = phase_.axis;
    for (int d = 0; d < 3; ++d) from_step_[d] = a[d].from_step * stride_[d];
    joined_ = stride_[2] == channels_ && phase_.taps() > 0;
    for (int64_t t = 1; t < a[2].taps(); ++t) joined_ = joined_ && a[2].offset[t] == a[2].offset[t - 1] + 1;
    if (a[2].mode != PaddingMode::kZeros || segments_[2].size() < 2) return;
    const double apart = cost(true);
    Segments tiles = segments_of_tiles(a[2], kernels_.rows);
    std::swap(segments_[2], tiles);
    if (cost(true) > apart) std::swap(segments_[2], tiles);
  }

  // Finds what the lines from line `at` of all samples on read and those of the band do not.
  void fetch_band(const Operands<T>& o, int64_t at, int64_t end, int64_t units, Band& band) const {
    band.next = band.next_end = nullptr;
    const GatherAxis* a = phase_.axis;
    if (!reads_in_place(kernels_, g_.from_per_group) || a[0].taps() != 1 || at >= end) return;
    if (g_.groups > 1 && units < g_.groups * panels_.count) return;  // other threads read the rest of a pixel
    const int64_t h = at % a[1].count, d = at / a[1].count % a[0].count, n = at / a[1].count / a[0].count;
    const auto reach = static_cast<int64_t>(std::min(reach_[1], static_cast<double>(a[1].from_extent)));
    const auto end_of = [&](int64_t line) {
      return std::clamp<int64_t>(line * a[1].from_step + low_[1] + reach + 1, 0, a[1].from_extent);
    };
    const int64_t first = h == 0 ? 0 : end_of(h - 1),
                  last = end_of(std::min({h + band_, a[1].count, h + end - at}) - 1);
    const T* const plane =
        o.from + n * g_.from_stride.batch + (d * a[0].from_step + a[0].offset[0]) * g_.from_stride.axis[0];
    band.next = as_words(plane + first * g_.from_stride.axis[1]);
    band.next_end = as_words(plane + std::max(first, last) * g_.from_stride.axis[1]);
    const int64_t high = kernels_.rows * (panels_.width == kernels_.lanes ? 2 : 1);
    const int64_t steps = units * band.count * ceil_div(a[2].count, high) * phase_.taps() * ceil_div(channels_, 2);
    band.next_step = ceil_div(band.next_end - band.next, std::max<int64_t>(steps, 1));
  }

  // Packs the lines that a band reads.
  void copy_lines(const Operands<T>& o, const Segment& d, int64_t group, Band& band) const {
    const GatherAxis* a = phase_.axis;
    const int64_t values = g_.from_per_group, pixel = g_.from_stride.axis[2], extent = a[2].from_extent;
    const auto high =
        static_cast<int64_t>(std::min(static_cast<double>(low_[1]) + reach_[1], static_cast<double>(a[1].from_extent)));
    band.first = std::clamp<int64_t>(band.h * a[1].from_step + low_[1], 0, a[1].from_extent);
    const int64_t last =
        std::clamp<int64_t>((band.h + band.count - 1) * a[1].from_step + high + 1, band.first, a[1].from_extent);
    // Columns [left, right) of a line are inside, from `inside` on; the others are padding.
    const int64_t inside = std::max<int64_t>(first_column_, 0), left = std::min(inside - first_column_, columns_);
    const int64_t right = std::clamp<int64_t>(extent - first_column_, left, columns_);
    for (int64_t td = d.tap0; td < d.tap1; ++td)
      for (int64_t l = band.first; l < last; ++l) {
        const T* const line = o.from + band.n * g_.from_stride.batch +
                              (band.d * a[0].from_step + a[0].offset[td]) * g_.from_stride.axis[0] +
                              l * g_.from_stride.axis[1] + group * values;
        // The next group's channels of the same pixels: too far apart for the machine to see them coming.
        for (int64_t i = 0; pixel > values && i < extent; ++i) __builtin_prefetch(line + i * pixel + values);
        W* const to = band.lines + td * stride_[0] + (l - band.first) * stride_[1];
        if (pixel == values && values % kernels_.pair == 0) {
          kernels_.copy_rows(line, 0, 1, extent * values, to, 0);
          continue;
        }
        kernels_.copy_rows(line + inside * pixel, pixel, right - left, values, to + left * channels_, channels_);
        for (int64_t i = left > 0 ? 0 : right; i < columns_; i = i + 1 == left ? right : i + 1) {
          const int64_t source = padded_index(first_column_ + i, extent, a[2].mode);
          W* const column = to + i * channels_;
          if (source < 0)
            std::fill_n(column, channels_, W(0));
          else
            kernels_.copy_rows(line + source * pixel, 0, 1, values, column, 0);
        }
      }
  }

  // Where a group's part of what the first pixel of a band reads lies.
  const W* image(const Operands<T>& o, const Band& band, int64_t group) const {
    const W* const first = in_place_ ? as_words(o.from + band.n * g_.from_stride.batch + group * g_.from_per_group) +
                                           band.d * from_step_[0]
                                     : band.lines - band.first * stride_[1];
    return first + band.h * from_step_[1];
  }

  GemmTile<T> tile(const Operands<T>& o, const W* b, const Block& block, int64_t unit, T* const* c, W* sums) const {
    return pointer_tile(g_, panels_, o, block, channels_ * phase_.taps(), unit, b, c, sums);
  }

  // A tile of each line, by pointers.
  void multiply_edge(const Operands<T>& o, const W* b, Band& band, const Piece& piece, const Pieces& pieces,
                     const Block& block, int64_t unit) const {
    const int64_t group = unit / panels_.count, panel = unit % panels_.count, rows = piece.end - piece.begin;
    const int64_t column = group * g_.to_per_group + panels_.begin(panel), count = piece.runs * rows;
    const W *const zeros = as_words(o.zeros), *line = image(o, band, group);
    const int64_t* const reads = pieces.reads.data() + piece.first_read;
    T* result = result_pixel(g_, phase_, {band.n, band.d, band.h, piece.begin}, o.to) + column;
    W* sums = band.sums + piece.begin * panels_.width;
    std::vector<const W*>& pixels = *band.pixels;
    pixels.resize(count);
    for (int64_t l = 0; l < band.count; ++l) {
      for (int64_t i = 0; i < count; ++i) pixels[i] = reads[i] == kOutside ? zeros : line + reads[i];
      T* c[kMaxRows];
      for (int64_t r = 0; r < rows; ++r) c[r] = result + r * to_step_[2];
      GemmTile<T> t = tile(o, b, block, unit, c, sums);
      t.taps = piece.runs, t.a = pixels.data(), t.b_offsets = pieces.taps.data() + piece.first_run;
      t.next = band.ahead();
      kernels_.gemm[rows - 1](t);
      if (t.next) band.next += piece.runs * piece.depth * rows;
      line += from_step_[1];
      result += to_step_[1];
      sums += phase_.axis[2].count * panels_.width;
    }
  }

  void multiply_runs(const Operands<T>& o, const W* b, Band& band, const Piece& piece, const Term* terms,
                     const Block& block, int64_t unit) const {
    const GatherAxis* a = phase_.axis;
    const int64_t group = unit / panels_.count, panel = unit % panels_.count, width = piece.end - piece.begin;
    const int64_t column = group * g_.to_per_group + panels_.begin(panel);
    const int along = piece.down ? 1 : 2, across = piece.down ? 2 : 1;
    const int64_t sums_step[3] = {0, a[2].count * panels_.width, panels_.width};
    GemmRows<T> rows{.tiles = 0,
                     .runs = piece.runs,
                     .depth = piece.depth,
                     .run = terms + piece.first_run,
                     .a = image(o, band, group) + piece.begin * from_step_[2],
                     .a_row = from_step_[along],
                     .b = b,
                     .ldb = panels_.width,
                     .c = result_pixel(g_, phase_, {band.n, band.d, band.h, piece.begin}, o.to) + column,
                     .c_row = to_step_[along],
                     .cols = panels_.size(panel),
                     .column_bias = o.bias ? o.bias + column : nullptr,
                     .accumulate = block.start > 0,
                     .results_ahead = results_ahead_,
                     .partial = band.sums + piece.begin * panels_.width,
                     .partial_step = sums_step[along],
                     .unfinished = unfinished(block)};
    const int64_t length = piece.down ? band.count : width, times = piece.down ? width : band.count;
    // Runs of one tile each are worked on together. Meanwhile the results of those that come next are fetched, if they
    // lie apart from each other.
    const int64_t at_once = length > kernels_.rows ? 1 : std::clamp<int64_t>(kPixelsAtOnce / length, 1, times);
    rows.a_tile = from_step_[across], rows.c_tile = to_step_[across], rows.partial_tile = sums_step[across];
    for (int64_t i = 0; i < times; i += at_once) {
      const int64_t count = std::min(at_once, times - i);
      for (int64_t j = i + count; g_.groups > 1 && j < std::min(times, i + 2 * count); ++j)
        for (int64_t k = 0; k < length; ++k)
          for (int64_t column = 0; column < rows.cols; column += 64 / static_cast<int64_t>(sizeof(T)))
            __builtin_prefetch(rows.c + (j - i) * to_step_[across] + k * to_step_[along] + column, 1);
      rows.next = band.ahead(), rows.next_step = band.next_step, rows.tiles = count;
      band.next = length > kernels_.rows ? multiply_rows(kernels_, rows, length) : kernels_.gemm_rows[length - 1](rows);
      rows.a += count * from_step_[across];
      rows.c += count * to_step_[across];
      rows.partial += count * sums_step[across];
    }
  }

  // The same for pixels that read what is not inside the image.
  void multiply_by_pointers(const Operands<T>& o, const W* b, const Band& band, const Piece& piece, const Block& block,
                            int64_t unit, TileWords<T>& words) const {
    const int64_t group = unit / panels_.count, panel = unit % panels_.count, taps = phase_.taps();
    const int64_t column = group * g_.to_per_group + panels_.begin(panel);
    std::vector<const T*> sources(taps * kernels_.rows);
    for (int64_t l = 0; l < band.count; ++l)
      for (Pixel at{band.n, band.d, band.h + l, piece.begin}; at.w < piece.end;) {
        const int64_t rows = std::min<int64_t>(kernels_.rows, piece.end - at.w);
        W* const sums = band.sums + (l * phase_.axis[2].count + at.w) * panels_.width;
        T* c[kMaxRows];
        for (int64_t r = 0; r < rows; ++r, ++at.w) {
          pixel_sources(g_, phase_, at, o.from, o.zeros, sources.data() + r, rows);
          c[r] = result_pixel(g_, phase_, at, o.to) + column;
        }
        int64_t offset;
        const W* const* const pixels = words.prepare(sources.data() + block.tap * rows, block.taps * rows,
                                                     group * g_.from_per_group, block, offset);
        GemmTile<T> t = tile(o, b, block, unit, c, sums);
        t.a = pixels, t.a_offset = offset;
        kernels_.gemm[rows - 1](t);
      }
  }

  const Gather& g_;
  const GatherPhase& phase_;
  const Kernels<T>& kernels_;
  const int64_t channels_;  // words
  Panels panels_;
  const Blocks blocks_;
  bool in_place_;  // whether what is read is multiplied where it lies, and not a copy of the lines of a band
  bool results_ahead_;
  bool padded_ = false;                     // such a copy, with the padding
  int64_t columns_ = 0, first_column_ = 0;  // of a line of such a copy, and where it begins
  Segments segments_[3];
  int64_t low_[3] = {0, 0, 0};  // of the offsets, and how far they reach
  double reach_[3] = {0, 0, 0};
  int64_t stride_[3], from_step_[3], to_step_[3], band_;  // words; from one result to the next
  bool joined_;                                           // the taps of a kernel line read what lies side by side
};

}  // namespace myconv::cpu::implicit_gemm
