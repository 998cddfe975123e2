// Implicit GEMM for forward and backward_input in NHWC: dense and grouped convolutions of any kernel, stride, dilation.
//
// Both directions are gathers (gather.h), and a gather is a matrix product per phase and group whose one operand is
// never built: rows (register tile) are result pixels, columns (vectors) result channels, the depth taps x channels.
// Weights are packed once a call into panels [block][tap][channel][width]; activations are read where they lie:
//
//   by rectangles   result pixels that read inside the image through the same taps: all of their rows lie at one
//                   distance and every tap at one offset, so nothing is set up for a tile; taps in the padding are
//                   left out exactly
//   by pointers     images so small that rectangles make no tiles: one pointer for each (tap, pixel); a pixel in the
//                   padding points to a row of zeros
//
// Taps in the padding may be left out where all weights are finite; what is left is summed as before, and adding 0
// changes nothing. Otherwise, and in other padding modes, what reads the padding is done by pointers.
//
// Sums: blocks of at most kSumLength terms, each from a fresh accumulator, added in order; bias with the first. The
// order does not depend on the tile, so results do not depend on batch or threads.
// Declines: NCHW, types other than float32 and float64, empty sums, kernels above kMaxTaps, backward_input with a
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
constexpr int64_t kBandBytes = 256 << 10;  // of what a band of result lines reads for one block of a sum
constexpr int64_t kFewBytes = 256;         // a pixel's channels of a group: what a band reads of them is copied
constexpr int64_t kCopyBytes = 32 << 10;   // of such a copy: L1
constexpr int64_t kOwnPanels = 128 << 10;  // up to here threads that share panels each pack them for themselves
constexpr int64_t kMostSegments = 64;      // of an axis, by rectangles

const char* decline(const ConvShape& s) {
  if (s.dtype != Dtype::kFloat32 && s.dtype != Dtype::kFloat64) return "only float32 and float64";
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

// Positions [begin, end) of a result that read inside through taps [tap0, tap1), and no others.
struct Segment {
  int64_t begin, end, tap0, tap1;
  int64_t length() const { return end - begin; }
  int64_t taps() const { return tap1 - tap0; }
};
using Segments = c10::SmallVector<Segment, 8>;

Segments segments(const GatherAxis& axis) {
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

// What a run of pixels costs, in pixels of full tiles: a tile of few rows costs no less than one of four.
double run_cost(int64_t length, int64_t rows) {
  const int64_t tiles = ceil_div(length, rows);
  return std::max(static_cast<double>(length), 4.0 * static_cast<double>(tiles)) + 0.7 * static_cast<double>(tiles);
}

// Few channels of each of many groups lie far apart, in the same few sets of the cache.
bool are_scattered(const Gather& g, int64_t element_size) {
  return g.groups > 1 && g.from_per_group * element_size <= kFewBytes;
}

// What one call needs, in elements. Packed weights are those of the pass that is being worked on.
struct Workspace {
  int64_t packed, zeros, copy;  // zeros: one pixel; copy: of a thread
  bool own_panels;              // threads that share panels each pack them for themselves: to fetch them costs more

  Workspace(const ConvShape& s, const Gather& g, Direction direction) {
    const bool forward = direction == Direction::kForward;
    const int64_t from = forward ? s.in_per_group : s.out_per_group, to = forward ? s.out_per_group : s.in_per_group;
    const Microkernels& m = microkernels();
    const int64_t lanes = s.dtype == Dtype::kFloat32 ? m.f32.lanes : m.f64.lanes;
    const int64_t vectors = s.dtype == Dtype::kFloat32 ? m.f32.vectors : m.f64.vectors;
    const Panels panels(to, lanes, vectors);
    const int64_t unit = s.taps() * from * panels.width;
    packed = std::min(s.groups * panels.count, std::max<int64_t>(1, kPackedBytes / dtype_size(s.dtype) / unit)) * unit;
    zeros = round_up(s.groups * from, 16);  // what follows begins with a line of the cache
    copy = are_scattered(g, dtype_size(s.dtype)) ? kCopyBytes / dtype_size(s.dtype) : 0;
    own_panels = s.groups * panels.count * unit * dtype_size(s.dtype) <= kOwnPanels;
  }
  int64_t elements(int threads) const { return zeros + threads * copy + (own_panels ? threads : 1) * packed; }
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
  double least;  // what a pixel costs, as a share of the products of a full tile

  Tiles(const Gather& g, const GatherPhase& phase, int64_t rows, bool skip_zeros) : rows(rows) {
    const GatherAxis* a = phase.axis;
    extent[0] = g.batch;
    double live[3];  // of all pairs of a position and a tap, those inside
    for (int d = 0; d < 3; ++d) {
      extent[d + 1] = a[d].count;
      live[d] = share_inside(a[d]);
    }
    pixels = g.batch * phase.pixels();
    run = pixels;
    // What a pixel costs for the products that are left: a tile of few rows costs no less than one of four.
    const auto cost = [&](int64_t length, double products) {
      return products * run_cost(length, rows) / static_cast<double>(length);
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
    least = cost(std::max<int64_t>(1, pixels), 1);
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
               const T* weight, int64_t unit, const Block& block, T* target) {
  const int64_t group = unit / panels.count, panel = unit % panels.count, columns = panels.size(panel);
  const int64_t in_channels = g.from_per_group, taps = phase.taps();
  const T* const source = weight + group * g.weight_group_stride + panels.begin(panel) * g.weight_to_stride;
  for (int64_t r = 0; columns < panels.width && r < block.terms(); ++r)
    std::fill(target + r * panels.width + columns, target + (r + 1) * panels.width, T(0));
  bool taps_last = true, channels_last = g.weight_from_stride == 1;  // how the terms of a result channel lie
  for (int64_t t = 0; t < taps; ++t) {
    const int64_t offset = g.weight_tap_offset(phase, t);
    taps_last = taps_last && offset == t;
    channels_last = channels_last && offset == t * in_channels;
  }
  if (channels_last)
    return pack_matrix(kernels, source + block.tap * in_channels + block.channel, int64_t{1}, g.weight_to_stride,
                       block.terms(), columns, target, panels.width);
  if (taps_last && block.taps > 1) {
    for (int64_t c = 0; c < block.channels; ++c)
      kernels.transpose(source + block.tap + (block.channel + c) * g.weight_from_stride, g.weight_to_stride, columns,
                        block.taps, target + c * panels.width, block.channels * panels.width);
    return;
  }
  for (int64_t t = 0; t < block.taps; ++t)
    pack_matrix(kernels, source + g.weight_tap_offset(phase, block.tap + t) + block.channel * g.weight_from_stride,
                g.weight_from_stride, g.weight_to_stride, block.channels, columns,
                target + t * block.channels * panels.width, panels.width);
}

template <typename T>
struct Operands {
  const T* from;
  const T* bias;
  T* to;
  const T* zeros;  // of a pixel
};

// By rectangles: what results between two cuts of each axis have in common is found once.
template <typename T>
class Rectangles {
 public:
  Rectangles(const Gather& g, const GatherPhase& phase, const Kernels<T>& kernels)
      : g_(g),
        phase_(phase),
        kernels_(kernels),
        panels_(g.to_per_group, kernels.lanes, kernels.vectors),
        blocks_(reduction_blocks(g.from_per_group, phase.taps(), /*taps_inside=*/false)) {
    const GatherAxis* a = phase.axis;
    for (int d = 0; d < 3; ++d) {
      segments_[d] = segments(a[d]);
      to_step_[d] = a[d].to_step * g.to_stride.axis[d];
    }
    const int64_t line = a[1].from_step * a[2].count * a[2].from_step * std::min(g.from_per_group, kSumLength);
    band_ = std::max<int64_t>(kernels.rows, kBandBytes / static_cast<int64_t>(sizeof(T)) / std::max<int64_t>(line, 1));
    if (are_scattered(g, sizeof(T)) && phase.taps() > 0 && a[0].taps() == 1 && blocks_.size() == 1) {
      const auto [low, high] = std::minmax_element(a[1].offset.begin(), a[1].offset.end());
      const int64_t copied_line = a[2].from_extent * g.from_per_group;
      const int64_t fit = kCopyBytes / static_cast<int64_t>(sizeof(T)) / copied_line;
      low_ = *low, high_ = *high, copied_ = high_ - low_ < fit;
      if (copied_) band_ = (fit - (high_ - low_) - 1) / a[1].from_step + 1;
    }
    stride_[0] = copied_ ? 0 : g.from_stride.axis[0];
    stride_[1] = copied_ ? a[2].from_extent * g.from_per_group : g.from_stride.axis[1];
    stride_[2] = copied_ ? g.from_per_group : g.from_stride.axis[2];
    joined_ = stride_[2] == g.from_per_group && phase.taps() > 0;
    for (int64_t t = 1; t < a[2].taps(); ++t) joined_ = joined_ && a[2].offset[t] == a[2].offset[t - 1] + 1;
  }

  // What a pixel costs, as a share of the products of a full tile.
  double cost(bool skip_zeros) const {
    const int64_t taps = phase_.taps();
    double sum = 0;
    for (const Segments& of_axis : segments_)
      if (static_cast<int64_t>(of_axis.size()) > kMostSegments) return 1e9;
    // A call takes as long as this many terms of a pixel.
    const double call = kCallCycles * 2.0 * kernels_.lanes / static_cast<double>(panels_.width) * blocks_.size();
    for (const Segment& d : segments_[0])
      for (const Segment& h : segments_[1])
        for (const Segment& w : segments_[2]) {
          const int64_t lines = std::min(band_, h.length()), bands = ceil_div(h.length(), lines);
          const int64_t inside = d.taps() * h.taps() * w.taps();
          // What is not left out is done by pointers, anew for each panel.
          const double terms = inside == taps || skip_zeros ? static_cast<double>(inside * g_.from_per_group)
                                                            : static_cast<double>(taps * (g_.from_per_group + 16));
          const bool down = is_down(w.length(), lines);
          const double runs = static_cast<double>(down ? w.length() * bands : h.length());
          const double run = run_cost(down ? ceil_div(h.length(), bands) : w.length(), kernels_.rows);
          sum += static_cast<double>(d.length()) * runs * (run * terms + call);
        }
    return sum / std::max(1.0, static_cast<double>(taps * g_.from_per_group) * static_cast<double>(phase_.pixels()));
  }

  // Result lines [begin, end) of all samples, units [unit0, unit1), whose panels begin at `packed`.
  void multiply(const Operands<T>& o, const T* packed, T* copy, int64_t begin, int64_t end, int64_t unit0,
                int64_t unit1, bool finite) const {
    const GatherAxis* a = phase_.axis;
    std::vector<Piece> pieces;
    std::vector<Term> terms;
    std::vector<const T*> sources;
    for (int64_t at = begin; at < end;) {
      const int64_t h = at % a[1].count, d = at / a[1].count % a[0].count, n = at / a[1].count / a[0].count;
      const Segment &of_d = find(0, d), &of_h = find(1, h);
      const int64_t lines = std::min({band_, of_h.end - h, end - at});
      for (const Block& block : blocks_) {
        pieces.clear(), terms.clear();
        for (const Segment& of_w : segments_[2]) add_piece(of_d, of_h, of_w, lines, block, finite, pieces, terms);
        for (int64_t unit = unit0; unit < unit1; ++unit) {
          const T* const b = packed + (unit - unit0) * unit_size() + block.start * panels_.width;
          const T* image = o.from + n * g_.from_stride.batch + unit / panels_.count * g_.from_per_group;
          if (copied_) {
            const int64_t line0 = std::max<int64_t>(0, h * a[1].from_step + low_);
            const int64_t line1 = std::min(a[1].from_extent, (h + lines - 1) * a[1].from_step + high_ + 1);
            if (unit == unit0 || unit % panels_.count == 0) copy_lines(image, d, line0, line1, copy);
            image = copy - line0 * stride_[1];
          }
          for (const Piece& piece : pieces)
            if (piece.by_pointers)
              multiply_by_pointers(o, b, {n, d, h, piece.begin}, lines, piece.end, block, unit, sources);
            else
              multiply_runs(o, image, b, {n, d, h, piece.begin}, lines, piece, terms.data(), block, unit);
        }
      }
      at += lines;
    }
  }

  int64_t unit_size() const { return phase_.taps() * g_.from_per_group * panels_.width; }

 private:
  static constexpr double kCallCycles = 60;

  // Of a band of result lines, those positions whose terms are the same.
  struct Piece {
    int64_t begin, end, first_run, runs, depth;
    bool down, by_pointers;
  };

  // Whether tiles lie across lines.
  bool is_down(int64_t width, int64_t lines) const {
    return static_cast<double>(width) * run_cost(lines, kernels_.rows) <
           static_cast<double>(lines) * run_cost(width, kernels_.rows);
  }
  const Segment& find(int axis, int64_t position) const {
    const Segment* found = segments_[axis].begin();
    while (found->end <= position) ++found;
    return *found;
  }

  void add_piece(const Segment& d, const Segment& h, const Segment& w, int64_t lines, const Block& block, bool finite,
                 std::vector<Piece>& pieces, std::vector<Term>& terms) const {
    const GatherAxis* a = phase_.axis;
    const bool whole = d.taps() == a[0].taps() && h.taps() == a[1].taps() && w.taps() == a[2].taps();
    Piece piece{w.begin, w.end, static_cast<int64_t>(terms.size()), 0, block.channels, is_down(w.length(), lines),
                false};
    piece.by_pointers = !whole && (!finite || a[2].mode != PaddingMode::kZeros);
    // Of a whole kernel line the taps are one run.
    const bool joined = joined_ && block.tap % a[2].taps() == 0 && block.taps % a[2].taps() == 0;
    if (joined) piece.depth = w.taps() * block.channels;
    for (int64_t td = d.tap0; td < d.tap1 && !piece.by_pointers; ++td)
      for (int64_t th = h.tap0; th < h.tap1; ++th)
        for (int64_t tw = w.tap0; tw < (joined ? std::min(w.tap0 + 1, w.tap1) : w.tap1); ++tw) {
          const int64_t tap = (td * a[1].taps() + th) * a[2].taps() + tw - block.tap;
          if (tap < 0 || tap >= block.taps) continue;
          const int64_t source = a[0].offset[td] * stride_[0] + a[1].offset[th] * stride_[1] +
                                 a[2].offset[tw] * stride_[2] + block.channel;
          terms.push_back({source, tap * block.channels * panels_.width});
          ++piece.runs;
        }
    pieces.push_back(piece);
  }

  // copy[line][position][channel] of the lines [line0, line1) that a band at depth d reads, of one group.
  void copy_lines(const T* image, int64_t d, int64_t line0, int64_t line1, T* copy) const {
    const GatherAxis* a = phase_.axis;
    const int64_t from_d = a[0].source(d, 0), pixel = g_.from_stride.axis[2];
    if (from_d < 0) return;  // no piece reads it
    for (int64_t line = line0; line < line1; ++line, copy += stride_[1]) {
      const T* const source = image + from_d * g_.from_stride.axis[0] + line * g_.from_stride.axis[1];
      // The next group's channels of the same pixels: too far apart for the machine to see them coming.
      for (int64_t i = 0; i < a[2].from_extent; ++i) __builtin_prefetch(source + i * pixel + g_.from_per_group);
      kernels_.copy_rows(source, pixel, a[2].from_extent, g_.from_per_group, copy, g_.from_per_group);
    }
  }

  void multiply_runs(const Operands<T>& o, const T* image, const T* b, const Pixel& at, int64_t lines,
                     const Piece& piece, const Term* terms, const Block& block, int64_t unit) const {
    const int64_t group = unit / panels_.count, panel = unit % panels_.count, width = piece.end - piece.begin;
    const int64_t column = group * g_.to_per_group + panels_.begin(panel);
    const GatherAxis* a = phase_.axis;
    const int along = piece.down ? 1 : 2, across = piece.down ? 2 : 1;
    GemmRows<T> rows{.tiles = 0,
                     .runs = piece.runs,
                     .depth = piece.depth,
                     .run = terms + piece.first_run,
                     .a = image + at.d * a[0].from_step * stride_[0] + at.h * a[1].from_step * stride_[1] +
                          at.w * a[2].from_step * stride_[2],
                     .a_row = a[along].from_step * stride_[along],
                     .b = b,
                     .ldb = panels_.width,
                     .c = result_pixel(g_, phase_, at, o.to) + column,
                     .c_row = to_step_[along],
                     .cols = panels_.size(panel),
                     .column_bias = o.bias ? o.bias + column : nullptr,
                     .accumulate = block.start > 0};
    for (int64_t i = 0; i < (piece.down ? width : lines); ++i) {
      multiply_rows(kernels_, rows, piece.down ? lines : width);
      rows.a += a[across].from_step * stride_[across];
      rows.c += to_step_[across];
    }
  }

  // The same for pixels that read what is not inside the image.
  void multiply_by_pointers(const Operands<T>& o, const T* b, Pixel at, int64_t lines, int64_t end, const Block& block,
                            int64_t unit, std::vector<const T*>& sources) const {
    const int64_t group = unit / panels_.count, panel = unit % panels_.count, taps = phase_.taps();
    const int64_t column = group * g_.to_per_group + panels_.begin(panel), begin = at.w;
    sources.resize(taps * kernels_.rows);
    for (const int64_t h = at.h + lines; at.h < h; ++at.h)
      for (at.w = begin; at.w < end;) {
        const int64_t rows = std::min<int64_t>(kernels_.rows, end - at.w);
        T* c[kMaxRows];
        for (int64_t r = 0; r < rows; ++r, ++at.w) {
          pixel_sources(g_, phase_, at, o.from, o.zeros, sources.data() + r, rows);
          c[r] = result_pixel(g_, phase_, at, o.to) + column;
        }
        kernels_.gemm[rows - 1]({.taps = block.taps,
                                 .depth = block.channels,
                                 .a = sources.data() + block.tap * rows,
                                 .a_offset = group * g_.from_per_group + block.channel,
                                 .a_step = 1,
                                 .b = b,
                                 .b_offsets = nullptr,
                                 .ldb = panels_.width,
                                 .c = c,
                                 .cols = panels_.size(panel),
                                 .row_bias = nullptr,
                                 .column_bias = o.bias ? o.bias + column : nullptr,
                                 .accumulate = block.start > 0});
      }
  }

  const Gather& g_;
  const GatherPhase& phase_;
  const Kernels<T>& kernels_;
  const Panels panels_;
  const Blocks blocks_;
  Segments segments_[3];
  int64_t stride_[3], to_step_[3];  // stride_: of what is read, an image or a copy
  int64_t band_;                    // result lines that are worked on together
  int64_t low_ = 0, high_ = 0;      // lines that a result line reads, copied
  bool copied_ = false, joined_;    // joined: the taps of a kernel line read what lies side by side
};

// How threads share result lines and units: as many pieces of either as together make one for each thread.
struct Split {
  int64_t lines = 1, units = 1;

  Split(int64_t all_lines, int64_t all_units, int threads) {
    const auto cost = [](int64_t all, int64_t pieces) {
      return static_cast<double>(ceil_div(all, pieces)) * static_cast<double>(pieces) / static_cast<double>(all);
    };
    double best = -1;
    for (int64_t u = 1; u <= std::min<int64_t>(threads, all_units); ++u) {
      const int64_t l = std::clamp<int64_t>(all_lines, 1, threads / u);
      const double idle = static_cast<double>(threads) / static_cast<double>(l * u);
      const double now = cost(all_lines, l) * cost(all_units, u) * idle;
      if (best < 0 || now < best) best = now, lines = l, units = u;
    }
  }
};

// By pointers: any shape.
template <typename T>
void multiply_by_pointers(const Gather& g, const GatherPhase& phase, const Kernels<T>& kernels, const T* from,
                          const T* bias, T* to, const T* packed, const T* zeros, int64_t first, int64_t last,
                          int threads, bool skip_zeros) {
  const int64_t taps = phase.taps(), depth = taps * g.from_per_group;
  const Blocks blocks = reduction_blocks(g.from_per_group, taps, /*taps_inside=*/false);
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
      for (const Block& block : blocks)
        for (int64_t unit = unit0; unit < unit1; ++unit) {
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
            kernels.gemm[rows - 1]({.taps = tap_count,
                                    .depth = block.channels,
                                    .a = sources.data() + slot * taps + first_tap * rows,
                                    .a_offset = group * g.from_per_group + block.channel,
                                    .a_step = 1,
                                    .b = packed + (unit - first) * unit_size + block.start * panels.width,
                                    .b_offsets = skip_zeros ? b_offsets.data() : nullptr,
                                    .ldb = panels.width,
                                    .c = c,
                                    .cols = panels.size(panel),
                                    .row_bias = nullptr,
                                    .column_bias = bias ? bias + column : nullptr,
                                    .accumulate = block.start > 0});
          }
        }
    }
  });
}

// What a pixel costs by pointers, as a share of the products of a full tile: setting up a pointer takes about 8 cycles.
template <typename T>
double pointer_cost(const Gather& g, const GatherPhase& phase, const Kernels<T>& kernels, bool skip_zeros) {
  const auto vectors = static_cast<double>(ceil_div(g.to_per_group, kernels.lanes) * g.groups);
  return Tiles(g, phase, kernels.rows, skip_zeros).least + 16 / (vectors * static_cast<double>(g.from_per_group));
}

template <typename T>
void run_phase(const Gather& g, const GatherPhase& phase, const Kernels<T>& kernels, const T* from, const T* weight,
               const T* bias, T* to, const Workspace& sizes, T* workspace, int threads, bool skip_zeros) {
  const GatherAxis* a = phase.axis;
  const int64_t depth = phase.taps() * g.from_per_group;
  const Blocks blocks = reduction_blocks(g.from_per_group, phase.taps(), /*taps_inside=*/false);
  const Panels panels(g.to_per_group, kernels.lanes, kernels.vectors);
  const bool padded = is_padded(a[0]) || is_padded(a[1]) || is_padded(a[2]);
  const bool look = !skip_zeros && padded && a[0].mode == PaddingMode::kZeros;
  const int64_t units = g.groups * panels.count, unit_size = depth * panels.width;
  const auto block_count = static_cast<int64_t>(blocks.size());

  // Packs pieces [begin, end) of the panels from unit `first` on, a piece being a block of a panel. Whether products
  // with the padding may be left out.
  const auto pack = [&](int64_t first, int64_t begin, int64_t end, T* packed) {
    bool finite = look || skip_zeros;
    for (int64_t i = begin; i < end; ++i) {
      const Block& block = blocks[i % block_count];
      const int64_t unit = i / block_count;
      T* const target = packed + unit * unit_size + block.start * panels.width;
      pack_unit(g, phase, kernels, panels, weight, first + unit, block, target);
      finite = finite && (!look || kernels.all_finite(target, block.terms() * panels.width));
    }
    return finite;
  };

  T* const zeros = workspace;
  T* const copies = zeros + sizes.zeros;
  T* const packed = copies + threads * sizes.copy;
  std::fill_n(zeros, sizes.zeros, T(0));
  const Operands<T> o{from, bias, to, zeros};
  const Rectangles<T> rectangles(g, phase, kernels);
  const bool may_skip = look || skip_zeros;
  const bool by_rectangles = rectangles.cost(may_skip) <= pointer_cost(g, phase, kernels, may_skip);
  const int64_t lines = g.batch * a[0].count * a[1].count;
  const double macs = static_cast<double>(g.batch) * static_cast<double>(phase.pixels()) * static_cast<double>(depth);
  const int64_t units_per_pass = std::clamp<int64_t>(sizes.packed / std::max<int64_t>(unit_size, 1), 1, units);
  for (int64_t first = 0; first < units; first += units_per_pass) {
    const int64_t count = std::min(units_per_pass, units - first);
    const Split split(lines, count, threads);
    const bool own = by_rectangles && (split.lines == 1 || sizes.own_panels);
    std::atomic<bool> all_finite = true;
    if (!own)
      parallel_tasks(count * block_count, 2.0 * unit_size / block_count, [&](int64_t begin, int64_t end) {
        if (!pack(first, begin, end, packed)) all_finite = false;
      });
    if (!by_rectangles) {
      multiply_by_pointers(g, phase, kernels, from, bias, to, packed, zeros, first, first + count, threads, all_finite);
      continue;
    }
    parallel_tasks(split.lines * split.units, macs * count * panels.width / (split.lines * split.units),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t i = begin; i < end; ++i) {
                       const int64_t line = i % split.lines, unit = i / split.lines;
                       const int64_t unit0 = count * unit / split.units, unit1 = count * (unit + 1) / split.units;
                       T* panels_of_mine = packed + unit0 * unit_size;
                       bool finite = all_finite;
                       if (own) {
                         if (split.lines > 1) panels_of_mine += at::get_thread_num() * sizes.packed;
                         finite = pack(first + unit0, 0, (unit1 - unit0) * block_count, panels_of_mine);
                       }
                       rectangles.multiply(o, panels_of_mine, copies + at::get_thread_num() * sizes.copy,
                                           lines * line / split.lines, lines * (line + 1) / split.lines, first + unit0,
                                           first + unit1, finite);
                     }
                   });
  }
}

template <typename T>
void run(const ConvShape& s, Direction direction, const void* from, const void* weight, const void* bias, void* to,
         void* workspace, int threads) {
  Gather g = make_gather(s, direction);
  const Workspace sizes(s, g, direction);
  const bool skip_zeros = works_on_padding(s) && all_finite(s, static_cast<const T*>(weight));
  if (skip_zeros) drop_idle_taps(g);
  const Kernels<T>& kernels = kernels_of<T>(microkernels());
  for (const GatherPhase& phase : g.phases)
    run_phase(g, phase, kernels, static_cast<const T*>(from), static_cast<const T*>(weight),
              static_cast<const T*>(bias), static_cast<T*>(to), sizes, static_cast<T*>(workspace), threads, skip_zeros);
}

void run(const ConvShape& s, Direction direction, const void* from, const ConvPointers& p, void* workspace,
         int threads) {
  const auto f = s.dtype == Dtype::kFloat32 ? run<float> : run<double>;
  f(s, direction, from, p.weight, p.bias, p.result, workspace, threads);
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
  return Workspace(s, make_gather(s, Direction::kForward), Direction::kForward).elements(threads) * dtype_size(s.dtype);
}

int64_t implicit_gemm_backward_input_workspace(const ConvShape& s, int threads) {
  return Workspace(s, make_gather(s, Direction::kBackwardInput), Direction::kBackwardInput).elements(threads) *
         dtype_size(s.dtype);
}

void implicit_gemm_forward(const ConvShape& s, const ConvPointers& p, void* workspace, int threads) {
  run(s, Direction::kForward, p.input, p, workspace, threads);
}

void implicit_gemm_backward_input(const ConvShape& s, const ConvPointers& p, void* workspace, int threads) {
  run(s, Direction::kBackwardInput, p.grad_output, p, workspace, threads);
}

}  // namespace myconv::cpu
