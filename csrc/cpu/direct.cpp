// Direct convolution on padded strips, forward and backward_input: NCHW, and NHWC with few channels a group or few result
// channels.
//
// For a block of result lines, the lines of the in channels that it reads are copied once, with their padding, into
// strips in L2, sorted such that what one tap reads for neighbouring results is contiguous; in NHWC they are transposed,
// and the results back. Then every term of the sum, a channel and a tap, is one offset into the strips and one into the
// weights, which are read where they lie:
//
//      y[k][j] = sum over terms of  w[k][term.a] * strip[term.b + j]
//
// A matrix product of result channels (rows) and pixels (columns). A vector of columns lies anywhere (StripVector):
// each line has its own vectors, or lines are joined at the pitch of the strip and what lies between is dropped.
// backward_input has one such product for each phase of the stride (gather.h). All of a block read the same strips, and
// their results are interleaved on the way out: strips are packed once, and every line is written once.
//
// Where the kernel is the stride, all phases of backward_input read the same pixel: they are rows of one product (Patch).
//
// Where weights of neighbouring channels lie far apart (backward_input), they are packed once into tiles of rows: with the
// taps of all phases, as they lie.
//
// Where much of the work would be on zeros of the padding and all weights are finite, the vectors that are multiplied
// together leave out the taps that read nothing else for them; adding 0 changes nothing.
//
// Sums: blocks of channels with at most kSumLength terms, each from a fresh accumulator, added in order; inside a block
// channels outermost; the bias with the first block. Threads split samples, groups, lines and result channels.
// 16-bit types are multiplied as words (stored.h), in which channels and terms count: strips are packed as they are
// copied, weights once a call, and results are float32 in scratch rows before they are rounded.
// Declines: NHWC with more channels, types other than floating-point, empty sums, kernels above kMaxTaps,
// the adjoint of a padding mode.
#include <numeric>
#include <vector>

#include "cpu/algorithms.h"
#include "cpu/direct_plan.h"
#include "cpu/finite.h"
#include "cpu/gather.h"
#include "cpu/gemm_blocks.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace myconv::cpu {
namespace {

using namespace direct;

constexpr int64_t kFewChannels = 16;        // of a group: with fewer NHWC is transposed
constexpr int64_t kShortVector = 8;         // NHWC: result channels of a group that are multiplied as they lie
constexpr int64_t kFewResults = 9;          // or with so few result channels, which would leave most lanes empty
constexpr int64_t kLeastShuffled = 16;      // channels of a sample, for which the shuffles of a strip are worth finding
constexpr int64_t kMostWeights = 48 << 20;  // bytes of packed weights
constexpr int64_t kMaxPhases = 65536;       // of backward_input: each costs a little set-up
constexpr int64_t kChannelsPacked = 16;     // of weights at a time
constexpr int64_t kShortSum = 128;          // NCHW: terms up to which lines of results are fetched early,
constexpr double kLargeResult = 16e6;       // of results above so many bytes

// Pieces of the channels of a group.
int64_t channel_pieces(const Gather& g) { return ceil_div(g.from_per_group, kChannelsPacked); }

// Where the weights of a phase lie: as they are, or packed into words [group][out channel][channel][tap].
struct Weights {
  int64_t group_stride, to_stride, from_stride;
  c10::SmallVector<int64_t, 9> tap;

  Weights(const Gather& g, const GatherPhase& phase, int64_t pair, bool packed) {
    const int64_t taps = phase.taps(), channels = ceil_div(g.from_per_group, pair);
    from_stride = packed ? taps : g.weight_from_stride;
    to_stride = packed ? channels * taps : g.weight_to_stride;
    group_stride = packed ? g.to_per_group * channels * taps : g.weight_group_stride;
    tap = g.weight_tap_offsets(phase);
    if (packed) std::iota(tap.begin(), tap.end(), 0);
  }
};

template <typename T>
void pack_weights(const Gather& g, const GatherPhase& phase, const Kernels<T>& kernels, const T* weight,
                  const Weights& packed, Word<T>* target) {
  const int64_t taps = phase.taps(), channels = g.from_per_group;
  const c10::SmallVector<int64_t, 9> offset = g.weight_tap_offsets(phase);
  bool taps_last = true, channels_last = g.weight_from_stride == 1;
  for (int64_t t = 0; t < taps; ++t) {
    taps_last = taps_last && offset[t] == offset[0] + t;
    channels_last = channels_last && offset[t] == offset[0] + t * (offset[taps > 1] - offset[0]);
  }
  if (taps == 0) return;
  parallel_tasks(g.groups * g.to_per_group, 4.0 * channels * taps, [&](int64_t begin, int64_t end) {
    std::vector<T> gathered;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t group = i / g.to_per_group, k = i % g.to_per_group;
      const T* const source = weight + group * g.weight_group_stride + k * g.weight_to_stride;
      Word<T>* const to = target + group * packed.group_stride + k * packed.to_stride;
      if (taps == 1 && g.weight_from_stride == 1) {
        kernels.copy_rows(source + offset[0], 0, 1, channels, to, 0);
      } else if (taps_last) {
        kernels.copy_channels(source + offset[0], g.weight_from_stride, channels, taps, to, taps);
      } else if (channels_last) {
        kernels.transpose(source + offset[0], taps > 1 ? offset[1] - offset[0] : 1, taps, channels, to, taps);
      } else {
        gathered.resize(channels * taps);
        for (int64_t c = 0; c < channels; ++c)
          for (int64_t t = 0; t < taps; ++t) gathered[c * taps + t] = source[c * g.weight_from_stride + offset[t]];
        kernels.copy_channels(gathered.data(), taps, channels, taps, to, taps);
      }
    }
  });
}

// Weights in tiles of rows, [group][tile][channel][row of the tile][tap], read in the order of memory: pieces
// [begin, end) of the channels of all groups, tiles [tile0, tile1).
template <typename T>
void pack_tiles(const Gather& g, const Plan& plan, const Kernels<T>& kernels, const T* weight, T* packed, int64_t begin,
                int64_t end, int64_t tile0, int64_t tile1) {
  const int64_t channels = g.from_per_group, pieces = channel_pieces(g);
  const int64_t rows = g.to_per_group, tiles = ceil_div(rows, plan.tile_rows);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t group = i / pieces, k = i % pieces * kChannelsPacked;
    const T* const source = weight + group * g.weight_group_stride + k * g.weight_from_stride;
    for (int64_t tile = tile0; tile < tile1; ++tile) {
      const int64_t row = tile * plan.tile_rows, height = std::min(plan.tile_rows, rows - row);
      kernels.copy_rows(source + row * g.weight_to_stride, g.weight_from_stride,
                        std::min(kChannelsPacked, channels - k), height * g.weight_to_stride,
                        packed + ((group * tiles + tile) * channels + k) * plan.tile_weights, plan.tile_weights);
    }
  }
}

// Results of a block, [begin, end) along each axis.
struct Range {
  int64_t begin[3], end[3];
};

// The terms of one sum block, a channel after the other, and the tap of each term of the first channel.
struct Terms {
  c10::SmallVector<Term, 64> list;
  c10::SmallVector<int64_t, 16> taps;

  // Those of the first channel, for these results; where zeros are skipped, taps that read something else.
  Terms(const Weights& weights, const GatherPhase& phase, const Plan& plan, const Range& results, bool skip_zeros) {
    const int64_t* const block = plan.block;
    const auto alive = [&](int d, int64_t t) {
      const GatherAxis& a = plan.axis[d].axis;
      return !skip_zeros ||
             std::max(results.begin[d], a.first_inside(t)) < std::min({results.end[d], a.count, a.last_inside(t)});
    };
    // Where a tap reads is a sum over the axes.
    c10::SmallVector<int64_t, 8> at[3];
    int64_t plane = plan.images * plan.image, pixel = 1;
    for (int d = 2; d >= 0; --d) {
      const StripAxis& axis = plan.axis[d];
      for (const int64_t offset : phase.axis[d].offset) {
        const int64_t t = axis.tap(offset);
        at[d].push_back(alive(d, t) ? axis.plane(t, block[d]) * plane + axis.shift(t, block[d]) * pixel : -1);
      }
      plane *= axis.planes(block[d]), pixel *= axis.length(block[d]);
    }
    int64_t t = 0;
    for (const int64_t d : at[0])
      for (const int64_t h : at[1])
        for (const int64_t w : at[2]) {
          if (d >= 0 && h >= 0 && w >= 0) list.push_back({weights.tap[t], d + h + w}), taps.push_back(t);
          ++t;
        }
  }
  void add_channels(const Weights& weights, const Plan& plan, int64_t channels) {
    const auto live = static_cast<int64_t>(taps.size());
    list.resize(live * channels);
    for (int64_t c = 1; c < channels; ++c)
      for (int64_t t = 0; t < live; ++t)
        list[c * live + t] = {list[t].a + c * weights.from_stride, list[t].b + c * plan.size};
  }
  // The terms that belong to a block: a prefix of whole channels, or some taps of one.
  std::pair<const Term*, int64_t> of(const Block& block, int64_t all_taps) const {
    if (block.taps == all_taps) return {list.data(), static_cast<int64_t>(taps.size()) * block.channels};
    const auto first = std::lower_bound(taps.begin(), taps.end(), block.tap);
    const auto last = std::lower_bound(first, taps.end(), block.tap + block.taps);
    return {list.data() + (first - taps.begin()), last - first};
  }
};

// A strip of each word of channels.
template <typename T>
void fill_strips(const Kernels<T>& kernels, const ActivationStrides& stride, const Runs& runs, const Shuffles& shuffles,
                 const T* from, int64_t channels, Word<T>* strips, int64_t size) {
  if (!shuffles.empty())
    return kernels.shuffle(channels, from, stride.channel, shuffles.begin(), shuffles.end(), strips, size);
  const int32_t all[] = {0, static_cast<int32_t>(runs.size())};
  if (stride.axis[2] == 1) return kernels.pack(channels, 1, from, stride.channel, runs.data(), all, strips, size);
  for (const Segment& run : runs) {
    if (run.first > 0 || run.last < run.length)
      for (int64_t c = 0; c < ceil_div(channels, kernels.pair); ++c) {
        Word<T>* const line = strips + c * size + run.target;
        std::fill(line, line + run.first, Word<T>(0));
        std::fill(line + run.last, line + run.length, Word<T>(0));
      }
    if (run.first >= run.last) continue;
    const T* const source = from + (run.source + run.first * run.step) * stride.axis[2];
    const int64_t pixel = run.step * stride.axis[2], count = run.last - run.first;
    // The next groups' channels of the same pixels: too far apart for the machine to see them coming.
    for (int64_t i = 0; i < count; ++i) __builtin_prefetch(source + i * pixel + channels);
    kernels.transpose(source, pixel, count, channels, strips + run.target + run.first, size);
  }
}

// Of 16-bit types, in words.
template <typename T>
int64_t packed_weights(const Gather& g, const GatherPhase& phase, const Kernels<T>& kernels) {
  if (!kIsHalf<T>) return 0;
  return round_up(g.groups * g.to_per_group * ceil_div(g.from_per_group, kernels.pair) * phase.taps(), 16);
}

// The products of a family: one task is a block of results of one sample and of a gather of groups, or a part of its
// rows.
template <typename T>
class FamilyProduct {
 public:
  using W = Word<T>;

  FamilyProduct(const Gather& g, const Family& family, const Patch& patch, const Plan& plan, const Kernels<T>& kernels,
                const T* from, const T* weight, const W* bias, T* to, W* workspace, bool skip_zeros)
      : g_(g),
        family_(family),
        patch_(patch),
        plan_(plan),
        kernels_(kernels),
        from_(from),
        weight_(weight),
        bias_(bias),
        to_(to),
        skip_zeros_(skip_zeros),
        patches_(patch.rows() > 1),
        axis_(family.shared.axis),
        channels_(g.to_per_group),
        from_words_(ceil_div(g.from_per_group, kernels.pair)),
        along_w_(family.along_w),
        gathers_(ceil_div(g.groups, plan.groups_at_once)),
        image_blocks_(ceil_div(g.batch, plan.images)),
        all_tiles_(ceil_div(channels_, plan.tile_rows)),
        line_step_(axis_[1].to_step * g.to_stride.axis[1]),
        pixel_step_(axis_[2].to_step * g.to_stride.axis[2]),
        nhwc_(g.to_stride.axis[2] != 1),
        owns_results_(!nhwc_ && from_words_ * family.most_taps <= kShortSum && line_step_ * sizeof(T) % 64 != 0 &&
                      static_cast<double>(g.batch) * g.groups * channels_ * g.to_pixels() * sizeof(T) > kLargeResult),
        sums_(reduction_blocks(from_words_, family.most_taps, /*taps_inside=*/true)) {
    for (const GatherPhase* phase : family.phases) {
      weights_.emplace_back(g, *phase, kernels.pair, kIsHalf<T>);
      if (plan.tile_weights) weights_.back().from_stride = plan.tile_weights;
      if constexpr (kIsHalf<T>) {
        pack_weights(g, *phase, kernels, weight, weights_.back(), workspace);
        words_.push_back(workspace);
        workspace += packed_weights(g, *phase, kernels);
      } else {
        words_.push_back(weight);
      }
    }
    tiled_ = workspace;
    of_threads_ = workspace + plan.packed_tiles(g);
  }

  void run() const {
    if (plan_.tile_weights && !plan_.own_tiles)
      parallel_tasks(g_.groups * channel_pieces(g_),
                     0.5 * static_cast<double>(kChannelsPacked * all_tiles_ * plan_.tile_weights),
                     [&](int64_t begin, int64_t end) { pack(begin, end, 0, all_tiles_); });
    const double macs =
        static_cast<double>(plan_.columns) * family_.all_taps * from_words_ * plan_.groups_at_once * channels_;
    // A split that packs its own tiles is one task.
    const int64_t splits = plan_.splits, tasks = plan_.own_tiles ? splits : plan_.problems * splits;
    const int64_t of_task = plan_.problems * splits / tasks;
    parallel_tasks(tasks, macs * of_task / splits, [&](int64_t begin, int64_t end) {
      Scratch s;
      s.strips = of_threads_ + at::get_thread_num() * plan_.of_thread();
      s.kept = s.strips + plan_.strips();
      for (int64_t i = begin * of_task; i < end * of_task; ++i) {
        const Task task = plan_.own_tiles ? at(i % plan_.problems, i / plan_.problems) : at(i / splits, i % splits);
        if (plan_.own_tiles && task.problem == 0)
          pack(0, channel_pieces(g_), task.row0 / plan_.tile_rows, ceil_div(task.row1, plan_.tile_rows));
        prepare(task, s);
        compute(task, s);
      }
    });
  }

 private:
  // A block of results: of groups [first_group, first_group + groups) of samples [n, n + images), rows [row0, row1) of
  // each group. Its first result lies at `start` along each axis, and at `result`, and it has so many lines of so many
  // pixels of each sample.
  struct Task {
    int64_t problem, block, n, images, first_group, groups, row0, row1;
    int64_t start[3], lines, line;
    T* result;
  };
  // Of a thread: the block for which runs and terms are prepared, and the problem whose lines fill the strips.
  struct Scratch {
    W *strips, *kept;
    Runs runs, runs_before;  // of the block, and of the one that was prepared before it
    Shuffles shuffles;
    c10::SmallVector<StripVector, 32> vectors;
    c10::SmallVector<Terms, 1> terms;
    c10::SmallVector<int32_t, 16> terms_of;  // [phase][vectors that are multiplied together]
    int64_t prepared = -1, images = 0, filled = -1;
  };

  void pack(int64_t begin, int64_t end, int64_t tile0, int64_t tile1) const {
    if constexpr (!kIsHalf<T>) pack_tiles(g_, plan_, kernels_, weight_, tiled_, begin, end, tile0, tile1);
  }

  // Tiles are of nearly equal height, or all but the last are whole.
  int64_t first_row(int64_t split) const {
    return std::min(channels_, ceil_div(channels_, plan_.split_rows) * split / plan_.splits * plan_.split_rows);
  }
  int64_t first_row_of_tile(const Task& t, int64_t tile, int64_t tiles) const {
    return plan_.split_rows > 1 ? std::min(t.row1, t.row0 + tile * plan_.tile_rows)
                                : t.row0 + (t.row1 - t.row0) * tile / tiles;
  }
  // Where a row of the groups lies in the result. (Divisions take as long as the sums of few terms.)
  int64_t row_offset(int64_t row) const {
    if (!patches_) return row * g_.to_stride.channel;
    const int64_t* const patch = patch_.size;
    const int64_t w = row % patch[2], h = row / patch[2] % patch[1], d = row / (patch[2] * patch[1]) % patch[0];
    return row / patch_.rows() * g_.to_stride.channel + d * g_.to_stride.axis[0] + h * g_.to_stride.axis[1] +
           w * g_.to_stride.axis[2];
  }

  Task at(int64_t problem, int64_t split) const {
    const int64_t gather = problem % gathers_, block = problem / gathers_ / image_blocks_;
    Task t;
    t.problem = problem, t.block = block, t.n = problem / gathers_ % image_blocks_ * plan_.images;
    t.images = std::min(plan_.images, g_.batch - t.n);
    t.first_group = gather * plan_.groups_at_once;
    t.groups = std::min(plan_.groups_at_once, g_.groups - t.first_group);
    t.row0 = first_row(split), t.row1 = first_row(split + 1);
    t.start[0] = block / (plan_.blocks[1] * plan_.blocks[2]) * plan_.block[0];
    t.start[1] = block / plan_.blocks[2] % plan_.blocks[1] * plan_.block[1];
    t.start[2] = block % plan_.blocks[2] * plan_.block[2];
    t.lines = std::min(plan_.block[1], axis_[1].count - t.start[1]);
    t.line = std::min(plan_.block[2], axis_[2].count - t.start[2]);
    t.result = to_ + t.n * g_.to_stride.batch + row_offset(t.first_group * channels_) +
               (axis_[0].to_start + t.start[0] * axis_[0].to_step) * g_.to_stride.axis[0] + t.start[1] * line_step_ +
               t.start[2] * pixel_step_;
    return t;
  }

  // What depends on the place and size of the block alone.
  void prepare(const Task& t, Scratch& s) const {
    if (s.prepared == t.block && s.images == t.images) return;
    s.runs.swap(s.runs_before);
    strip_runs(plan_, t.start, t.images, g_.from_stride.batch, s.runs);
    if (g_.from_stride.axis[2] == 1) join_planes(plan_, s.runs);
    if (g_.from_stride.axis[2] == 1 && g_.groups * g_.from_per_group >= kLeastShuffled &&
        (s.prepared < 0 || !shift_shuffles(s.runs_before, s.runs, s.shuffles)))
      strip_shuffles(plan_, s.runs, kernels_.lanes, s.shuffles);
    s.vectors.clear();
    const int64_t c_line = plan_.keep ? plan_.pitch : line_step_, lanes = kernels_.lanes;
    const int64_t length = plan_.joined ? (t.images - 1) * plan_.image + (t.lines - 1) * plan_.pitch + t.line : t.line;
    const int64_t lines = plan_.joined ? 1 : t.lines, of_line = ceil_div(length, lanes);
    for (int64_t i = 0; i < lines * of_line; ++i) {
      // Vectors below each other leave out the same taps. (Of phases with fewer lines, the first vectors must be theirs.)
      const bool down = skip_zeros_ && family_.size() == 1;
      const int64_t h = down ? i % lines : i / of_line, j = (down ? i / lines : i % of_line) * lanes;
      s.vectors.push_back({h * plan_.pitch + j, h * c_line + j, std::min<int64_t>(lanes, length - j)});
    }
    s.terms.clear(), s.terms_of.clear();
    for (int64_t f = 0; f < family_.size(); ++f) {
      const auto first = static_cast<int64_t>(s.terms.size());
      for (int64_t panel = 0, panels = panels_of(t, s, f); panel < panels; ++panel) {
        if (!skip_zeros_ && panel > 0) {
          s.terms_of.push_back(first);
          continue;
        }
        Terms terms(weights_[f], *family_.phases[f], plan_, results_of(t, s, f, panel), skip_zeros_);
        auto found = first;
        while (found < static_cast<int64_t>(s.terms.size()) && s.terms[found].taps != terms.taps) ++found;
        s.terms_of.push_back(found);
        if (found < static_cast<int64_t>(s.terms.size())) continue;
        terms.add_channels(weights_[f], plan_, sums_[0].channels);
        s.terms.push_back(std::move(terms));
      }
    }
    s.prepared = t.block, s.images = t.images;
  }

  // Panels are vectors that are multiplied together: as many as fit into a register tile, or one less.
  int64_t vectors_of(const Task& t, const Scratch& s, int64_t f) const {
    const auto all = static_cast<int64_t>(s.vectors.size());
    return plan_.keep || plan_.joined ? all : all / t.lines * std::max<int64_t>(0, lines_of(t, f / along_w_));
  }
  int64_t panels_of(const Task& t, const Scratch& s, int64_t f) const {
    return ceil_div(vectors_of(t, s, f), kernels_.vectors);
  }
  static int64_t first_vector(int64_t vectors, int64_t panel, int64_t panels) { return vectors * panel / panels; }

  Range results_of(const Task& t, const Scratch& s, int64_t f, int64_t panel) const {
    Range r;
    for (int d = 0; d < 3; ++d) r.begin[d] = t.start[d], r.end[d] = t.start[d] + plan_.block[d];
    if (!skip_zeros_ || t.images > 1) return r;
    const int64_t vectors = vectors_of(t, s, f), panels = panels_of(t, s, f), pitch = plan_.pitch;
    int64_t h0 = plan_.block[1], h1 = 0, w0 = plan_.block[2], w1 = 0;
    for (int64_t v = first_vector(vectors, panel, panels); v < first_vector(vectors, panel + 1, panels); ++v) {
      const int64_t first = s.vectors[v].b, last = first + s.vectors[v].lanes - 1;
      const bool one_line = first / pitch == last / pitch;
      h0 = std::min(h0, first / pitch), h1 = std::max(h1, last / pitch + 1);
      w0 = std::min(w0, one_line ? first % pitch : 0), w1 = std::max(w1, one_line ? last % pitch + 1 : plan_.block[2]);
    }
    r.begin[1] = t.start[1] + h0, r.end[1] = t.start[1] + h1;
    r.begin[2] = t.start[2] + w0, r.end[2] = t.start[2] + w1;
    return r;
  }

  void compute(const Task& t, Scratch& s) const {
    const int64_t tiles = ceil_div(t.row1 - t.row0, plan_.tile_rows);
    const int64_t part = std::max<int64_t>(kMaxRows, plan_.split_rows);  // rows that are delivered together
    const int64_t kept_of_phase = plan_.keep_all ? t.groups * channels_ - channels_ + t.row1 - t.row0 : part;
    for (int64_t c0 = 0; c0 == 0 || c0 < from_words_; c0 += plan_.chunk) {
      const int64_t c1 = std::min(from_words_, c0 + plan_.chunk);
      fill(t, c0, c1, s);
      for (int64_t group = 0; group < t.groups; ++group)
        for (int64_t tile = 0; tile < tiles; ++tile) {
          const int64_t row = first_row_of_tile(t, tile, tiles), rows = first_row_of_tile(t, tile + 1, tiles) - row;
          const int64_t in_part = patches_ ? (row - t.row0) % plan_.split_rows : 0;
          for (int64_t h = 0; h < family_.lines(); ++h) {
            if (lines_of(t, h) <= 0) continue;
            for (int64_t w = 0; w < along_w_; ++w) {
              const int64_t f = h * along_w_ + w;
              const int64_t kept_row =
                  plan_.keep_all ? f * kept_of_phase + group * channels_ + row - t.row0 : w * part + in_part;
              multiply(t, s, f, group, row, rows, c0, c1, s.kept + kept_row * plan_.columns);
            }
            if (plan_.keep && !plan_.keep_all && (in_part + rows) % patch_.size[2] == 0)
              deliver(t, h, s.kept, part * plan_.columns, group * channels_ + row - in_part, in_part + rows);
          }
        }
    }
    if (!plan_.keep_all) return;
    for (int64_t h = 0; h < family_.lines(); ++h)
      deliver(t, h, s.kept + h * along_w_ * kept_of_phase * plan_.columns, kept_of_phase * plan_.columns, t.row0,
              (t.groups - 1) * channels_ + t.row1 - t.row0);
  }

  // The strips of channels [c0, c1), unless they are there.
  void fill(const Task& t, int64_t c0, int64_t c1, Scratch& s) const {
    const int64_t pair = kernels_.pair;
    const bool chunked = plan_.chunk < from_words_;
    if (family_.most_taps == 0 || (!chunked && s.filled == t.problem)) return;
    // Groups together, unless a word would hold values of two.
    const int64_t values = std::min((c1 - c0) * pair, g_.from_per_group - c0 * pair);
    const int64_t together = values % pair == 0 ? t.groups : 1;
    for (int64_t group = 0; group < t.groups; group += together) {
      const int64_t first = (t.first_group + group) * g_.from_per_group + c0 * pair;
      fill_strips(kernels_, g_.from_stride, s.runs, s.shuffles,
                  from_ + t.n * g_.from_stride.batch + first * g_.from_stride.channel, together * values,
                  s.strips + group * (c1 - c0) * plan_.size, plan_.size);
    }
    s.filled = t.problem;
  }

  // Of the phases of a line: where their results begin, and how many lines they have.
  T* begin_of(const Task& t, int64_t h) const {
    return t.result + family_.phases[h * along_w_]->axis[1].to_start * g_.to_stride.axis[1];
  }
  int64_t lines_of(const Task& t, int64_t h) const {
    return std::min(t.lines, family_.phases[h * along_w_]->axis[1].count - t.start[1]);
  }

  // Rows of a tile of phase f: the products with the strips of channels [c0, c1).
  void multiply(const Task& t, const Scratch& s, int64_t f, int64_t group, int64_t row, int64_t rows, int64_t c0,
                int64_t c1, W* sums_at) const {
    const int64_t in_group = t.first_group + group, h = f / along_w_;
    const int64_t vectors = vectors_of(t, s, f), panels = panels_of(t, s, f);
    const int32_t* terms_of = s.terms_of.data();
    for (int64_t before = 0; before < f; ++before) terms_of += panels_of(t, s, before);
    T* c = nullptr;  // of 16-bit types, only sums in scratch rows
    if constexpr (!kIsHalf<T>) c = plan_.keep ? sums_at : begin_of(t, h) + row * g_.to_stride.channel;
    const int64_t c_row = plan_.keep ? plan_.columns : g_.to_stride.channel;
    for (const Block& sum : sums_) {
      if (sum.channel < c0 || (sum.channel >= c1 && sum.channels > 0)) continue;
      const W* const w = plan_.tile_weights
                             ? tiled_ + ((in_group * all_tiles_ + row / plan_.tile_rows) * from_words_ + sum.channel) *
                                            plan_.tile_weights
                             : words_[f] + in_group * weights_[f].group_stride + row * weights_[f].to_stride +
                                   sum.channel * weights_[f].from_stride;
      const W* const b = s.strips + (group * (c1 - c0) + sum.channel - c0) * plan_.size;
      for (int64_t panel = 0; panel < panels; ++panel) {
        if (owns_results_ && sum.start == 0) own_results(t, f, row, rows, panel, panels);
        const int64_t v0 = first_vector(vectors, panel, panels), v1 = first_vector(vectors, panel + 1, panels);
        const auto [term, count] = s.terms[terms_of[panel]].of(sum, family_.most_taps);
        kernels_.strip[rows - 1]({.terms = count,
                                  .term = term,
                                  .a = w,
                                  .a_row = weights_[f].to_stride,
                                  .b = b,
                                  .c = c,
                                  .c_row = c_row,
                                  .vectors = static_cast<int>(v1 - v0),
                                  .vector = s.vectors.data() + v0,
                                  .row_bias = bias_ ? bias_ + in_group * channels_ + row : nullptr,
                                  .column_bias = nullptr,
                                  .accumulate = sum.start > 0,
                                  .partial = sums_at});
      }
    }
  }

  // Fetches lines of memory that results of phase f will be written to, a share for each panel: else each store waits
  // for them, unless it fills one. Tiles and phases that make a line share it.
  __attribute__((noinline)) void own_results(const Task& t, int64_t f, int64_t row, int64_t rows, int64_t panel,
                                             int64_t panels) const {
    const int64_t step = axis_[2].to_step, of_line = patch_.size[2];
    if (t.images > 1 || (step > 1 && step != along_w_ * of_line)) return;
    asm volatile("");  // without it gcc takes this for a function without effects, and drops its calls
    const int64_t tiles = ceil_div(of_line, plan_.tile_rows), tile = row % of_line / plan_.tile_rows;
    const int64_t parts = panels * along_w_ * tiles, part = panel + panels * (f % along_w_ + along_w_ * tile);
    int64_t count = lines_of(t, f / along_w_), values = t.line * step;
    if (values == line_step_) values *= count, count = 1;
    const int64_t line = 64 / sizeof(T), of_values = ceil_div(values, line), lines = count * of_values;
    const int64_t begin = lines * part / parts, end = lines * (part + 1) / parts;
    for (int64_t r = row - row % of_line; r < row + rows; r += of_line) {
      const T* const target = begin_of(t, f / along_w_) + row_offset(r);
      for (int64_t h = begin / of_values, i = h * of_values; i < end; ++h, i += of_values)
        for (int64_t j = std::max(begin, i); j < std::min(end, i + of_values); ++j)
          __builtin_prefetch(target + h * line_step_ + (j - i) * line, 1);
    }
  }

  // Rows [first, first + rows) of the groups go from scratch to the result: those of all phases of a line, which lie at
  // one distance from each other.
  void deliver(const Task& t, int64_t h_phase, const W* source, int64_t distance, int64_t first, int64_t rows) const {
    for (int64_t n = 0; n < t.images; ++n, source += plan_.image)
      deliver_image(t, h_phase, source, distance, first, rows, begin_of(t, h_phase) + n * g_.to_stride.batch);
  }

  void deliver_image(const Task& t, int64_t h_phase, const W* source, int64_t distance, int64_t first, int64_t rows,
                     T* target) const {
    const int64_t count = lines_of(t, h_phase), of_line = patch_.size[2];
    if (!nhwc_ && along_w_ * of_line > 1) {
      const int64_t values = std::min(t.line * axis_[2].to_step, g_.to_extent[2] - t.start[2] * axis_[2].to_step);
      for (int64_t r = 0; r < rows; r += of_line)
        for (int64_t h = 0; h < count; ++h)
          kernels_.interleave(source + r * plan_.columns + h * plan_.pitch, of_line > 1 ? plan_.columns : distance,
                              along_w_ * of_line, values, target + row_offset(first + r) + h * line_step_);
      return;
    }
    for (int64_t w = 0; w < along_w_; ++w, source += distance) {
      const GatherAxis& axis = family_.phases[h_phase * along_w_ + w]->axis[2];
      deliver_phase(source, first, rows, count, std::min(t.line, axis.count - t.start[2]),
                    target + axis.to_start * g_.to_stride.axis[2]);
    }
  }

  // Of one phase: `count` lines of `length` pixels.
  void deliver_phase(const W* source, int64_t first, int64_t rows, int64_t count, int64_t length, T* target) const {
    if (nhwc_) {
      for (int64_t h = 0; h < count; ++h)
        kernels_.store_transposed(source + h * plan_.pitch, plan_.columns, rows, length,
                                  target + row_offset(first) + h * line_step_, pixel_step_);
      return;
    }
    for (int64_t r = 0; r < rows; ++r, source += plan_.columns) {
      T* const of_row = target + row_offset(first + r);
      if (pixel_step_ == 1) {
        kernels_.store_rows(source, plan_.pitch, count, length, of_row, line_step_);
        continue;
      }
      for (int64_t h = 0; h < count; ++h) {
        T stored[kMostColumns];
        kernels_.store_rows(source + h * plan_.pitch, 0, 1, length, stored, 0);
        for (int64_t j = 0; j < length; ++j) of_row[h * line_step_ + j * pixel_step_] = stored[j];
      }
    }
  }

  const Gather& g_;
  const Family& family_;
  const Patch& patch_;
  const Plan& plan_;
  const Kernels<T>& kernels_;
  const T *const from_, *const weight_;
  const W* const bias_;
  T* const to_;
  const bool skip_zeros_, patches_;
  const GatherAxis* const axis_;  // of what the phases share
  const int64_t channels_, from_words_, along_w_;
  const int64_t gathers_, image_blocks_, all_tiles_;
  const int64_t line_step_, pixel_step_;
  const bool nhwc_, owns_results_;
  const Blocks sums_;
  c10::SmallVector<Weights, 1> weights_;  // of each phase
  c10::SmallVector<const W*, 4> words_;   // and where its weights lie
  W *tiled_, *of_threads_;
};

// The cheapest of the plans. Small planes of NCHW leave lanes empty at their end: several samples share a block.
template <typename T>
Plan plan_for(const Gather& g, const Family& family, const Patch& patch, const Kernels<T>& kernels, int threads) {
  Gather words = g;
  words.from_per_group = ceil_div(g.from_per_group, kernels.pair);
  const auto plan = [&](const Cut& cut) {
    return Plan(words, family, patch, kernels.rows, kernels.lanes, sizeof(Word<T>), kIsHalf<T>, threads, cut);
  };
  const GatherAxis* const a = family.shared.axis;
  Cut best;
  double least = plan(best).cost(words, family, threads);
  const auto consider = [&](const Cut& cut) {
    if (cut.line_per_tap && a[2].taps() <= 1) return;
    if (cut.plane_per_tap && a[1].taps() <= 1) return;
    const Plan other = plan(cut);
    const double cost = other.is_possible() ? other.cost(words, family, threads) : least;
    if (cost < least) least = cost, best = cut;
  };
  consider({.line_per_tap = true});
  const int64_t pixels = family.shared.pixels();
  const bool nchw = g.from_stride.axis[2] == 1 && g.to_stride.axis[2] == 1;
  for (int64_t images = 2; nchw && images <= g.batch && images * pixels <= kMostColumns; images *= 2)
    for (const auto& [line, plane] : {std::pair{false, false}, {true, false}, {true, true}})
      consider({.images = images, .line_per_tap = line, .plane_per_tap = plane});
  return plan(best);
}

Gather gather_of(const ConvShape& s, Direction direction, int64_t most_rows, Patch& patch) {
  Gather g = make_gather(s, direction);
  if (direction == Direction::kForward) return g;
  patch = join_patches(g, s, most_rows);
  if (patch.rows() == 1) take_lines_apart(g);
  return g;
}

template <typename T>
void run(const ConvShape& s, Direction direction, const void* from, const ConvPointers& p, void* workspace,
         int threads) {
  const Kernels<T>& kernels = dense_kernels<T>();
  Patch patch;
  Gather g = gather_of(s, direction, kernels.rows, patch);
  const auto* const weight = static_cast<const T*>(p.weight);
  const bool skip_zeros = works_on_padding(s) && all_finite(s, weight);
  if (skip_zeros) drop_idle_taps(g);
  const int64_t results = g.groups * g.to_per_group;
  const Bias<T> bias(microkernels(), p.bias, results / patch.rows());
  c10::SmallVector<Word<T>, 0> of_rows;
  if (bias.get() && patch.rows() > 1)
    for (int64_t row = 0; row < results; ++row) of_rows.push_back(bias.get()[row / patch.rows()]);
  for (const Family& family : families(g)) {
    const Plan plan = plan_for(g, family, patch, kernels, threads);
    FamilyProduct<T>(g, family, patch, plan, kernels, static_cast<const T*>(from), weight,
                     of_rows.empty() ? bias.get() : of_rows.data(), static_cast<T*>(p.result),
                     static_cast<Word<T>*>(workspace), skip_zeros)
        .run();
  }
}

const char* decline(const ConvShape& s, Direction direction) {
  if (!is_floating_point(s.dtype)) return "only floating-point types";
  if (s.in_per_group == 0 || s.out_per_group == 0 || s.in_pixels() == 0 || s.out_pixels() == 0)
    return "nothing to sum over";
  const int64_t results = direction == Direction::kForward ? s.out_per_group : s.in_per_group;
  if (s.channels_last() && s.groups > 1 && std::max(s.in_per_group, s.out_per_group) >= kFewChannels)
    return "NHWC with 16 channels a group or more";
  // Of a strided input gradient a phase has too few terms for that.
  if (s.channels_last() && s.groups > 1 && direction == Direction::kForward && dtype_size(s.dtype) > 2 &&
      s.in_per_group >= kShortVector && s.out_per_group == kShortVector)
    return "NHWC with groups that fill a short vector";
  if (s.channels_last() && s.groups == 1 && results > kFewResults) return "NHWC with more than 9 result channels";
  if (s.taps() > kMaxTaps) return "more than 16384 taps";
  const int64_t words = s.in_channels() * s.out_per_group * s.taps();
  if (is_half(s.dtype) && words > kMostWeights / static_cast<int64_t>(sizeof(float)))
    return "more packed weights than 48 MiB";
  if (direction == Direction::kForward) return nullptr;
  if (s.padding_mode != PaddingMode::kZeros) return "the adjoint of a padding mode";
  double phases = 1;
  for (int d = 0; d < 3; ++d) phases *= static_cast<double>(std::min(s.stride[d], s.in[d]));
  if (phases > kMaxPhases) return "more than 65536 phases";
  return nullptr;
}

// Families follow each other in the same scratch.
template <typename T>
int64_t workspace_bytes(const ConvShape& s, Direction direction, int threads) {
  const Kernels<T>& kernels = dense_kernels<T>();
  Patch patch;
  Gather g = gather_of(s, direction, kernels.rows, patch);
  int64_t words = 0;
  const auto add = [&] {
    for (const Family& family : families(g)) {
      int64_t packed = 0;
      for (const GatherPhase* phase : family.phases) packed += packed_weights(g, *phase, kernels);
      words = std::max(words, packed + plan_for(g, family, patch, kernels, threads).elements(g, threads));
    }
  };
  add();
  if (works_on_padding(s)) {
    drop_idle_taps(g);
    add();
  }
  return words * static_cast<int64_t>(sizeof(Word<T>));
}

int64_t workspace(const ConvShape& s, Direction direction, int threads) {
  return with_type(s.dtype, [&](auto type) { return workspace_bytes<decltype(type)>(s, direction, threads); });
}

void run_any(const ConvShape& s, Direction direction, const void* from, const ConvPointers& p, void* workspace,
             int threads) {
  with_type(s.dtype, [&](auto type) { run<decltype(type)>(s, direction, from, p, workspace, threads); });
}

}  // namespace

const char* direct_forward_decline(const ConvShape& s) { return decline(s, Direction::kForward); }
const char* direct_backward_input_decline(const ConvShape& s) { return decline(s, Direction::kBackwardInput); }

int64_t direct_forward_workspace(const ConvShape& s, int threads) { return workspace(s, Direction::kForward, threads); }
int64_t direct_backward_input_workspace(const ConvShape& s, int threads) {
  return workspace(s, Direction::kBackwardInput, threads);
}

void direct_forward(const ConvShape& s, const ConvPointers& p, void* workspace, int threads) {
  run_any(s, Direction::kForward, p.input, p, workspace, threads);
}
void direct_backward_input(const ConvShape& s, const ConvPointers& p, void* workspace, int threads) {
  run_any(s, Direction::kBackwardInput, p.grad_output, p, workspace, threads);
}

}  // namespace myconv::cpu
