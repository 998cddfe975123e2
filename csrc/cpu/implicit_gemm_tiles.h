// By pointers: tiles of any result pixels, with a pointer for each pixel and tap. The other way is
// implicit_gemm_rectangles.h.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/implicit_gemm_pixels.h"

namespace myconv::cpu::implicit_gemm {

inline constexpr int64_t kPointerBytes = 64 << 10;  // pointers to what tiles read at a time
inline constexpr int64_t kMostTilesAtOnce = 16;     // by pointers

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

// By pointers, any shape: part `part` of the tiles of a phase, units [unit0, unit1), whose panels begin at `packed`.
template <typename T>
void multiply_by_pointers(const Gather& g, const GatherPhase& phase, const Kernels<T>& kernels, const Panels& panels,
                          const Operands<T>& o, const Word<T>* packed, int64_t part, int64_t parts, int64_t unit0,
                          int64_t unit1, bool skip_zeros) {
  using W = Word<T>;
  const int64_t channels = ceil_div(g.from_per_group, kernels.pair), taps = phase.taps(), depth = taps * channels;
  const bool in_place = reads_in_place(kernels, g.from_per_group);
  const Blocks blocks = reduction_blocks(channels, taps, /*taps_inside=*/false);
  const auto block_count = static_cast<int64_t>(blocks.size());
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
  TileWords<T> words(kernels, g.from_per_group, std::min(depth, kSumLength));
  // What tile `tile` reads first, up to a line: tiles along lines read what lies between that and the next one's.
  const auto first_line = [&](int64_t tile) {
    const Pixel at = cut.first(tile);
    const GatherAxis& h = phase.axis[1];
    const int64_t line = std::clamp<int64_t>(at.h * h.from_step, 0, h.from_extent - 1);
    return as_words(o.from + at.n * g.from_stride.batch + line * g.from_stride.axis[1]);
  };
  const bool ahead = in_place && g.groups > 1 && unit1 - unit0 == g.groups * panels.count && cut.along == Tiles::kAll &&
                     phase.axis[0].from_extent == 1;
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
        const T* const* const pixel = sources.data() + slot * taps + first_tap * rows;
        int64_t offset;
        const W* const* const read = words.prepare(pixel, tap_count * rows, group * g.from_per_group, block, offset);
        GemmTile<T> t = pointer_tile(g, panels, o, block, depth, unit,
                                     packed + (unit - unit0) * depth * panels.width + block.start * panels.width, c,
                                     sums.data() + slot * panels.width);
        t.taps = tap_count, t.a = read, t.a_offset = offset;
        t.b_offsets = skip_zeros ? b_offsets.data() : nullptr;
        t.next = next < next_end ? next : nullptr;
        kernels.gemm[rows - 1](t);
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

}  // namespace myconv::cpu::implicit_gemm
