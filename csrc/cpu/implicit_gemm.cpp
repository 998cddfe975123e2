// Implicit GEMM for forward and backward_input in NHWC: dense and grouped convolutions of any kernel, stride, dilation.
//
// Both directions are gathers (gather.h), and a gather is a matrix product per phase and group whose one operand is
// never built: rows (register tile) are result pixels, columns (vectors) result channels, the depth taps x channels.
// Weights are packed once a call into panels [block][tap][channel][width]; activations are read where they lie:
//
//   by terms      sums of one block: a term is one offset for all pixels of a tile, a piece of a line; tiles that read
//                 padding read a padded copy of it
//   by pointers   the others: one for each (tap, pixel); a pixel in the padding points to a row of zeros
//
// Where all weights are finite, a tile by pointers leaves out the taps that read nothing but padding, and runs along
// the axis that leaves out most. What is left is summed as before, and adding 0 changes nothing.
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
constexpr int64_t kFewChannels = 16;
constexpr int64_t kPatchBytes = 64 << 10;  // of a tile's padded copy of what it reads

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

// Sums of one block: a tile is a few pixels of one line, and every term is an offset from the first value that they
// read, so that nothing is set up for a tile. Tiles that read padding read a padded copy of their piece of each line.
struct Patch {
  int64_t low[3] = {0, 0, 0};
  int64_t width = 0, size = 0;  // positions of a line of the copy, elements

  Patch(const Gather& g, const GatherPhase& phase, int64_t rows) {
    const GatherAxis* a = phase.axis;
    if (phase.taps() == 0) return;
    for (int d = 0; d < 3; ++d) low[d] = *std::min_element(a[d].offset.begin(), a[d].offset.end());
    const double reach = static_cast<double>(*std::max_element(a[2].offset.begin(), a[2].offset.end())) - low[2];
    if (reach + static_cast<double>(rows) * a[2].from_step > kPatchBytes) return;
    width = static_cast<int64_t>(reach) + (rows - 1) * a[2].from_step + 1;
    size = a[0].taps() * a[1].taps() * width * g.from_per_group;
  }
};

// Whether a phase is worked on by terms, and not by pointers: where copies are rare, or pointers to a few channels each
// would cost more than what they are for.
bool takes_terms(const Gather& g, const GatherPhase& phase, int64_t rows, int64_t element_size) {
  const Patch patch(g, phase, rows);
  const GatherAxis* a = phase.axis;
  const bool lines = a[2].count >= rows / 2 || a[0].count * a[1].count == 1;
  bool padded = false;
  for (int d = 0; d < 3; ++d) padded = padded || is_padded(a[d]);
  const bool worth = !padded || g.from_per_group < kFewChannels || a[2].count >= 4 * rows;
  return lines && worth && patch.size > 0 && patch.size <= kPatchBytes / element_size &&
         phase.taps() * g.from_per_group <= kSumLength;
}

// What one call needs, in elements. Packed weights are those of the pass that is being worked on.
struct Workspace {
  int64_t packed, zeros, patch;  // zeros: one pixel; patch: of a thread

  Workspace(const ConvShape& s, const Gather& g, Direction direction) {
    const bool forward = direction == Direction::kForward;
    const int64_t from = forward ? s.in_per_group : s.out_per_group, to = forward ? s.out_per_group : s.in_per_group;
    const Microkernels& m = microkernels();
    const int64_t lanes = s.dtype == Dtype::kFloat32 ? m.f32.lanes : m.f64.lanes;
    const int64_t vectors = s.dtype == Dtype::kFloat32 ? m.f32.vectors : m.f64.vectors;
    const Panels panels(to, lanes, vectors);
    const int64_t unit = s.taps() * from * panels.width;
    packed = std::min(s.groups * panels.count, std::max<int64_t>(1, kPackedBytes / dtype_size(s.dtype) / unit)) * unit;
    zeros = s.groups * from;
    patch = 0;
    const int64_t rows = s.dtype == Dtype::kFloat32 ? m.f32.rows : m.f64.rows;
    for (const GatherPhase& phase : g.phases)
      if (takes_terms(g, phase, rows, dtype_size(s.dtype))) patch = std::max(patch, Patch(g, phase, rows).size);
  }
  int64_t elements(int threads) const { return packed + std::max(zeros, threads * patch); }
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

  Tiles(const Gather& g, const GatherPhase& phase, int64_t rows, bool skip_zeros) : rows(rows) {
    const GatherAxis* a = phase.axis;
    extent[0] = g.batch;
    double live[3];  // of all pairs of a position and a tap, those inside
    for (int d = 0; d < 3; ++d) {
      extent[d + 1] = a[d].count;
      double inside = 0;
      for (int64_t t = 0; t < a[d].taps(); ++t)
        inside += static_cast<double>(std::max<int64_t>(0, a[d].last_inside(t) - a[d].first_inside(t)));
      live[d] = inside / static_cast<double>(std::max<int64_t>(1, a[d].taps() * a[d].count));
    }
    pixels = g.batch * phase.pixels();
    run = pixels;
    // What a pixel costs for the products that are left: a tile of few rows costs no less than one of four.
    const auto cost = [&](int64_t length, double products) {
      const double tile = static_cast<double>(length) / static_cast<double>(ceil_div(length, rows));
      return products * (std::max(tile, 4.0) + 0.7) / tile;
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
    double least = cost(std::max<int64_t>(1, pixels), 1);
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
void multiply_by_terms(const Gather& g, const GatherPhase& phase, const Kernels<T>& kernels, const T* from,
                       const T* bias, T* to, const T* packed, T* scratch, int64_t first, int64_t last, int threads) {
  const GatherAxis* a = phase.axis;
  const int64_t taps = phase.taps(), channels = g.from_per_group, depth = taps * channels;
  const Panels panels(g.to_per_group, kernels.lanes, kernels.vectors);
  const Patch patch(g, phase, kernels.rows);
  // Terms from the first value that a tile reads, where it lies and in its padded copy.
  c10::SmallVector<Term, kSumLength> in_place(depth), in_patch(depth);
  const auto offset = [&](int d, int64_t t) { return a[d].offset[t] - patch.low[d]; };
  for (int64_t td = 0, t = 0; td < a[0].taps(); ++td)
    for (int64_t th = 0; th < a[1].taps(); ++th)
      for (int64_t tw = 0; tw < a[2].taps(); ++tw, ++t)
        for (int64_t c = 0; c < channels; ++c) {
          const int64_t row = (t * channels + c) * panels.width;
          in_place[t * channels + c] = {offset(0, td) * g.from_stride.axis[0] + offset(1, th) * g.from_stride.axis[1] +
                                            offset(2, tw) * g.from_stride.axis[2] + c,
                                        row};
          in_patch[t * channels + c] = {((td * a[1].taps() + th) * patch.width + offset(2, tw)) * channels + c, row};
        }
  int64_t inside[3], outside[3];  // results that read no padding: [inside, outside)
  for (int d = 0; d < 3; ++d) {
    inside[d] = 0, outside[d] = a[d].count;
    for (int64_t t = 0; t < a[d].taps(); ++t)
      inside[d] = std::max(inside[d], a[d].first_inside(t)), outside[d] = std::min(outside[d], a[d].last_inside(t));
  }
  const auto fill = [&](const T* image, int64_t d, int64_t h, int64_t w, int64_t rows, T* target) {
    const int64_t used = patch.width - (kernels.rows - rows) * a[2].from_step;
    for (int64_t td = 0; td < a[0].taps(); ++td)
      for (int64_t th = 0; th < a[1].taps(); ++th, target += patch.width * channels) {
        const int64_t from_d = a[0].source(d, td), from_h = a[1].source(h, th);
        if (from_d < 0 || from_h < 0) {
          std::fill_n(target, used * channels, T(0));
          continue;
        }
        const T* const line = image + from_d * g.from_stride.axis[0] + from_h * g.from_stride.axis[1];
        const int64_t begin = patch.low[2] + w * a[2].from_step;
        const int64_t extent = a[2].from_extent, pixel = g.from_stride.axis[2];
        const auto copy = [&](int64_t at, int64_t i, int64_t count) {
          kernels.copy_rows(line + at * pixel, pixel, pixel == channels ? 1 : count,
                            pixel == channels ? count * channels : channels, target + i * channels, channels);
        };
        const int64_t first = std::clamp<int64_t>(-begin, 0, used);
        const int64_t last = std::clamp<int64_t>(extent - begin, first, used);
        if (first < last) copy(begin + first, first, last - first);
        for (int64_t i = 0; i < used; ++i) {
          if (i >= first && i < last) continue;
          const int64_t at = padded_index(begin + i, extent, a[2].mode);
          // What no tap reads may lie beyond any padding mode's reach.
          if (at < 0 || at >= extent)
            for (int64_t c = 0; c < channels; ++c) target[i * channels + c] = 0;
          else
            copy(at, i, 1);
        }
      }
  };

  const int64_t lines = g.batch * a[0].count * a[1].count, tiles = ceil_div(a[2].count, kernels.rows);
  const int64_t chunks =
      std::clamp<int64_t>(ceil_div(lines * tiles, 4), 1, std::max<int64_t>(1, std::min<int64_t>(lines, 16 * threads)));
  const int64_t splits = std::clamp<int64_t>(ceil_div(2 * threads, chunks), 1, last - first);
  const double macs = static_cast<double>(lines) * a[2].count * depth * panels.width * (last - first);
  parallel_tasks(chunks * splits, macs / (chunks * splits), [&](int64_t begin, int64_t end) {
    T* const patched = scratch + at::get_thread_num() * patch.size;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t chunk = i / splits, split = i % splits;
      const int64_t unit0 = first + (last - first) * split / splits;
      const int64_t unit1 = first + (last - first) * (split + 1) / splits;
      for (int64_t unit = unit0; unit < unit1; ++unit) {
        const int64_t group = unit / panels.count, panel = unit % panels.count;
        const int64_t column = group * g.to_per_group + panels.begin(panel), columns = panels.size(panel);
        StripVector vectors[kMaxVectors];
        int count = 0;
        for (int64_t j = 0; j < columns; j += kernels.lanes)
          vectors[count++] = {j, j, std::min<int64_t>(kernels.lanes, columns - j)};
        for (int64_t line = lines * chunk / chunks; line < lines * (chunk + 1) / chunks; ++line) {
          const int64_t h = line % a[1].count, d = line / a[1].count % a[0].count, n = line / a[1].count / a[0].count;
          const T* const image = from + n * g.from_stride.batch + group * channels;
          T* const result = to + n * g.to_stride.batch + (a[0].to_start + d * a[0].to_step) * g.to_stride.axis[0] +
                            (a[1].to_start + h * a[1].to_step) * g.to_stride.axis[1] +
                            a[2].to_start * g.to_stride.axis[2] + column;
          const bool line_inside = d >= inside[0] && d < outside[0] && h >= inside[1] && h < outside[1];
          const T* const origin = line_inside ? image + (patch.low[0] + d * a[0].from_step) * g.from_stride.axis[0] +
                                                    (patch.low[1] + h * a[1].from_step) * g.from_stride.axis[1]
                                              : nullptr;
          for (int64_t tile = 0; tile < tiles; ++tile) {
            const int64_t w = a[2].count * tile / tiles, rows = a[2].count * (tile + 1) / tiles - w;
            const bool whole = line_inside && w >= inside[2] && w + rows <= outside[2];
            if (!whole) fill(image, d, h, w, rows, patched);
            kernels.strip[rows - 1](
                {.terms = depth,
                 .term = whole ? in_place.data() : in_patch.data(),
                 .a = whole ? origin + (patch.low[2] + w * a[2].from_step) * g.from_stride.axis[2] : patched,
                 .a_row = a[2].from_step * (whole ? g.from_stride.axis[2] : channels),
                 .b = packed + (unit - first) * depth * panels.width,
                 .c = result + w * a[2].to_step * g.to_stride.axis[2],
                 .c_row = a[2].to_step * g.to_stride.axis[2],
                 .vectors = count,
                 .vector = vectors,
                 .row_bias = nullptr,
                 .column_bias = bias ? bias + column : nullptr,
                 .accumulate = false});
          }
        }
      }
    }
  });
}

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

template <typename T>
void run_phase(const Gather& g, const GatherPhase& phase, const Kernels<T>& kernels, const T* from, const T* weight,
               const T* bias, T* to, const Workspace& sizes, T* workspace, int threads, bool skip_zeros) {
  const int64_t depth = phase.taps() * g.from_per_group;
  const Blocks blocks = reduction_blocks(g.from_per_group, phase.taps(), /*taps_inside=*/false);
  const Panels panels(g.to_per_group, kernels.lanes, kernels.vectors);
  const bool padded = is_padded(phase.axis[0]) || is_padded(phase.axis[1]) || is_padded(phase.axis[2]);
  T* const packed = workspace;
  T* const scratch = packed + sizes.packed;
  const bool terms = !skip_zeros && takes_terms(g, phase, kernels.rows, sizeof(T));
  if (!terms) std::fill_n(scratch, sizes.zeros, T(0));

  const int64_t units = g.groups * panels.count, unit_size = depth * panels.width;
  const int64_t units_per_pass = std::clamp<int64_t>(sizes.packed / std::max<int64_t>(unit_size, 1), 1, units);
  for (int64_t first = 0; first < units; first += units_per_pass) {
    const int64_t last = std::min(units, first + units_per_pass), block_count = static_cast<int64_t>(blocks.size());
    std::atomic<bool> finite = true;
    const bool look = !terms && !skip_zeros && padded && phase.axis[0].mode == PaddingMode::kZeros;
    parallel_tasks((last - first) * block_count, 2.0 * unit_size / block_count, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Block& block = blocks[i % block_count];
        const int64_t unit = i / block_count;
        T* const target = packed + unit * unit_size + block.start * panels.width;
        pack_unit(g, phase, kernels, panels, weight, first + unit, block, target);
        if (look && !kernels.all_finite(target, block.terms() * panels.width)) finite = false;
      }
    });
    if (terms)
      multiply_by_terms(g, phase, kernels, from, bias, to, packed, scratch, first, last, threads);
    else
      multiply_by_pointers(g, phase, kernels, from, bias, to, packed, scratch, first, last, threads,
                           skip_zeros || (look && finite));
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
