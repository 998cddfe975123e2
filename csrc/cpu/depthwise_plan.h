// How depthwise convolutions are walked: what all three directions have in common. A Plan is the table of one phase, from
// which it fills tiles (depthwise.h) for the microkernels; strips are padded copies of lines that cannot be read in place.
#pragma once

#include <bit>
#include <numeric>
#include <optional>
#include <type_traits>
#include <vector>

#include "cpu/gather.h"
#include "cpu/gemm_blocks.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/strip.h"

namespace myconv::cpu::depthwise {

// Whether loops are written out for the taps of a line, and neighbouring results share what they read.
inline bool is_short(const ConvShape& s) { return s.kernel[2] <= 7 && s.stride[1] == 1 && s.stride[2] == 1; }

inline int64_t lanes_of(int64_t size) { return size <= 4 ? microkernels().f32.lanes : microkernels().f64.lanes; }

inline constexpr int64_t kStripLimit = 1 << 20;  // a strip that does not fit here is declined
inline constexpr int64_t kMaxDepthwiseKernel = 4096;
inline constexpr int64_t kMaxReach = 65536;  // positions from an axis' first tap to its last
// Result lines that are kept before they are spread: a whole tile at least.
inline constexpr int64_t kKeptBytes = 16 << 10;
inline constexpr int64_t kMostLanes = 64;   // of any ISA, in bytes
inline constexpr int64_t kLeastPixels = 8;  // NHWC: pixels that are kept before the filters of a channel are added up
inline constexpr int64_t kTasks = 16;       // NHWC: pieces of work of a call, at least
inline constexpr int64_t kPlanesBytes = 16 << 10;   // NCHW: planes that are done together
inline constexpr double kStreamed = 16e6;           // above so many bytes, read and written, values are fetched early
inline constexpr double kInOrder = 6e6;             // NHWC, 3x3: above so many they are read in order,
inline constexpr int64_t kLeastInOrder = 4;         // with so many vectors of channels: of fewer a pixel is little
inline constexpr int64_t kPixelsBytes = 256 << 10;  // NHWC: what the lines of a strip read;
inline constexpr int64_t kLeastLines = 4;           // with fewer, a part of their channels is not done at a time
inline constexpr int64_t kRolledLines = 7;          // NHWC: lines of a strip where tiles roll,
inline constexpr int64_t kFewRolledLines = 4;       // or so many: with stride 2, of more lines than that,
inline constexpr int64_t kSameSets = 4096;  // whose distance is a multiple of this: 15 would not fit their sets of L1

// The positions that result positions read along an axis, as offsets; -1 in the padding.
using Positions = c10::SmallVector<int64_t, 128>;

// Whether a padding mode moves columns: whether lines go on at their ends.
inline bool goes_on(const GatherAxis& w) {
  return w.mode != PaddingMode::kZeros && w.taps() > 0 &&
         (w.offset[0] < 0 || w.offset.back() + (w.count - 1) * w.from_step >= w.from_extent);
}

// Where backward_input undoes stride 2, results of both residues together: a phase has all positions and taps along its
// tiles' axis, as they are, and in NCHW all columns and the taps of the even ones. Where pixels roll, all lines, too.
struct Spread {
  int64_t pad;                         // along the tiles' axis
  GatherAxis odd;                      // NCHW: the odd columns
  std::optional<int64_t> lines_pad{};  // NHWC, of all lines
  // The results before those that exist, and the first unit.
  static int64_t skipped(int64_t pad) { return pad % 2; }
  static int64_t low(int64_t pad, int64_t taps) { return (pad - skipped(pad)) / 2 - taps / 2; }
};

struct Phase : GatherPhase {
  std::optional<Spread> spread;
};

// How the tiles of one phase are walked. Their units are lines (NCHW) or pixels (NHWC).
class Plan {
 public:
  // `step` and `weight_step`: of what is read and of the weights, along D, H and W. `lanes`: of a vector.
  Plan(const Phase& phase, bool lines, const int64_t* step, const int64_t* weight_step, int64_t lanes)
      : lines_(lines), phase_(phase), along_(phase_.axis[lines ? 1 : 2]) {
    for (GatherAxis& axis : phase_.axis)
      if (axis.taps() > 1 && axis.offset[1] < axis.offset[0]) {
        std::reverse(axis.tap.begin(), axis.tap.end());
        std::reverse(axis.offset.begin(), axis.offset.end());
      }
    const GatherAxis* a = phase_.axis;
    // A vector of a line holds columns a stride of 1 or 2 apart (needs_strip).
    stride_ = lines ? a[2].from_step : std::min<int64_t>(a[2].from_step, 2);
    const int64_t n = along_.taps();
    shares_ = n % 2 == 1 || n > 7;
    shares_ = shares_ && along_.from_step == stride_ && (n == 1 || along_.offset[1] - along_.offset[0] == 1);
    const auto gap = [&](int d) { return a[d].taps() > 1 ? (a[d].tap[1] - a[d].tap[0]) * weight_step[d] : 0; };
    along_gap_ = gap(lines ? 1 : 2);
    pair_gap_ = gap(2);
    unit_size_ = step[lines ? 1 : 2];
    if (spread()) {
      skipped_ = Spread::skipped(spread()->pad);
      low_ = Spread::low(spread()->pad, n);
      even_taps_ = a[0].taps() * a[2].taps();
      read(along_, low_, round_up(along_.count + skipped_, kDepthwiseRows[std::size(kDepthwiseRows) - 1]) / 2 + n / 2,
           unit_size_, units_);
    } else {
      low_ = low(along_);
      read(along_, low_, reach(along_), unit_size_, units_);
    }
    if (lines)
      rows_.push_back(0);
    else if (pairs_lines())
      read(a[1], Spread::low(*spread()->lines_pad, a[1].taps()), pairs() + a[1].taps() / 2, step[1], rows_);
    else
      read(a[1], low(a[1]), reach(a[1]), step[1], rows_);

    const bool pairs = lines && stride_ == 2;
    const int64_t heights = lines && shares_ ? std::min<int64_t>(1, a[1].taps()) : a[1].taps();
    const int64_t widths = !lines && shares_ ? std::min<int64_t>(1, a[2].taps()) : a[2].taps();
    const auto walk = [&](int64_t d, const GatherAxis& columns, int64_t width) {
      for (int64_t td = 0; td < a[0].taps(); ++td) {
        const int64_t from_d = a[0].source(d, td), offset = from_d < 0 ? -1 : from_d * step[0];
        pads_ = pads_ || offset < 0;
        for (int64_t th = 0; th < heights; ++th)
          for (int64_t tw = 0; tw < width; tw += pairs ? 2 : 1) {
            const int64_t h = a[1].offset[th] - a[1].offset[0], w = columns.offset[tw] - columns.offset[0];
            const int64_t weight =
                a[0].tap[td] * weight_step[0] + a[1].tap[th] * weight_step[1] + columns.tap[tw] * weight_step[2];
            taps_.push_back({offset, lines ? 0 : h, lines ? columns.offset[tw] : 0, lines ? h : w, weight,
                             pairs && tw + 1 < width, pairs ? tw / 2 : tw});
          }
      }
    };
    for (int64_t d = 0; d < a[0].count; ++d) {
      walk(d, a[2], widths);
      if (spread() && lines) walk(d, spread()->odd, spread()->odd.taps());
    }
    if (lines && goes_on(a[2])) find_moves(lanes);
    walked_ = static_cast<int64_t>(taps_.size()) / std::max<int64_t>(1, a[0].count);
    rolls_ = find_rolls();
  }

  Plan(const Plan&) = delete;
  const GatherAxis& axis(int d) const { return phase_.axis[d]; }
  // Lists: lines of results (NHWC), or pairs of them.
  bool pairs_lines() const { return spread() && spread()->lines_pad; }
  int64_t lists() const { return pairs_lines() ? pairs() : phase_.axis[1].count; }
  // Of a list, the number of its first line; the first pair may begin with one that does not exist.
  int64_t first_line(int64_t list) const {
    return pairs_lines() ? 2 * list - Spread::skipped(*spread()->lines_pad) : list;
  }
  bool pads() const { return pads_; }  // whether any tap of any result lies in the padding (NCHW: but for columns)

  // The kernel that rolls, or reads in order, if there is one for this plan.
  template <typename T>
  auto rolled(const DepthwiseKernels<T>& kernels, bool weighs, bool in_order = false) const ->
      typename RollingKernels<T>::Tile {
    if (!rolls_) return nullptr;
    const RollingKernels<T>& k = kernels.rolling;
    if (in_order && !spread()) return k.pixels_in_order[stride_ - 1];
    if (spread()) return lines_ ? k.spread_lines : k.spread_pixels;
    return (weighs ? lines_ ? k.weight_lines : k.weight_pixels : lines_ ? k.lines : k.pixels)[stride_ - 1];
  }

  // Runs results [first, first + count) along the tiles' axis, for depth d and (NHWC) the lists from `line` on. The
  // caller sets lists, from, extent, weight, bias, to and its steps, length, skip_zeros, accumulate and (NHWC) moves;
  // for backward_weight gy and sums instead of weight, bias and to. Where stride 2 is undone, all results are run.
  template <typename T>
  void run(const DepthwiseKernels<T>& kernels, int64_t d, int64_t line, int64_t first, int64_t count,
           DepthwiseTile<T> t) const {
    using W = Word<T>;
    const T* const gy = t.gy;
    const auto& table = (gy       ? lines_ ? kernels.weight_lines : kernels.weight_pixels
                         : lines_ ? kernels.lines
                                  : kernels.pixels)[stride_ - 1];
    const int64_t across = shares_ ? along_.taps() : 1;
    const W *const bias = t.bias, *const weight = t.weight;
    if (walked_ == 0) t.ahead = 0;  // nothing is read
    W* const sums = t.sums;
    T* const to = t.to;
    t.row_step = lines_ ? 0 : phase_.axis[1].from_step;
    t.rows = rows_.data() + line * t.row_step;
    t.unit_size = unit_size_;
    t.weight_step = along_gap_;
    t.pair_step = pair_gap_;
    t.first_inside = units_.data() + std::max<int64_t>(0, -low_);
    t.end_inside = units_.data() + std::min<int64_t>(units_.size(), along_.from_extent - low_);
    if (lines_) set_moves(t);
    if (const auto roll = t.rolls ? rolled(kernels, gy, t.in_order) : nullptr) {
      t.taps = walked_;
      t.tap = taps_.data() + d * walked_;
      t.from += t.tap->offset;  // of the one tap along D
      t.count = count;
      t.units = units_.data() + first * stride_;
      if (spread()) {
        t.even_taps = even_taps_;
        t.units = units_.data();
        t.to = to - skipped_ * t.to_step;
        t.first_stored = skipped_, t.end_stored = along_.count + skipped_;
        const int64_t before = -first_line(line);
        t.first_list = std::max<int64_t>(0, before), t.end_list = phase_.axis[1].count + before;
      }
      return roll(t);
    }
    t.unit_step = along_.from_step;
    if (spread()) {
      const auto& tiles = (lines_ ? kernels.spread_lines : kernels.spread_pixels)[along_.taps() / 2 - 1];
      const int64_t most = lines_ ? kernels.most_spread_lines : kernels.most_spread_pixels;
      const int64_t results = along_.count + skipped_;
      t.taps = walked_, t.even_taps = even_taps_;
      t.tap = taps_.data() + d * walked_;
      for (int64_t i = 0; i < results; i += t.count) {
        const int64_t left = results - i, rest = left % most, high = left - rest + (2 * rest > most ? most : 0);
        t.count = high > 0 ? high : round_up(left, 2);
        t.line = low_ + i / 2;
        t.units = units_.data() + i / 2;
        t.to = to + (i - skipped_) * t.to_step;
        t.first_stored = skipped_ - i, t.end_stored = left;
        tiles[high > 0](t);
      }
      return;
    }
    // Pieces of the results, and of the taps, each with at most kSumLength terms. Of kernels with several pieces the taps
    // that all of a tile reads from the padding are left out.
    int64_t widest = 2 * kDepthwiseWidths - 1;
    while (!table[widest / 2][0]) widest -= 2;
    const bool tall = across > widest && to && t.skip_zeros && along_.mode == PaddingMode::kZeros;
    const bool accumulates = t.accumulate;
    for (int64_t i = 0; i < count; i += t.count) {
      const int rows = rows_for(count - i, table[0]);
      const int64_t tile = kDepthwiseRows[rows];
      t.count = tall ? tile : (count - i) / tile * tile;
      t.accumulate = accumulates;
      if (to) t.to = to + i * t.to_step;
      if (gy) t.gy = gy + i * t.to_step;
      const int64_t* const units = units_.data() + (first + i) * along_.from_step;
      int64_t low = 0, high = across;
      if (tall) {
        low = std::clamp<int64_t>(t.first_inside - units - (tile - 1) * along_.from_step, 0, across - 1);
        high = std::clamp<int64_t>(t.end_inside - units, low + 1, across);
      }
      // Odd widths add up to an odd number only if they are so many.
      int64_t pieces = std::max<int64_t>(1, ceil_div(high - low, widest));
      if ((high - low - pieces) % 2 != 0) {
        if (low > 0)
          --low;
        else if (high < across)
          ++high;
        else
          ++pieces;
      }
      for (int64_t k = low, width; k == low || k < high; k += width, --pieces) {
        width = std::max<int64_t>(1, ceil_div(high - k, pieces) | 1);
        const auto w = static_cast<int>(width / 2);
        t.line = (first + i) * along_.from_step + k + low_;
        t.units = units + k;
        const bool last = k + width >= high;
        if (weight) t.weight = weight + k * along_gap_;
        if (sums) t.sums = sums + k * along_gap_;
        const int64_t most = std::min<int64_t>(kMaxWalkedTaps, kSumLength / width / (lines_ ? stride_ : 1));
        for (int64_t tap = 0; tap == 0 || tap < walked_; tap += most) {
          t.taps = std::min(most, walked_ - tap);
          t.tap = taps_.data() + d * walked_ + tap;
          t.bias = last && tap + most >= walked_ ? bias : nullptr;
          table[w][rows](t);
          t.accumulate = true;
        }
      }
    }
  }

 private:
  // Tiles of 8 or 7 as long as they fit; the rest of a count is smaller ones.
  static int rows_for(int64_t count, const auto& tiles) {
    int rows = std::size(kDepthwiseRows) - 1;
    if (count % 8 != 0 && count % 7 == 0 && tiles[rows - 1]) --rows;
    while (kDepthwiseRows[rows] > count || !tiles[rows]) --rows;
    return rows;
  }

  const std::optional<Spread>& spread() const { return phase_.spread; }
  int64_t pairs() const { return ceil_div(phase_.axis[1].count + Spread::skipped(*spread()->lines_pad), 2); }

  // Whether a kernel that rolls can be used: 3 x 3 taps, one stride of 1 or 2, and dilation 1 where values are shared.
  bool find_rolls() const {
    const GatherAxis &depth = phase_.axis[0], &height = phase_.axis[1], &width = phase_.axis[2];
    if (!shares_ || depth.taps() != 1 || height.taps() != 3) return false;
    const auto in_padding = [](const DepthwiseTap& tap) { return tap.offset < 0; };
    if (std::any_of(taps_.begin(), taps_.end(), in_padding)) return false;
    if (pairs_lines()) return true;
    if (spread()) return lines_ && std::max(width.taps(), spread()->odd.taps()) == 2 && walked_ == 3;
    const GatherAxis& shared = lines_ ? along_ : height;
    if (width.taps() != 3 || shared.from_step != stride_ || shared.offset[1] - shared.offset[0] != 1) return false;
    // At each end of a line a padding mode may move one column.
    return moves_.empty() ||
           (width.offset[0] >= -1 && width.offset[2] + (width.count - 1) * stride_ <= width.from_extent);
  }

  template <typename T>
  void set_moves(DepthwiseTile<T>& t) const {
    if (moves_.empty()) return;
    t.moves = moves_.data();
    t.line_moves = line_moves_, t.first_end = first_end_, t.to_end = to_end_;
    const GatherAxis& w = phase_.axis[2];
    t.before_line = padded_index(-1, w.from_extent, w.mode);
    t.behind_line = padded_index(w.from_extent, w.from_extent, w.mode);
  }

  // The first position that is read along an axis, and how many there are.
  static int64_t low(const GatherAxis& axis) { return axis.taps() ? axis.offset[0] : 0; }
  static int64_t reach(const GatherAxis& axis) {
    return (axis.taps() ? axis.offset.back() : 0) - low(axis) + (axis.count - 1) * axis.from_step + 1;
  }

  void read(const GatherAxis& axis, int64_t low, int64_t count, int64_t step, Positions& positions) {
    for (int64_t i = low; i < low + count; ++i) {
      const int64_t source = padded_index(i, axis.from_extent, axis.mode);
      positions.push_back(source < 0 ? -1 : source * step);
      pads_ = pads_ || source < 0;
    }
  }

  // NCHW: the moves of the vectors at the ends of a line.
  void find_moves(int64_t lanes) {
    const GatherAxis& w = phase_.axis[2];
    const int64_t vectors = ceil_div(w.count, lanes), taps = w.taps();
    const auto results = [&](int64_t v) { return std::min(lanes, w.count - v * lanes); };
    const auto first = [&](int64_t v, int64_t t) { return v * lanes * stride_ + w.offset[t]; };
    const auto last = [&](int64_t v, int64_t t) { return first(v, t) + (results(v) - 1) * stride_; };
    while (first_end_ < vectors && first(first_end_, 0) < 0) ++first_end_;
    for (to_end_ = vectors; to_end_ > first_end_ && last(to_end_ - 1, taps - 1) >= w.from_extent;) --to_end_;
    line_moves_ = ceil_div(taps, stride_);
    for (int64_t v = 0; v < vectors; ++v)
      for (int64_t t = 0; t < taps && (v < first_end_ || v >= to_end_); t += stride_)
        moves_.push_back(move(first(v, t), results(v), std::min(stride_, taps - t), lanes));
  }

  // Of a vector of results whose first tap reads `column`; with stride 2 the next tap, if it is there, reads the next.
  DepthwiseMove move(int64_t column, int64_t results, int64_t taps, int64_t lanes) const {
    const GatherAxis& w = phase_.axis[2];
    const int64_t extent = w.from_extent, end = column + (results - 1) * stride_ + taps;
    DepthwiseMove m{};
    m.moves = column < 0 || end > extent;
    if (!m.moves) return m;
    if (w.mode == PaddingMode::kCircular && extent > lanes * stride_) {
      const int64_t few = std::min<int64_t>(kFew, lanes), other = column < 0 ? extent - few : 0;
      m.at = column;
      m.wrap = other - column;
      m.wrap_first = column < 0 ? 0 : extent - column;
      m.wrap_last = column < 0 ? -column : end - column;
      for (int64_t i = std::max<int64_t>(0, m.wrap_first); i < m.wrap_last; ++i)
        m.index[i / lanes][i % lanes] = static_cast<int32_t>(padded_index(column + i, extent, w.mode) - other);
    } else {
      int64_t source[2][kMostIndices];
      m.at = extent;
      for (int64_t t = 0; t < taps; ++t)
        for (int64_t l = 0; l < results; ++l) {
          source[t][l] = padded_index(column + l * stride_ + t, extent, w.mode);
          m.at = std::min(m.at, source[t][l]);
        }
      for (int64_t t = 0; t < taps; ++t)
        for (int64_t l = 0; l < results; ++l) m.index[t][l] = static_cast<int32_t>(source[t][l] - m.at);
    }
    m.first = -m.at, m.last = extent - m.at;
    return m;
  }

  bool lines_, shares_, pads_ = false, rolls_ = false;
  Phase phase_;
  const GatherAxis& along_;
  int64_t low_, skipped_ = 0, even_taps_ = 0;  // of units, the first; where stride 2 is undone
  int64_t stride_, along_gap_, pair_gap_, walked_, unit_size_;
  Positions units_, rows_;
  c10::SmallVector<DepthwiseTap, 16> taps_;
  std::vector<DepthwiseMove> moves_;
  int64_t line_moves_ = 0, first_end_ = 0, to_end_ = 0;
};

// Whether no value is infinite or NaN.
template <typename T>
inline bool all_finite(const T* values, int64_t count) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  constexpr Bits kExponent = sizeof(T) == 4 ? Bits{0x7f800000} : Bits(uint64_t{0x7ff} << 52);
  Bits found = 0;
  for (int64_t i = 0; i < count; ++i) found |= (std::bit_cast<Bits>(values[i]) & kExponent) == kExponent;
  return !found;
}

template <typename T>
double bytes_moved(const Gather& g) {
  const double from = static_cast<double>(g.from_pixels()) * g.from_per_group;
  return (from + static_cast<double>(g.to_pixels()) * g.to_per_group) * g.groups * g.batch * sizeof(Word<T>);
}

inline bool spreads(const ConvShape& s, Direction direction) {
  if (direction != Direction::kBackwardInput) return false;
  const int d = s.channels_last() ? 2 : 1;
  const int64_t walked = s.taps() / s.kernel[d];
  if (std::find(std::begin(kSpreadWidths), std::end(kSpreadWidths), s.kernel[d]) == std::end(kSpreadWidths))
    return false;
  if (s.stride[d] != 2 || s.dilation[d] != 1 || s.pad[d] < 0 || s.in[d] < 2) return false;
  if (walked > kMaxWalkedTaps || s.taps() > kSumLength) return false;
  return s.channels_last() ? s.out_per_group == 1 : s.stride[2] == 2 && s.in[2] >= 2;
}

// NHWC: result lines that tiles roll along together, of `lines` that read lines so many bytes apart.
inline int64_t rolled_lines(int64_t lines, int64_t stride, int64_t line_bytes) {
  const bool conflicts = line_bytes % kSameSets == 0;
  return stride == 2 && lines > kRolledLines && conflicts ? kFewRolledLines : kRolledLines;
}

// NHWC: whether pixels share so few sets of L1 that the vectors of channels next to those that roll do not stay in it.
inline bool pixels_meet(int64_t pixel_bytes) { return pixel_bytes % (kSameSets / 2) == 0; }

// NHWC, in order, where stride 2 is undone: units whose results, two lines of two pixels each, stay in L1.
inline int64_t units_in_order(int64_t pixel_bytes) {
  constexpr int64_t kOfOneSet = 4, kMost = 16;
  return std::min(kMost, kOfOneSet * kSameSets / std::gcd(pixel_bytes, kSameSets));
}

// NHWC, stride 1, kernels of 5 columns and more: how many of the vectors of channels are done together, line after line,
// so that what the lines of a result read stays in L1; 256 bytes of a pixel are fetched as fast as fewer. All of them where
// pixels share few sets of L1 and nothing would stay.
inline int64_t vectors_together(int64_t vectors, int64_t vector_bytes, int64_t pixel_bytes) {
  constexpr int64_t kBytes = 256;
  return pixels_meet(pixel_bytes) ? vectors : std::min(vectors, kBytes / vector_bytes);
}

// NHWC: whether pixels roll where stride 2 is undone, along both axes.
inline bool spreads_lines(const ConvShape& s) {
  if (!s.channels_last() || !microkernels().f32.depthwise.rolling.spread_pixels) return false;
  if (s.kernel[0] != 1 || s.stride[0] != 1 || s.pad[0] != 0 || s.kernel[1] != 3 || s.kernel[2] != 3) return false;
  return s.stride[1] == 2 && s.dilation[1] == 1 && s.pad[1] >= 0 && s.in[1] >= 2;
}

using Phases = c10::SmallVector<Phase, 1>;

inline Phases phases_of(const ConvShape& s, Direction direction) {
  const bool spreading = spreads(s, direction);
  const int along = s.channels_last() ? 2 : 1;
  const bool pairs = spreading && spreads_lines(s);
  Phases phases;
  const Direction read = direction == Direction::kBackwardWeight ? Direction::kForward : direction;
  for (const GatherPhase& gather : make_gather(s, read).phases) {
    Phase phase{gather, std::nullopt};
    if (spreading) {
      const GatherAxis *h = gather.axis + 1, *w = gather.axis + 2;
      if (w->to_start > 0 || (h->to_start > 0 && (along == 1 || pairs))) continue;
      phase.spread = Spread{s.pad[along], backward_input_axis(s, 2, 1)};
      const auto take_all = [&](int d) {
        GatherAxis& axis = phase.axis[d];
        axis = {s.in[d], 0, 1, 1, s.out[d], {}, {}, PaddingMode::kZeros};
        for (int64_t t = 0; t < s.kernel[d]; ++t) axis.tap.push_back(t), axis.offset.push_back(t);
      };
      take_all(along);
      if (along == 1) phase.axis[2].count = s.in[2], phase.axis[2].to_step = 1;
      if (pairs) take_all(1), phase.spread->lines_pad = s.pad[1];
    }
    phases.push_back(phase);
  }
  return phases;
}

// NCHW: whether lines roll, as far as the shape tells (Plan::find_rolls).
inline bool lines_roll(const ConvShape& s, Direction direction) {
  const RollingKernels<float>& kernels = microkernels().f32.depthwise.rolling;
  const int64_t stride = s.stride[1];
  if (s.kernel[0] != 1 || s.kernel[1] != 3 || s.kernel[2] != 3 || s.dilation[1] != 1) return false;
  if (stride > 2 || s.stride[2] != stride || (stride == 2 && s.dilation[2] != 1)) return false;
  return (direction == Direction::kBackwardWeight ? kernels.weight_lines : kernels.lines)[stride - 1];
}

// --- NCHW: copies of lines -----------------------------------------------------------------------------------------

// Whether lines must be copied first: columns too far apart, or that a padding mode moves too far.
inline bool needs_strip(const GatherPhase& phase, int64_t lanes) {
  const GatherAxis& w = phase.axis[2];
  if (w.from_step > 2) return true;
  if (w.from_step == 2 && w.taps() > 1 && w.offset[1] - w.offset[0] != 1) return true;
  if (!goes_on(w)) return false;
  const bool wraps = w.mode == PaddingMode::kCircular && w.from_extent > lanes * w.from_step;
  const int64_t most = wraps ? std::min<int64_t>(kFew, lanes - 1) : lanes - 1;
  return -w.offset[0] > most || w.offset.back() + (w.count - 1) * w.from_step - w.from_extent + 1 > most;
}

// The strip of a block of lines as what a phase reads: nothing lies outside.
inline Phase strip_phase(const GatherPhase& phase, const StripPlan& strip) {
  Phase of_strip{phase, std::nullopt};
  constexpr int64_t kEndless = int64_t{1} << 40;
  auto& [d, h, w] = of_strip.axis;
  d.count = 1, d.from_step = 1;
  for (int64_t t = 0; t < d.taps(); ++t) d.offset[t] = t;
  for (int64_t& offset : h.offset) offset -= strip.low[1];
  for (int64_t& offset : w.offset) {
    const int64_t position = offset - strip.low[2];
    offset = position % w.from_step * strip.span + position / w.from_step;
  }
  w.from_step = 1;
  for (GatherAxis& axis : of_strip.axis) axis.from_extent = kEndless, axis.mode = PaddingMode::kZeros;
  return of_strip;
}

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

// Scratch of a thread, in elements.
struct LineScratch {
  int64_t strip, lines, kept;
  LineScratch(const GatherPhase& phase, int64_t size, int64_t lanes)
      : strip(needs_strip(phase, lanes) ? StripPlan(phase, size, kStripBytes).size + kMostLanes / size : 0),
        lines(std::max<int64_t>(8, kKeptBytes / size / std::max<int64_t>(1, phase.axis[2].count))),
        kept(phase.axis[2].to_step == 1 ? 0 : std::min(lines, phase.axis[1].count) * phase.axis[2].count) {}
  int64_t elements() const { return round_up(strip + kept, 16); }
};

// --- NHWC: a channel multiplier, groups ----------------------------------------------------------------------------

// Which channels of x the results of each vector of filters are made of, with a channel multiplier.
inline std::vector<DepthwiseMove> multiplier_moves(int64_t filters, int64_t multiplier, int64_t lanes) {
  std::vector<DepthwiseMove> moves(ceil_div(filters, lanes));
  for (int64_t b = 0; b < static_cast<int64_t>(moves.size()); ++b) {
    const int64_t first = b * lanes, count = std::min(lanes, filters - first);
    DepthwiseMove& move = moves[b];
    move.moves = true;
    move.at = first / multiplier;
    move.last = (first + count - 1) / multiplier - move.at + 1;
    for (int64_t l = 0; l < count; ++l) move.index[0][l] = static_cast<int32_t>((first + l) / multiplier - move.at);
  }
  return moves;
}

// Groups of a few channels, which a vector holds whole: a result is a sum of as many vectors, of which each repeats one
// channel of every group.
inline bool is_few_in_groups(const ConvShape& s) {
  constexpr int64_t kFewChannels = 4;
  return s.in_per_group > 1 && s.in_per_group == s.out_per_group && s.in_per_group <= kFewChannels &&
         s.channels_last() && !is_half(s.dtype) && lanes_of(dtype_size(s.dtype)) % s.in_per_group == 0;
}

inline std::vector<DepthwiseMove> group_moves(int64_t channels, int64_t of_group, int64_t lanes) {
  std::vector<DepthwiseMove> moves;
  for (int64_t first = 0; first < channels; first += lanes)
    for (int64_t m = 0; m < of_group; ++m) {
      DepthwiseMove move{};
      move.moves = true, move.at = first, move.last = std::min(lanes, channels - first);
      for (int64_t l = 0; l < move.last; ++l) move.index[0][l] = static_cast<int32_t>(l / of_group * of_group + m);
      moves.push_back(move);
    }
  return moves;
}

// --- What is declined ------------------------------------------------------------------------------------------------

// What 16-bit types lack: loads by masks, sums in pieces, and strips.
inline const char* decline_half(const ConvShape& s, Direction direction) {
  const Microkernels& m = microkernels();
  if (!m.bf16.depthwise.lines[0][0][0]) return "no masks for 16-bit values";
  if (direction != Direction::kBackwardWeight && (s.kernel[0] > 1 || std::max(s.kernel[1], s.kernel[2]) > 7))
    return "16-bit sums in pieces";
  if (direction == Direction::kBackwardInput && s.out_per_group > 1) return "16-bit sums in pieces";
  if (!s.channels_last())
    for (const Phase& phase : phases_of(s, direction))
      if (needs_strip(phase, m.f32.lanes)) return "16-bit strips";
  return nullptr;
}

inline const char* decline(const ConvShape& s, Direction direction) {
  if (s.in_per_group != 1 && !(is_few_in_groups(s) && direction != Direction::kBackwardWeight))
    return "more than one channel a group";
  if (s.out_per_group == 0) return "nothing to sum over";
  const bool half = is_half(s.dtype);
  if (!is_floating_point(s.dtype)) return "not of this type";
  if (s.in_pixels() == 0 || s.out_pixels() == 0) return "nothing to sum over";
  if (s.taps() > kMaxDepthwiseKernel) return "more than 4096 taps";
  for (int d = 0; d < 3; ++d)
    if (s.kernel[d] > 1 && s.dilation[d] > kMaxReach / (s.kernel[d] - 1)) return "a reach above 65536";
  if (direction == Direction::kBackwardInput) {
    if (s.padding_mode != PaddingMode::kZeros) return "the adjoint of a padding mode";
    for (int d = 0; d < 3; ++d)
      if (s.stride[d] > 64) return "a stride above 64";
    if (s.out_per_group != 1 && s.stride[2] != 1 && !s.channels_last() && !spreads(s, direction))
      return "a stride with a channel multiplier";
  }
  if (half)
    if (const char* reason = decline_half(s, direction)) return reason;
  const int64_t size = dtype_size(s.dtype);
  if (s.channels_last()) {
    const bool adds = direction == Direction::kBackwardInput && s.out_per_group > 1 && s.in_per_group == 1;
    return adds && s.groups * s.out_per_group > kStripLimit / size / kLeastPixels ? "filters above 1 MiB" : nullptr;
  }
  for (const Phase& phase : phases_of(s, direction))
    if (needs_strip(phase, lanes_of(size)) && StripPlan(phase, size, kStripBytes).size > kStripLimit / size)
      return "a strip of padded lines above 1 MiB";
  return nullptr;
}

}  // namespace myconv::cpu::depthwise
