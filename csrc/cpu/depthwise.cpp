// Depthwise convolutions (one in channel a group, or few), floating-point types; 16-bit ones with float32 weights and sums.
// Here forward and backward_input; depthwise_backward_weight.cpp walks the same tiles.
//
//   NCHW   vectors run along a line and are loaded from the plane as it lies, masked where a line ends; with stride 2
//          pairs of vectors are sorted into even and odd columns. At the ends of a line a padding mode permutes them.
//          Tiles are 8 or 7 lines high. Columns further apart come from a padded copy of the lines (strip.h).
//          Small planes whose lines cost more are transposed, a vector of channels at a time, and done as NHWC.
//   NHWC   vectors run along channels. Tiles are 8 or 7 pixels of a line.
//   3x3 kernels with stride 1 or 2 roll along lines (NCHW) or pixels (NHWC) instead: depthwise_rolling.inc.
//   Of large tensors in NHWC, and on AVX2, they read in order: depthwise_in_order.inc.
//
//                    for each walked tap (NCHW: of W, NHWC: of H), for each line (pixel) that the tile reads: one load
//   forward            K weights in registers:     sum[result] += loaded * weight[k]      up to K multiply-adds
//   backward_input     the same gather (gather.h); stride 2 is undone by tiles of 8 results that read 4 + K / 2 units
//
// K is 1, 3, 5 or 7; even, dilated and other strided kernels walk every tap. Zeros of the padding are left out where
// weights are finite. Sums: walked taps outermost, at most kSumLength terms a piece, then the bias.
// Groups of two or four channels in NHWC are done as these are, once for each channel of a group (is_few_in_groups).
// Declines (depthwise_plan.h): other groups of more than one in channel; strips above kStripLimit; backward_input with a
// padding mode.
#include <atomic>
#include <deque>
#include <type_traits>
#include <vector>

#include "cpu/algorithms.h"
#include "cpu/depthwise_plan.h"
#include "cpu/past_caches.h"

namespace myconv::cpu {
namespace {

using namespace depthwise;

constexpr int64_t kSmallPlane = 4096;        // NCHW: values of a plane that may be transposed
constexpr int64_t kOwnWeights = 256 * 1024;  // values of all threads, that each pack them for themselves
constexpr int64_t kWidenedStep = 16;         // NCHW: what follows widened weights begins with a line of the cache

// --- NCHW ------------------------------------------------------------------------------------------------------------

// Copies of weights that threads make for themselves where they are few: to fetch what another thread has written takes
// longer.
inline int64_t weight_copies(int64_t size, int threads) { return threads * size <= kOwnWeights ? threads : 1; }

// Whether the taps of a filter lie together, in order.
inline bool taps_in_order(const Gather& g, const int64_t* kernel) {
  bool in_order = true;
  for (int64_t d = 2, step = 1; d >= 0; step *= kernel[d--])
    in_order = in_order && (kernel[d] == 1 || g.weight_axis_stride[d] == step);
  return in_order;
}

// Weights as lines are multiplied by them: of 16-bit types copies, dense, of which g is told.
template <typename T>
class LineWeights {
 public:
  using W = Word<T>;
  LineWeights(Gather& g, const Kernels<T>& kernels, const int64_t* kernel, const T* weight, W* memory, int threads)
      : kernels_(kernels), kernel_(kernel), taps_(kernel[0] * kernel[1] * kernel[2]), weight_(weight), memory_(memory) {
    if constexpr (!kIsHalf<T>) return;
    const int64_t per_group = g.from_per_group * g.to_per_group, dense[] = {kernel[1] * kernel[2], kernel[2], 1};
    filters_ = g.groups * per_group, filter_step_ = g.weight_group_stride / per_group;
    std::copy_n(g.weight_axis_stride, 3, axis_step_);
    dense_ = taps_in_order(g, kernel) && filter_step_ == taps_;
    std::copy_n(dense, 3, g.weight_axis_stride);
    g.weight_group_stride = taps_ * per_group;
    copies_ = weight_copies(size(filters_ * taps_), threads);
    if (copies_ == 1) widen(0, filters_, memory);
  }

  static int64_t size(int64_t values) { return round_up(values, kWidenedStep); }
  W* end() const { return memory_ + copies_ * size(filters_ * taps_); }
  // For the calling thread, which reads those of filters [first, last).
  const W* of(int64_t first, int64_t last) const {
    if constexpr (!kIsHalf<T>) return weight_;
    if (copies_ == 1) return memory_;
    W* const mine = memory_ + at::get_thread_num() * size(filters_ * taps_);
    widen(first, last, mine);
    return mine;
  }

 private:
  void widen(int64_t first, int64_t last, W* to) const {
    if (dense_) return kernels_.copy_rows(weight_ + first * taps_, 0, 1, (last - first) * taps_, to + first * taps_, 0);
    for (int64_t f = first; f < last; ++f)
      for (int64_t d = 0; d < kernel_[0]; ++d)
        for (int64_t h = 0; h < kernel_[1]; ++h)
          kernels_.copy_rows(weight_ + f * filter_step_ + d * axis_step_[0] + h * axis_step_[1], axis_step_[2],
                             kernel_[2], 1, to + ((f * kernel_[0] + d) * kernel_[1] + h) * kernel_[2], 1);
  }

  const Kernels<T>& kernels_;
  const int64_t* kernel_;
  int64_t taps_, filters_ = 0, filter_step_ = 0, axis_step_[3] = {}, copies_ = 0;
  const T* weight_;
  W* memory_;
  bool dense_ = true;  // all filters lie together
};

template <typename T>
void gather_lines(const Gather& g, const Phase& phase, const int64_t* kernel, const Kernels<T>& kernels, const T* from,
                  const LineWeights<T>& weights, const Word<T>* bias, T* to) {
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
  const bool dense = weight_step == taps;  // then all weights of a channel lie together
  const auto finite = [&](const Word<T>* weight, int64_t first, int64_t last) {  // used in this phase or not
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
    T* const mine = reinterpret_cast<T*>(weights.end()) + at::get_thread_num() * scratch.elements();
    T* const kept = mine + scratch.strip;
    const bool all = end - begin >= channels || begin % channels > (end - 1) % channels;
    const int64_t first = all ? 0 : begin % channels, last = all ? channels : (end - 1) % channels + 1;
    const Word<T>* const weight = weights.of(first * summed, last * summed);
    const bool skip_zeros = !plan.pads() || finite(weight, first, last);
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
            tile.ahead = copies ? 0 : g.from_stride.axis[1];
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

// The channels of a group that a result sums up, if groups share vectors.
inline int64_t summed_channels(const Gather& g) {
  return g.from_per_group > 1 && g.to_per_group > 1 ? g.from_per_group : 1;
}

// Weights packed as [block][summed][tap][lane]; a block is one vector of channels.
template <typename T>
class PackedWeights {
 public:
  using W = Word<T>;
  struct Packed {
    const W* data;
    bool finite;
  };

  PackedWeights(const Gather& g, const Kernels<T>& kernels, const int64_t* kernel, const T* weight, W* memory,
                int threads)
      : g_(g),
        kernels_(kernels),
        kernel_(kernel),
        taps_(kernel[0] * kernel[1] * kernel[2]),
        summed_(summed_channels(g)),
        filters_(g.groups * g.from_per_group * g.to_per_group / summed_),
        run_(summed_ > 1 ? g.to_per_group : kernels.lanes),
        filter_step_(summed_ > 1 ? g.weight_to_stride : g.weight_group_stride / (g.from_per_group * g.to_per_group)),
        blocks_(ceil_div(filters_, kernels.lanes)),
        weight_(weight),
        memory_(memory),
        in_order_(taps_in_order(g, kernel)) {
    copies_ = weight_copies(size(), threads);
    if (copies_ > 1) return;
    std::atomic<bool> finite = true;
    parallel_tasks(blocks_, 8.0 * summed_ * taps_ * kernels.lanes, [&](int64_t begin, int64_t end) {
      if (!pack(begin, end, memory_)) finite = false;
    });
    finite_ = finite;
  }

  int64_t blocks() const { return blocks_; }
  int64_t size() const { return blocks_ * summed_ * taps_ * kernels_.lanes; }
  W* end() const { return memory_ + copies_ * size(); }
  // For the calling thread.
  Packed packed() const {
    if (copies_ == 1) return {memory_, finite_};
    W* const mine = memory_ + at::get_thread_num() * size();
    const bool finite = pack(0, blocks_, mine);
    return {mine, finite};
  }

 private:
  // Returns whether all of them are finite.
  bool pack(int64_t begin, int64_t end, W* packed) const {
    const int64_t lanes = kernels_.lanes;
    for (int64_t i = begin * summed_; i < end * summed_; ++i) {
      const int64_t first = i / summed_ * lanes, m = i % summed_, count = std::min(lanes, filters_ - first);
      W* const w = packed + i * taps_ * lanes;
      if (count < lanes) std::fill_n(w, taps_ * lanes, W(0));
      for (int64_t l = 0; l < count; l += run_)
        pack_run(summed_ > 1 ? weight_ + (first + l) / run_ * g_.weight_group_stride + m * g_.weight_from_stride
                             : weight_ + first * filter_step_,
                 std::min(run_, count - l), w + l);
    }
    return all_finite(packed + begin * summed_ * taps_ * lanes, (end - begin) * summed_ * taps_ * lanes);
  }

  // `count` filters, a step apart.
  void pack_run(const T* from, int64_t count, W* to) const {
    const int64_t lanes = kernels_.lanes;
    if (in_order_) return kernels_.transpose(from, filter_step_, count, taps_, to, lanes);
    for (int64_t t = 0; t < taps_; ++t) {
      const T* of_tap = from + t / (kernel_[1] * kernel_[2]) * g_.weight_axis_stride[0] +
                        t / kernel_[2] % kernel_[1] * g_.weight_axis_stride[1] +
                        t % kernel_[2] * g_.weight_axis_stride[2];
      for (int64_t c = 0; c < count; ++c) kernels_.copy_rows(of_tap + c * filter_step_, 0, 1, 1, to + t * lanes + c, 0);
    }
  }

  const Gather& g_;
  const Kernels<T>& kernels_;
  const int64_t* kernel_;
  int64_t taps_, summed_, filters_, run_, filter_step_, blocks_;  // a run: filters that are equally far apart
  const T* weight_;
  W* memory_;
  bool in_order_;
  bool finite_ = true;
  int64_t copies_;
};

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
// backward_input adds up the results of a channel's filters. Groups of a few channels repeat what each of them holds, one
// after the other.
template <typename T>
void gather_pixels(const Gather& g, const Phases& phases, const Kernels<T>& kernels, const int64_t* kernel,
                   const T* from, const T* weight, const Word<T>* bias, T* to, double bytes_after, Word<T>* workspace,
                   int threads) {
  const int64_t lanes = kernels.lanes, taps = kernel[0] * kernel[1] * kernel[2];
  const int64_t summed = summed_channels(g), multiplier = g.from_per_group * g.to_per_group / summed;
  const int64_t filters = g.groups * multiplier;  // or results of groups
  const int64_t packed_step[] = {kernel[1] * kernel[2] * lanes, kernel[2] * lanes, lanes};
  const PackedWeights<T> weights(g, kernels, kernel, weight, workspace, threads);
  const int64_t blocks = weights.blocks();
  T* const kept = reinterpret_cast<T*>(weights.end());
  const bool adds = g.from_per_group > 1 && summed == 1;
  std::vector<DepthwiseMove> moves;
  if (summed > 1)
    moves = group_moves(filters, summed, lanes);
  else if (g.to_per_group > 1)
    moves = multiplier_moves(filters, multiplier, lanes);

  std::deque<Plan> plans;
  // The most of any phase; lines that a line of each phase reads.
  int64_t depths = 1, lines = 1, width = 1, reads = 1;
  double macs = 0;
  for (const Phase& phase : phases) {
    const GatherAxis* a = phase.axis;
    plans.emplace_back(phase, /*lines=*/false, g.from_stride.axis, packed_step, lanes);
    depths = std::max(depths, a[0].count), lines = std::max(lines, plans.back().lists());
    width = std::max(width, a[2].taps());
    reads = std::max(reads, a[1].from_step);
    macs += 2.0 * summed * phase.taps() * phase.pixels() * filters * g.batch;
  }
  // Lines in equal strips: a few for each thread, that fit L2. All phases of a strip follow one another. Where tiles roll,
  // strips are theirs; those of large tensors are any, of whole tiles. Vectors of channels are shared out if lines are few;
  // in order, only if threads would have none.
  const bool rolls = !adds && moves.empty() && plans[0].rolled(kernels.depthwise, false);
  const int64_t pixel_bytes = g.to_stride.axis[2] * sizeof(T);
  const bool large = bytes_moved<T>(g) > (phases[0].spread ? kStreamed : kInOrder);
  const bool in_order = rolls && (large || pixels_meet(pixel_bytes)) && blocks >= kLeastInOrder &&
                        plans[0].rolled(kernels.depthwise, false, /*in_order=*/true);
  const int64_t line_bytes = reads * g.from_stride.axis[1] * sizeof(T), images = std::max<int64_t>(1, g.batch * depths);
  int64_t together = blocks, strip = lines;
  // Lowers strips where threads would have unequal shares of them.
  const auto share_out = [&](int64_t others, int64_t step) {
    const auto share = [&](int64_t s) { return ceil_div(others * ceil_div(lines, s), threads) * s; };
    for (int64_t lower = strip - step; lower > 1; lower -= step)
      if (share(lower) < share(strip)) strip = lower;
  };
  if (in_order) {
    constexpr int64_t kTileLines = 2;
    const int64_t wanted = std::max<int64_t>(kTasks, kTasks / 4 * threads);
    strip = round_up(ceil_div(lines, std::min(lines, ceil_div(wanted, images))), kTileLines);
    share_out(images, kTileLines);
    together = ceil_div(blocks, std::clamp<int64_t>(wanted / (images * ceil_div(lines, strip)), 1, blocks));
  } else if (rolls) {
    const int64_t step = g.from_stride.axis[1] * static_cast<int64_t>(sizeof(T));
    strip = ceil_div(lines, ceil_div(lines, rolled_lines(lines, reads, step)));
    together = ceil_div(blocks, std::min(blocks, ceil_div(kTasks, images * ceil_div(lines, strip))));
  } else {
    const int64_t fit = std::max<int64_t>(1, kPixelsBytes / std::max<int64_t>(1, line_bytes));
    if (width >= 5 && reads == 1 && !adds && fit >= kLeastLines)
      together = vectors_together(blocks, lanes * sizeof(T), g.from_stride.axis[2] * sizeof(T));
    const int64_t others = images * ceil_div(blocks, together), wanted = ceil_div(kTasks, others);
    strip = ceil_div(lines, std::clamp<int64_t>(wanted, ceil_div(lines, fit), lines));
    share_out(others, 1);
  }
  const int64_t units = in_order ? units_in_order(pixel_bytes) : 0;
  const bool streams = bytes_moved<T>(g) > kStreamed;
  const double written = static_cast<double>(g.batch) * g.to_pixels() * filters * sizeof(T);
  const bool past = !kIsHalf<T> && rolls &&
                    goes_past_caches(bytes_moved<T>(g) - written + bytes_after, written, to, filters * sizeof(T));
  const int64_t parts = ceil_div(blocks, together);
  const int64_t strips = ceil_div(lines, strip);
  const int64_t tasks = g.batch * depths * strips * parts;
  parallel_tasks(tasks, macs / tasks, [&](int64_t begin, int64_t end) {
    const auto [packed, finite] = weights.packed();
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
        tile.summed = summed;
        tile.from_plane = tile.to_plane = lanes;
        tile.weight_plane = taps * lanes;
        tile.bias_plane = bias ? lanes : 0;
        tile.lists = std::min(strip, plan.lists() - h);
        tile.from = from + n * g.from_stride.batch + (moves.empty() ? c : 0);
        tile.moves = moves.empty() ? nullptr : moves.data() + part * together * summed;
        tile.weight = packed + c * summed * taps;
        tile.bias = bias && !adds ? bias + c : nullptr;
        tile.to = result + c;
        tile.list_step = axis(1).to_step * g.to_stride.axis[1];
        tile.to_step = axis(2).to_step * g.to_stride.axis[2];
        tile.length = filters - c;
        tile.skip_zeros = finite;
        tile.rolls = rolls, tile.in_order = units, tile.past = past;
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
    if (past) finish_stores();
  });
}

// --- NCHW, small planes ----------------------------------------------------------------------------------------------

// Whether lines that leave part of a vector empty cost more than to transpose the planes. A vector of a line and a tap
// takes 1.5 cycles, with a stride 2.2, of 16-bit values, which are widened for each tap, half as much again; one of
// channels takes 1.3 or 1.6, and one that is transposed 8 (Zen 4).
bool lines_cost_more(const ConvShape& s, int64_t lines, int64_t columns, int64_t lanes) {
  constexpr double kTransposed = 8, kClearly = 0.9, kWidened = 1.5;
  const bool strided = s.stride[1] * s.stride[2] > 1;
  const double line = (strided ? 2.2 : 1.5) * (is_half(s.dtype) ? kWidened : 1), pixel = strided ? 1.6 : 1.3;
  const auto taps = static_cast<double>(s.taps()), vector = static_cast<double>(lanes);
  const double of_lines = line * taps * static_cast<double>(lines * ceil_div(columns, lanes));
  const double of_pixels = pixel * taps * static_cast<double>(lines * columns) / vector;
  return of_pixels + kTransposed * static_cast<double>(s.in_pixels() + s.out_pixels()) / vector < kClearly * of_lines;
}

// Small planes of NCHW, whose lines would leave half of a vector empty, or less of it for many taps: a vector of channels
// is transposed, done as above, and transposed back. Not where lines roll and a quarter of a vector is full, of 16-bit
// values half of one.
bool transposes(const ConvShape& s, Direction direction, int64_t lanes) {
  const bool forward = direction == Direction::kForward;
  const int64_t lines = forward ? s.out[1] : s.in[1], columns = forward ? s.out[2] : s.in[2],
                plane = std::max(s.in_pixels(), s.out_pixels());
  const bool phases = !forward && s.stride[0] * s.stride[1] * s.stride[2] != 1;
  if (lines_roll(s, direction) && (is_half(s.dtype) ? 2 : 4) * columns > lanes) return false;
  const bool empty = 2 * columns <= lanes || lines_cost_more(s, lines, columns, lanes);
  return !s.channels_last() && s.out_per_group == 1 && !phases && s.groups >= lanes && empty && s.in[0] == 1 &&
         s.out[0] == 1 && plane <= kSmallPlane;
}

template <typename T>
void gather_transposed(const Gather& g, const Kernels<T>& kernels, const int64_t* kernel, const T* from,
                       const T* weight, const Word<T>* bias, T* to, Word<T>* workspace, int threads) {
  using W = Word<T>;
  const GatherAxis* a = g.phases[0].axis;
  const int64_t lanes = kernels.lanes, channels = g.groups, blocks = ceil_div(channels, lanes);
  const int64_t taps = kernel[0] * kernel[1] * kernel[2], in = g.from_pixels(), out = g.to_pixels();
  const int64_t packed_step[] = {kernel[1] * kernel[2] * lanes, kernel[2] * lanes, lanes};
  const int64_t from_step[] = {in * lanes, g.from_extent[2] * lanes, lanes};
  const PackedWeights<T> weights(g, kernels, kernel, weight, workspace, threads);
  W* const images = weights.end();
  const Plan plan({g.phases[0], std::nullopt}, /*lines=*/false, from_step, packed_step, lanes);
  const Kernels<W>& words = kernels_of<W>(microkernels());
  // Where planes do not go round, threads take parts of their lines, and transpose what these read.
  const int64_t lines = a[1].count, width = a[2].count, extent = g.from_extent[1];
  int64_t pieces = 1;
  const auto cost = [&](int64_t n) {
    constexpr double kTransposedAgain = 0.1;
    return static_cast<double>(ceil_div(g.batch * blocks * n, threads)) *
           (1 / static_cast<double>(n) + kTransposedAgain);
  };
  for (int64_t n = 2; n <= std::min<int64_t>(lines, threads); ++n)
    if (cost(n) < cost(pieces)) pieces = n;
  const auto [least, most] = std::minmax_element(a[1].offset.begin(), a[1].offset.end());
  const auto lines_read = [&, low = *least, high = *most](int64_t h0, int64_t h1) {
    if (a[1].mode != PaddingMode::kZeros) return std::pair{int64_t{0}, extent};
    const int64_t first = std::clamp<int64_t>(h0 * a[1].from_step + low, 0, extent);
    return std::pair{first, std::clamp((h1 - 1) * a[1].from_step + high + 1, first, extent)};
  };
  parallel_tasks(g.batch * blocks * pieces, 2.0 * taps * out * lanes / pieces, [&](int64_t begin, int64_t end) {
    W* const image = images + at::get_thread_num() * (in + out) * lanes;
    W* const result = image + in * lanes;
    const auto [packed, finite] = weights.packed();
    for (int64_t i = begin; i < end; ++i) {
      const int64_t piece = i % pieces, c = i / pieces % blocks * lanes, n = i / pieces / blocks;
      const int64_t h0 = lines * piece / pieces, h1 = lines * (piece + 1) / pieces,
                    count = std::min(lanes, channels - c);
      const auto [first, last] = lines_read(h0, h1);
      const T* const planes = from + n * g.from_stride.batch + c * in;
      kernels.transpose(planes + first * g.from_extent[2], in, count, (last - first) * g.from_extent[2],
                        image + first * from_step[1], lanes);
      DepthwiseTile<W> tile{};
      tile.planes = 1;
      tile.lists = h1 - h0;
      tile.from = image;
      tile.weight = packed + c * taps;
      tile.bias = bias ? bias + c : nullptr;
      tile.to = result;
      tile.list_step = width * lanes;
      tile.to_step = lanes;
      tile.length = count;
      tile.skip_zeros = finite;
      tile.rolls = true;
      plan.run(words.depthwise, 0, h0, 0, width, tile);
      kernels.store_transposed(result, lanes, (h1 - h0) * width, count,
                               to + n * g.to_stride.batch + c * out + h0 * width, out);
    }
  });
}

template <typename T>
void gather(const ConvShape& s, Direction direction, const void* from, const ConvPointers& p, void* workspace,
            int threads) {
  using W = Word<T>;
  Gather g = make_gather(s, direction);
  const Kernels<T>& kernels = kernels_of<T>(microkernels());
  const T *const x = static_cast<const T*>(from), *const w = static_cast<const T*>(p.weight);
  const Bias<T> bias(microkernels(), p.bias, g.groups * g.to_per_group);
  const W* const b = bias.get();
  T* const y = static_cast<T*>(p.result);
  W* const scratch = static_cast<W*>(workspace);
  const Phases phases = phases_of(s, direction);
  if (s.channels_last())
    return gather_pixels(g, phases, kernels, s.kernel, x, w, b, y, p.bytes_after, scratch, threads);
  if (transposes(s, direction, kernels.lanes))
    return gather_transposed(g, kernels, s.kernel, x, w, b, y, scratch, threads);
  const LineWeights<T> weights(g, kernels, s.kernel, w, scratch, threads);
  for (const Phase& phase : phases) gather_lines(g, phase, s.kernel, kernels, x, weights, b, y);
}

int64_t gather_workspace(const ConvShape& s, Direction direction, int threads) {
  const int64_t size = dtype_size(s.dtype), word = std::max<int64_t>(size, 4), filters = s.groups * s.out_per_group;
  const int64_t packed = s.taps() * round_up(filters, lanes_of(size)) * s.in_per_group;  // one vector for each
  const int64_t weights = weight_copies(packed, threads) * packed * word;                // of vectors of channels
  if (s.channels_last()) {
    if (direction == Direction::kForward || s.out_per_group == 1 || s.in_per_group > 1) return weights;
    return weights +
           threads * (size == 4 ? summed_pixels<float> : summed_pixels<double>)(filters, s.in[2]) * filters * size;
  }
  if (transposes(s, direction, lanes_of(size)))
    return weights + threads * (s.in_pixels() + s.out_pixels()) * kMostLanes;
  int64_t elements = 0;
  for (const Phase& phase : phases_of(s, direction))
    elements = std::max(elements, LineScratch(phase, size, lanes_of(size)).elements());
  const int64_t widened = is_half(s.dtype) ? LineWeights<bfloat16>::size(s.taps() * filters) : 0;
  return threads * elements * size + weight_copies(widened, threads) * widened * word;
}

}  // namespace

const char* depthwise_forward_decline(const ConvShape& s) { return decline(s, Direction::kForward); }
const char* depthwise_forward_yield(const ConvShape& s) {
  constexpr int64_t kTileFilters = 8;
  if (s.in_per_group > 2 && s.stride[1] * s.stride[2] == 1) return "groups of four with stride 1";
  if (s.out_per_group < kTileFilters || (s.channels_last() && s.groups > 1)) return nullptr;
  // Lines that roll read each pixel once for all taps, which counts if they fill several vectors.
  const int64_t lanes = lanes_of(dtype_size(s.dtype)), width = s.out[2];
  const bool full = width > lanes && 5 * width >= 4 * round_up(width, lanes);
  if (!s.channels_last() && lines_roll(s, Direction::kForward) && s.stride[2] == 1 && full) return nullptr;
  return "filters enough for the rows of a register tile";
}
const char* depthwise_backward_input_decline(const ConvShape& s) { return decline(s, Direction::kBackwardInput); }
const char* depthwise_backward_input_yield(const ConvShape& s) {
  constexpr int64_t kHalfVector = 8, kVector = 16;
  if (s.in_per_group > 2) return "groups of four";
  if (s.groups > 1 || s.out_per_group == 1) return nullptr;
  if (s.channels_last() && s.out_per_group < (is_short(s) ? kHalfVector : kVector))
    return "one channel, filters too few for a vector";
  return !s.channels_last() && !is_short(s) && s.kernel[0] * s.kernel[1] == 1 ? "one channel, taps in one long line"
                                                                              : nullptr;
}

int64_t depthwise_forward_workspace(const ConvShape& s, int threads) {
  return gather_workspace(s, Direction::kForward, threads);
}
int64_t depthwise_backward_input_workspace(const ConvShape& s, int threads) {
  return gather_workspace(s, Direction::kBackwardInput, threads);
}

void depthwise_forward(const ConvShape& s, const ConvPointers& p, void* workspace, int threads) {
  with_type(s.dtype,
            [&](auto type) { gather<decltype(type)>(s, Direction::kForward, p.input, p, workspace, threads); });
}

void depthwise_backward_input(const ConvShape& s, const ConvPointers& p, void* workspace, int threads) {
  const Direction direction = Direction::kBackwardInput;
  with_type(s.dtype, [&](auto type) { gather<decltype(type)>(s, direction, p.grad_output, p, workspace, threads); });
}

}  // namespace myconv::cpu
