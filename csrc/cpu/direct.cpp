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
#include "cpu/finite.h"
#include "cpu/gather.h"
#include "cpu/gemm_blocks.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace myconv::cpu {
namespace {

constexpr int64_t kStripsBytes = 384 << 10;  // strips of the in channels that are in use at a time: they stay in L2
constexpr int64_t kKeptBytes = 256 << 10;    // result rows of a task that are in the making
constexpr int64_t kLeastColumns = 384;       // of a block, if there are as many: a row tile of weights is read for all
constexpr int64_t kMostColumns = 512;
constexpr int64_t kFewChannels = 16;        // of a group: with fewer NHWC is transposed
constexpr int64_t kFewResults = 9;          // or with so few result channels, which would leave most lanes empty
constexpr int64_t kChannelsAtOnce = 16;     // of several groups that NHWC transposes together
constexpr int64_t kLeastShuffled = 16;      // channels of a sample, for which the shuffles of a strip are worth finding
constexpr int64_t kSlack = 16;              // behind the strips: vectors are read whole
constexpr int64_t kMostWeights = 48 << 20;  // bytes of packed weights
constexpr int64_t kFarWeights = 2 << 10;    // bytes from a row's weight to its next channel's: then they are packed
constexpr int64_t kChannelsPacked = 16;     // of weights at a time
constexpr int64_t kMaxPhases = 65536;       // of backward_input: each costs a little set-up
constexpr int64_t kMostTogether = 16;       // phases that share strips

// One axis of a strip: planes of equal length. Position i of plane p holds source position base[p] + i * step, counted
// from what the block's first result reads. Taps share planes, one for each residue of their offsets, or where they
// are far apart each has its own.
struct StripAxis {
  const GatherAxis& axis;
  int64_t low = 0, residues = 0, extra = 0;  // residues: how many different ones there are
  bool shareable = false, per_tap = false;
  c10::SmallVector<int64_t, 8> base;

  explicit StripAxis(const GatherAxis& a) : axis(a) {
    if (a.taps() == 0) return;
    const auto [least, most] = std::minmax_element(a.offset.begin(), a.offset.end());
    low = *least;
    if (static_cast<double>(*most) - static_cast<double>(low) >= 1e9) return;
    shareable = true;
    extra = (*most - low) / a.from_step;
    for (const int64_t offset : a.offset) base.push_back((offset - low) % a.from_step);
    std::sort(base.begin(), base.end());
    base.erase(std::unique(base.begin(), base.end()), base.end());
    residues = static_cast<int64_t>(base.size());
    for (int64_t& b : base) b += low;
  }

  bool shared(int64_t block) const {
    return shareable && !per_tap && residues * (block + extra) <= axis.taps() * block;
  }
  int64_t planes(int64_t block) const { return shared(block) ? residues : axis.taps(); }
  int64_t length(int64_t block) const { return shared(block) ? block + extra : block; }
  int64_t values(int64_t block) const { return planes(block) * length(block); }
  int64_t plane_base(int64_t p, int64_t block) const { return shared(block) ? base[p] : axis.offset[p]; }
  int64_t tap(int64_t offset) const {
    return std::find(axis.offset.begin(), axis.offset.end(), offset) - axis.offset.begin();
  }
  // Where tap t reads for the block's first result: its plane and the position there.
  int64_t plane(int64_t t, int64_t block) const {
    if (!shared(block)) return t;
    const int64_t first = low + (axis.offset[t] - low) % axis.from_step;
    return std::lower_bound(base.begin(), base.end(), first) - base.begin();
  }
  int64_t shift(int64_t t, int64_t block) const { return shared(block) ? (axis.offset[t] - low) / axis.from_step : 0; }
};

// Phases that share strips, [h][w]: of one residue along D. `shared` has the taps of all of them, by what they read, and
// the most positions; it is no phase itself unless it is the only one.
struct Family {
  GatherPhase shared;
  c10::SmallVector<const GatherPhase*, 1> phases;
  int64_t along_w = 1, most_taps = 0, all_taps = 0;

  explicit Family(const GatherPhase& phase) : shared(phase) { add(phase); }
  Family(const GatherPhase* first, int64_t count, int64_t phases_w) : shared(*first), along_w(phases_w) {
    for (int64_t i = 0; i < count; ++i) add(first[i]);
    for (int d = 1; d < 3; ++d) {
      c10::SmallVector<int64_t, 8>& offset = shared.axis[d].offset;
      offset.clear();
      for (const GatherPhase* phase : phases)
        offset.insert(offset.end(), phase->axis[d].offset.begin(), phase->axis[d].offset.end());
      std::sort(offset.begin(), offset.end());
      offset.erase(std::unique(offset.begin(), offset.end()), offset.end());
      shared.axis[d].tap.resize(offset.size());  // numbers of no weights
      std::iota(shared.axis[d].tap.begin(), shared.axis[d].tap.end(), 0);
    }
  }
  int64_t size() const { return static_cast<int64_t>(phases.size()); }
  int64_t lines() const { return size() / along_w; }

 private:
  void add(const GatherPhase& phase) {
    phases.push_back(&phase);
    most_taps = std::max(most_taps, phase.taps()), all_taps += phase.taps();
  }
};

using Families = c10::SmallVector<Family, 1>;

Families families(const Gather& g) {
  const auto count = static_cast<int64_t>(g.phases.size());
  const auto phases_of = [&](int d) { return std::min(g.phases[0].axis[d].to_step, g.to_extent[d]); };
  const int64_t along_w = phases_of(2), plane = phases_of(1) * along_w;
  int64_t most_taps = 0;
  for (const GatherPhase& phase : g.phases) most_taps = std::max(most_taps, phase.taps());
  const int64_t together = most_taps > kSumLength     ? 1
                           : plane <= kMostTogether   ? plane
                           : along_w <= kMostTogether ? along_w
                                                      : 1;
  Families found;
  for (int64_t i = 0; i < count; i += together)
    if (together == 1)
      found.emplace_back(g.phases[i]);
    else
      found.emplace_back(&g.phases[i], together, along_w);
  return found;
}

// How a family is cut. Scratch of each thread, in elements: the strips of a chunk of channels, result rows in the
// making.
struct Plan {
  StripAxis axis[3];
  int64_t block[3] = {1, 1, 1}, blocks[3];
  int64_t pitch, size, columns;       // of a strip: distance of lines, elements; of the result at its pitch
  int64_t vectors;                    // of a block
  int64_t groups_at_once = 1, chunk;  // channels whose strips are in use at a time
  int64_t kept_rows, splits;
  int64_t tile_rows;            // of the register tile
  int64_t tile_weights = 0;     // weights of a channel of a packed tile; 0: they are read where they lie
  bool own_tiles = false;       // each split packs those that it reads
  bool joined, keep, keep_all;  // lines are joined to one run of columns; results go through scratch rows, all at once

  Plan(const Gather& g, const Family& family, int64_t tile_rows, int64_t lanes, int64_t element_size, bool half,
       int threads, bool line_per_tap)
      : axis{StripAxis(family.shared.axis[0]), StripAxis(family.shared.axis[1]), StripAxis(family.shared.axis[2])},
        tile_rows(tile_rows) {
    const GatherAxis* a = family.shared.axis;
    axis[2].per_tap = line_per_tap;
    const bool nhwc = g.to_stride.channel == 1 && g.to_stride.axis[2] != 1;
    const Blocks sums = reduction_blocks(g.from_per_group, family.most_taps, /*taps_inside=*/true);
    if (nhwc)
      groups_at_once = std::clamp<int64_t>(
          (half ? 2 : 1) * kChannelsAtOnce / std::max(g.from_per_group, g.to_per_group), 1, g.groups);
    const int64_t step = groups_at_once * sums[0].channels;
    const int64_t budget = kStripsBytes / element_size / std::max<int64_t>(step, 1);
    const auto fits = [&](int64_t lines, int64_t line) {
      return axis[0].values(1) * axis[1].values(lines) * axis[2].values(line) <= budget;
    };
    block[2] = ceil_div(a[2].count, ceil_div(a[2].count, kMostColumns));
    block[1] = std::min(a[1].count, ceil_div(kLeastColumns, block[2]));
    while (block[1] > 1 && !fits(block[1], block[2])) --block[1];
    while (block[2] > 1 && !fits(block[1], block[2])) block[2] /= 2;
    const auto values = [&] { return axis[0].values(1) * axis[1].values(block[1]) * axis[2].values(block[2]); };
    const int64_t fit = std::max<int64_t>(1, budget / std::max<int64_t>(1, values()));
    chunk = family.most_taps == 0 ? g.from_per_group : std::min(g.from_per_group, sums[0].channels * fit);
    if (chunk < g.from_per_group) groups_at_once = 1;
    if (chunk == g.from_per_group) {
      const int64_t all = kStripsBytes / element_size / std::max<int64_t>(1, groups_at_once * chunk);
      const auto more = [&](int64_t lines) {
        return lines * block[2] <= kMostColumns &&
               axis[0].values(1) * axis[1].values(lines) * axis[2].values(block[2]) <= all;
      };
      int64_t lines = std::min(a[1].count, kMostColumns / block[2]);
      while (lines > block[1] && !more(lines)) --lines;
      block[1] = std::max(block[1], lines);
    }
    for (int d = 0; d < 3; ++d) {
      blocks[d] = ceil_div(a[d].count, block[d]);
      block[d] = ceil_div(a[d].count, blocks[d]);
      blocks[d] = ceil_div(a[d].count, block[d]);
    }
    size = values();
    pitch = axis[2].length(block[2]);
    columns = (block[1] - 1) * pitch + block[2];
    const bool scatter = nhwc || a[2].to_step != 1;
    const int64_t joined_vectors = ceil_div(columns, lanes), line_vectors = block[1] * ceil_div(block[2], lanes);
    joined = joined_vectors < line_vectors;
    vectors = std::min(joined_vectors, line_vectors);
    // Joined lines that follow each other in the result, too, are a run there.
    const bool gapless = block[1] == 1 || (pitch == block[2] && a[1].to_step == 1 && blocks[2] == 1);
    keep = half || scatter || (joined && !gapless);

    // Threads take different blocks, or where these do not go round, different result channels.
    const int64_t rows = g.to_per_group;
    const int64_t problems = g.batch * ceil_div(g.groups, groups_at_once) * blocks[0] * blocks[1] * blocks[2];
    splits = problems < 8 * threads ? ceil_div(threads, problems) : 1;
    for (int64_t s = splits; s < splits + threads && problems < 8 * threads; ++s)
      if (problems * s % threads == 0) {
        splits = s;
        break;
      }
    if (groups_at_once > 1) splits = 1;
    keep_all = keep && (nhwc || chunk < g.from_per_group);
    if (keep_all)
      splits = std::max(
          splits, ceil_div(rows, std::max<int64_t>(kMaxRows, kKeptBytes / element_size / columns / family.size())));
    splits = std::min(splits, ceil_div(rows, kMaxRows));
    // Of backward_input: the weights of neighbouring rows lie together, those of the next channel far away.
    const int64_t packed = g.groups * round_up(rows, tile_rows) * g.from_per_group * g.weight_to_stride;
    bool together = g.weight_to_stride == family.all_taps;
    for (const GatherPhase* p : family.phases)
      for (const int64_t offset : g.weight_tap_offsets(*p)) together = together && offset < g.weight_to_stride;
    if (!half && together && g.weight_from_stride * element_size >= kFarWeights &&
        packed * element_size <= kPackedBytes)
      tile_weights = tile_rows * g.weight_to_stride;
    // Where weights are more than what is read, threads share result channels: nothing passes between them.
    own_tiles = tile_weights > 0 && g.groups == 1 && threads > 1 && rows >= threads * tile_rows &&
                packed > g.batch * g.from_pixels() * g.from_per_group;
    if (own_tiles) splits = std::min(round_up(splits, threads), ceil_div(rows, tile_rows) / threads * threads);
    const int64_t of_split =
        tile_weights ? ceil_div(ceil_div(rows, tile_rows), splits) * tile_rows : ceil_div(rows, splits);
    kept_rows = keep_all ? groups_at_once * of_split * family.size() : keep ? kMaxRows * family.along_w : 0;
  }
  // About how many cycles one image and group take.
  double cost(const Gather& g, const Family& family) const {
    const double products = 0.5 * vectors * family.all_taps * round_up(g.to_per_group, kMaxRows), copies = 0.7 * size;
    return (products + copies) * g.from_per_group * blocks[0] * blocks[1] * blocks[2];
  }
  int64_t strips() const { return groups_at_once * chunk * size + kSlack; }
  int64_t of_thread() const { return strips() + kept_rows * columns; }
  int64_t packed_tiles(const Gather& g) const {
    return round_up(g.groups * ceil_div(g.to_per_group, tile_rows) * g.from_per_group * tile_weights, 16);
  }
  int64_t elements(const Gather& g, int threads) const { return packed_tiles(g) + threads * of_thread(); }
};

// Pieces of the channels of a group.
int64_t channel_pieces(const Gather& g) { return ceil_div(g.from_per_group, kChannelsPacked); }

// The runs that fill a strip for the block that begins at result (d, h, w). Sources are pixels.
using Runs = c10::SmallVector<Segment, 16>;

void strip_runs(const Plan& plan, const int64_t (&start)[3], Runs& runs) {
  runs.clear();
  const int64_t* const block = plan.block;
  const GatherAxis* const a[3] = {&plan.axis[0].axis, &plan.axis[1].axis, &plan.axis[2].axis};
  int64_t planes[3], length[3], left[3];
  for (int d = 0; d < 3; ++d) {
    planes[d] = plan.axis[d].planes(block[d]), length[d] = plan.axis[d].length(block[d]);
    left[d] = std::min(length[d], a[d]->count - start[d] + length[d] - block[d]);  // the last block may be smaller
  }
  const int64_t extent = a[2]->from_extent, step = a[2]->from_step;
  const auto source = [&](int d, int64_t p, int64_t i) {
    const int64_t base = plan.axis[d].plane_base(p, block[d]);
    const int64_t at =
        padded_index(source_index(start[d] + i, a[d]->from_step, 0, 0, -base), a[d]->from_extent, a[d]->mode);
    return at < a[d]->from_extent ? at : -1;  // what no tap reads may lie beyond any padding mode's reach
  };
  const auto add = [&](int64_t from, int64_t target, int64_t count, int64_t first, int64_t last) {
    runs.push_back({from, step, static_cast<int32_t>(target), static_cast<int32_t>(count), static_cast<int32_t>(first),
                    static_cast<int32_t>(last)});
  };
  for (int64_t dp = 0; dp < planes[0]; ++dp)
    for (int64_t hp = 0; hp < planes[1]; ++hp)
      for (int64_t wp = 0; wp < planes[2]; ++wp)
        for (int64_t di = 0; di < left[0]; ++di)
          for (int64_t hi = 0; hi < left[1]; ++hi) {
            const int64_t plane = (dp * planes[1] + hp) * planes[2] + wp;
            const int64_t target = ((plane * length[0] + di) * length[1] + hi) * length[2];
            const int64_t from_d = source(0, dp, di), from_h = source(1, hp, hi);
            if (from_d < 0 || from_h < 0) {
              add(0, target, left[2], 0, 0);
              continue;
            }
            const int64_t line = (from_d * a[1]->from_extent + from_h) * extent;
            // Position i of this plane is base + i * step; those in [first, last) lie in the line.
            const int64_t base = source_index(start[2], step, 0, 0, -plan.axis[2].plane_base(wp, block[2]));
            const int64_t first = base >= 0 ? 0 : std::min(left[2], (-base - 1) / step + 1);
            const int64_t last = base >= extent ? first : std::clamp((extent - 1 - base) / step + 1, first, left[2]);
            if (a[2]->mode == PaddingMode::kZeros) {
              // Lines that follow each other here and there are copied at once; what is padding is zeroed after.
              int64_t lines = 1;
              if (step == 1 && length[2] == extent && left[2] == extent && first < last)
                while (hi + lines < left[1] && source(1, hp, hi + lines) == from_h + lines) ++lines;
              add(line + base, target, (lines - 1) * extent + left[2], first, (lines - 1) * extent + last);
              for (int64_t l = 0; l + 1 < lines; ++l) {
                if (last < extent) add(0, target + l * extent + last, extent - last, 0, 0);
                if (first > 0) add(0, target + (l + 1) * extent, first, 0, 0);
              }
              hi += lines - 1;
              continue;
            }
            if (first < last) add(line + base + first * step, target + first, last - first, 0, last - first);
            for (int64_t i = 0; i < left[2]; ++i)
              if (i < first || i >= last) {
                // What no tap reads (the end of a residue) may lie beyond any padding mode's reach.
                const int64_t w = padded_index(base + i * step, extent, a[2]->mode);
                add(line + w, target + i, 1, 0, w >= 0 && w < extent);
              }
          }
}

// The same, vector by vector, where runs are short. Empty where they are not, or where too many windows would be read.
using Shuffles = c10::SmallVector<Shuffle, 16>;

void strip_shuffles(const Plan& plan, const Runs& runs, int64_t lanes, Shuffles& shuffles) {
  constexpr double kRun = 10, kRunVector = 3, kShuffle = 4;  // cycles
  shuffles.clear();
  double of_runs = 0;
  for (const Segment& run : runs) of_runs += kRun + kRunVector * static_cast<double>(ceil_div(run.length, lanes));
  const auto most = static_cast<size_t>(of_runs / kShuffle);
  if (static_cast<size_t>(ceil_div(plan.size, lanes)) > most) return;

  c10::SmallVector<int64_t, 1024> source(round_up(plan.size, lanes), -1);
  for (const Segment& run : runs)
    for (int64_t i = 0; i < run.length; ++i)
      source[run.target + i] = i >= run.first && i < run.last ? run.source + i * run.step : -1;
  for (int64_t target = 0; target < plan.size; target += lanes) {
    int64_t* const from = source.data() + target;
    bool onto = false;
    for (bool done = false; !done; onto = true) {
      // The windows take in turn what is first in the plane; -1 as an unsigned number is the last.
      Shuffle s{{0, 0}, {0, 0}, static_cast<int32_t>(target), 0, onto, {}};
      s.length = static_cast<int32_t>(std::min(lanes, plan.size - target));
      for (int64_t l = 0; l < lanes; ++l) s.lane[l] = static_cast<int32_t>(onto ? l : lanes - 1);
      for (int w = onto; w < 2; ++w) {
        const int64_t longest = w == 0 ? lanes - 1 : lanes;
        const auto first = *std::min_element(from, from + lanes, [](int64_t a, int64_t b) {
          return static_cast<uint64_t>(a) < static_cast<uint64_t>(b);
        });
        if (first < 0) break;
        s.source[w] = first;
        for (int64_t l = 0; l < lanes; ++l) {
          if (from[l] < 0 || from[l] >= first + longest) continue;
          s.lane[l] = static_cast<int32_t>(w * lanes + from[l] - first);
          s.count[w] = std::max(s.count[w], static_cast<int32_t>(from[l] - first + 1));
          from[l] = -1;
        }
      }
      done = *std::max_element(from, from + lanes) < 0;
      shuffles.push_back(s);
      if (shuffles.size() > most) return shuffles.clear();
    }
  }
}

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
      kernels.copy_rows(source + row * g.weight_to_stride, g.weight_from_stride, std::min(kChannelsPacked, channels - k),
                        height * g.weight_to_stride,
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
    parallel_tasks(g.groups * channel_pieces(g), 0.5 * static_cast<double>(kChannelsPacked * all_tiles * plan.tile_weights),
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
