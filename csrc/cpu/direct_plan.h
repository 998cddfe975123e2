// The plan of direct.cpp: phases that share strips (Family), how their results are cut into blocks and what a block reads
// into strips (Plan), and the copies that fill the strips of a block (Runs, Shuffles).
#pragma once

#include <algorithm>
#include <numeric>
#include <tuple>

#include "cpu/gather.h"
#include "cpu/gemm_blocks.h"
#include "cpu/microkernels.h"

namespace myconv::cpu::direct {

// Strips of the in channels that are in use at a time, which stay in L2: 512 terms of 208 columns.
inline constexpr int64_t kStripsBytes = 416 << 10;
inline constexpr int64_t kKeptBytes = 448 << 10;  // result rows of a task that are in the making
// Of a block, if there are as many: a row tile of weights is read for all.
inline constexpr int64_t kLeastColumns = 384;
inline constexpr int64_t kMostColumns = 512;
inline constexpr int64_t kChannelsAtOnce = 16;  // of several groups that NHWC transposes together
inline constexpr int64_t kSlack = 16;           // behind the strips: vectors are read whole
// Bytes from a row's weight to its next channel's: then they are packed.
inline constexpr int64_t kFarWeights = 2 << 10;
inline constexpr int64_t kMostTogether = 64;  // phases that share strips
inline constexpr int64_t kLeastJoined = 3;    // planes that are read as one: a strided copy of each is as fast for two
inline constexpr int64_t kMostOfLine = 64;    // rows of a patch that are interleaved into one line

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

inline Families families(const Gather& g) {
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
    if (together == 1 || count == 1)
      found.emplace_back(g.phases[i]);
    else
      found.emplace_back(&g.phases[i], together, along_w);
  return found;
}

// What a plan is made for: samples that share a block, and axes of a strip along which every tap has its own copy, whose
// lines follow each other without a gap.
struct Cut {
  int64_t images = 1;
  bool line_per_tap = false, plane_per_tap = false;
};

// backward_input whose taps neither meet nor leave gaps (kernel = stride, as of patches): every result has one tap, and
// all phases read the same pixel. They are rows of one product, [channel][position in the patch], as their weights lie:
// a result channel of the gather is such a row, and `size[2]` of them are interleaved into a line.
struct Patch {
  int64_t size[3] = {1, 1, 1};

  int64_t rows() const { return size[0] * size[1] * size[2]; }
  // Rows of a register tile: of whole lines, or whole parts of a line.
  int64_t tile_rows(int64_t most) const {
    if (size[2] <= most) return most / size[2] * size[2];
    while (size[2] % most != 0) --most;
    return most;
  }
};

inline Patch join_patches(Gather& g, const ConvShape& s, int64_t most_rows) {
  Patch patch, none;
  int64_t weights = 1;
  for (int d = 2; d >= 0; --d) {
    if (s.pad[d] != 0 || s.stride[d] != s.kernel[d] || (s.dilation[d] != 1 && s.kernel[d] != 1) ||
        s.in[d] != s.out[d] * s.stride[d] || (s.kernel[d] > 1 && g.weight_axis_stride[d] != weights))
      return none;
    weights *= s.kernel[d];
    patch.size[d] = s.kernel[d];
  }
  const bool nchw = g.from_stride.axis[2] == 1 && g.to_stride.axis[2] == 1;
  if (!nchw || weights == 1 || g.weight_to_stride != weights || patch.size[2] > kMostOfLine ||
      2 * patch.tile_rows(most_rows) <= most_rows)
    return none;
  GatherPhase phase = g.phases[0];
  g.phases.clear();
  g.phases.push_back(phase);
  g.to_per_group *= weights;
  g.weight_to_stride = 1;
  return patch;
}

// backward_input of kernels that nearly cover the input, such as 22x1 on 22 lines: most taps of a line of gx would read
// zeros beyond gy. There each line is a phase of its own, with the taps that read something. A plane likewise.
inline void take_lines_apart(Gather& g) {
  for (int d = 0; d < 2; ++d) {
    const GatherAxis axis = g.phases[0].axis[d];
    if (axis.to_step > 1 || axis.mode != PaddingMode::kZeros || 2 * axis.from_extent >= axis.count ||
        axis.count > kMostTogether)
      continue;
    const auto all = static_cast<int64_t>(g.phases.size());
    const int64_t planes = d == 0 ? 1 : std::min(g.phases[0].axis[0].to_step, g.to_extent[0]), of_plane = all / planes;
    c10::SmallVector<GatherPhase, 1> apart;
    for (int64_t i = 0; i < planes * axis.count; ++i) {
      const int64_t j = i % axis.count;
      GatherAxis line{1, j, axis.count, 1, axis.from_extent, {}, {}, axis.mode};
      for (int64_t t = 0; t < axis.taps(); ++t) {
        if (axis.source(j, t) < 0) continue;
        line.tap.push_back(axis.tap[t]);
        line.offset.push_back(axis.source(j, t));
      }
      for (int64_t p = 0; p < of_plane; ++p) {
        apart.push_back(g.phases[i / axis.count * of_plane + p]);
        apart.back().axis[d] = line;
      }
    }
    g.phases = apart;
  }
}

// How a family is cut. Scratch of each thread, in elements: the strips of a chunk of channels, result rows in the
// making.
struct Plan {
  StripAxis axis[3];
  int64_t block[3] = {1, 1, 1}, blocks[3];
  int64_t images;  // samples of a block, one after the other in each plane of a strip
  int64_t pitch, image, size,
      columns;      // of a strip: distance of lines and of samples, elements; of the result at its pitch
  int64_t vectors;  // of a block
  int64_t groups_at_once = 1, chunk;  // channels whose strips are in use at a time
  int64_t problems, kept_rows, splits;
  int64_t tile_rows;            // of the register tile
  int64_t split_rows = 1;       // what splits have whole numbers of: tiles, where those are whole, and lines of a patch
  int64_t tile_weights = 0;     // weights of a channel of a packed tile; 0: they are read where they lie
  bool own_tiles = false;       // each split packs those that it reads
  bool joined, keep, keep_all;  // lines are joined to one run of columns; results go through scratch rows, all at once

  Plan(const Gather& g, const Family& family, const Patch& patch, int64_t most_rows, int64_t lanes,
       int64_t element_size, bool half, int threads, const Cut& cut)
      : axis{StripAxis(family.shared.axis[0]), StripAxis(family.shared.axis[1]), StripAxis(family.shared.axis[2])},
        images(ceil_div(g.batch, ceil_div(g.batch, cut.images))),
        tile_rows(patch.rows() > 1 ? patch.tile_rows(most_rows) : most_rows) {
    const GatherAxis* a = family.shared.axis;
    axis[1].per_tap = cut.plane_per_tap, axis[2].per_tap = cut.line_per_tap;
    const bool nhwc = g.to_stride.channel == 1 && g.to_stride.axis[2] != 1;
    const Blocks sums = reduction_blocks(g.from_per_group, family.most_taps, /*taps_inside=*/true);
    if (nhwc)
      groups_at_once = std::clamp<int64_t>(
          (half ? 2 : 1) * kChannelsAtOnce / std::max(g.from_per_group, g.to_per_group), 1, g.groups);
    const int64_t step = groups_at_once * sums[0].channels;
    const int64_t budget = kStripsBytes / element_size / std::max<int64_t>(step, 1);
    const auto fits = [&](int64_t lines, int64_t line) {
      return images * axis[0].values(1) * axis[1].values(lines) * axis[2].values(line) <= budget;
    };
    block[2] = ceil_div(a[2].count, ceil_div(a[2].count, kMostColumns));
    block[1] = std::min(a[1].count, ceil_div(kLeastColumns, block[2]));
    while (block[1] > 1 && !fits(block[1], block[2])) --block[1];
    while (block[2] > 1 && !fits(block[1], block[2])) block[2] /= 2;
    const auto values = [&] {
      return images * axis[0].values(1) * axis[1].values(block[1]) * axis[2].values(block[2]);
    };
    const int64_t fit = std::max<int64_t>(1, budget / std::max<int64_t>(1, values()));
    chunk = family.most_taps == 0 ? g.from_per_group : std::min(g.from_per_group, sums[0].channels * fit);
    if (chunk < g.from_per_group) groups_at_once = 1;
    if (chunk == g.from_per_group) {
      const int64_t all = kStripsBytes / element_size / std::max<int64_t>(1, groups_at_once * chunk);
      const auto more = [&](int64_t lines) {
        return lines * block[2] <= kMostColumns &&
               images * axis[0].values(1) * axis[1].values(lines) * axis[2].values(block[2]) <= all;
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
    image = axis[0].length(1) * axis[1].length(block[1]) * pitch;
    columns = (images - 1) * image + (block[1] - 1) * pitch + block[2];
    const bool scatter = nhwc || a[2].to_step != 1;
    const int64_t joined_vectors = ceil_div(columns, lanes);
    const int64_t line_vectors = images * block[1] * ceil_div(block[2], lanes);
    joined = images > 1 || joined_vectors < line_vectors;
    vectors = joined ? joined_vectors : line_vectors;
    // Joined lines that follow each other in the result, too, are a run there.
    const bool gapless = images == 1 && (block[1] == 1 || (pitch == block[2] && a[1].to_step == 1 && blocks[2] == 1));
    keep = half || scatter || patch.rows() > 1 || (joined && !gapless);

    // Threads take different blocks, or where these do not go round, different result channels.
    const int64_t rows = g.to_per_group;
    problems = ceil_div(g.batch, images) * ceil_div(g.groups, groups_at_once) * blocks[0] * blocks[1] * blocks[2];
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
    if (tile_weights || patch.rows() > 1) split_rows = std::max(tile_rows, patch.size[2]);
    const int64_t units = ceil_div(rows, split_rows);
    splits = own_tiles ? std::min(round_up(splits, threads), units / threads * threads) : std::min(splits, units);
    const int64_t of_split = ceil_div(units, splits) * split_rows;
    kept_rows = keep_all ? groups_at_once * of_split * family.size()
                : keep   ? std::max<int64_t>(kMaxRows, split_rows) * family.along_w
                         : 0;
  }
  // Samples share a block if that holds all of their results.
  bool is_possible() const { return images == 1 || (blocks[0] == 1 && blocks[1] == 1 && blocks[2] == 1); }
  // About how many cycles a thread takes.
  double cost(const Gather& g, const Family& family, int threads) const {
    const double products = 0.5 * vectors * family.all_taps * round_up(g.to_per_group, kMaxRows), copies = 0.7 * size;
    const auto of_task = static_cast<double>(groups_at_once * g.from_per_group) * (products / splits + copies);
    return of_task * ceil_div(problems * splits, threads);
  }
  int64_t strips() const { return groups_at_once * chunk * size + kSlack; }
  int64_t of_thread() const { return strips() + kept_rows * columns; }
  int64_t packed_tiles(const Gather& g) const {
    return round_up(g.groups * ceil_div(g.to_per_group, tile_rows) * g.from_per_group * tile_weights, 16);
  }
  int64_t elements(const Gather& g, int threads) const { return packed_tiles(g) + threads * of_thread(); }
};

// The runs that fill a strip for the block of `images` samples that begins at result (d, h, w) of each. Sources are
// pixels, of which a sample has image_step to the next one.
using Runs = c10::SmallVector<Segment, 16>;

inline void strip_runs(const Plan& plan, const int64_t (&start)[3], int64_t images, int64_t image_step, Runs& runs) {
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
  for (int64_t plane = 0; plane < planes[0] * planes[1] * planes[2]; ++plane) {
    const int64_t wp = plane % planes[2], hp = plane / planes[2] % planes[1], dp = plane / (planes[1] * planes[2]);
    // Position i of this plane is base + i * step; those in [first, last) lie in the line.
    const int64_t base = source_index(start[2], step, 0, 0, -plan.axis[2].plane_base(wp, block[2]));
    const int64_t first = base >= 0 ? 0 : std::min(left[2], (-base - 1) / step + 1);
    const int64_t last = base >= extent ? first : std::clamp((extent - 1 - base) / step + 1, first, left[2]);
    for (int64_t n = 0; n < images; ++n)
      for (int64_t di = 0; di < left[0]; ++di)
        for (int64_t hi = 0; hi < left[1]; ++hi) {
          const int64_t target = (plane * plan.images + n) * plan.image + (di * length[1] + hi) * length[2];
          const int64_t from_d = source(0, dp, di), from_h = source(1, hp, hi);
          if (from_d < 0 || from_h < 0) {
            add(0, target, left[2], 0, 0);
            continue;
          }
          const int64_t line = n * image_step + (from_d * a[1]->from_extent + from_h) * extent;
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
}

// Runs of neighbouring planes along W that read the same line in turn become one: the line is read once. What only some
// of them read, at a border, stays apart.
inline void join_planes(const Plan& plan, Runs& runs) {
  const StripAxis* a = plan.axis;
  const int64_t along_w = a[2].planes(plan.block[2]), others = a[0].planes(1) * a[1].planes(plan.block[1]);
  const auto size = static_cast<int64_t>(runs.size());
  // (With stride 1 none do, and what is padding is zeroed after the lines: in this order.)
  if (a[2].axis.from_step == 1 || along_w < kLeastJoined || size == 0 || size % (along_w * others) != 0) return;
  const int64_t of_plane = size / (along_w * others), apart = plan.images * plan.image;
  Runs joined;
  for (int64_t i = 0; i < others * of_plane; ++i) {
    const Segment* const first = runs.begin() + (i / of_plane * along_w * of_plane + i % of_plane);
    for (int64_t w = 0; w < along_w;) {
      Segment all = first[w * of_plane];
      int64_t next = w + 1;
      for (; next < along_w && next < w + all.step; ++next, ++all.planes) {
        const Segment &run = first[next * of_plane], &before = first[(next - 1) * of_plane];
        if (run.source != before.source + 1 || run.target != before.target + apart || run.length != all.length) break;
        all.first = std::max(all.first, run.first), all.last = std::min(all.last, run.last);
      }
      if (all.planes == 1 || all.first >= all.last) {
        for (; w < next; ++w) joined.push_back(first[w * of_plane]);
        continue;
      }
      all.apart = static_cast<int32_t>(apart);
      joined.push_back(all);
      for (; w < next; ++w) {
        const Segment& run = first[w * of_plane];
        const auto left = [&](int32_t begin, int32_t end) {
          if (begin < end)
            joined.push_back(
                {run.source + begin * run.step, run.step, run.target + begin, end - begin, 0, end - begin});
        };
        left(run.first, all.first);
        left(all.last, run.last);
      }
    }
  }
  runs = std::move(joined);
}

// The same, vector by vector, where runs are short. Empty where they are not, or where too many windows would be read.
using Shuffles = c10::SmallVector<Shuffle, 16>;

inline void strip_shuffles(const Plan& plan, const Runs& runs, int64_t lanes, Shuffles& shuffles) {
  constexpr double kRun = 10, kRunVector = 3, kShuffle = 4;  // cycles
  shuffles.clear();
  double of_runs = 0;
  for (const Segment& run : runs)
    of_runs += kRun + kRunVector * static_cast<double>(run.planes * ceil_div(run.length, lanes));
  const auto most = static_cast<size_t>(of_runs / kShuffle);
  if (static_cast<size_t>(ceil_div(plan.size, lanes)) > most) return;

  c10::SmallVector<int64_t, 1024> source(round_up(plan.size, lanes), -1);
  for (const Segment& run : runs)
    for (int64_t p = 0; p < run.planes; ++p)
      for (int64_t i = 0; i < run.length; ++i)
        source[run.target + p * run.apart + i] = i >= run.first && i < run.last ? run.source + p + i * run.step : -1;
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

// For a block that lies elsewhere: whether its runs are those before, but read what lies further on. Then so do its
// shuffles, which take longer to find than to use.
inline bool shift_shuffles(const Runs& before, const Runs& runs, Shuffles& shuffles) {
  const auto reads = [](const Segment& run) { return run.first < run.last; };
  const auto same = [&](const Segment& a, const Segment& b) {
    return std::tie(a.step, a.target, a.length, a.first, a.last, a.planes, a.apart) ==
           std::tie(b.step, b.target, b.length, b.first, b.last, b.planes, b.apart);
  };
  if (!std::equal(before.begin(), before.end(), runs.begin(), runs.end(), same)) return false;
  const auto first = static_cast<size_t>(std::find_if(runs.begin(), runs.end(), reads) - runs.begin());
  const int64_t by = first < runs.size() ? runs[first].source - before[first].source : 0;
  for (size_t i = first; i < runs.size(); ++i)
    if (reads(runs[i]) && runs[i].source - before[i].source != by) return false;
  for (Shuffle& s : shuffles)
    for (int w = 0; w < 2; ++w)
      if (s.count[w] > 0) s.source[w] += by;
  return true;
}

}  // namespace myconv::cpu::direct
