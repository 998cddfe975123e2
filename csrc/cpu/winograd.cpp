// Winograd convolution: 3x3, stride 1; forward and backward_input; float32 and 16-bit types. Each tile of m x m results,
// m = 2 or 4, is computed from its (m + 2) x (m + 2) pixels with (m + 2)^2 multiplications per pair of channels
// instead of 9 m^2:
//
//     Y = A^T [ sum over channels of (G g G^T) * (B^T d B) ] A
//
//     U[position][channel][k]  = G g G^T      weights: once a call
//     V[position][tile][channel] = B^T d B    tiles of the input
//     M[position] = V[position] x U[position]  a matrix product for each position: rows are tiles, columns k
//     Y[tile] = A^T M[.][tile] A + bias
//
// A dilation d makes d x d convolutions without one, of every d-th line and pixel; a tile belongs to one of them (NHWC).
//
// NHWC reads pixels where they lie, through a pointer each (a row of zeros in the padding). NCHW transposes the lines of
// a few tiles at a time, on the way in and on the way out. backward_input is the same with the taps reversed (gather.h).
//
// Threads: where U is small, they split tiles, each with all of U; else they split the columns, each with U of its own
// and, unless they are many, V of all tiles. What a thread needs it computes: to fetch it from another costs more. Sums: blocks of kBlock channels, each from a fresh accumulator, added in order.
// A tile with a result that is not finite is computed again without transforms, in which an infinity would spread.
// 16-bit types are float32 from the transforms of what is read to those of what is written, and rounded there.
// Declines: other kernels, strides and types, dilations in NCHW. Yields where direct computation or the other tile size
// takes less time.
#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/algorithms.h"
#include "cpu/gather.h"
#include "cpu/gemm_blocks.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace myconv::cpu {
namespace {

constexpr int64_t kBlock = 128;             // channels of one sum: errors of the transforms add up
constexpr int64_t kSmallWeights = 4 << 20;  // bytes of U up to which threads split tiles
constexpr int64_t kTilesInL2 = 400 << 10;   // bytes of V and M of one thread
constexpr int64_t kInputBytes = 12 << 20;   // bytes of V of all threads
constexpr int64_t kAllWeights = 32 << 20;   // and bytes of U, or of V, that all threads have of their own
constexpr int64_t kColumnsPerThread = 64;   // from which on all tiles' transforms are little beside the products
constexpr int64_t kFewChannels = 16;        // whose transforms are not shared by enough products
constexpr int64_t kFewGroupChannels = 64;   // the same of a group: groups take turns
constexpr int64_t kMostTiles = 64;          // of a block
constexpr int64_t kStripChannels = 64;      // NCHW: channels that are transposed at a time
constexpr int64_t kWeightChannels = 64;     // whose taps are packed at a time

// Tiles of an axis: all of the results 0, d, 2 d, .., then of 1, 1 + d, ..  with a dilation d.
int64_t tiles_of_axis(int64_t count, int64_t dilation, int64_t out) {
  const int64_t longer = count % dilation;
  return longer * ceil_div(count / dilation + 1, out) + (dilation - longer) * ceil_div(count / dilation, out);
}

// The positions that tiles read and write; -1 is a zero, or nothing.
struct Axis {
  int64_t tiles, out, inner;                // inner: positions that a tile reads
  c10::SmallVector<int64_t, 128> from, to;  // [tiles][inner], [tiles][out]
  int64_t tap[3];                           // of the weight, by position

  Axis(const GatherAxis& a, int64_t dilation, int64_t out)
      : tiles(tiles_of_axis(a.count, dilation, out)), out(out), inner(out + 2) {
    const int64_t low = std::min(a.offset[0], a.offset[2]);
    for (int64_t t = 0; t < 3; ++t) tap[(a.offset[t] - low) / dilation] = a.tap[t];
    for (int64_t residue = 0; residue < std::min(dilation, a.count); ++residue)
      for (int64_t first = residue; first < a.count; first += out * dilation) {
        for (int64_t p = 0; p < inner; ++p) {
          const int64_t at = padded_index(first + p * dilation + low, a.from_extent, a.mode);
          // The last tile may reach further than any result, and than any padding mode.
          from.push_back(at >= 0 && at < a.from_extent ? at : -1);
        }
        for (int64_t p = 0; p < out; ++p) to.push_back(first + p * dilation < a.count ? first + p * dilation : -1);
      }
  }
  int64_t source(int64_t tile, int64_t p) const { return from[tile * inner + p]; }
  int64_t target(int64_t tile, int64_t p) const { return to[tile * out + p]; }
  // Without a dilation tiles follow each other: where position p from the first tile on is read.
  int64_t line(int64_t p) const {
    const int64_t tile = std::min(p / out, tiles - 1);
    return source(tile, p - tile * out);
  }
};

// From one position to the next. A line is added: steps that are powers of two would put all positions into the same few
// sets of the cache.
constexpr int64_t step(int64_t elements) { return elements + 16; }

// Sizes, in elements.
struct Plan {
  int64_t positions, out;
  int64_t tiles_of_image, tiles;
  int64_t width, panels;
  bool split_columns, own_input;
  int64_t block, chunk;  // tiles that M is of, and V is of
  int64_t u_channels;    // that a U is of: few tiles do not wait for all of it
  int64_t u, v, m, strip, result_strip, taps;
  int64_t shared, of_thread;

  Plan(const ConvShape& s, Direction direction, const WinogradKernels<float>& w, int64_t lanes, int64_t vectors,
       int threads) {
    const bool forward = direction == Direction::kForward;
    const int64_t from = forward ? s.in_per_group : s.out_per_group, to = forward ? s.out_per_group : s.in_per_group;
    const int64_t* const extent = forward ? s.out : s.in;
    out = w.out, positions = w.tile * w.tile;
    const int64_t tiles_w = tiles_of_axis(extent[2], s.dilation[2], out);
    tiles_of_image = tiles_of_axis(extent[1], s.dilation[1], out) * tiles_w;
    tiles = s.batch * tiles_of_image;
    const int64_t bytes = positions * sizeof(float);
    split_columns = bytes * from * round_up(to, lanes) > std::min(kSmallWeights, kAllWeights / threads);
    const Panels widest(to, lanes, vectors);
    width = widest.width;
    if (split_columns) {
      int64_t best = -1;
      for (int64_t n = vectors; n > vectors / 2; --n) {
        const int64_t most = ceil_div(ceil_div(to, n * lanes), threads) * n;  // vectors of one thread
        if (best < 0 || most < best) best = most, width = n * lanes;
      }
    }
    panels = ceil_div(to, width);
    const int64_t fit = kTilesInL2 / (bytes * (split_columns ? width : from + width));
    block = std::clamp<int64_t>(fit, 8, kMostTiles);
    block = std::min(block, split_columns ? tiles : ceil_div(tiles, threads));
    own_input = !split_columns || (threads * kColumnsPerThread <= to && threads * bytes * from * block <= kAllWeights);
    // All of a panel's U, or where that is much for all threads, a block of channels at a time and as few tiles.
    const bool whole_u = threads * bytes * from * width <= kAllWeights;
    chunk = block;
    if (split_columns && whole_u)
      chunk = std::clamp<int64_t>(kInputBytes / (own_input ? threads : 1) / (bytes * from), block, tiles);
    u_channels = split_columns && chunk <= block ? std::min(from, kBlock) : from;
    u = positions * step(u_channels * width), v = positions * step(chunk * from), m = positions * step(block * width);
    strip = result_strip = 0;
    if (!s.channels_last()) {
      // Whole tile rows, or a piece of one.
      const int64_t columns = std::min(block, tiles_w),
                    rows = std::min(ceil_div(block, columns), tiles_of_image / tiles_w);
      strip = (rows * out + 2) * (columns * out + 2) * std::min(from, kStripChannels);
      result_strip = rows * out * columns * out * width;
    }
    taps = kWeightChannels * 9 * width;
    // Besides: a row of zeros to read from (shared) and one to write to.
    shared = from + (own_input ? 0 : v);
    if (!split_columns) u *= panels;
    of_thread = round_up(u + (own_input ? v : 0) + m + strip + result_strip + taps + width, 16);
  }
};

// A rectangle of tiles of one image.
struct Tiles {
  int64_t image, h0, h1, w0, w1;
  int64_t count() const { return (h1 - h0) * (w1 - w0); }
};

template <typename T>
class Winograd {
 public:
  Winograd(const ConvShape& s, Direction direction, int64_t out, const void* from, const ConvPointers& p,
           float* workspace, int threads)
      : gather_(make_gather(s, direction)),
        phase_(gather_.phases[0]),
        kernels_(microkernels().f32),
        stored_(kernels_of<T>(microkernels())),
        variant_(out == 4),
        plan_(s, direction, kernels_.winograd[variant_], kernels_.lanes, kernels_.vectors, threads),
        h_(phase_.axis[1], s.dilation[1], plan_.out),
        w_(phase_.axis[2], s.dilation[2], plan_.out),
        channels_last_(s.channels_last()),
        from_(static_cast<const T*>(from)),
        weight_(static_cast<const T*>(p.weight)),
        bias_(microkernels(), p.bias, gather_.groups * gather_.to_per_group),
        to_(static_cast<T*>(p.result)),
        zeros_(reinterpret_cast<T*>(workspace)),
        shared_(workspace + gather_.from_per_group),
        scratch_(workspace + plan_.shared),
        threads_(threads) {
    std::fill_n(zeros_, gather_.from_per_group, T{});
  }

  void run() {
    for (group_ = 0; group_ < gather_.groups; ++group_) plan_.split_columns ? split_columns() : split_tiles();
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
  int64_t panel_columns(int64_t panel) const {
    return std::min(plan_.width, gather_.to_per_group - panel * plan_.width);
  }

  void split_tiles() {
    const int64_t from = gather_.from_per_group, u_of_panel = plan_.u / plan_.panels;
    const int64_t blocks = std::min(plan_.tiles, round_up(ceil_div(plan_.tiles, plan_.block), threads_));
    parallel_tasks(blocks, macs() / blocks, [&](int64_t begin, int64_t end) {
      const Scratch s = scratch();
      for (int64_t panel = 0; panel < plan_.panels; ++panel)
        transform_weights(panel, 0, from, s.taps, s.u + panel * u_of_panel);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = plan_.tiles * i / blocks, last = plan_.tiles * (i + 1) / blocks;
        transform_input(first, last, s, s.v, last - first);
        for (int64_t panel = 0; panel < plan_.panels; ++panel) {
          multiply(panel, 0, from, s.u + panel * u_of_panel, s.v, last - first, last - first, s.m);
          transform_output(panel, first, last, s);
        }
      }
    });
  }

  void split_columns() {
    const int64_t from = gather_.from_per_group;
    for (int64_t first = 0; first < plan_.tiles; first += plan_.chunk) {
      const int64_t count = std::min(plan_.chunk, plan_.tiles - first);
      const auto transform_pieces = [&](int64_t pieces, int64_t begin, int64_t end, const Scratch& s) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t tile = count * i / pieces;
          transform_input(first + tile, first + count * (i + 1) / pieces, s, s.v + tile * from, count);
        }
      };
      const int64_t pieces = std::min(count, round_up(ceil_div(count, plan_.block), threads_));
      if (!plan_.own_input)
        parallel_tasks(pieces, 16.0 * plan_.positions * count * from / pieces,
                       [&](int64_t begin, int64_t end) { transform_pieces(pieces, begin, end, scratch()); });
      parallel_tasks(plan_.panels, macs() / plan_.panels, [&](int64_t begin, int64_t end) {
        const Scratch s = scratch();
        if (plan_.own_input) transform_pieces(pieces, 0, pieces, s);
        const int64_t blocks = ceil_div(count, plan_.block);
        for (int64_t panel = begin; panel < end; ++panel)
          for (int64_t c0 = 0; c0 < from; c0 += plan_.u_channels) {
            const int64_t c1 = std::min(from, c0 + plan_.u_channels);
            transform_weights(panel, c0, c1, s.taps, s.u);
            for (int64_t i = 0; i < blocks; ++i) {
              const int64_t tile = count * i / blocks, end_tile = count * (i + 1) / blocks;
              multiply(panel, c0, c1, s.u, s.v + tile * from, end_tile - tile, count, s.m);
              if (c1 == from) transform_output(panel, first + tile, first + end_tile, s);
            }
          }
      });
    }
  }

  double macs() const {
    return static_cast<double>(plan_.positions) * plan_.tiles * gather_.from_per_group * gather_.to_per_group;
  }

  // u[position][channel - c0][column] for channels [c0, c1) of one panel.
  void transform_weights(int64_t panel, int64_t c0, int64_t c1, float* packed, float* u) const {
    const int64_t width = plan_.width, columns = panel_columns(panel);
    const int64_t to_stride = gather_.weight_to_stride, from_stride = gather_.weight_from_stride;
    const int64_t h_stride = gather_.weight_axis_stride[1], w_stride = gather_.weight_axis_stride[2];
    const T* const weight = weight_ + group_ * gather_.weight_group_stride + panel * width * to_stride;
    int64_t offsets[9];
    for (int64_t t = 0; t < 9; ++t) offsets[t] = (h_.tap[t / 3] * 3 + w_.tap[t % 3]) * width;
    for (int64_t first = c0; first < c1; first += kWeightChannels) {
      // packed[channel][tap][column]
      const int64_t channels = std::min(kWeightChannels, c1 - first);
      const T* const source = weight + first * from_stride;
      if (columns < width) std::fill_n(packed, channels * 9 * width, 0.0f);
      if (w_stride == 1 && h_stride == 3 && from_stride == 9) {
        stored_.transpose(source, to_stride, columns, channels * 9, packed, width);
      } else if (w_stride == 1 && h_stride == 3 && to_stride == 9) {
        for (int64_t c = 0; c < channels; ++c)
          stored_.transpose(source + c * from_stride, 9, columns, 9, packed + c * 9 * width, width);
      } else {
        for (int64_t t = 0; t < 9; ++t)
          pack_matrix(stored_, source + t / 3 * h_stride + t % 3 * w_stride, from_stride, to_stride, channels, columns,
                      packed + t * width, 9 * width);
      }
      for (int64_t c = 0; c < channels; ++c)
        kernels_.winograd[variant_].weight(packed + c * 9 * width, offsets, width / kernels_.lanes,
                                           u + (first - c0 + c) * width, step(plan_.u_channels * width));
    }
  }

  // Calls f(rectangle, tiles before it) for the rectangles that tiles [first, last) are made of.
  template <typename F>
  void each_rectangle(int64_t first, int64_t last, const F& f) const {
    for (int64_t tile = first; tile < last;) {
      const int64_t image = tile / plan_.tiles_of_image, in_image = tile % plan_.tiles_of_image;
      const int64_t h = in_image / w_.tiles, w = in_image % w_.tiles, left = last - tile;
      Tiles r{image, h, h + 1, w, std::min(w_.tiles, w + left)};
      if (w == 0 && left >= w_.tiles) r.h1 = h + std::min(left / w_.tiles, h_.tiles - h);
      f(r, tile - first);
      tile += r.count();
    }
  }

  // v[position][tile - first][channel]
  void transform_input(int64_t first, int64_t last, const Scratch& s, float* v, int64_t v_tiles) const {
    const int64_t from = gather_.from_per_group, out = plan_.out;
    const T* const group = from_ + group_ * from * gather_.from_stride.channel;
    each_rectangle(first, last, [&](const Tiles& r, int64_t before) {
      const T* const image = group + r.image * gather_.from_stride.batch;
      const int64_t most = channels_last_ ? from : kStripChannels;
      for (int64_t c = 0; c < from; c += most) {
        const int64_t channels = std::min(most, from - c);
        const int64_t pitch = ((r.w1 - r.w0) * out + 2) * channels;  // of a line of the strip
        if (!channels_last_) fill_strip(r, image + c * gather_.from_stride.channel, channels, s.strip);
        float* target = v + before * from + c;
        for (int64_t h = r.h0; h < r.h1; ++h)
          for (int64_t w = r.w0; w < r.w1; ++w, target += from) {
            if (channels_last_)
              transform_tile(stored_, channels, target, step(v_tiles * from), [&](int64_t i, int64_t j) {
                const int64_t at_h = h_.source(h, i), at_w = w_.source(w, j);
                return at_h < 0 || at_w < 0
                           ? zeros_
                           : image + at_h * gather_.from_stride.axis[1] + at_w * gather_.from_stride.axis[2];
              });
            else
              transform_tile(kernels_, channels, target, step(v_tiles * from), [&](int64_t i, int64_t j) {
                return s.strip + ((h - r.h0) * out + i) * pitch + ((w - r.w0) * out + j) * channels;
              });
          }
      }
    });
  }

  // One tile, whose pixel (i, j) lies at pixel(i, j): stored values, or float32 of a strip.
  template <typename P, typename At>
  void transform_tile(const Kernels<P>& kernels, int64_t channels, float* v, int64_t position_step,
                      const At& pixel) const {
    const WinogradKernels<P>& transforms = kernels.winograd[variant_];
    const P* pixels[36];
    for (int64_t i = 0; i < transforms.tile; ++i)
      for (int64_t j = 0; j < transforms.tile; ++j) pixels[i * transforms.tile + j] = pixel(i, j);
    transforms.input(pixels, channels, v, position_step);
  }

  // strip[line][pixel][channel] of what the tiles of r read, with its padding.
  void fill_strip(const Tiles& r, const T* planes, int64_t channels, float* strip) const {
    const int64_t plane = gather_.from_stride.channel, w0 = r.w0 * plan_.out, w1 = r.w1 * plan_.out + 2;
    for (int64_t h = r.h0 * plan_.out; h < r.h1 * plan_.out + 2; ++h, strip += (w1 - w0) * channels) {
      const int64_t line = h_.line(h) * gather_.from_stride.axis[1];
      for (int64_t w = w0; w < w1;) {  // runs of pixels that lie side by side
        const int64_t at = h_.line(h) < 0 ? -1 : w_.line(w);
        int64_t end = w + 1;
        while (end < w1 && (at < 0 ? h_.line(h) < 0 || w_.line(end) < 0 : w_.line(end) == at + end - w)) ++end;
        float* const target = strip + (w - w0) * channels;
        if (at < 0)
          std::fill_n(target, (end - w) * channels, 0.0f);
        else
          stored_.transpose(planes + line + at, plane, channels, end - w, target, channels);
        w = end;
      }
    }
  }

  // m[position][tile][column] += sum over channels [c0, c1) of v[position][tile][channel] * u[position][channel - c0]
  // [column]; from channel 0 on, m is overwritten.
  void multiply(int64_t panel, int64_t c0, int64_t c1, const float* u, const float* v, int64_t tiles, int64_t v_tiles,
                float* m) const {
    const int64_t from = gather_.from_per_group, width = plan_.width, row_tiles = ceil_div(tiles, kernels_.rows);
    const float* a[kMaxRows];
    float* c[kMaxRows];
    for (int64_t position = 0; position < plan_.positions; ++position)
      for (int64_t channel = c0; channel < c1; channel += kBlock)
        for (int64_t i = 0; i < row_tiles; ++i) {
          const int64_t row = tiles * i / row_tiles, rows = tiles * (i + 1) / row_tiles - row;
          for (int64_t r = 0; r < rows; ++r) {
            a[r] = v + position * step(v_tiles * from) + (row + r) * from + channel;
            c[r] = m + position * step(tiles * width) + (row + r) * width;
          }
          kernels_.gemm[rows - 1]({.taps = 1,
                                   .depth = std::min(kBlock, c1 - channel),
                                   .a = a,
                                   .a_offset = 0,
                                   .a_step = 1,
                                   .b = u + position * step(plan_.u_channels * width) + (channel - c0) * width,
                                   .b_offsets = nullptr,
                                   .ldb = width,
                                   .c = c,
                                   .cols = panel_columns(panel),
                                   .row_bias = nullptr,
                                   .column_bias = nullptr,
                                   .accumulate = channel > 0});
        }
  }

  void transform_output(int64_t panel, int64_t first, int64_t last, const Scratch& s) const {
    const int64_t out = plan_.out, width = plan_.width, columns = panel_columns(panel);
    const int64_t k = group_ * gather_.to_per_group + panel * width;
    const ActivationStrides& to_stride = gather_.to_stride;
    each_rectangle(first, last, [&](const Tiles& r, int64_t before) {
      T* const image = to_ + r.image * to_stride.batch + k * to_stride.channel;
      const int64_t pitch = (r.w1 - r.w0) * out * width;  // of a line of the strip
      int64_t tile = before;
      for (int64_t h = r.h0; h < r.h1; ++h)
        for (int64_t w = r.w0; w < r.w1; ++w, ++tile) {
          const float* const m = s.m + tile * width;
          const int64_t m_step = step((last - first) * width);
          if (channels_last_)
            finish_tile(stored_, r.image, h, w, panel, m, m_step, [&](int64_t i, int64_t j) {
              const int64_t at_h = h_.target(h, i), at_w = w_.target(w, j);
              return at_h < 0 || at_w < 0 ? reinterpret_cast<T*>(s.trash)
                                          : image + at_h * to_stride.axis[1] + at_w * to_stride.axis[2];
            });
          else
            finish_tile(kernels_, r.image, h, w, panel, m, m_step, [&](int64_t i, int64_t j) {
              return s.result_strip + ((h - r.h0) * out + i) * pitch + ((w - r.w0) * out + j) * width;
            });
        }
      if (channels_last_) return;
      const int64_t w0 = r.w0 * out, w1 = std::min(r.w1 * out, phase_.axis[2].count);
      for (int64_t h = r.h0 * out; h < std::min(r.h1 * out, phase_.axis[1].count); ++h)
        stored_.store_transposed(s.result_strip + (h - r.h0 * out) * pitch, width, w1 - w0, columns,
                                 image + h * to_stride.axis[1] + w0, to_stride.channel);
    });
  }

  // The results of one tile and panel, of which (i, j) goes to pixel(i, j): as it is stored, or float32 in a strip.
  template <typename P, typename At>
  void finish_tile(const Kernels<P>& kernels, int64_t image, int64_t tile_h, int64_t tile_w, int64_t panel,
                   const float* m, int64_t position_step, const At& pixel) const {
    const int64_t out = plan_.out, k = group_ * gather_.to_per_group + panel * plan_.width;
    P* pixels[16];
    for (int64_t i = 0; i < out; ++i)
      for (int64_t j = 0; j < out; ++j) pixels[i * out + j] = pixel(i, j);
    const float* const bias = bias_.get() ? bias_.get() + k : nullptr;
    if (!kernels.winograd[variant_].output(m, position_step, panel_columns(panel), bias, pixels))
      compute_directly(kernels, image, tile_h, tile_w, panel, pixels);
  }

  // The same from their definition.
  template <typename P>
  void compute_directly(const Kernels<P>& kernels, int64_t image, int64_t tile_h, int64_t tile_w, int64_t panel,
                        P* const* pixels) const {
    const int64_t from = gather_.from_per_group, out = plan_.out;
    const T* const x = from_ + image * gather_.from_stride.batch + group_ * from * gather_.from_stride.channel;
    const auto value = [&](const T& stored) {
      float single;
      stored_.copy_rows(&stored, 0, 1, 1, &single, 0);
      return static_cast<double>(single);
    };
    for (int64_t i = 0; i < out; ++i)
      for (int64_t j = 0; j < out; ++j) {
        if (h_.target(tile_h, i) < 0 || w_.target(tile_w, j) < 0) continue;
        for (int64_t k = 0; k < panel_columns(panel); ++k) {
          const int64_t to = panel * plan_.width + k;
          const T* const g = weight_ + group_ * gather_.weight_group_stride + to * gather_.weight_to_stride;
          double sum = 0;
          for (int64_t t = 0; t < 9; ++t) {
            const int64_t at_h = h_.source(tile_h, i + t / 3), at_w = w_.source(tile_w, j + t % 3);
            const T* const tap =
                g + h_.tap[t / 3] * gather_.weight_axis_stride[1] + w_.tap[t % 3] * gather_.weight_axis_stride[2];
            const T* const pixel = x + at_h * gather_.from_stride.axis[1] + at_w * gather_.from_stride.axis[2];
            for (int64_t c = 0; c < from; ++c)
              sum += (at_h < 0 || at_w < 0 ? 0 : value(pixel[c * gather_.from_stride.channel])) *
                     value(tap[c * gather_.weight_from_stride]);
          }
          if (bias_.get()) sum += bias_.get()[group_ * gather_.to_per_group + to];
          const float single = static_cast<float>(sum);
          kernels.store_rows(&single, 0, 1, 1, pixels[i * out + j] + k, 0);
        }
      }
  }

  const Gather gather_;
  const GatherPhase& phase_;
  const Kernels<float>& kernels_;  // of everything between the transforms
  const Kernels<T>& stored_;
  const int variant_;  // of the transforms
  const Plan plan_;
  const Axis h_, w_;
  const bool channels_last_;
  const T* const from_;
  const T* const weight_;
  const Bias<T> bias_;
  T* const to_;
  T* const zeros_;
  float* const shared_;
  float* const scratch_;
  const int threads_;
  int64_t group_ = 0;
};

const char* decline(const ConvShape& s, Direction direction, int64_t out) {
  if (!is_floating_point(s.dtype) || s.dtype == Dtype::kFloat64) return "only float32 and 16-bit types";
  if (s.in_per_group == 0 || s.out_per_group == 0 || s.in_pixels() == 0 || s.out_pixels() == 0)
    return "nothing to sum over";
  if (s.kernel[0] != 1 || s.kernel[1] != 3 || s.kernel[2] != 3) return "only 3x3 kernels";
  if (s.in[0] != 1 || s.out[0] != 1 || s.pad[0] != 0) return "a third axis";
  if (s.stride[1] != 1 || s.stride[2] != 1) return "a stride";
  const bool dilated = s.dilation[1] != 1 || s.dilation[2] != 1;
  if (dilated && !s.channels_last()) return "a dilation in NCHW";
  if (direction != Direction::kForward && s.padding_mode != PaddingMode::kZeros) return "the adjoint of a padding mode";
  const int64_t* const extent = direction == Direction::kForward ? s.out : s.in;
  // Its rounding errors are those of a whole tile, whatever part of it is wanted.
  if ((out == 4 || dilated) && std::min(extent[1] / s.dilation[1], extent[2] / s.dilation[2]) < out)
    return "results smaller than a tile";
  return nullptr;
}

// Estimates in cycles of one core, of one sample. A register tile of 8 rows and one vector takes 4 cycles a step and 20
// besides; a transform of one vector of channels takes about as long as its loads and stores.
double product_cycles(double rows, double depth, double columns) { return rows / 8 * columns * (4 * depth + 20); }

double winograd_cycles(const ConvShape& s, Direction direction, int64_t out) {
  constexpr double kVector = 16;
  const bool forward = direction == Direction::kForward;
  const int64_t* const extent = forward ? s.out : s.in;
  const double from = forward ? s.in_per_group : s.out_per_group, to = forward ? s.out_per_group : s.in_per_group;
  const auto tiles =
      static_cast<double>(tiles_of_axis(extent[1], s.dilation[1], out) * tiles_of_axis(extent[2], s.dilation[2], out));
  const double positions = static_cast<double>((out + 2) * (out + 2)), columns = std::ceil(to / kVector);
  // NCHW transposes what a tile reads and writes.
  const double moved = s.channels_last() ? 0 : 0.5 * kVector * (1.5 * out * out + out * out);
  const double transforms = 3 * positions * (tiles * (std::ceil(from / kVector) + columns) + 0.6 * from * columns);
  return product_cycles(std::max(tiles, 3.0), from, columns) * positions + transforms +
         moved * tiles * std::max(std::ceil(from / kVector), columns);
}

double direct_cycles(const ConvShape& s, Direction direction) {
  const bool forward = direction == Direction::kForward;
  const double from = forward ? s.in_per_group : s.out_per_group, to = forward ? s.out_per_group : s.in_per_group;
  const double words = std::ceil(from / (s.dtype == Dtype::kBFloat16 ? dense_kernels<bfloat16>().pair : 1));
  // With a dilation much of the products may be with the padding, which the direct way leaves out.
  double inside = 1;
  if (s.padding_mode == PaddingMode::kZeros)
    for (int d = 1; d < 3; ++d)
      if (s.dilation[d] > 1) inside *= share_inside(forward ? forward_axis(s, d) : backward_input_axis(s, d, 0));
  const auto pixels = static_cast<double>(forward ? s.out_pixels() : s.in_pixels());
  return product_cycles(pixels * inside, 9 * words, std::ceil(to / 16));
}

const char* yield(const ConvShape& s, Direction direction, int64_t out) {
  const bool forward = direction == Direction::kForward;
  if ((forward ? s.in_per_group : s.out_per_group) < kFewChannels) return "few channels";
  if (s.groups > 1 && std::min(s.in_per_group, s.out_per_group) < kFewGroupChannels) return "few channels a group";
  const double cycles = winograd_cycles(s, direction, out);
  if (winograd_cycles(s, direction, 6 - out) < cycles)
    return out == 4 ? "tiles of 2x2 take less" : "tiles of 4x4 take less";
  if (direct_cycles(s, direction) < cycles) return "the transforms cost more than they save";
  return nullptr;
}

int64_t workspace(const ConvShape& s, Direction direction, int64_t out, int threads) {
  const Kernels<float>& k = microkernels().f32;
  const Plan plan(s, direction, k.winograd[out == 4], k.lanes, k.vectors, threads);
  return (plan.shared + threads * plan.of_thread) * static_cast<int64_t>(sizeof(float));
}

template <Direction direction, int64_t out>
void run(const ConvShape& s, const ConvPointers& p, void* workspace, int threads) {
  const void* const from = direction == Direction::kForward ? p.input : p.grad_output;
  auto* const scratch = static_cast<float*>(workspace);
  if (s.dtype == Dtype::kBFloat16) return Winograd<bfloat16>(s, direction, out, from, p, scratch, threads).run();
  if (s.dtype == Dtype::kFloat16) return Winograd<float16>(s, direction, out, from, p, scratch, threads).run();
  Winograd<float>(s, direction, out, from, p, scratch, threads).run();
}

}  // namespace

template <Direction direction, int out>
Algorithm winograd() {
  return {out == 4 ? "winograd_4x4" : "winograd_2x2",
          [](const ConvShape& s) { return decline(s, direction, out); },
          [](const ConvShape& s, int threads) { return workspace(s, direction, out, threads); },
          run<direction, out>,
          {"lines of the activations, into strips, tiles and weights, transformed", "tiles and weights, transformed"},
          [](const ConvShape& s) { return yield(s, direction, out); }};
}

template Algorithm winograd<Direction::kForward, 2>();
template Algorithm winograd<Direction::kForward, 4>();
template Algorithm winograd<Direction::kBackwardInput, 2>();
template Algorithm winograd<Direction::kBackwardInput, 4>();

}  // namespace myconv::cpu
