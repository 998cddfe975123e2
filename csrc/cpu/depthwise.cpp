// Depthwise convolutions (one in channel a group), all three directions, floating-point types; the 16-bit ones with
// float32 weights and sums.
//
//   NCHW   vectors run along a line and are loaded from the plane as it lies, masked where a line ends; with stride 2
//          pairs of vectors are sorted into even and odd columns. At the ends of a line a padding mode permutes them.
//          Tiles are 8 or 7 lines high. Columns further apart come from a padded copy of the lines (strip.h).
//          Planes with lines of up to half a vector are transposed, a vector of channels at a time, and done as NHWC.
//   NHWC   vectors run along channels. Tiles are 8 or 7 pixels of a line.
//
//                    for each walked tap (NCHW: of W, NHWC: of H), for each line (pixel) that the tile reads: one load
//   forward            K weights in registers:     sum[result] += loaded * weight[k]      up to K multiply-adds
//   backward_input     the same gather (gather.h); stride 2 is undone by tiles of 8 results that read 4 + K / 2 units
//   backward_weight    gy in registers:            sum[k] += loaded * gy[result]
//
// K is 1, 3, 5 or 7; even, dilated and other strided kernels walk every tap. Zeros of the padding are left out where
// weights are finite. Sums: walked taps outermost, at most kSumLength terms a piece, then the bias. backward_weight: the
// terms of a tile, then at most kSumLength tiles, then totals of chunks fixed by the shape; the lanes of NCHW last.
// Declines: more than one in channel a group; strips above kStripLimit; backward_input with a padding mode.
#include <atomic>
#include <bit>
#include <deque>
#include <optional>
#include <type_traits>
#include <vector>

#include "cpu/algorithms.h"
#include "cpu/gather.h"
#include "cpu/gemm_blocks.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/strip.h"

namespace myconv::cpu {
namespace {

constexpr int64_t kStripLimit = 1 << 20;  // a strip that does not fit here is declined
constexpr int64_t kMaxDepthwiseKernel = 4096;
constexpr int64_t kMaxReach = 65536;         // positions from an axis' first tap to its last
constexpr int64_t kKeptBytes = 16 << 10;     // result lines that are kept before they are spread: a whole tile at least
constexpr int64_t kMostLanes = 64;           // of any ISA, in bytes
constexpr int64_t kLeastPixels = 8;          // NHWC: pixels that are kept before the filters of a channel are added up
constexpr int64_t kTasks = 16;               // NHWC: pieces of work of a call, at least
constexpr int64_t kPlanesBytes = 16 << 10;   // NCHW: planes that are done together
constexpr int64_t kSmallPlane = 256;         // NCHW: values of a plane that may be transposed
constexpr int64_t kSmallPlanes = 2048;       // NCHW, backward_weight: values of both planes that may be transposed;
constexpr int64_t kManyTaps = 25;            // from so many taps on, four times as many
constexpr double kStreamed = 16e6;           // above so many bytes, read and written, values are fetched early
constexpr int64_t kRolledLines = 7;          // NHWC: lines of a strip where tiles roll,
constexpr int64_t kFewRolledLines = 4;       // or so many: with stride 2, of more lines than that,
constexpr int64_t kSameSets = 4096;          // whose distance is a multiple of this: 15 would not fit their sets of L1
constexpr int64_t kPixelsBytes = 256 << 10;  // NHWC: what the lines of a strip read

// --- forward and backward_input --------------------------------------------------------------------------------------

// The positions that result positions read along an axis, as offsets; -1 in the padding.
using Positions = c10::SmallVector<int64_t, 128>;

// Whether a padding mode moves columns: whether lines go on at their ends.
bool goes_on(const GatherAxis& w) {
  return w.mode != PaddingMode::kZeros && w.taps() > 0 &&
         (w.offset[0] < 0 || w.offset.back() + (w.count - 1) * w.from_step >= w.from_extent);
}

// Where backward_input undoes stride 2, results of both residues together: a phase has all positions and taps along its
// tiles' axis, as they are, and in NCHW all columns and the taps of the even ones. Where pixels roll, all lines, too.
struct Spread {
  int64_t pad;                         // along the tiles' axis
  GatherAxis odd;                      // NCHW: the odd columns
  std::optional<int64_t> lines_pad{};  // NHWC, of all lines
  // The first unit, and the results before those that exist.
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

  // The kernel that rolls, if there is one for this plan.
  template <typename T>
  auto rolled(const DepthwiseKernels<T>& kernels, bool weighs) const -> typename RollingKernels<T>::Tile {
    if (!rolls_) return nullptr;
    const RollingKernels<T>& k = kernels.rolling;
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
    if (const auto roll = t.rolls ? rolled(kernels, gy) : nullptr) {
      t.rows = rows_.data() + (lines_ ? 0 : line * stride_);
      t.weight_step = along_gap_;
      t.pair_step = pair_gap_;
      t.taps = walked_;
      t.tap = taps_.data() + d * walked_;
      t.from += t.tap->offset;  // of the one tap along D
      t.count = count;
      t.units = units_.data() + first * stride_;
      t.unit_size = unit_size_;
      if (lines_) set_moves(t);
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
    t.row_step = lines_ ? 0 : phase_.axis[1].from_step;
    t.rows = rows_.data() + line * t.row_step;
    t.unit_step = along_.from_step;
    t.first_inside = units_.data() + std::max<int64_t>(0, -low_);
    t.end_inside = units_.data() + std::min<int64_t>(units_.size(), along_.from_extent - low_);
    t.unit_size = unit_size_;
    t.weight_step = along_gap_;
    t.pair_step = pair_gap_;
    if (lines_) set_moves(t);
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
    // Pieces of the taps, each with at most kSumLength terms, and of the results.
    for (int64_t k = 0, width; k == 0 || k < across; k += width) {
      int w = std::size(kDepthwiseWidths) - 1;
      while (w > 0 && kDepthwiseWidths[w] > across - k) --w;
      width = kDepthwiseWidths[w];
      const int64_t most = std::min<int64_t>(kMaxWalkedTaps, kSumLength / width / (lines_ ? stride_ : 1));
      for (int64_t tap = 0; tap == 0 || tap < walked_; tap += most) {
        t.taps = std::min(most, walked_ - tap);
        t.tap = taps_.data() + d * walked_ + tap;
        if (weight) t.weight = weight + k * along_gap_;
        if (sums) t.sums = sums + k * along_gap_;
        t.bias = k + width >= across && tap + most >= walked_ ? bias : nullptr;
        for (int64_t i = 0; i < count; i += t.count) {
          const int rows = rows_for(count - i, table[w]);
          t.count = (count - i) / kDepthwiseRows[rows] * kDepthwiseRows[rows];
          t.line = (first + i) * along_.from_step + k + low_;
          t.units = units_.data() + (first + i) * along_.from_step + k;
          if (to) t.to = to + i * t.to_step;
          if (gy) t.gy = gy + i * t.to_step;
          table[w][rows](t);
        }
        t.accumulate = true;
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
    return !lines_ || stride_ == 1 || moves_.empty();
  }

  template <typename T>
  void set_moves(DepthwiseTile<T>& t) const {
    if (moves_.empty()) return;
    t.moves = moves_.data();
    t.line_moves = line_moves_, t.first_end = first_end_, t.to_end = to_end_;
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
bool all_finite(const T* values, int64_t count) {
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

bool spreads(const ConvShape& s, Direction direction) {
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
int64_t rolled_lines(int64_t lines, int64_t stride, int64_t line_bytes) {
  const bool conflicts = stride == 2 && lines > kRolledLines && line_bytes % kSameSets == 0;
  return conflicts ? kFewRolledLines : kRolledLines;
}

// NHWC: whether pixels roll where stride 2 is undone, along both axes.
bool spreads_lines(const ConvShape& s) {
  if (!s.channels_last() || !microkernels().f32.depthwise.rolling.spread_pixels) return false;
  if (s.kernel[0] != 1 || s.stride[0] != 1 || s.pad[0] != 0 || s.kernel[1] != 3 || s.kernel[2] != 3) return false;
  return s.stride[1] == 2 && s.dilation[1] == 1 && s.pad[1] >= 0 && s.in[1] >= 2;
}

using Phases = c10::SmallVector<Phase, 1>;

Phases phases_of(const ConvShape& s, Direction direction) {
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

// --- NCHW ------------------------------------------------------------------------------------------------------------

// Whether lines must be copied first: columns too far apart, or that a padding mode moves too far.
bool needs_strip(const GatherPhase& phase, int64_t lanes) {
  const GatherAxis& w = phase.axis[2];
  if (w.from_step > 2) return true;
  if (w.from_step == 2 && w.taps() > 1 && w.offset[1] - w.offset[0] != 1) return true;
  if (!goes_on(w)) return false;
  const bool wraps = w.mode == PaddingMode::kCircular && w.from_extent > lanes * w.from_step;
  const int64_t most = wraps ? std::min<int64_t>(kFew, lanes - 1) : lanes - 1;
  return -w.offset[0] > most || w.offset.back() + (w.count - 1) * w.from_step - w.from_extent + 1 > most;
}

// The strip of a block of lines as what a phase reads: nothing lies outside.
Phase strip_phase(const GatherPhase& phase, const StripPlan& strip) {
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

template <typename T>
void gather_lines(const Gather& g, const Phase& phase, const int64_t* kernel, const Kernels<T>& kernels, const T* from,
                  const Word<T>* weight, const Word<T>* bias, T* to, Word<T>* workspace) {
  const GatherAxis* a = phase.axis;
  const LineScratch scratch(phase, sizeof(T), kernels.lanes);
  const StripPlan strip(phase, sizeof(T), kStripBytes);
  const int64_t strip_step[] = {strip.strip_lines * strip.pitch, strip.pitch, 1};
  const bool copies = scratch.strip > 0, scatters = scratch.kept > 0;
  const Plan plan(copies ? strip_phase(phase, strip) : phase, /*lines=*/true, copies ? strip_step : g.from_stride.axis,
                  g.weight_axis_stride, kernels.lanes);
  std::optional<BlockRuns> runs;
  if (copies) runs.emplace(phase, strip);
  const int64_t block = copies ? strip.block_lines : a[1].count;
  const int64_t step = scatters ? std::min(block, scratch.lines) : block;  // lines of one run of the plan
  // Planes of a group: of what is read, which are summed up, and of the result.
  const int64_t summed = g.from_per_group, multiplier = g.to_per_group;
  const int64_t channels = g.groups * multiplier, taps = kernel[0] * kernel[1] * kernel[2];
  const int64_t weight_step = g.weight_group_stride / (summed * multiplier);
  const int64_t plane_bytes = g.from_stride.channel * sizeof(T);
  const int64_t together =
      copies || scatters || multiplier > 1 ? 1 : std::max<int64_t>(1, kPlanesBytes / std::max<int64_t>(1, plane_bytes));
  const bool streams = bytes_moved<T>(g) > kStreamed;
  const bool dense = weight_step == taps;                 // then all weights of a channel lie together
  const auto finite = [&](int64_t first, int64_t last) {  // used in this phase or not
    if (dense) return all_finite(weight + first * summed * taps, (last - first) * summed * taps);
    bool all = true;
    for (int64_t t = 0; t < taps; ++t)
      for (int64_t c = first * summed; c < last * summed; ++c)
        all = all && all_finite(weight + c * weight_step + t / (kernel[1] * kernel[2]) * g.weight_axis_stride[0] +
                                    t / kernel[2] % kernel[1] * g.weight_axis_stride[1] +
                                    t % kernel[2] * g.weight_axis_stride[2],
                                1);
    return all;
  };

  parallel_tasks(g.batch * channels, 2.0 * phase.taps() * summed * phase.pixels(), [&](int64_t begin, int64_t end) {
    T* const mine = reinterpret_cast<T*>(workspace) + at::get_thread_num() * scratch.elements();
    T* const kept = mine + scratch.strip;
    const bool all = end - begin >= channels || begin % channels > (end - 1) % channels;
    const bool skip_zeros =
        !plan.pads() || finite(all ? 0 : begin % channels, all ? channels : (end - 1) % channels + 1);
    for (int64_t i = begin, planes; i < end; i += planes) {
      const int64_t n = i / channels, c = i % channels;
      planes = std::min({together, end - i, channels - c});
      const T* const plane = from + n * g.from_stride.batch + c / multiplier * summed * g.from_stride.channel;
      T* const result = to + n * g.to_stride.batch + c * g.to_stride.channel;
      for (int64_t d = 0; d < a[0].count; ++d)
        for (int64_t h = 0; h < a[1].count; h += block) {
          if constexpr (!kIsHalf<T>)
            if (copies) runs->fill(d, h, plane, kernels, mine);
          for (int64_t l = h; l < std::min(a[1].count, h + block); l += step) {
            const int64_t lines = std::min(step, std::min(a[1].count, h + block) - l);
            T* const target = result + (a[0].to_start + d * a[0].to_step) * g.to_stride.axis[0] +
                              (a[1].to_start + l * a[1].to_step) * g.to_stride.axis[1] + a[2].to_start;
            const int64_t target_step = a[1].to_step * g.to_stride.axis[1];
            DepthwiseTile<T> tile{};
            tile.planes = planes;
            tile.from_plane = g.from_stride.channel * summed;
            tile.weight_plane = weight_step * summed;
            tile.bias_plane = bias != nullptr;
            tile.to_plane = g.to_stride.channel;
            tile.lists = 1;
            tile.extent = plan.axis(2).from_extent;
            tile.to = scatters ? kept : target;
            tile.to_step = scatters ? a[2].count : target_step;
            tile.length = a[2].count;
            tile.skip_zeros = skip_zeros;
            tile.rolls = true;
            tile.ahead = streams && !copies ? g.from_stride.axis[1] : 0;
            for (int64_t m = 0; m < summed; ++m) {
              tile.from = copies ? mine : plane + m * g.from_stride.channel;
              tile.weight = weight + (c * summed + m) * weight_step;
              tile.accumulate = m > 0;
              tile.bias = bias && m + 1 == summed ? bias + c : nullptr;
              plan.run(kernels.depthwise, copies ? 0 : d, 0, copies ? l - h : l, lines, tile);
            }
            if (scatters)
              for (int64_t r = 0; r < lines; ++r)
                for (int64_t j = 0; j < a[2].count; ++j)
                  target[r * target_step + j * a[2].to_step] = kept[r * a[2].count + j];
          }
        }
    }
  });
}

// --- NHWC ------------------------------------------------------------------------------------------------------------

// Packs weights as [block][tap][lane]; a block is one vector of channels. Returns whether all of them are finite.
template <typename T>
bool pack_weights(const Gather& g, const Kernels<T>& kernels, const int64_t* kernel, const T* weight, Word<T>* packed) {
  using W = Word<T>;
  const int64_t lanes = kernels.lanes, taps = kernel[0] * kernel[1] * kernel[2];
  const int64_t per_group = g.from_per_group * g.to_per_group;
  const int64_t filters = g.groups * per_group, filter_step = g.weight_group_stride / per_group;
  bool dense = true;  // the taps of a filter, in order
  for (int64_t d = 2, step = 1; d >= 0; step *= kernel[d--])
    dense = dense && (kernel[d] == 1 || g.weight_axis_stride[d] == step);
  std::atomic<bool> finite = true;
  parallel_tasks(ceil_div(filters, lanes), 8.0 * taps * lanes, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const T* of_block = weight + b * lanes * filter_step;
      const int64_t count = std::min(lanes, filters - b * lanes);
      W* const w = packed + b * taps * lanes;
      if (count < lanes) std::fill_n(w, taps * lanes, W(0));
      if (dense)
        kernels.transpose(of_block, filter_step, count, taps, w, lanes);
      else
        for (int64_t t = 0; t < taps; ++t) {
          const T* of_tap = of_block + t / (kernel[1] * kernel[2]) * g.weight_axis_stride[0] +
                            t / kernel[2] % kernel[1] * g.weight_axis_stride[1] +
                            t % kernel[2] * g.weight_axis_stride[2];
          for (int64_t c = 0; c < count; ++c)
            kernels.copy_rows(of_tap + c * filter_step, 0, 1, 1, w + t * lanes + c, 0);
        }
    }
    if (!all_finite(packed + begin * taps * lanes, (end - begin) * taps * lanes)) finite = false;
  });
  return finite;
}

// Which channels of x the results of each vector of filters are made of, with a channel multiplier.
std::vector<DepthwiseMove> multiplier_moves(int64_t filters, int64_t multiplier, int64_t lanes) {
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

// Pixels that are kept, one value a filter, before those of a channel are added up.
template <typename T>
int64_t summed_pixels(int64_t filters, int64_t pixels) {
  return std::clamp<int64_t>(kStripBytes / static_cast<int64_t>(sizeof(T)) / filters, kLeastPixels,
                             std::max(pixels, kLeastPixels));
}

// to[pixel * to_step + c] = sum over m of  from[(pixel * channels + c) * multiplier + m],  + bias[c]
template <typename T>
void add_filters(const T* from, int64_t pixels, int64_t channels, int64_t multiplier, const Word<T>* bias, T* to,
                 int64_t to_step) {
  const auto add = [&](auto m) {
    for (int64_t i = 0; i < pixels; ++i, to += to_step, from += channels * m) {
      for (int64_t c = 0; c < channels; ++c) {
        T sum = from[c * m];
        if constexpr (!kIsHalf<T>)
          for (int64_t j = 1; j < m; ++j) sum += from[c * m + j];
        to[c] = sum;
      }
      if constexpr (!kIsHalf<T>)
        for (int64_t c = 0; bias && c < channels; ++c) to[c] += bias[c];
    }
  };
  if (multiplier == 2) return add(std::integral_constant<int64_t, 2>{});  // the compiler makes vectors of it
  if (multiplier == 4) return add(std::integral_constant<int64_t, 4>{});
  add(multiplier);
}

// With a channel multiplier a vector holds filters: forward repeats what each channel of x holds (moves), and
// backward_input adds up the results of a channel's filters.
template <typename T>
void gather_pixels(const Gather& g, const Phases& phases, const Kernels<T>& kernels, const int64_t* kernel,
                   const T* from, const T* weight, const Word<T>* bias, T* to, Word<T>* workspace) {
  using W = Word<T>;
  const int64_t lanes = kernels.lanes, taps = kernel[0] * kernel[1] * kernel[2];
  const int64_t multiplier = g.from_per_group * g.to_per_group, filters = g.groups * multiplier;
  const int64_t blocks = ceil_div(filters, lanes);
  const int64_t packed_step[] = {kernel[1] * kernel[2] * lanes, kernel[2] * lanes, lanes};
  W* const packed = workspace;
  T* const kept = reinterpret_cast<T*>(packed + blocks * taps * lanes);
  const bool finite = pack_weights(g, kernels, kernel, weight, packed);
  const bool adds = g.from_per_group > 1;
  std::vector<DepthwiseMove> moves;
  if (g.to_per_group > 1) moves = multiplier_moves(filters, multiplier, lanes);

  std::deque<Plan> plans;
  int64_t depths = 1, lines = 1, width = 1, reads = 1;  // the most of any phase; lines that a line of each phase reads
  double macs = 0;
  for (const Phase& phase : phases) {
    const GatherAxis* a = phase.axis;
    plans.emplace_back(phase, /*lines=*/false, g.from_stride.axis, packed_step, lanes);
    depths = std::max(depths, a[0].count), lines = std::max(lines, plans.back().lists());
    width = std::max(width, a[2].taps());
    reads = std::max(reads, a[1].from_step);
    macs += 2.0 * phase.taps() * phase.pixels() * filters * g.batch;
  }
  // Lines in equal strips: a few for each thread, that fit L2. All phases of a strip follow one another. Where tiles roll,
  // strips are theirs, and vectors of channels are shared out.
  const bool rolls = !adds && moves.empty() && plans[0].rolled(kernels.depthwise, false);
  const int64_t line_bytes = reads * g.from_stride.axis[1] * sizeof(T), images = std::max<int64_t>(1, g.batch * depths);
  const bool streams = bytes_moved<T>(g) > kStreamed;
  int64_t together = width < 7 || adds ? blocks : 1, strip = lines;
  if (rolls) {
    const int64_t step = g.from_stride.axis[1] * static_cast<int64_t>(sizeof(T));
    strip = ceil_div(lines, ceil_div(lines, rolled_lines(lines, reads, step)));
    together = ceil_div(blocks, std::min(blocks, ceil_div(kTasks, images * ceil_div(lines, strip))));
  } else {
    const int64_t fit = std::max<int64_t>(1, kPixelsBytes / std::max<int64_t>(1, line_bytes));
    const int64_t wanted = ceil_div(kTasks, images * ceil_div(blocks, together));
    strip = ceil_div(lines, std::clamp<int64_t>(wanted, ceil_div(lines, fit), lines));
  }
  const int64_t parts = ceil_div(blocks, together);
  const int64_t strips = ceil_div(lines, strip);
  const int64_t tasks = g.batch * depths * strips * parts;
  parallel_tasks(tasks, macs / tasks, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (const Plan& plan : plans) {
        const auto axis = [&](int j) -> const GatherAxis& { return plan.axis(j); };
        const int64_t part = i % parts, c = part * together * lanes, h = i / parts % strips * strip;
        const int64_t d = i / (parts * strips) % depths, n = i / (parts * strips * depths);
        if (d >= axis(0).count || h >= plan.lists()) continue;
        T* const result = to + n * g.to_stride.batch + (axis(0).to_start + d * axis(0).to_step) * g.to_stride.axis[0] +
                          (axis(1).to_start + plan.first_line(h) * axis(1).to_step) * g.to_stride.axis[1] +
                          axis(2).to_start * g.to_stride.axis[2];
        DepthwiseTile<T> tile{};
        tile.planes = std::min(together, blocks - part * together);
        tile.from_plane = tile.to_plane = lanes;
        tile.weight_plane = taps * lanes;
        tile.bias_plane = bias ? lanes : 0;
        tile.lists = std::min(strip, plan.lists() - h);
        tile.from = from + n * g.from_stride.batch + (moves.empty() ? c : 0);
        tile.moves = moves.empty() ? nullptr : moves.data() + part * together;
        tile.weight = packed + c * taps;
        tile.bias = bias && !adds ? bias + c : nullptr;
        tile.to = result + c;
        tile.list_step = axis(1).to_step * g.to_stride.axis[1];
        tile.to_step = axis(2).to_step * g.to_stride.axis[2];
        tile.length = filters - c;
        tile.skip_zeros = finite;
        tile.rolls = rolls;
        tile.ahead = streams ? axis(1).from_step * g.from_stride.axis[1] : 0;
        if (!adds) {
          plan.run(kernels.depthwise, d, h, 0, axis(2).count, tile);
          continue;
        }
        const int64_t most = summed_pixels<T>(filters, g.to_extent[2]), lists = tile.lists;
        tile.to = kept + at::get_thread_num() * most * filters;
        tile.to_step = filters;
        tile.lists = 1;
        for (int64_t l = 0; l < lists; ++l)
          for (int64_t first = 0; first < axis(2).count; first += most) {
            const int64_t count = std::min(most, axis(2).count - first), step = axis(2).to_step * g.to_stride.axis[2];
            plan.run(kernels.depthwise, d, h + l, first, count, tile);
            add_filters(tile.to, count, g.groups, multiplier, bias, result + l * tile.list_step + first * step, step);
          }
      }
  });
}

// NCHW: whether lines roll, as far as the shape tells (Plan::find_rolls).
bool lines_roll(const ConvShape& s, Direction direction) {
  const RollingKernels<float>& kernels = microkernels().f32.depthwise.rolling;
  const int64_t stride = s.stride[1];
  if (s.kernel[0] != 1 || s.kernel[1] != 3 || s.kernel[2] != 3 || s.dilation[1] != 1) return false;
  if (stride > 2 || s.stride[2] != stride || (stride == 2 && s.dilation[2] != 1)) return false;
  return (direction == Direction::kBackwardWeight ? kernels.weight_lines : kernels.lines)[stride - 1];
}

// Small planes of NCHW, whose lines would leave half of a vector empty: a vector of channels is transposed, done as
// above, and transposed back. Not where lines roll and a quarter of a vector is full.
bool transposes(const ConvShape& s, Direction direction, int64_t lanes) {
  const bool forward = direction == Direction::kForward;
  const int64_t columns = forward ? s.out[2] : s.in[2], plane = std::max(s.in_pixels(), s.out_pixels());
  const bool phases = !forward && s.stride[0] * s.stride[1] * s.stride[2] != 1;
  if (lines_roll(s, direction) && 4 * columns > lanes) return false;
  return !s.channels_last() && s.out_per_group == 1 && !phases && s.groups >= lanes && 2 * columns <= lanes &&
         s.in[0] == 1 && s.out[0] == 1 && plane <= kSmallPlane;
}

template <typename T>
void gather_transposed(const Gather& g, const Kernels<T>& kernels, const int64_t* kernel, const T* from,
                       const T* weight, const Word<T>* bias, T* to, Word<T>* workspace) {
  using W = Word<T>;
  const GatherAxis* a = g.phases[0].axis;
  const int64_t lanes = kernels.lanes, channels = g.groups, blocks = ceil_div(channels, lanes);
  const int64_t taps = kernel[0] * kernel[1] * kernel[2], in = g.from_pixels(), out = g.to_pixels();
  const int64_t packed_step[] = {kernel[1] * kernel[2] * lanes, kernel[2] * lanes, lanes};
  const int64_t from_step[] = {in * lanes, g.from_extent[2] * lanes, lanes};
  W *const packed = workspace, *const images = packed + blocks * taps * lanes;
  const bool finite = pack_weights(g, kernels, kernel, weight, packed);
  const Plan plan({g.phases[0], std::nullopt}, /*lines=*/false, from_step, packed_step, lanes);
  parallel_tasks(g.batch * blocks, 2.0 * taps * out * lanes, [&](int64_t begin, int64_t end) {
    W* const image = images + at::get_thread_num() * (in + out) * lanes;
    W* const result = image + in * lanes;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t c = i % blocks * lanes, n = i / blocks, count = std::min(lanes, channels - c);
      const T* const planes = from + n * g.from_stride.batch + c * in;
      kernels.transpose(planes, in, count, in, image, lanes);
      DepthwiseTile<W> tile{};
      tile.planes = 1;
      tile.lists = a[1].count;
      tile.from = image;
      tile.weight = packed + c * taps;
      tile.bias = bias ? bias + c : nullptr;
      tile.to = result;
      tile.list_step = a[2].count * lanes;
      tile.to_step = lanes;
      tile.length = count;
      tile.skip_zeros = finite;
      tile.rolls = true;
      plan.run(kernels_of<W>(microkernels()).depthwise, 0, 0, 0, a[2].count, tile);
      kernels.store_transposed(result, lanes, out, count, to + n * g.to_stride.batch + c * out, out);
    }
  });
}

// Weights as they are multiplied: of 16-bit types a copy, dense, of which g is told.
template <typename T>
const Word<T>* widened_weights(Gather& g, const Kernels<T>& kernels, const int64_t* kernel, const T* weight,
                               Word<T>* copy) {
  if constexpr (!kIsHalf<T>) return weight;
  const int64_t per_group = g.from_per_group * g.to_per_group, filter_step = g.weight_group_stride / per_group;
  const int64_t step[] = {kernel[1] * kernel[2], kernel[2], 1};
  for (int64_t f = 0; f < g.groups * per_group; ++f)
    for (int64_t d = 0; d < kernel[0]; ++d)
      for (int64_t h = 0; h < kernel[1]; ++h) {
        const T* const line = weight + f * filter_step + d * g.weight_axis_stride[0] + h * g.weight_axis_stride[1];
        Word<T>* const to = copy + (f * kernel[0] + d) * step[0] + h * kernel[2];
        if (g.weight_axis_stride[2] == 1)
          kernels.copy_rows(line, 0, 1, kernel[2], to, 0);
        else
          kernels.copy_rows(line, g.weight_axis_stride[2], kernel[2], 1, to, 1);
      }
  std::copy_n(step, 3, g.weight_axis_stride);
  g.weight_group_stride = kernel[0] * step[0] * per_group;
  return copy;
}

template <typename T>
void gather(const ConvShape& s, Direction direction, const void* from, const ConvPointers& p, void* workspace) {
  using W = Word<T>;
  Gather g = make_gather(s, direction);
  const Kernels<T>& kernels = kernels_of<T>(microkernels());
  const T *const x = static_cast<const T*>(from), *const w = static_cast<const T*>(p.weight);
  const Bias<T> bias(microkernels(), p.bias, g.groups * g.to_per_group);
  const W* const b = bias.get();
  T* const y = static_cast<T*>(p.result);
  W* const scratch = static_cast<W*>(workspace);
  const Phases phases = phases_of(s, direction);
  if (s.channels_last()) return gather_pixels(g, phases, kernels, s.kernel, x, w, b, y, scratch);
  if (transposes(s, direction, kernels.lanes)) return gather_transposed(g, kernels, s.kernel, x, w, b, y, scratch);
  const W* const weight = widened_weights(g, kernels, s.kernel, w, scratch);
  W* const rest = scratch + (kIsHalf<T> ? round_up(g.groups * s.out_per_group * s.taps(), 16) : 0);
  for (const Phase& phase : phases) gather_lines(g, phase, s.kernel, kernels, x, weight, b, y, rest);
}

// --- backward_weight -------------------------------------------------------------------------------------------------

// Sums are made in three steps: R terms a lane in registers, up to kSumLength tiles in memory, and totals of those. The
// totals of a chunk of the lines (NCHW: samples) are one sum, and chunks are added up in order: there are more than one
// where the channels alone are too few tasks, or where a line of all channels is better read by one thread.

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
      kernels_.add_row(totals_, sums_, count_);
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
void weight_lines(const ConvShape& s, const Kernels<T>& kernels, const T* gy, const T* x, T* gw, Word<T>* workspace) {
  using W = Word<T>;
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
  const bool streams = bytes_moved<T>(make_gather(s, Direction::kForward)) > kStreamed;
  const WeightTarget target(s);
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
              tile.ahead = streams && !copies ? s.in[2] : 0;
              all.reserve(most_tiles(lines) * vectors);
              plan.run(kernels.depthwise, copies ? 0 : d, 0, copies ? l - h : l, lines, tile);
            }
          }
      }
      all.finish();
      if (cut.chunks == 1) store(f, planes, totals, sums + 2 * cut.sums);
    }
  });
  if (cut.chunks == 1) return;
  for (int64_t chunk = 1; chunk < cut.chunks; ++chunk)
    words.add_row(shared, shared + chunk * filters * of_plane, filters * of_plane);
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
void weight_pixels(const ConvShape& s, const Kernels<T>& kernels, const T* gy, const T* x, T* gw, Word<T>* workspace) {
  using W = Word<T>;
  const Kernels<W>& words = kernels_of<W>(microkernels());
  const int64_t taps = s.taps(), lanes = kernels.lanes, of_vector = taps * lanes, filters = s.out_channels();
  const int64_t multiplier = s.out_per_group, width = s.out[2], in = s.in_pixels(), out = s.out_pixels();
  const WeightPixels cut(s, sizeof(W), lanes);
  const auto x_stride = activation_strides(Layout::kChannelsLast, cut.turns ? lanes : s.groups, s.in);
  const int64_t sum_step[] = {s.kernel[1] * s.kernel[2] * lanes, s.kernel[2] * lanes, lanes};
  const Plan plan(phases_of(s, Direction::kForward)[0], /*lines=*/false, x_stride.axis, sum_step, lanes);
  std::vector<DepthwiseMove> moves;
  if (multiplier > 1) moves = multiplier_moves(filters, multiplier, lanes);
  const int64_t line_bytes = (s.stride[1] * x_stride.axis[1] + width * filters) * sizeof(T);
  const bool wide = s.kernel[2] >= 7;  // a strip of lines for each vector
  const int64_t columns = std::min(width, (kSumLength - 3) * 7), line_tiles = most_tiles(columns);
  int64_t fit = std::min(kSumLength / line_tiles,
                         wide && !cut.turns ? std::max<int64_t>(1, kPixelsBytes / line_bytes) : kSumLength);
  if (plan.rolled(kernels.depthwise, true) && moves.empty()) {
    const int64_t step = x_stride.axis[1] * static_cast<int64_t>(sizeof(T));
    if (const int64_t most = rolled_lines(s.out[1], s.stride[1], step); most < kRolledLines) fit = std::min(fit, most);
  }
  const bool streams = !cut.turns && bytes_moved<T>(make_gather(s, Direction::kForward)) > kStreamed;
  const WeightTarget target(s);
  W* const shared = workspace;
  W* const scratch = workspace + cut.shared_words(s, lanes);

  const auto store = [&](int64_t vector, const W* totals) {
    const int64_t f = vector * lanes, count = std::min(lanes, filters - f);
    if (target.dense) return kernels.store_transposed(totals, lanes, taps, count, gw + f * taps, taps);
    for (int64_t t = 0; t < taps; ++t)
      for (int64_t c = 0; c < count; ++c)
        kernels.store_rows(totals + t * lanes + c, 0, 1, 1, gw + (f + c) * target.filter + target.taps[t], 0);
  };

  // Vectors [first, last) of lines [begin, end), which are whole samples where planes are transposed.
  const auto sum_up = [&](WeightSums<W>& all, auto from, auto of_gy, const auto& tiles, int64_t first, int64_t last,
                          int64_t begin, int64_t end, W* sums) {
    using S = std::remove_const_t<std::remove_pointer_t<decltype(from)>>;
    const int64_t pixel = cut.turns ? lanes : filters, together = wide ? 1 : last - first;
    for (int64_t line = begin, lists; line < end; line += lists) {
      const int64_t h = line % s.out[1], d = line / s.out[1] % s.out[0], n = line / (s.out[1] * s.out[0]);
      lists = std::min({fit, end - line, s.out[1] - h});
      for (int64_t at = 0; at < width; at += columns) {
        const int64_t count = std::min(columns, width - at);
        all.reserve(lists * most_tiles(count));
        for (int64_t v = first; v < last; v += together) {
          DepthwiseTile<S> tile{};
          tile.planes = together;
          tile.from_plane = tile.to_plane = lanes;
          tile.sums_plane = of_vector;
          tile.lists = lists;
          tile.from = from + (cut.turns ? 0 : n * x_stride.batch + (moves.empty() ? v * lanes : 0));
          tile.moves = moves.empty() ? nullptr : moves.data() + v;
          tile.gy = of_gy + ((cut.turns ? h : line) * width + at) * pixel + (cut.turns ? 0 : v * lanes);
          tile.list_step = width * pixel;
          tile.to_step = pixel;
          tile.length = filters - v * lanes;
          tile.sums = sums + (v - first) * of_vector;
          tile.rolls = moves.empty();
          tile.ahead = streams ? s.stride[1] * x_stride.axis[1] : 0;
          plan.run(tiles, d, h, at, count, tile);
        }
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
          sum_up(all, from, of_gy, words.depthwise, first, last, n * cut.unit, (n + 1) * cut.unit, sums);
        }
      else
        sum_up(all, x, gy, kernels.depthwise, first, last, begin_unit, end_unit, sums);
      all.finish();
      if (cut.chunks == 1)
        for (int64_t v = first; v < last; ++v) store(v, totals + (v - first) * of_vector);
    }
  });
  if (cut.chunks == 1) return;
  parallel_tasks(cut.vectors, 4.0 * cut.chunks * of_vector, [&](int64_t begin, int64_t end) {
    const int64_t size = (end - begin) * of_vector;
    W* const totals = shared + begin * of_vector;
    for (int64_t chunk = 1; chunk < cut.chunks; ++chunk)
      words.add_row(totals, totals + chunk * cut.vectors * of_vector, size);
    for (int64_t v = begin; v < end; ++v) store(v, shared + v * of_vector);
  });
}

// What 16-bit types lack: loads by masks, sums in pieces, and strips.
const char* decline_half(const ConvShape& s, Direction direction) {
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

int64_t lanes_of(int64_t size) { return size <= 4 ? microkernels().f32.lanes : microkernels().f64.lanes; }

const char* decline(const ConvShape& s, Direction direction) {
  if (s.in_per_group != 1) return "more than one channel a group";
  if (s.out_per_group == 0) return "nothing to sum over";
  const bool half = dtype_size(s.dtype) == 2;
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
    const bool adds = direction == Direction::kBackwardInput && s.out_per_group > 1;
    return adds && s.groups * s.out_per_group > kStripLimit / size / kLeastPixels ? "filters above 1 MiB" : nullptr;
  }
  for (const Phase& phase : phases_of(s, direction))
    if (needs_strip(phase, lanes_of(size)) && StripPlan(phase, size, kStripBytes).size > kStripLimit / size)
      return "a strip of padded lines above 1 MiB";
  return nullptr;
}

int64_t gather_workspace(const ConvShape& s, Direction direction, int threads) {
  const int64_t size = dtype_size(s.dtype), word = std::max<int64_t>(size, 4), filters = s.groups * s.out_per_group;
  const int64_t weights = s.taps() * (filters * word + kMostLanes) + kMostLanes;
  if (s.channels_last()) {
    if (direction == Direction::kForward || s.out_per_group == 1) return weights;
    return weights +
           threads * (size == 4 ? summed_pixels<float> : summed_pixels<double>)(filters, s.in[2]) * filters * size;
  }
  if (transposes(s, direction, lanes_of(size)))
    return weights + threads * (s.in_pixels() + s.out_pixels()) * kMostLanes;
  int64_t elements = 0;
  for (const Phase& phase : phases_of(s, direction))
    elements = std::max(elements, LineScratch(phase, size, lanes_of(size)).elements());
  return threads * elements * size + (size == 2 ? weights : 0);
}

}  // namespace

const char* depthwise_forward_decline(const ConvShape& s) { return decline(s, Direction::kForward); }
const char* depthwise_forward_yield(const ConvShape& s) {
  constexpr int64_t kTileFilters = 8;
  if (s.out_per_group < kTileFilters || (s.channels_last() && s.groups > 1)) return nullptr;
  return "filters enough for the rows of a register tile";
}
const char* depthwise_backward_input_decline(const ConvShape& s) { return decline(s, Direction::kBackwardInput); }
const char* depthwise_backward_weight_decline(const ConvShape& s) {
  return s.batch == 0 ? "nothing to sum over" : decline(s, Direction::kBackwardWeight);
}
const char* depthwise_backward_weight_yield(const ConvShape& s) {
  constexpr int64_t kVectorFilters = 16;
  return s.groups == 1 && s.out_per_group >= kVectorFilters ? "one channel, filters enough for a vector" : nullptr;
}

int64_t depthwise_forward_workspace(const ConvShape& s, int threads) {
  return gather_workspace(s, Direction::kForward, threads);
}
int64_t depthwise_backward_input_workspace(const ConvShape& s, int threads) {
  return gather_workspace(s, Direction::kBackwardInput, threads);
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

void depthwise_forward(const ConvShape& s, const ConvPointers& p, void* workspace, int) {
  with_type(s.dtype, [&](auto type) { gather<decltype(type)>(s, Direction::kForward, p.input, p, workspace); });
}

void depthwise_backward_input(const ConvShape& s, const ConvPointers& p, void* workspace, int) {
  const Direction direction = Direction::kBackwardInput;
  with_type(s.dtype, [&](auto type) { gather<decltype(type)>(s, direction, p.grad_output, p, workspace); });
}

void depthwise_backward_weight(const ConvShape& s, const ConvPointers& p, void* workspace, int) {
  with_type(s.dtype, [&](auto type) {
    using T = decltype(type);
    const Kernels<T>& kernels = kernels_of<T>(microkernels());
    (s.channels_last() || transposes_weight(s, kernels.lanes)
         ? weight_pixels<T>
         : weight_lines<T>)(s, kernels, static_cast<const T*>(p.grad_output), static_cast<const T*>(p.input),
                            static_cast<T*>(p.result), static_cast<Word<T>*>(workspace));
  });
}

}  // namespace myconv::cpu
