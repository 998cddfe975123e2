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
// 16-bit types are multiplied as words (stored.h), in which channels and terms count. Pixels are read where they
// lie if they are whole pairs; else they are packed, for rectangles the lines that a band of result lines reads.
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

constexpr int64_t kMaxPhases = 65536;            // of backward_input: each costs a little set-up
constexpr int64_t kPointerBytes = 64 << 10;      // pointers to what tiles read at a time
constexpr int64_t kMostTilesAtOnce = 16;         // by pointers
constexpr int64_t kBandBytes = 256 << 10;        // of what a band of result lines reads for one block of a sum
constexpr int64_t kFewBytes = 256;               // a pixel's channels of a group, few of those that lie together
constexpr int64_t kSetBytes = 4096;              // apart, lines of memory are in one set of L1
constexpr double kConflicts = 1.5;               // how much longer reading takes then
constexpr int64_t kCopyBytes = 32 << 10;         // of such a copy: L1
constexpr double kCopyCycles = 2;                // of a pixel, and 2 for every vector of it
constexpr int64_t kOwnPanels = 16 << 20;         // of all threads, that share panels and each pack them for themselves
constexpr int64_t kOwnPixels = 192;              // of a thread, from which on that takes little
constexpr int64_t kMostSegments = 64;            // of an axis, by rectangles
constexpr double kAcrossLines = 1.15;            // how much longer a tile across lines takes than one along a line
constexpr int64_t kConvertedBytes = 1536 << 10;  // of a thread: packed lines, if what is read has to be

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

// Positions [begin, end) of a result that read inside through taps [tap0, tap1), and no others. Or an edge: those of one
// tile, of which some read the padding instead.
struct Segment {
  int64_t begin, end, tap0, tap1;
  bool edge = false;
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

// The same with as few tiles of so many positions as there can be: those at the edges of a line read zeros, too.
Segments segments_of_tiles(const GatherAxis& axis, int64_t rows) {
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

// What a run of pixels costs, in pixels of full tiles: a tile of few rows costs no less than one of four.
double run_cost(int64_t length, int64_t rows) {
  const int64_t tiles = ceil_div(length, rows);
  return std::max(static_cast<double>(length), 4.0 * static_cast<double>(tiles)) + 0.7 * static_cast<double>(tiles);
}

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

// The pixels of a tile by pointers, as they are multiplied: where they lie, or packed.
template <typename T>
class TileWords {
 public:
  TileWords(const Kernels<T>& kernels, int64_t channels, int64_t block_terms)
      : kernels_(kernels),
        channels_(channels),
        in_place_(reads_in_place(kernels, channels)),
        words_(in_place_ ? 0 : kernels.rows * block_terms) {}

  // Of `count` pixels: the channels of a block, from the group's first one on. `offset` is theirs in what is returned.
  const Word<T>* const* prepare(const T* const* pixels, int64_t count, int64_t group_channel, const Block& block,
                                int64_t& offset) {
    const int64_t first = block.channel * kernels_.pair;
    if (in_place_) {
      offset = (group_channel + first) / kernels_.pair;
      return reinterpret_cast<const Word<T>* const*>(pixels);
    }
    offset = 0;
    pointers_.resize(count);
    for (int64_t i = 0; i < count; ++i) {
      Word<T>* const to = words_.data() + i * block.channels;
      kernels_.copy_rows(pixels[i] + group_channel + first, 0, 1,
                         std::min(block.channels * kernels_.pair, channels_ - first), to, 0);
      pointers_[i] = to;
    }
    return pointers_.data();
  }

 private:
  const Kernels<T>& kernels_;
  const int64_t channels_;
  const bool in_place_;
  std::vector<Word<T>> words_;
  std::vector<const Word<T>*> pointers_;
};

template <typename T>
struct Operands {
  const T* from;
  const Word<T>* bias;
  T* to;
  const T* zeros;  // of a pixel
};

// A call of a kernel takes as long as this many terms of a pixel.
template <typename T>
double call_terms(const Kernels<T>& kernels, const Panels& panels) {
  constexpr double kCallCycles = 60;
  return kCallCycles * 2.0 * kernels.lanes / static_cast<double>(panels.width);
}

// How much longer a tile by pointers takes for having fewer sums than are begun before the first is done.
template <typename T>
double idle_sums(const Kernels<T>& kernels, const Panels& panels) {
  constexpr int64_t kSums = 8;
  int64_t cycles = 0;
  for (int64_t i = 0; i < panels.count; ++i)
    cycles += std::max(kSums, kernels.rows * ceil_div(panels.size(i), panels.lanes));
  return static_cast<double>(cycles) / static_cast<double>(kernels.rows * panels.vectors);
}

// By rectangles: what results between two cuts of each axis have in common is found once.
template <typename T>
class Rectangles {
 public:
  using W = Word<T>;

  // Padded: of copies of what a band of result lines reads, with the padding to its left and right.
  Rectangles(const Gather& g, const GatherPhase& phase, const Kernels<T>& kernels, bool padded)
      : g_(g),
        phase_(phase),
        kernels_(kernels),
        channels_(ceil_div(g.from_per_group, kernels.pair)),
        panels_(g.to_per_group, kernels.lanes, kernels.vectors),
        blocks_(reduction_blocks(channels_, phase.taps(), /*taps_inside=*/false)),
        padded_(padded),
        in_place_(!padded && reads_in_place(kernels, g.from_per_group)) {
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
    if (!in_place_) {
      columns_ = a[2].from_extent;
      if (padded) {
        // All of a group's channels at once, in L1; further away, what is gained by it is lost.
        const double width = static_cast<double>(a[2].count - 1) * a[2].from_step + reach_[2] + 1;
        const auto fit = static_cast<int64_t>(kCopyBytes / (width * static_cast<double>(channels_ * sizeof(W))));
        if (blocks_.size() > 1 || a[0].taps() != 1 || phase.taps() == 0 || static_cast<double>(fit) <= reach_[1]) {
          padded_ = false;
          return;
        }
        columns_ = static_cast<int64_t>(width), first_column_ = low_[2];
        band_ = (fit - static_cast<int64_t>(reach_[1]) - 1) / a[1].from_step + 1;
        segments_[2] = {Segment{0, a[2].count, 0, a[2].taps()}};
      }
      const double reads = static_cast<double>(std::min(band_, a[1].count) - 1) * a[1].from_step + reach_[1] + 1;
      const auto lines = static_cast<int64_t>(std::min(reads, static_cast<double>(a[1].from_extent)));
      stride_[2] = channels_, stride_[1] = columns_ * channels_, stride_[0] = lines * stride_[1];
    }
    for (int d = 0; d < 3; ++d) from_step_[d] = a[d].from_step * stride_[d];
    joined_ = stride_[2] == channels_ && phase.taps() > 0;
    for (int64_t t = 1; t < a[2].taps(); ++t) joined_ = joined_ && a[2].offset[t] == a[2].offset[t - 1] + 1;
    if (a[2].mode != PaddingMode::kZeros || segments_[2].size() < 2) return;
    const double apart = cost(true);
    Segments tiles = segments_of_tiles(a[2], kernels.rows);
    std::swap(segments_[2], tiles);
    if (cost(true) > apart) std::swap(segments_[2], tiles);
  }

  // Whichever costs less.
  static Rectangles best(const Gather& g, const GatherPhase& phase, const Kernels<T>& kernels) {
    const Rectangles lying(g, phase, kernels, false);
    if (g.groups == 1) return lying;
    const Rectangles padded(g, phase, kernels, true);
    return padded.padded_ && padded.cost(true) < lying.cost(true) ? padded : lying;
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
    return g_.groups > 1 && from_step_[2] * static_cast<int64_t>(sizeof(W)) % kSetBytes == 0 &&
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

  // Finds what the lines from line `at` of all samples on read and those of the band do not.
  void fetch_band(const Operands<T>& o, int64_t at, int64_t end, int64_t units, Band& band) const {
    band.next = band.next_end = nullptr;
    const GatherAxis* a = phase_.axis;
    if (!reads_in_place(kernels_, g_.from_per_group) || a[0].taps() != 1 || at >= end) return;
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

  // What tiles by pointers have in common: all but what they read.
  GemmTile<T> tile(const Operands<T>& o, const W* b, const Block& block, int64_t unit, T* const* c, W* sums) const {
    const int64_t panel = unit % panels_.count, column = unit / panels_.count * g_.to_per_group + panels_.begin(panel);
    return {.taps = block.taps,
            .depth = block.channels,
            .a = nullptr,
            .a_offset = 0,
            .a_step = 1,
            .b = b,
            .b_offsets = nullptr,
            .ldb = panels_.width,
            .c = c,
            .cols = panels_.size(panel),
            .row_bias = nullptr,
            .column_bias = o.bias ? o.bias + column : nullptr,
            .accumulate = block.start > 0,
            .partial = sums,
            .partial_step = panels_.width,
            .unfinished = unfinished(block)};
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
                     .partial = band.sums + piece.begin * panels_.width,
                     .partial_step = sums_step[along],
                     .unfinished = unfinished(block)};
    const int64_t length = piece.down ? band.count : width, times = piece.down ? width : band.count;
    if (length <= kernels_.rows) {  // a tile each
      rows.tiles = times, rows.a_tile = from_step_[across], rows.c_tile = to_step_[across];
      rows.partial_tile = sums_step[across];
      rows.next = band.ahead(), rows.next_step = band.next_step;
      band.next = kernels_.gemm_rows[length - 1](rows);
      return;
    }
    for (int64_t i = 0; i < times; ++i) {
      rows.next = band.ahead(), rows.next_step = band.next_step;
      band.next = multiply_rows(kernels_, rows, length);
      rows.a += from_step_[across];
      rows.c += to_step_[across];
      rows.partial += sums_step[across];
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
  const Panels panels_;
  const Blocks blocks_;
  bool padded_, in_place_;  // whether what is read is multiplied where it lies, and not a copy of the lines of a band
  int64_t columns_ = 0, first_column_ = 0;  // of a line of such a copy, and where it begins
  Segments segments_[3];
  int64_t low_[3] = {0, 0, 0};  // of the offsets, and how far they reach
  double reach_[3] = {0, 0, 0};
  int64_t stride_[3], from_step_[3], to_step_[3], band_;  // words; from one result to the next
  bool joined_;                                           // the taps of a kernel line read what lies side by side
};

// What one call needs, in words. Packed weights are those of the pass that is being worked on.
struct Workspace {
  int64_t packed, zeros, of_thread = 0;  // zeros: one pixel; of_thread: what rectangles need
  bool own_panels;  // threads that share panels each pack them for themselves: to fetch them costs more

  template <typename T>
  Workspace(const Gather& g, const Kernels<T>& kernels, int64_t all_taps, int threads) {
    constexpr int64_t size = sizeof(Word<T>);
    const Panels panels(g.to_per_group, kernels.lanes, kernels.vectors);
    const int64_t unit = all_taps * ceil_div(g.from_per_group, kernels.pair) * panels.width;
    packed = std::min(g.groups * panels.count, std::max<int64_t>(1, kPackedBytes / size / unit)) * unit;
    zeros = round_up(g.groups * g.from_per_group, 16);  // what follows begins with a line of the cache
    own_panels = threads * g.groups * panels.count * unit * size <= kOwnPanels;
    for (const GatherPhase& phase : g.phases)
      if (const auto r = Rectangles<T>::best(g, phase, kernels); r.fits())
        of_thread = std::max(of_thread, round_up(r.converted() + r.sums(), 16));
  }
  int64_t elements(int threads) const { return zeros + (own_panels ? threads : 1) * packed + threads * of_thread; }
};

// How threads share result rows (lines, or tiles) and units: as many pieces of either as together make one for each
// thread. Units rather than rows, if both leave them equal work, where packed weights are more than what is read: then
// each thread packs its own, and nothing passes between threads, whose caches may be far apart.
struct Split {
  int64_t rows = 1, units = 1;

  Split(int64_t all_rows, int64_t all_units, bool units_first, int threads) {
    const auto cost = [](int64_t all, int64_t pieces) {
      return static_cast<double>(ceil_div(all, pieces)) * static_cast<double>(pieces) / static_cast<double>(all);
    };
    double best = -1;
    for (int64_t u = 1; u <= std::min<int64_t>(threads, all_units); ++u) {
      const int64_t r = std::clamp<int64_t>(all_rows, 1, threads / u);
      const double idle = static_cast<double>(threads) / static_cast<double>(r * u);
      const double now = cost(all_rows, r) * cost(all_units, u) * idle;
      if (best < 0 || now < best || (units_first && now == best)) best = now, rows = r, units = u;
    }
  }
};

// By pointers, any shape: part `part` of the tiles of a phase, units [unit0, unit1), whose panels begin at `packed`.
template <typename T>
void multiply_by_pointers(const Gather& g, const GatherPhase& phase, const Kernels<T>& kernels, const Operands<T>& o,
                          const Word<T>* packed, int64_t part, int64_t parts, int64_t unit0, int64_t unit1,
                          bool skip_zeros) {
  using W = Word<T>;
  const int64_t channels = ceil_div(g.from_per_group, kernels.pair), taps = phase.taps(), depth = taps * channels;
  const bool in_place = reads_in_place(kernels, g.from_per_group);
  const Blocks blocks = reduction_blocks(channels, taps, /*taps_inside=*/false);
  const auto block_count = static_cast<int64_t>(blocks.size());
  const Panels panels(g.to_per_group, kernels.lanes, kernels.vectors);
  const Tiles cut(g, phase, kernels.rows, skip_zeros);
  const int64_t begin = cut.count * part / parts, end = cut.count * (part + 1) / parts;
  const int64_t fit = std::max<int64_t>(1, kPointerBytes / (std::max<int64_t>(taps, 1) * kernels.rows * sizeof(T*)));
  const int64_t at_once = std::clamp<int64_t>(end - begin, 1, std::min(fit, kMostTilesAtOnce));

  std::vector<const T*> sources(at_once * kernels.rows * taps);
  std::vector<T*> results(at_once * kernels.rows);
  std::vector<std::vector<int64_t>> live(skip_zeros ? at_once : 0);  // taps, of each tile
  std::vector<int64_t> b_offsets(skip_zeros ? taps : 0);
  const bool in_parts = kIsHalf<T> && blocks.size() > 1;  // sums that are rounded at their end
  std::vector<W> sums(in_parts ? at_once * kernels.rows * panels.width : 0);
  std::vector<W> words(in_place ? 0 : kernels.rows * std::min(depth, kSumLength));  // what a tile reads, packed
  std::vector<const W*> a(in_place ? 0 : taps * kernels.rows);
  // What tile `tile` reads first, up to a line: tiles along lines read what lies between that and the next one's.
  const auto first_line = [&](int64_t tile) {
    const Pixel at = cut.first(tile);
    const GatherAxis& h = phase.axis[1];
    const int64_t line = std::clamp<int64_t>(at.h * h.from_step, 0, h.from_extent - 1);
    return as_words(o.from + at.n * g.from_stride.batch + line * g.from_stride.axis[1]);
  };
  const bool ahead = in_place && g.groups > 1 && cut.along == Tiles::kAll && phase.axis[0].from_extent == 1;
  for (int64_t tile0 = begin; tile0 < end; tile0 += at_once) {
    const int64_t tile1 = std::min(end, tile0 + at_once);
    // What the tiles after these read is fetched meanwhile.
    const W* next = ahead && tile1 < end ? first_line(tile1) : nullptr;
    const W* const next_end = next ? first_line(std::min(end, tile1 + at_once) - 1) + g.from_stride.axis[1] : nullptr;
    for (int64_t tile = tile0; tile < tile1; ++tile) {
      Pixel at = cut.first(tile);
      const int64_t slot = (tile - tile0) * kernels.rows, rows = cut.size(tile);
      for (int64_t r = 0; r < rows; ++r, cut.next(at)) {
        pixel_sources(g, phase, at, o.from, o.zeros, sources.data() + slot * taps + r, rows);
        results[slot + r] = result_pixel(g, phase, at, o.to);
      }
      if (skip_zeros) keep_live_taps(o.zeros, taps, rows, sources.data() + slot * taps, live[tile - tile0]);
    }
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
          const auto first = std::lower_bound(of_tile.begin(), of_tile.end(), block.tap);
          first_tap = first - of_tile.begin();
          tap_count = std::lower_bound(first, of_tile.end(), block.tap + block.taps) - first;
          for (int64_t t = 0; t < tap_count; ++t) b_offsets[t] = (first[t] - block.tap) * block.channels * panels.width;
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
                                .b = packed + (unit - unit0) * depth * panels.width + block.start * panels.width,
                                .b_offsets = skip_zeros ? b_offsets.data() : nullptr,
                                .ldb = panels.width,
                                .c = c,
                                .cols = panels.size(panel),
                                .row_bias = nullptr,
                                .column_bias = o.bias ? o.bias + column : nullptr,
                                .accumulate = block.start > 0,
                                .next = next < next_end ? next : nullptr,
                                .partial = sums.data() + slot * panels.width,
                                .partial_step = panels.width,
                                .unfinished = block.start + block.terms() < depth});
        next += next < next_end ? tap_count * block.channels * rows : 0;
      }
    }
  }
}

// What a pixel costs by pointers, as a share of the products of a full tile: setting up a pointer takes about 8 cycles.
template <typename T>
double pointer_cost(const Gather& g, const GatherPhase& phase, const Kernels<T>& kernels, bool skip_zeros) {
  const auto vectors = static_cast<double>(ceil_div(g.to_per_group, kernels.lanes) * g.groups);
  const auto channels = static_cast<double>(ceil_div(g.from_per_group, kernels.pair));
  const double terms = channels * static_cast<double>(std::max<int64_t>(1, phase.taps()) * kernels.rows);
  const Panels panels(g.to_per_group, kernels.lanes, kernels.vectors);
  const double calls = call_terms(kernels, panels) / terms;
  return Tiles(g, phase, kernels.rows, skip_zeros).least * idle_sums(kernels, panels) + 16 / (vectors * channels) +
         calls;
}

// A phase that no tap reaches: its pixels are the bias, or zeros.
template <typename T>
void fill_phase(const Gather& g, const GatherPhase& phase, const Kernels<T>& kernels, const Word<T>* bias, T* to) {
  const GatherAxis* a = phase.axis;
  const int64_t channels = g.groups * g.to_per_group, lines = g.batch * a[0].count * a[1].count;
  const std::vector<Word<T>> zeros(bias ? 0 : channels);
  parallel_tasks(lines, static_cast<double>(a[2].count * channels), [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) {
      const Pixel first{line / (a[0].count * a[1].count), line / a[1].count % a[0].count, line % a[1].count, 0};
      kernels.store_rows(bias ? bias : zeros.data(), 0, a[2].count, channels, result_pixel(g, phase, first, to),
                         a[2].to_step * g.to_stride.axis[2]);
    }
  });
}

template <typename T>
void run_phase(const Gather& g, const GatherPhase& phase, const Kernels<T>& kernels, const T* from, const T* weight,
               const Word<T>* bias, T* to, const Workspace& sizes, Word<T>* workspace, int threads, bool skip_zeros) {
  using W = Word<T>;
  if (phase.taps() == 0) return fill_phase(g, phase, kernels, bias, to);
  const GatherAxis* a = phase.axis;
  const int64_t channels = ceil_div(g.from_per_group, kernels.pair), depth = phase.taps() * channels;
  const Blocks blocks = reduction_blocks(channels, phase.taps(), /*taps_inside=*/false);
  const Panels panels(g.to_per_group, kernels.lanes, kernels.vectors);
  const bool padded = is_padded(a[0]) || is_padded(a[1]) || is_padded(a[2]);
  const bool look = !skip_zeros && padded && a[0].mode == PaddingMode::kZeros;
  const int64_t units = g.groups * panels.count, unit_size = depth * panels.width;
  const auto block_count = static_cast<int64_t>(blocks.size());

  // Packs pieces [begin, end) of the panels from unit `first` on, a piece being a block of a panel. Whether products
  // with the padding may be left out.
  const auto pack = [&](int64_t first, int64_t begin, int64_t end, W* packed) {
    bool finite = look || skip_zeros;
    for (int64_t i = begin; i < end; ++i) {
      const Block& block = blocks[i % block_count];
      const int64_t unit = i / block_count;
      W* const target = packed + unit * unit_size + block.start * panels.width;
      pack_unit(g, phase, kernels, panels, weight, first + unit, block, target);
      finite = finite && (!look || kernels.all_finite(target, block.terms() * panels.width));
    }
    return finite;
  };

  W* const packed = workspace + sizes.zeros;
  W* const of_threads = packed + (sizes.own_panels ? threads : 1) * sizes.packed;
  std::fill_n(workspace, sizes.zeros, W(0));
  const T* const zeros = reinterpret_cast<const T*>(workspace);
  const Operands<T> o{from, bias, to, zeros};
  const auto rectangles = Rectangles<T>::best(g, phase, kernels);
  const bool may_skip = look || skip_zeros;
  const bool by_rectangles = rectangles.cost(may_skip) <= pointer_cost(g, phase, kernels, may_skip);
  const int64_t lines = g.batch * a[0].count * a[1].count, pixels = g.batch * phase.pixels();
  const int64_t rows = by_rectangles ? lines : ceil_div(pixels, int64_t{kernels.rows});
  const double macs = static_cast<double>(pixels) * static_cast<double>(depth);
  const int64_t units_per_pass = std::clamp<int64_t>(sizes.packed / std::max<int64_t>(unit_size, 1), 1, units);
  for (int64_t first = 0; first < units; first += units_per_pass) {
    const int64_t count = std::min(units_per_pass, units - first);
    const Split split(rows, count, count * unit_size > g.batch * g.from_pixels() * g.groups * channels, threads);
    const bool own = split.rows == 1 || (sizes.own_panels && pixels >= kOwnPixels * split.rows);
    std::atomic<bool> all_finite = true;
    if (!own)
      parallel_tasks(count * block_count, 2.0 * unit_size / block_count, [&](int64_t begin, int64_t end) {
        if (!pack(first, begin, end, packed)) all_finite = false;
      });
    const int64_t parts = split.rows * split.units;
    parallel_tasks(parts, macs * count * panels.width / parts, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t part = i % split.rows, unit = i / split.rows;
        const int64_t unit0 = count * unit / split.units, unit1 = count * (unit + 1) / split.units;
        W* panels_of_mine = packed + unit0 * unit_size;
        bool finite = all_finite;
        if (own) {
          if (split.rows > 1) panels_of_mine += at::get_thread_num() * sizes.packed;
          finite = pack(first + unit0, 0, (unit1 - unit0) * block_count, panels_of_mine);
        }
        if (by_rectangles)
          rectangles.multiply(o, panels_of_mine, of_threads + at::get_thread_num() * sizes.of_thread,
                              lines * part / split.rows, lines * (part + 1) / split.rows, first + unit0, first + unit1,
                              finite);
        else
          multiply_by_pointers(g, phase, kernels, o, panels_of_mine, part, split.rows, first + unit0, first + unit1,
                               finite);
      }
    });
  }
}

template <typename T>
void run(const ConvShape& s, Direction direction, const void* from, const ConvPointers& p, void* workspace,
         int threads) {
  Gather g = make_gather(s, direction);
  const Kernels<T>& kernels = dense_kernels<T>(g.to_per_group);
  const auto* const weight = static_cast<const T*>(p.weight);
  const bool skip_zeros = works_on_padding(s) && all_finite(s, weight);
  if (skip_zeros) drop_idle_taps(g);
  const Workspace sizes(g, kernels, s.taps(), threads);
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
    Gather g = make_gather(s, direction);
    int64_t words = Workspace(g, dense_kernels<T>(g.to_per_group), s.taps(), threads).elements(threads);
    if (works_on_padding(s)) {
      drop_idle_taps(g);
      words = std::max(words, Workspace(g, dense_kernels<T>(g.to_per_group), s.taps(), threads).elements(threads));
    }
    return words * static_cast<int64_t>(sizeof(Word<T>));
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
