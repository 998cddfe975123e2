// Winograd convolution, forward and backward_input; float32 and 16-bit types. Results are computed in tiles, with fewer
// products of pixels and weights than there are pairs of a result and a tap:
//
//     Y = A^T [ sum over channels of (G g G^T) * (B^T d B) ] A
//
//     U[position][channel][k]  = G g G^T      weights: once a call
//     V[position][tile][channel] = B^T d B    tiles of the input
//     M[position] = V[position] x U[position]  a matrix product for each position: rows are tiles, columns k
//     Y[tile] = A^T M[.][tile] A + bias
//
// Kernels, and products for each result (winograd.inc has the transforms; an axis with one tap is not transformed):
//
//     3x3          tiles of 4x4 2.25 of 9, 2x2 4 of 9            1x3, 3x1   tiles of 4: 1.5 of 3
//     3x3 stride 2 tiles of 4x4 5.1 of 9, 2x2 6.25 of 9          1x5, 5x1   tiles of 4: 2 of 5
//       adjoint    tiles of 8x8 1.3 of 2.25, 4x4 1.6 of 2.25     1x7, 7x1   tiles of 2: 4 of 7
//     5x5          tiles of 2x2 9 of 25
//
// With a dilation the results of a tile, like the pixels it reads, lie that far apart. Of a third axis every tap is a
// block of channels of its own.
//
// NHWC reads pixels where they lie, through a pointer each (a row of zeros in the padding). NCHW transposes the lines of
// a few tiles at a time, on the way in and on the way out. backward_input is the same with the taps reversed (gather.h).
//
// Groups with few channels are taken together, so that they fill vectors (Together): each multiplies its own lanes.
//
// Threads: where U is small, they split groups and tiles, each with all of a group's U; else they split the columns,
// each with U of its own and, where tiles are few, V of all tiles: to compute it is no slower than to fetch it from
// another thread, and nobody waits. Sums: blocks of kBlock channels, each from a fresh accumulator, added in order.
// A tile with a result that is not finite is computed again without transforms, in which an infinity would spread.
// 16-bit types are float32 from the transforms of what is read to those of what is written, and rounded there.
// Declines: other kernels, strides and types. Yields where direct computation or the other tile size takes less time.
#include <cmath>
#include <limits>

#include "cpu/algorithms.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/winograd_tiles.h"

namespace myconv::cpu {
namespace {

constexpr int64_t kBlock = 128;               // channels of one sum: errors of the transforms add up
constexpr int64_t kSmallWeights = 1 << 20;    // bytes of U up to which threads split tiles
constexpr int64_t kLargeWeights = 8 << 20;    // and from which on columns; between, whichever is more
constexpr int64_t kFewTiles = 4;              // of a thread, which leave its multiply-adds waiting for each other
constexpr int64_t kTilesInL2 = 400 << 10;     // bytes of V and M of one thread
constexpr int64_t kFewTilesInL2 = 160 << 10;  // where U is small
constexpr int64_t kInputBytes = 12 << 20;     // bytes of V of all threads
constexpr int64_t kOwnInput = 3 << 20;        // of V of all tiles, up to which each thread has one of its own
constexpr int64_t kAllWeights = 32 << 20;     // and bytes of U, or of V, that all threads have of their own
constexpr int64_t kColumnsPerThread = 16;     // from which on all tiles' transforms are little beside the products
constexpr double kTransforms = 32;            // terms that those of a tile of V and one of M take as long as
constexpr int64_t kFewChannels = 16;          // whose transforms are not shared by enough products
constexpr int64_t kFewTerms = 8;              // the same of groups that share vectors
constexpr int64_t kFewInAndOut = 40;          // NHWC: in and out channels; what a tile takes besides is most
constexpr int64_t kFewResults = 5;            // NHWC
constexpr int64_t kMostTiles = 64;            // of a block
constexpr int64_t kMostTaps = 25;             // of a kernel
constexpr int64_t kMostResults = 64;          // of a tile
constexpr int64_t kMostFrames = 64;           // taps of the third axis
constexpr int64_t kNoResult = std::numeric_limits<int64_t>::min();
constexpr int64_t kWeightChannels = 64;  // whose taps are packed at a time

// What is computed. Frames are the results' positions on the third axis: each is an image of its own.
struct Problem {
  Gather gather;
  const GatherPhase& phase;  // of a stride, the first one: the third axis is the same in all
  const WinogradKernels<float>& transforms;
  TileAxis h, w;
  Together together;
  int64_t depth;           // of what is read: taps of the third axis times channels
  int64_t terms;           // of a sum: of one group
  int64_t tiles_of_image;  // or frame
  int64_t tiles;

  Problem(const ConvShape& s, Direction direction, const WinogradKernels<float>& t, const Together& groups_together,
          int64_t groups)
      : gather(make_gather(s, direction)),
        phase(gather.phases[0]),
        transforms(t),
        h(tiles_of(s, phase, t, 1)),
        w(tiles_of(s, phase, t, 2)),
        together(groups_together),
        depth(phase.axis[0].taps() * gather.from_per_group * together.groups),
        terms(depth / together.groups),
        tiles_of_image(h.tiles() * w.tiles()),
        tiles(gather.batch * frames() * tiles_of_image) {
    gather.groups = groups / together.groups;
    gather.from_per_group *= together.groups, gather.to_per_group *= together.groups;
  }
  Problem(const Problem&) = delete;
  Problem& operator=(const Problem&) = delete;
  int64_t frames() const { return phase.axis[0].count; }

 private:
  static TileAxis tiles_of(const ConvShape& s, const GatherPhase& phase, const WinogradKernels<float>& t, int d) {
    return t.result_stride == 2 ? TileAxis::of_stride(s, d, t.out[d - 1], t.in[d - 1])
                                : TileAxis(phase.axis[d], t.out[d - 1], t.in[d - 1], /*in_order=*/d == 2);
  }
};

// Sizes, in elements.
struct Plan {
  int64_t width, panels;
  bool split_columns, own_input;
  int64_t block, chunk;  // tiles that M is of, and V is of
  int64_t u_channels;    // of the depth that a U is of: few tiles do not wait for all of it
  int64_t u, v, m, strip, result_strip, taps;
  int64_t shared, of_thread;

  Plan(const Problem& p, bool channels_last, const Kernels<float>& kernels, int threads) {
    const int64_t lanes = kernels.lanes, vectors = kernels.vectors;
    const int64_t from = p.gather.from_per_group, depth = p.depth, to = p.gather.to_per_group;
    const int64_t positions = p.transforms.positions, bytes = positions * sizeof(float);
    // Threads repeat the transforms of what they do not split.
    const int64_t all_u = bytes * p.terms * round_up(to, lanes);
    const bool waits = p.tiles < kFewTiles * threads && to >= threads * lanes && p.gather.groups % threads != 0;
    split_columns = p.together.groups == 1 && (all_u > std::min(kLargeWeights, kAllWeights / threads) ||
                                               (all_u > kSmallWeights && 2 * p.tiles < to) || waits);
    const Panels widest(to, lanes, vectors);
    width = widest.width;
    if (split_columns) {
      int64_t best = -1;
      for (int64_t n = vectors; n > vectors / 2; --n) {
        const int64_t most = ceil_div(ceil_div(to, n * lanes), threads) * n;  // vectors of one thread
        if (best < 0 || most < best) best = most, width = n * lanes;
      }
    }
    if (p.together.groups > 1) width = round_up(to, lanes);
    panels = ceil_div(to, width);
    // Columns of large weights are read again for each block: better that M does not fit.
    block = split_columns
                ? kMostTiles
                : std::clamp<int64_t>((p.together.groups > 1 ? kFewTilesInL2 : kTilesInL2) / (bytes * (depth + width)),
                                      8, kMostTiles);
    block = std::min(block, split_columns || p.gather.groups >= threads ? p.tiles : ceil_div(p.tiles, threads));
    own_input = !split_columns || (threads * kColumnsPerThread <= to && bytes * depth * p.tiles <= kOwnInput &&
                                   threads * kOwnInput <= kAllWeights);
    // All of a panel's U, or where that is much for all threads, a block of channels at a time and as few tiles.
    const bool whole_u = threads * bytes * depth * width <= kAllWeights;
    chunk = block;
    if (split_columns && whole_u)
      chunk = std::clamp<int64_t>(kInputBytes / (own_input ? threads : 1) / (bytes * depth), block, p.tiles);
    u_channels = split_columns && chunk <= block ? std::min(p.terms, kBlock) : p.terms;
    u = positions * position_step(u_channels * width) * (split_columns ? 1 : panels);
    v = positions * position_step(chunk * depth), m = positions * position_step(block * width);
    strip = result_strip = 0;
    if (!channels_last) {
      strip = TileReader<float>::strip_size(p.h, p.w, block, from);
      result_strip = TileReader<float>::strip_size(p.h.of_results(), p.w.of_results(), block, width);
    }
    taps = kWeightChannels * p.transforms.taps[0] * p.transforms.taps[1] * width;
    // Besides: a row of zeros to read from (shared) and one to write to.
    shared = from + (own_input ? 0 : v);
    of_thread = round_up(u + (own_input ? v : 0) + m + strip + result_strip + taps + width, 16);
  }
};

template <typename T>
class Winograd {
 public:
  Winograd(const Problem& problem, const Plan& plan, bool channels_last, const T* from, const T* weight, const T* bias,
           T* to, float* workspace, int threads)
      : p_(problem),
        g_(problem.gather),
        t_(problem.transforms),
        plan_(plan),
        kernels_(microkernels().f32),
        stored_(kernels_of<T>(microkernels())),
        variant_(static_cast<int>(&t_ - kernels_.winograd)),
        channels_last_(channels_last),
        lanes_(p_.together, g_.from_per_group / p_.together.groups, g_.to_per_group / p_.together.groups),
        from_(from),
        weight_(weight),
        bias_(microkernels(), bias, g_.groups * g_.to_per_group),
        to_(to),
        zeros_(reinterpret_cast<T*>(workspace)),
        shared_(workspace + g_.from_per_group),
        scratch_(workspace + plan_.shared),
        threads_(threads) {
    std::fill_n(zeros_, g_.from_per_group, T{});
    const int64_t pixel = channels_last_ ? g_.to_stride.axis[2] : plan_.width;
    for (const int64_t first : p_.w.first)
      for (int64_t j = 0; j < p_.w.out; ++j) {
        const int64_t at = p_.w.result(first, j);
        columns_.push_back(channels_last_ && !p_.w.is_result(at) ? kNoResult : at * pixel);
      }
  }

  void run() const {
    if (!plan_.split_columns) return split_tiles();
    for (int64_t group = 0; group < g_.groups; ++group) split_columns(group);
  }

 private:
  struct Scratch {
    float *u, *v, *m, *strip, *result_strip, *taps, *trash;
  };
  Scratch scratch() const {
    Scratch s;
    s.u = scratch_ + at::get_thread_num() * plan_.of_thread;
    s.v = plan_.own_input ? s.u + plan_.u : shared_;
    s.m = s.u + plan_.u + (plan_.own_input ? plan_.v : 0);
    s.strip = s.m + plan_.m;
    s.result_strip = s.strip + plan_.strip;
    s.taps = s.result_strip + plan_.result_strip;
    s.trash = s.taps + plan_.taps;
    return s;
  }
  int64_t panel_columns(int64_t panel) const { return std::min(plan_.width, g_.to_per_group - panel * plan_.width); }

  void split_tiles() const {
    const int64_t u_of_panel = plan_.u / plan_.panels;
    int64_t blocks = ceil_div(p_.tiles, plan_.block);
    if (g_.groups < threads_) blocks = std::min(p_.tiles, round_up(blocks, threads_));
    parallel_tasks(g_.groups * blocks, macs() / blocks, [&](int64_t begin, int64_t end) {
      const Scratch s = scratch();
      int64_t prepared = -1;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t group = i / blocks, block = i % blocks;
        const int64_t first = p_.tiles * block / blocks, last = p_.tiles * (block + 1) / blocks;
        transform_input(group, first, last, s, s.v, last - first);
        for (int64_t panel = 0; panel < plan_.panels; ++panel) {
          float* const u = s.u + panel * u_of_panel;
          if (group != prepared) transform_weights(group, panel, 0, p_.terms, s.taps, u);
          if (p_.together.groups > 1)
            multiply_groups(u, s.v, last - first, s.m);
          else
            multiply(panel, 0, p_.terms, u, s.v, last - first, last - first, s.m);
          transform_output(group, panel, first, last, s);
        }
        prepared = group;
      }
    });
  }

  void split_columns(int64_t group) const {
    const int64_t depth = p_.depth;
    for (int64_t first = 0; first < p_.tiles; first += plan_.chunk) {
      const int64_t count = std::min(plan_.chunk, p_.tiles - first);
      const auto transform_pieces = [&](int64_t pieces, int64_t begin, int64_t end, const Scratch& s) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t tile = count * i / pieces;
          transform_input(group, first + tile, first + count * (i + 1) / pieces, s, s.v + tile * depth, count);
        }
      };
      const int64_t pieces = std::min(count, round_up(ceil_div(count, plan_.block), threads_));
      if (!plan_.own_input)
        parallel_tasks(pieces, 16.0 * t_.positions * count * depth / pieces,
                       [&](int64_t begin, int64_t end) { transform_pieces(pieces, begin, end, scratch()); });
      parallel_tasks(plan_.panels, macs() / plan_.panels, [&](int64_t begin, int64_t end) {
        const Scratch s = scratch();
        if (plan_.own_input) transform_pieces(pieces, 0, pieces, s);
        const int64_t blocks = ceil_div(count, plan_.block);
        for (int64_t panel = begin; panel < end; ++panel)
          for (int64_t d0 = 0; d0 < depth; d0 += plan_.u_channels) {
            const int64_t d1 = std::min(depth, d0 + plan_.u_channels);
            transform_weights(group, panel, d0, d1, s.taps, s.u);
            for (int64_t i = 0; i < blocks; ++i) {
              const int64_t tile = count * i / blocks, end_tile = count * (i + 1) / blocks;
              multiply(panel, d0, d1, s.u, s.v + tile * depth, end_tile - tile, count, s.m);
              if (d1 == depth) transform_output(group, panel, first + tile, first + end_tile, s);
            }
          }
      });
    }
  }

  // Of one group, and where a sum has few terms, what its transforms take.
  double macs() const {
    const double terms = p_.terms + (p_.together.groups > 1 ? kTransforms : 0);
    return static_cast<double>(t_.positions) * p_.tiles * terms * g_.to_per_group;
  }

  // u[position][d - d0][column] for [d0, d1) of the terms, and one panel.
  void transform_weights(int64_t group, int64_t panel, int64_t d0, int64_t d1, float* packed, float* u) const {
    const int64_t width = plan_.width, from = g_.from_per_group / p_.together.groups;
    const int64_t columns = panel_columns(panel) / p_.together.groups;
    const T* const weight =
        weight_ + group * p_.together.groups * g_.weight_group_stride + panel * width * g_.weight_to_stride;
    const int64_t kernel_w = t_.taps[1], taps = t_.taps[0] * kernel_w;
    int64_t offsets[kMostTaps], *offset = offsets;
    for (const int64_t h : p_.h.tap)
      for (const int64_t w : p_.w.tap) *offset++ = (h * kernel_w + w) * width;
    for (int64_t d = d0; d < d1;) {
      const int64_t tap = d / from, c = d % from, channels = std::min({kWeightChannels, from - c, d1 - d});
      const T* const of_tap = weight + p_.phase.axis[0].tap[tap] * g_.weight_axis_stride[0] + c * g_.weight_from_stride;
      if (p_.together.groups * columns < width) std::fill_n(packed, channels * taps * width, 0.0f);
      for (int64_t i = 0; i < p_.together.groups; ++i)
        pack_taps(of_tap + i * g_.weight_group_stride, channels, columns, packed + i * columns);
      for (int64_t i = 0; i < channels; ++i)
        t_.weight(packed + i * taps * width, offsets, width / kernels_.lanes, u + (d - d0 + i) * width,
                  position_step(plan_.u_channels * width));
      d += channels;
    }
  }

  // packed[channel][tap][column]
  void pack_taps(const T* weight, int64_t channels, int64_t columns, float* packed) const {
    const int64_t width = plan_.width, taps_w = t_.taps[1], taps = t_.taps[0] * taps_w;
    const int64_t to_stride = g_.weight_to_stride, from_stride = g_.weight_from_stride;
    const int64_t h_stride = g_.weight_axis_stride[1], w_stride = g_.weight_axis_stride[2];
    const bool run = (taps_w == 1 || w_stride == 1) && (t_.taps[0] == 1 || h_stride == taps_w);
    if (run && from_stride == taps)
      return stored_.transpose(weight, to_stride, columns, channels * taps, packed, width);
    if (run && from_stride != 1) {
      for (int64_t c = 0; c < channels; ++c)
        stored_.transpose(weight + c * from_stride, to_stride, columns, taps, packed + c * taps * width, width);
      return;
    }
    for (int64_t t = 0; t < taps; ++t)
      pack_matrix(stored_, weight + t / taps_w * h_stride + t % taps_w * w_stride, from_stride, to_stride, channels,
                  columns, packed + t * width, taps * width);
  }

  // v[position][tile - first][depth]
  void transform_input(int64_t group, int64_t first, int64_t last, const Scratch& s, float* v, int64_t v_tiles) const {
    const int64_t from = g_.from_per_group, depth = p_.depth, v_step = position_step(v_tiles * depth);
    const GatherAxis& third = p_.phase.axis[0];
    const TileReader<T> reader{p_.h,
                               p_.w,
                               stored_.winograd[variant_].input,
                               t_.input,
                               stored_,
                               channels_last_,
                               g_.from_stride.axis,
                               g_.from_stride.channel,
                               zeros_};
    each_rectangle(p_.h, p_.w, p_.frames(), first, last, [&](const TileRectangle& r, int64_t before) {
      for (int64_t tap = 0; tap < third.taps(); ++tap) {
        const int64_t frame = third.source(r.frame, tap);
        if (frame < 0) {
          for (int64_t position = 0; position < t_.positions; ++position)
            for (int64_t tile = 0; tile < r.count(); ++tile)
              std::fill_n(v + position * v_step + (before + tile) * depth + tap * from, from, 0.0f);
          continue;
        }
        const T* const image = from_ + r.image * g_.from_stride.batch + frame * g_.from_stride.axis[0] +
                               group * from * g_.from_stride.channel;
        reader.read(r, image, from, s.strip, {v + before * depth + tap * from, from, 0, v_step, depth});
      }
    });
  }

  // m[position][tile][column] += sum over [d0, d1) of v[position][tile][d] * u[position][d - d0][column]; from 0 on, m
  // is overwritten.
  void multiply(int64_t panel, int64_t d0, int64_t d1, const float* u, const float* v, int64_t tiles, int64_t v_tiles,
                float* m) const {
    const int64_t depth = p_.depth, width = plan_.width, row_tiles = ceil_div(tiles, kernels_.rows);
    const float* a[kMaxRows];
    float* c[kMaxRows];
    for (int64_t position = 0; position < t_.positions; ++position)
      for (int64_t d = d0; d < d1; d += kBlock)
        for (int64_t i = 0; i < row_tiles; ++i) {
          const int64_t row = tiles * i / row_tiles, rows = tiles * (i + 1) / row_tiles - row;
          for (int64_t r = 0; r < rows; ++r) {
            a[r] = v + position * position_step(v_tiles * depth) + (row + r) * depth + d;
            c[r] = m + position * position_step(tiles * width) + (row + r) * width;
          }
          kernels_.gemm[rows - 1]({.taps = 1,
                                   .depth = std::min(kBlock, d1 - d),
                                   .a = a,
                                   .a_offset = 0,
                                   .a_step = 1,
                                   .b = u + position * position_step(plan_.u_channels * width) + (d - d0) * width,
                                   .b_offsets = nullptr,
                                   .ldb = width,
                                   .c = c,
                                   .cols = panel_columns(panel),
                                   .row_bias = nullptr,
                                   .column_bias = nullptr,
                                   .accumulate = d > 0});
        }
  }

  // The same of groups that share vectors, all terms of it.
  void multiply_groups(const float* u, const float* v, int64_t tiles, float* m) const {
    const Together& together = p_.together;
    const int64_t depth = p_.depth, width = plan_.width, taps = p_.phase.axis[0].taps();
    for (int64_t position = 0; position < t_.positions; ++position)
      kernels_.groups_product({.taps = taps,
                               .depth = p_.terms / taps,
                               .vectors = together.vectors,
                               .lane = lanes_.lane,
                               .a = v + position * position_step(tiles * depth),
                               .a_row = depth,
                               .a_tap = g_.from_per_group,
                               .a_vector = g_.from_per_group / together.vectors,
                               .rows = tiles,
                               .b = u + position * position_step(plan_.u_channels * width),
                               .ldb = width,
                               .c = m + position * position_step(tiles * width),
                               .c_row = width});
  }

  void transform_output(int64_t group, int64_t panel, int64_t first, int64_t last, const Scratch& s) const {
    const TileAxis &h = p_.h, &w = p_.w;
    const int64_t width = plan_.width, k = group * g_.to_per_group + panel * width;
    const ActivationStrides& to_stride = g_.to_stride;
    each_rectangle(p_.h, p_.w, p_.frames(), first, last, [&](const TileRectangle& r, int64_t before) {
      T* const image = to_ + r.image * to_stride.batch + r.frame * to_stride.axis[0] + k * to_stride.channel;
      const int64_t pitch = strip_pixels(r) * width;
      const float* m = s.m + before * width;
      for (int64_t th = r.h0; th < r.h1; ++th) {
        T* lines[kMostResults];  // nullptr where there is no such result
        float* strip_lines[kMostResults];
        for (int64_t i = 0; i < h.out; ++i) {
          const int64_t at = h.result(h.first[th], i);
          lines[i] = h.is_result(at) ? image + at * to_stride.axis[1] : nullptr;
          strip_lines[i] = s.result_strip + ((th - r.h0) * h.out + i) * pitch - w.first[r.w0] * width;
        }
        for (int64_t tw = r.w0; tw < r.w1; ++tw, m += width) {
          const Tile tile{group, panel, r.image, r.frame, h.first[th], w.first[tw]};
          const int64_t m_step = position_step((last - first) * width);
          if (channels_last_)
            finish_tile(stored_, tile, m, m_step, lines, &columns_[tw * w.out], reinterpret_cast<T*>(s.trash));
          else
            finish_tile(kernels_, tile, m, m_step, strip_lines, &columns_[tw * w.out], s.trash);
        }
      }
      if (!channels_last_) empty_strip(r, s.result_strip, panel_columns(panel), image);
    });
  }

  // Results of a panel: where they lie, and the first of them along each axis.
  struct Tile {
    int64_t group, panel, image, frame, h, w;
  };

  // Result (i, j) goes to lines[i] + columns[j], as it is stored, or float32 in a strip.
  template <typename P>
  void finish_tile(const Kernels<P>& kernels, const Tile& tile, const float* m, int64_t m_step, P* const* lines,
                   const int64_t* columns, P* trash) const {
    P* pixels[kMostResults];
    for (int64_t i = 0; i < p_.h.out; ++i)
      for (int64_t j = 0; j < p_.w.out; ++j)
        pixels[i * p_.w.out + j] = lines[i] != nullptr && columns[j] != kNoResult ? lines[i] + columns[j] : trash;
    const float* const bias =
        bias_.get() ? bias_.get() + tile.group * g_.to_per_group + tile.panel * plan_.width : nullptr;
    if (!kernels.winograd[variant_].output(m, m_step, panel_columns(tile.panel), bias, pixels))
      compute_directly(kernels, tile, pixels);
  }

  // Pixels of a line of the strip of results.
  int64_t strip_pixels(const TileRectangle& r) const {
    return p_.w.result(p_.w.first[r.w1 - 1], p_.w.out - 1) + 1 - p_.w.first[r.w0];
  }

  // Results go from the strip to their planes in runs: with a dilation other tiles may own those in between.
  void empty_strip(const TileRectangle& r, const float* strip, int64_t columns, T* planes) const {
    const TileAxis &h = p_.h, &w = p_.w;
    const int64_t low = w.first[r.w0], pixels = strip_pixels(r), end = std::min(pixels, w.count - low);
    c10::SmallVector<bool, 256> own(pixels, w.dilation == 1);
    if (w.dilation > 1)
      for (int64_t tile = r.w0; tile < r.w1; ++tile)
        for (int64_t j = 0; j < w.out; ++j) own[w.result(w.first[tile], j) - low] = true;
    for (int64_t tile = r.h0; tile < r.h1; ++tile)
      for (int64_t i = 0; i < h.out; ++i, strip += pixels * plan_.width) {
        const int64_t line = h.result(h.first[tile], i);
        if (!h.is_result(line)) continue;
        for (int64_t at = std::max<int64_t>(0, -low), next; at < end; at = next) {
          for (next = at + 1; next < end && own[next] == own[at];) ++next;
          if (own[at])
            stored_.store_transposed(strip + at * plan_.width, plan_.width, next - at, columns,
                                     planes + line * g_.to_stride.axis[1] + low + at, g_.to_stride.channel);
        }
      }
  }

  // The results of a tile from their definition.
  template <typename P>
  void compute_directly(const Kernels<P>& kernels, const Tile& tile, P* const* pixels) const {
    const TileAxis &h = p_.h, &w = p_.w;
    const int64_t from = g_.from_per_group / p_.together.groups, to_of_group = g_.to_per_group / p_.together.groups;
    const T* const x =
        from_ + tile.image * g_.from_stride.batch + tile.group * g_.from_per_group * g_.from_stride.channel;
    const auto value = [&](const T& stored) {
      float single;
      stored_.copy_rows(&stored, 0, 1, 1, &single, 0);
      return static_cast<double>(single);
    };
    for (int64_t i = 0; i < h.out; ++i)
      for (int64_t j = 0; j < w.out; ++j) {
        const int64_t out_h = h.result(tile.h, i), out_w = w.result(tile.w, j);
        if (!h.is_result(out_h) || !w.is_result(out_w)) continue;
        const GatherPhase& phase = phase_of(out_h, out_w);
        const GatherAxis* const a = phase.axis;
        for (int64_t k = 0; k < panel_columns(tile.panel); ++k) {
          const int64_t to = tile.panel * plan_.width + k, group = to / to_of_group, first = group * from;
          const T* const g = weight_ + (tile.group * p_.together.groups + group) * g_.weight_group_stride +
                             to % to_of_group * g_.weight_to_stride;
          double sum = 0;
          for (int64_t t = 0; t < phase.taps(); ++t) {
            const int64_t td = t / (a[1].taps() * a[2].taps()), th = t / a[2].taps() % a[1].taps(),
                          tw = t % a[2].taps();
            const int64_t at_d = a[0].source(tile.frame, td), at_h = a[1].source(out_h / a[1].to_step, th),
                          at_w = a[2].source(out_w / a[2].to_step, tw);
            const bool zero = at_d < 0 || at_h < 0 || at_w < 0;
            const T* const tap = g + g_.weight_tap_offset(phase, t);
            const T* const pixel =
                x + at_d * g_.from_stride.axis[0] + at_h * g_.from_stride.axis[1] + at_w * g_.from_stride.axis[2];
            for (int64_t c = 0; c < from; ++c)
              sum += (zero ? 0 : value(pixel[(first + c) * g_.from_stride.channel])) *
                     value(tap[c * g_.weight_from_stride]);
          }
          if (bias_.get()) sum += bias_.get()[tile.group * g_.to_per_group + to];
          const float single = static_cast<float>(sum);
          kernels.store_rows(&single, 0, 1, 1, pixels[i * w.out + j] + k, 0);
        }
      }
  }

  const GatherPhase& phase_of(int64_t h, int64_t w) const {
    const GatherAxis* const a = p_.phase.axis;
    const int64_t phases_w = std::min(a[2].to_step, g_.to_extent[2]);
    return g_.phases[h % a[1].to_step * phases_w + w % a[2].to_step];
  }

  const Problem& p_;
  const Gather& g_;
  const WinogradKernels<float>& t_;
  const Plan& plan_;
  const Kernels<float>& kernels_;  // of everything between the transforms
  const Kernels<T>& stored_;
  const int variant_;  // of the transforms
  const bool channels_last_;
  const GroupLanes lanes_;
  c10::SmallVector<int64_t, 64> columns_;  // [tile][result of it] along a line: offsets, or kNoResult
  const T* const from_;
  const T* const weight_;
  const Bias<T> bias_;
  T* const to_;
  T* const zeros_;
  float* const shared_;
  float* const scratch_;
  const int threads_;
};

const WinogradKernels<float>* transforms(const ConvShape& s, Direction direction, bool small) {
  return find_transforms(microkernels().f32, s, direction, small);
}

const char* decline(const ConvShape& shape, Direction direction, bool small) {
  const ConvShape s = lines_as_frames(shape, direction);
  if (!is_floating_point(s.dtype) || s.dtype == Dtype::kFloat64) return "only float32 and 16-bit types";
  if (s.in_per_group == 0 || s.out_per_group == 0 || s.in_pixels() == 0 || s.out_pixels() == 0)
    return "nothing to sum over";
  const WinogradKernels<float>* const t = transforms(s, direction, small);
  if (t == nullptr) return small ? "only 3x3 kernels, strides 1 and 2" : "no tiles for this kernel, stride or dilation";
  const int64_t* const extent = direction == Direction::kForward ? s.out : s.in;
  if (direction != Direction::kForward) {
    if (s.padding_mode != PaddingMode::kZeros) return "the adjoint of a padding mode";
    if (s.stride[0] > 1) return "a stride in depth";
  }
  if (s.kernel[0] > kMostFrames) return "more than 64 taps in depth";
  // Its rounding errors are those of a whole tile, whatever part of it is wanted.
  for (int d = 0; d < 2 && !small; ++d)
    if (s.kernel[d + 1] > 1 && extent[d + 1] < t->out[d] * s.dilation[d + 1]) return "results smaller than a tile";
  return nullptr;
}

// Estimates in cycles of one core, of one sample and group, with factors that lose the least time by the choice over
// layers of a hundred networks, on AVX-512 with vectors that run whole and on AVX2. A register tile of 8 rows and one
// vector takes 4 cycles a step or 8 (multiply_cycles), and as long as 5 steps besides.
double product_cycles(double rows, double depth, double columns) {
  return rows / 8 * columns * multiply_cycles() * (depth + 5);
}

constexpr double kVector = 16;
// A vector of a position, with its way through the caches.
constexpr double kTileRead = 8.7, kTileWritten = 5.2, kWeights = 3;
constexpr double kStridedWeights = 8;    // the same of a stride's, which are more positions than stay in L2
constexpr double kBesidePairs = 6;       // the same in NHWC where the direct way multiplies pairs, half the bytes
constexpr double kWeightsAgain = 8;      // the same, packed and transformed once more for each further chunk of tiles
constexpr double kWeightsFar = 24;       // the same of weights that fill the last cache (kAllWeights)
constexpr double kTransposed = 0.12;     // a pixel of a tile in NCHW,
constexpr double kFewTransposed = 0.36;  // of groups that share vectors
constexpr double kTogether = 1.2;        // their transforms, divided by the number of vectors
constexpr double kPieceWaits = 1.12;     // of what `direct` does in pieces, without the padding of a dilation
constexpr double kOperandWaits = 0.7;    // of a step
constexpr double kPhases = 5000;         // more parallel regions and smaller pieces than the direct way has

Together together_of(const ConvShape& s, Direction direction) {
  const int64_t from = direction == Direction::kForward ? s.in_per_group : s.out_per_group;
  const int64_t to = s.in_per_group + s.out_per_group - from;
  return s.kernel[0] * from <= kBlock ? Together(s.groups, from, to) : Together();
}

// Values of a word that the direct way multiplies.
int64_t pair_of(const ConvShape& s) { return s.dtype == Dtype::kBFloat16 ? dense_kernels<bfloat16>().pair : 1; }

double winograd_cycles(const ConvShape& s, Direction direction, const WinogradKernels<float>& t) {
  const bool forward = direction == Direction::kForward;
  const int64_t* const extent = forward ? s.out : s.in;
  const double from = forward ? s.in_per_group : s.out_per_group, to = forward ? s.out_per_group : s.in_per_group;
  const auto tiles_of = [&](int d) {
    const int64_t dilation = s.kernel[d] > 1 ? std::min(s.dilation[d], extent[d]) : 1;
    const int64_t before = t.result_stride == 2 && s.pad[d] % 2 == 0;  // a tile begins before the first result
    const int64_t longer = extent[d] % dilation, length = extent[d] / dilation + before, out = t.out[d - 1];
    return static_cast<double>(longer * ceil_div(length + 1, out) + (dilation - longer) * ceil_div(length, out));
  };
  const double tiles = static_cast<double>(extent[0]) * tiles_of(1) * tiles_of(2), taps_d = s.kernel[0];
  const auto [groups, vectors] = together_of(s, direction);
  const bool together = groups > 1;
  const double positions = t.positions, columns = together ? to / kVector : std::ceil(to / kVector);
  const double rows = together ? from / kVector : std::ceil(from / kVector);
  // NCHW transposes what a tile reads and writes.
  double out = 1, read = 1;
  for (int d = 0; d < 2; ++d) out *= t.out[d], read *= s.kernel[d + 1] > 1 ? t.out[d] / t.result_stride * t.stride : 1;
  const double transposed = together ? kFewTransposed : kTransposed;
  const double moved = s.channels_last() ? 0 : transposed * kVector * (1.5 * taps_d * read + out);
  const double bytes_of_v = positions * from * taps_d * sizeof(float), all_u = bytes_of_v * to;
  const double chunk = std::max<double>(kMostTiles, kInputBytes / 2 / bytes_of_v);
  const double again = all_u > kLargeWeights && !together ? std::max(0.0, tiles / chunk - 1) : 0;
  const double once_more = all_u > kAllWeights ? kWeightsFar : kWeightsAgain;
  const double weights = t.stride * t.result_stride > 1        ? kStridedWeights
                         : s.channels_last() && pair_of(s) > 1 ? kBesidePairs
                                                               : kWeights;
  double transforms = positions * (tiles * (kTileRead * rows * taps_d + kTileWritten * columns) +
                                   (weights + once_more * again) * from * taps_d * columns);
  // Tiles of several groups that share vectors are few enough to stay in the first cache.
  if (together && t.stride * t.result_stride == 1) transforms *= kTogether / static_cast<double>(vectors);
  const double computed = static_cast<double>(ceil_div(s.groups, groups) * groups) / static_cast<double>(s.groups);
  return computed *
             ((1 + kOperandWaits / multiply_cycles()) * product_cycles(tiles, from * taps_d, columns) * positions +
              transforms + moved * tiles * std::max(rows, columns)) +
         kPhases / static_cast<double>(s.groups);
}

double direct_cycles(const ConvShape& s, Direction direction) {
  const bool forward = direction == Direction::kForward;
  const double from = forward ? s.in_per_group : s.out_per_group, to = forward ? s.out_per_group : s.in_per_group;
  const double words = std::ceil(from / static_cast<double>(pair_of(s)));
  // backward_input has a product for each phase of the stride, with its share of the taps.
  const double phases = forward ? 1 : static_cast<double>(s.stride[1] * s.stride[2]);
  const auto pixels = static_cast<double>(forward ? s.out_pixels() : s.in_pixels()) / phases;
  // What the direct way leaves out of the padding: in NHWC, by rectangles, all of it.
  const double inside = s.channels_last() || works_on_padding(s) ? tiles_inside(s) : 1;
  const double depth = static_cast<double>(s.taps()) * words / phases;
  const char* const by_strips = forward ? direct_forward_decline(s) : direct_backward_input_decline(s);
  if (s.channels_last() && by_strips != nullptr) {
    const double lanes = microkernels().half ? dense_kernels<float>(static_cast<int64_t>(to)).lanes : kVector;
    return phases * product_cycles(pixels * inside, depth, std::ceil(to / lanes) * lanes / kVector);
  }
  // NCHW, and few channels of groups: vectors of pixels, of each line or of the lines of a strip joined. A vector of the
  // strip takes 4 cycles.
  const int64_t* const extent = forward ? s.out : s.in;
  double strip = 1, line[3], count[3];  // pixels of a strip and of its result, along each axis
  for (int d = 0; d < 3; ++d) {
    const int64_t step = forward ? std::min(s.stride[d], s.kernel[d]) : 1;
    count[d] = static_cast<double>(forward ? extent[d] : ceil_div(extent[d], s.stride[d]));
    line[d] = count[d] + static_cast<double>((s.kernel[d] - 1) * s.dilation[d] / s.stride[d]);
    strip *= static_cast<double>(step) * line[d];
  }
  const double lines = count[0] * count[1], values = count[2];
  const double joined = std::ceil(((lines - 1) * line[2] + values) / kVector);
  const double vectors = std::min(joined, lines * std::ceil(values / kVector));
  const double waits = works_on_padding(s) ? kPieceWaits : 1;
  return phases * waits * product_cycles(to, depth, vectors * inside) + 4 * words * strip / kVector;
}

// With a stride there are more positions, and a thread that has some columns of all tiles waits for them.
bool is_too_large(const ConvShape& s, const WinogradKernels<float>& t) {
  const int64_t taps = s.taps() / (s.kernel[1] * s.kernel[2]), values = s.in_per_group * s.out_per_group;
  return t.stride * t.result_stride > 1 &&
         t.positions * taps * values * static_cast<int64_t>(sizeof(float)) > kLargeWeights;
}

const char* yield(const ConvShape& shape, Direction direction, bool small) {
  const ConvShape s = lines_as_frames(shape, direction);
  const int64_t from = direction == Direction::kForward ? s.in_per_group : s.out_per_group;
  const int64_t to = s.in_per_group + s.out_per_group - from;
  const bool together = together_of(s, direction).groups > 1;
  if (from < (together ? kFewTerms : kFewChannels) ||
      (s.groups == 1 && from + to < (s.channels_last() ? kFewInAndOut : 2 * kFewChannels)))
    return "few channels";
  if (s.channels_last() && s.groups == 1 && to < kFewResults)
    return "few result channels";  // they leave most lanes empty; `direct` turns them round
  const WinogradKernels<float>& t = *transforms(s, direction, small);
  if (is_too_large(s, t)) return "weights too large for all positions";
  const double cycles = winograd_cycles(s, direction, t);
  const WinogradKernels<float>* const other = transforms(s, direction, !small);
  if (decline(s, direction, !small) == nullptr && !is_too_large(s, *other) &&
      winograd_cycles(s, direction, *other) < cycles)
    return small ? "larger tiles take less" : "smaller tiles take less";
  if (direct_cycles(shape, direction) < cycles) return "the transforms cost more than they save";
  return nullptr;
}

// Each range of groups is a problem of its own; they follow each other in the same scratch.
template <typename Use>
void each_range(const ConvShape& s, Direction direction, bool small, int threads, const Use& use) {
  const Together together = together_of(s, direction);
  for (const GroupRange& range : group_ranges(s.groups, together)) {
    const Problem problem(s, direction, *transforms(s, direction, small), together, range.count);
    use(range.first, problem, Plan(problem, s.channels_last(), microkernels().f32, threads));
  }
}

int64_t workspace(const ConvShape& shape, Direction direction, bool small, int threads) {
  int64_t floats = 0;
  each_range(lines_as_frames(shape, direction), direction, small, threads,
             [&](int64_t, const Problem&, const Plan& plan) {
               floats = std::max(floats, plan.shared + threads * plan.of_thread);
             });
  return floats * static_cast<int64_t>(sizeof(float));
}

template <typename T, Direction direction, bool small>
void run_ranges(const ConvShape& s, const ConvPointers& p, float* workspace, int threads) {
  const auto* const from = static_cast<const T*>(direction == Direction::kForward ? p.input : p.grad_output);
  each_range(s, direction, small, threads, [&](int64_t group, const Problem& problem, const Plan& plan) {
    // Channels of a group, before groups were taken together.
    const Gather& g = problem.gather;
    const int64_t reads = g.from_per_group / problem.together.groups, writes = g.to_per_group / problem.together.groups;
    const auto* const bias = static_cast<const T*>(p.bias);
    Winograd<T>(problem, plan, s.channels_last(), from + group * reads * g.from_stride.channel,
                static_cast<const T*>(p.weight) + group * g.weight_group_stride, bias ? bias + group * writes : nullptr,
                static_cast<T*>(p.result) + group * writes * g.to_stride.channel, workspace, threads)
        .run();
  });
}

template <Direction direction, bool small>
void run(const ConvShape& shape, const ConvPointers& p, void* workspace, int threads) {
  const ConvShape s = lines_as_frames(shape, direction);
  auto* const scratch = static_cast<float*>(workspace);
  if (s.dtype == Dtype::kBFloat16) return run_ranges<bfloat16, direction, small>(s, p, scratch, threads);
  if (s.dtype == Dtype::kFloat16) return run_ranges<float16, direction, small>(s, p, scratch, threads);
  run_ranges<float, direction, small>(s, p, scratch, threads);
}

}  // namespace

template <Direction direction, bool small>
Algorithm winograd() {
  return {small ? "winograd_2x2" : "winograd",
          [](const ConvShape& s) { return decline(s, direction, small); },
          [](const ConvShape& s, int threads) { return workspace(s, direction, small, threads); },
          run<direction, small>,
          {"lines of the activations, into strips, tiles and weights, transformed", "tiles and weights, transformed"},
          [](const ConvShape& s) { return yield(s, direction, small); }};
}

template Algorithm winograd<Direction::kForward, false>();
template Algorithm winograd<Direction::kForward, true>();
template Algorithm winograd<Direction::kBackwardInput, false>();
template Algorithm winograd<Direction::kBackwardInput, true>();

}  // namespace myconv::cpu
