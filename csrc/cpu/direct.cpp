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
// Where weights of neighbouring channels lie far apart (backward_input), they are packed once into tiles of rows: with the
// taps of all phases, as they lie.
//
// Where much of the work would be on zeros of the padding and all weights are finite, each block leaves out the taps
// that read nothing else for its results; adding 0 changes nothing.
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
constexpr int64_t kFewResults = 9;          // or with so few result channels, which would leave most lanes empty
constexpr int64_t kLeastShuffled = 16;      // channels of a sample, for which the shuffles of a strip are worth finding
constexpr int64_t kMostWeights = 48 << 20;  // bytes of packed weights
constexpr int64_t kMaxPhases = 65536;       // of backward_input: each costs a little set-up
constexpr int64_t kChannelsPacked = 16;     // of weights at a time

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

// The terms of one sum block, a channel after the other, and the tap of each term of the first channel.
struct Terms {
  c10::SmallVector<Term, 64> list;
  c10::SmallVector<int64_t, 16> taps;

  void prepare(const Weights& weights, const GatherPhase& phase, const Plan& plan, const int64_t (&start)[3],
               int64_t channels, bool skip_zeros) {
    list.clear(), taps.clear();
    const int64_t* const block = plan.block;
    const auto alive = [&](int d, int64_t t) {
      const GatherAxis& a = plan.axis[d].axis;
      return !skip_zeros ||
             std::max(start[d], a.first_inside(t)) < std::min({start[d] + block[d], a.count, a.last_inside(t)});
    };
    // Where a tap reads is a sum over the axes.
    c10::SmallVector<int64_t, 8> at[3];
    int64_t plane = 1, pixel = 1;
    for (int d = 0; d < 3; ++d) plane *= plan.axis[d].length(block[d]);
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

template <typename T>
void run_family(const Gather& g, const Family& family, const Plan& plan, const Kernels<T>& kernels, const T* from,
                const T* weight, const Word<T>* bias, T* to, Word<T>* workspace, int threads, bool skip_zeros) {
  using W = Word<T>;
  const GatherAxis* a = family.shared.axis;
  const int64_t channels = g.to_per_group, pair = kernels.pair, from_words = ceil_div(g.from_per_group, pair);
  const Blocks sums = reduction_blocks(from_words, family.most_taps, /*taps_inside=*/true);
  c10::SmallVector<Weights, 1> weights;
  c10::SmallVector<const W*, 4> words;  // of each phase
  for (const GatherPhase* phase : family.phases) {
    weights.emplace_back(g, *phase, pair, kIsHalf<T>);
    if (plan.tile_weights) weights.back().from_stride = plan.tile_weights;
    if constexpr (kIsHalf<T>) {
      pack_weights(g, *phase, kernels, weight, weights.back(), workspace);
      words.push_back(workspace);
      workspace += packed_weights(g, *phase, kernels);
    } else {
      words.push_back(weight);
    }
  }
  const int64_t all_tiles = ceil_div(channels, plan.tile_rows);
  W* const tiled = workspace;
  const auto pack = [&](int64_t begin, int64_t end, int64_t tile0, int64_t tile1) {
    if constexpr (!kIsHalf<T>) pack_tiles(g, plan, kernels, weight, tiled, begin, end, tile0, tile1);
  };
  if (plan.tile_weights && !plan.own_tiles)
    parallel_tasks(g.groups * channel_pieces(g),
                   0.5 * static_cast<double>(kChannelsPacked * all_tiles * plan.tile_weights),
                   [&](int64_t begin, int64_t end) { pack(begin, end, 0, all_tiles); });
  workspace += plan.packed_tiles(g);
  const int64_t splits = plan.splits, gathers = ceil_div(g.groups, plan.groups_at_once), along_w = family.along_w;
  const int64_t problems = plan.blocks[0] * plan.blocks[1] * plan.blocks[2] * g.batch * gathers;
  const bool nhwc = g.to_stride.axis[2] != 1, chunked = plan.chunk < from_words;
  const double macs = static_cast<double>(plan.columns) * family.all_taps * from_words * plan.groups_at_once * channels;
  // A split that packs its own tiles is one task.
  const int64_t tasks = plan.own_tiles ? splits : problems * splits, of_task = problems * splits / tasks;
  parallel_tasks(tasks, macs * of_task / splits, [&](int64_t begin, int64_t end) {
    W* const strips = workspace + at::get_thread_num() * plan.of_thread();
    W* const kept = strips + plan.strips();
    Runs runs;
    Shuffles shuffles;
    c10::SmallVector<Terms, 1> terms(family.size());
    c10::SmallVector<StripVector, 32> vectors;
    int64_t prepared = -1, filled = -1;
    for (int64_t i = begin * of_task; i < end * of_task; ++i) {
      const int64_t split = plan.own_tiles ? i / problems : i % splits;
      const int64_t problem = plan.own_tiles ? i % problems : i / splits, gather = problem % gathers;
      const int64_t n = problem / gathers % g.batch, at = problem / gathers / g.batch;
      const int64_t start[3] = {at / (plan.blocks[1] * plan.blocks[2]) * plan.block[0],
                                at / plan.blocks[2] % plan.blocks[1] * plan.block[1],
                                at % plan.blocks[2] * plan.block[2]};
      const int64_t lines = std::min(plan.block[1], a[1].count - start[1]);
      const int64_t line = std::min(plan.block[2], a[2].count - start[2]);
      const int64_t line_step = a[1].to_step * g.to_stride.axis[1], pixel_step = a[2].to_step * g.to_stride.axis[2];
      if (prepared != at) {
        strip_runs(plan, start, runs);
        if (!nhwc && g.groups * g.from_per_group >= kLeastShuffled) strip_shuffles(plan, runs, kernels.lanes, shuffles);
        for (int64_t f = 0; f < family.size(); ++f)
          terms[f].prepare(weights[f], *family.phases[f], plan, start, sums[0].channels, skip_zeros);
        vectors.clear();
        const int64_t c_line = plan.keep ? plan.pitch : line_step;
        const int64_t length = plan.joined ? (lines - 1) * plan.pitch + line : line;
        for (int64_t h = 0; h < (plan.joined ? 1 : lines); ++h)
          for (int64_t j = 0; j < length; j += kernels.lanes)
            vectors.push_back({h * plan.pitch + j, h * c_line + j, std::min<int64_t>(kernels.lanes, length - j)});
        prepared = at;
      }
      const int64_t first_group = gather * plan.groups_at_once;
      const int64_t groups = std::min(plan.groups_at_once, g.groups - first_group);
      // Of packed tiles all but the last are whole; else they are of nearly equal height.
      const auto first_row = [&](int64_t i) {
        return plan.tile_weights ? std::min(channels, all_tiles * i / splits * plan.tile_rows) : channels * i / splits;
      };
      const int64_t row0 = first_row(split), row1 = first_row(split + 1);
      const int64_t tiles = ceil_div(row1 - row0, plan.tile_rows);
      if (plan.own_tiles && problem == 0)
        pack(0, channel_pieces(g), row0 / plan.tile_rows, row0 / plan.tile_rows + tiles);
      T* const result = to + n * g.to_stride.batch + first_group * channels * g.to_stride.channel +
                        (a[0].to_start + start[0] * a[0].to_step) * g.to_stride.axis[0] + start[1] * line_step +
                        start[2] * pixel_step;
      // Of the phases of a line: where they begin, and how many lines they have.
      const auto begin_of = [&](int64_t h) {
        return result + family.phases[h * along_w]->axis[1].to_start * g.to_stride.axis[1];
      };
      const auto lines_of = [&](int64_t h) {
        return std::min(lines, family.phases[h * along_w]->axis[1].count - start[1]);
      };

      // Rows [first, first + rows) of the group go from scratch to the result: those of all phases of a line, which lie
      // at one distance from each other.
      const auto deliver = [&](int64_t h_phase, const W* source, int64_t distance, int64_t first, int64_t rows) {
        T* const target = begin_of(h_phase) + first * g.to_stride.channel;
        const int64_t count = lines_of(h_phase);
        if (along_w > 1 && !nhwc) {
          const int64_t values = std::min(line * along_w, g.to_extent[2] - start[2] * a[2].to_step);
          for (int64_t r = 0; r < rows; ++r)
            for (int64_t h = 0; h < count; ++h)
              kernels.interleave(source + r * plan.columns + h * plan.pitch, distance, along_w, values,
                                 target + r * g.to_stride.channel + h * line_step);
          return;
        }
        for (int64_t w = 0; w < along_w; ++w, source += distance) {
          const GatherAxis& axis = family.phases[h_phase * along_w + w]->axis[2];
          const int64_t length = std::min(line, axis.count - start[2]);
          T* const to_phase = target + axis.to_start * g.to_stride.axis[2];
          if (nhwc)
            for (int64_t h = 0; h < count; ++h)
              kernels.store_transposed(source + h * plan.pitch, plan.columns, rows, length, to_phase + h * line_step,
                                       pixel_step);
          else if (pixel_step == 1)
            for (int64_t r = 0; r < rows; ++r)
              kernels.store_rows(source + r * plan.columns, plan.pitch, count, length,
                                 to_phase + r * g.to_stride.channel, line_step);
          else
            for (int64_t r = 0; r < rows; ++r)
              for (int64_t h = 0; h < count; ++h) {
                T stored[kMostColumns];
                kernels.store_rows(source + r * plan.columns + h * plan.pitch, 0, 1, length, stored, 0);
                T* const to_line = to_phase + r * g.to_stride.channel + h * line_step;
                for (int64_t j = 0; j < length; ++j) to_line[j * pixel_step] = stored[j];
              }
        }
      };

      // Rows of a tile of one phase: the products with the strips of channels [c0, c1).
      const auto multiply = [&](int64_t f, int64_t group, int64_t row, int64_t rows, int64_t c0, int64_t c1,
                                W* sums_at) {
        const int64_t in_group = first_group + group, h = f / along_w;
        auto vector_count = static_cast<int64_t>(vectors.size());
        if (!plan.keep && !plan.joined) vector_count = vector_count / lines * lines_of(h);
        const int64_t panels = ceil_div(vector_count, kernels.vectors);
        T* c = nullptr;  // of 16-bit types, only sums in scratch rows
        if constexpr (!kIsHalf<T>) c = plan.keep ? sums_at : begin_of(h) + row * g.to_stride.channel;
        const int64_t c_row = plan.keep ? plan.columns : g.to_stride.channel;
        for (const Block& sum : sums) {
          if (sum.channel < c0 || (sum.channel >= c1 && sum.channels > 0)) continue;
          const auto [term, count] = terms[f].of(sum, family.most_taps);
          const W* const w = plan.tile_weights
                                 ? tiled + ((in_group * all_tiles + row / plan.tile_rows) * from_words + sum.channel) *
                                               plan.tile_weights
                                 : words[f] + in_group * weights[f].group_stride + row * weights[f].to_stride +
                                       sum.channel * weights[f].from_stride;
          const W* const b = strips + (group * (c1 - c0) + sum.channel - c0) * plan.size;
          for (int64_t panel = 0; panel < panels; ++panel) {
            const int64_t v0 = vector_count * panel / panels, v1 = vector_count * (panel + 1) / panels;
            kernels.strip[rows - 1]({.terms = count,
                                     .term = term,
                                     .a = w,
                                     .a_row = weights[f].to_stride,
                                     .b = b,
                                     .c = c,
                                     .c_row = c_row,
                                     .vectors = static_cast<int>(v1 - v0),
                                     .vector = vectors.data() + v0,
                                     .row_bias = bias ? bias + in_group * channels + row : nullptr,
                                     .column_bias = nullptr,
                                     .accumulate = sum.start > 0,
                                     .partial = sums_at});
          }
        }
      };

      const int64_t kept_of_phase = plan.keep_all ? groups * channels - channels + row1 - row0 : kMaxRows;
      for (int64_t c0 = 0; c0 == 0 || c0 < from_words; c0 += plan.chunk) {
        const int64_t c1 = std::min(from_words, c0 + plan.chunk);
        if (family.most_taps > 0 && (chunked || filled != problem)) {
          // Groups together, unless a word would hold values of two.
          const int64_t values = std::min((c1 - c0) * pair, g.from_per_group - c0 * pair);
          const int64_t together = values % pair == 0 ? groups : 1;
          for (int64_t group = 0; group < groups; group += together) {
            const int64_t first = (first_group + group) * g.from_per_group + c0 * pair;
            fill_strips(kernels, g.from_stride, runs, shuffles,
                        from + n * g.from_stride.batch + first * g.from_stride.channel, together * values,
                        strips + group * (c1 - c0) * plan.size, plan.size);
          }
          filled = problem;
        }
        for (int64_t group = 0; group < groups; ++group)
          for (int64_t tile = 0; tile < tiles; ++tile) {
            const auto begin_of_tile = [&](int64_t i) {
              return plan.tile_weights ? std::min(row1, row0 + i * plan.tile_rows) : row0 + (row1 - row0) * i / tiles;
            };
            const int64_t row = begin_of_tile(tile), rows = begin_of_tile(tile + 1) - row;
            for (int64_t h = 0; h < family.lines(); ++h) {
              if (lines_of(h) <= 0) continue;
              for (int64_t w = 0; w < along_w; ++w) {
                const int64_t f = h * along_w + w;
                const int64_t kept_row =
                    plan.keep_all ? f * kept_of_phase + group * channels + row - row0 : w * kMaxRows;
                multiply(f, group, row, rows, c0, c1, kept + kept_row * plan.columns);
              }
              if (plan.keep && !plan.keep_all) deliver(h, kept, kMaxRows * plan.columns, group * channels + row, rows);
            }
          }
      }
      if (plan.keep_all)
        for (int64_t h = 0; h < family.lines(); ++h)
          deliver(h, kept + h * along_w * kept_of_phase * plan.columns, kept_of_phase * plan.columns, row0,
                  (groups - 1) * channels + row1 - row0);
    }
  });
}

template <typename T>
Plan plan_for(const Gather& g, const Family& family, const Kernels<T>& kernels, int threads) {
  Gather words = g;
  words.from_per_group = ceil_div(g.from_per_group, kernels.pair);
  const auto plan = [&](bool line_per_tap) {
    return Plan(words, family, kernels.rows, kernels.lanes, sizeof(Word<T>), kIsHalf<T>, threads, line_per_tap);
  };
  Plan shared = plan(false);
  if (family.shared.axis[2].taps() <= 1) return shared;
  Plan per_tap = plan(true);
  return per_tap.cost(words, family) < shared.cost(words, family) ? per_tap : shared;
}

template <typename T>
void run(const ConvShape& s, Direction direction, const void* from, const ConvPointers& p, void* workspace,
         int threads) {
  Gather g = make_gather(s, direction);
  const Kernels<T>& kernels = dense_kernels<T>();
  const auto* const weight = static_cast<const T*>(p.weight);
  const bool skip_zeros = works_on_padding(s) && all_finite(s, weight);
  if (skip_zeros) drop_idle_taps(g);
  const Bias<T> bias(microkernels(), p.bias, g.groups * g.to_per_group);
  for (const Family& family : families(g))
    run_family(g, family, plan_for(g, family, kernels, threads), kernels, static_cast<const T*>(from), weight,
               bias.get(), static_cast<T*>(p.result), static_cast<Word<T>*>(workspace), threads, skip_zeros);
}

const char* decline(const ConvShape& s, Direction direction) {
  if (!is_floating_point(s.dtype)) return "only floating-point types";
  if (s.in_per_group == 0 || s.out_per_group == 0 || s.in_pixels() == 0 || s.out_pixels() == 0)
    return "nothing to sum over";
  const int64_t results = direction == Direction::kForward ? s.out_per_group : s.in_per_group;
  if (s.channels_last() && s.groups > 1 && std::max(s.in_per_group, s.out_per_group) >= kFewChannels)
    return "NHWC with 16 channels a group or more";
  if (s.channels_last() && s.groups == 1 && results > kFewResults) return "NHWC with more than 9 result channels";
  if (s.taps() > kMaxTaps) return "more than 16384 taps";
  const int64_t words = s.in_channels() * s.out_per_group * s.taps();
  if (dtype_size(s.dtype) == 2 && words > kMostWeights / static_cast<int64_t>(sizeof(float)))
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
  Gather g = make_gather(s, direction);
  const Kernels<T>& kernels = dense_kernels<T>();
  int64_t words = 0;
  const auto add = [&] {
    for (const Family& family : families(g)) {
      int64_t packed = 0;
      for (const GatherPhase* phase : family.phases) packed += packed_weights(g, *phase, kernels);
      words = std::max(words, packed + plan_for(g, family, kernels, threads).elements(g, threads));
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
