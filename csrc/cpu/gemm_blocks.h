// How GEMM operands are cut, shared by the implicit-GEMM algorithms. All of it depends on the shape alone.
#pragma once

#include <c10/util/SmallVector.h>

#include <algorithm>

#include "conv_shape.h"
#include "cpu/microkernels.h"

namespace myconv::cpu {

// A float32 sum starts a fresh accumulator after this many terms; the partial sums are added in order. It bounds the
// error of long reductions, and a block of B (512 x 48 floats, 96 KiB) stays in L2.
inline constexpr int64_t kSumLength = 512;

// Packed operands are made in passes of about this size, so that the workspace does not grow with the weight.
inline constexpr int64_t kPackedBytes = int64_t{32} << 20;

// Taps of an implicit GEMM: bounds the list of pointers of one register tile to 1 MiB.
inline constexpr int64_t kMaxTaps = 16384;

// Columns in panels of nearly equal width, whole numbers of vectors: 49 columns of 16 lanes are 32 + 17, not 48 + 1, and
// 160 are 48 + 32 + 48 + 32, not 3 x 48 + 16.
struct Panels {
  int64_t columns, lanes, vectors, count, width;  // width: of the widest
  Panels(int64_t columns, int64_t lanes, int64_t most_vectors)
      : columns(columns),
        lanes(lanes),
        vectors(ceil_div(columns, lanes)),
        count(ceil_div(vectors, most_vectors)),
        width(ceil_div(vectors, std::max<int64_t>(count, 1)) * lanes) {}
  int64_t begin(int64_t panel) const { return vectors * panel / count * lanes; }
  int64_t size(int64_t panel) const { return std::min(begin(panel + 1), columns) - begin(panel); }
};

// A piece of a reduction over channels x taps with at most kSumLength terms.
struct Block {
  int64_t channel, channels, tap, taps;
  int64_t start;  // terms before this block
  int64_t terms() const { return channels * taps; }
};

// Whole taps (or whole channels) together as long as they fit. The major index is the outer one in memory:
// channels inside taps for NHWC, taps inside channels for NCHW. An empty reduction is one empty block.
using Blocks = c10::SmallVector<Block, 8>;

inline Blocks reduction_blocks(int64_t channels, int64_t taps, bool taps_inside) {
  const int64_t inner = taps_inside ? taps : channels, outer = taps_inside ? channels : taps;
  Blocks blocks;
  if (inner == 0 || outer == 0) return Blocks(1, Block{0, 0, 0, 0, 0});
  const auto add = [&](int64_t o, int64_t outers, int64_t i, int64_t inners) {
    const int64_t start = o * inner + i;
    if (taps_inside)
      blocks.push_back({o, outers, i, inners, start});
    else
      blocks.push_back({i, inners, o, outers, start});
  };
  if (inner > kSumLength) {
    const int64_t step = ceil_div(inner, ceil_div(inner, kSumLength));
    for (int64_t o = 0; o < outer; ++o)
      for (int64_t i = 0; i < inner; i += step) add(o, 1, i, std::min(step, inner - i));
  } else {
    const int64_t fit = std::min(outer, kSumLength / inner), step = ceil_div(outer, ceil_div(outer, fit));
    for (int64_t o = 0; o < outer; o += step) add(o, std::min(step, outer - o), 0, inner);
  }
  return blocks;
}

// to[r * width + c] = from[r * row_stride + c * column_stride]; the columns up to width are left alone. Words are
// made of neighbouring rows.
template <typename T>
void pack_matrix(const Kernels<T>& kernels, const T* from, int64_t row_stride, int64_t column_stride, int64_t rows,
                 int64_t columns, Word<T>* to, int64_t width) {
  if (column_stride == 1) return kernels.copy_channels(from, row_stride, rows, columns, to, width);
  if (row_stride == 1) return kernels.transpose(from, column_stride, columns, rows, to, width);
  constexpr int64_t kTile = 16;  // one cache line of float on either side
  for (int64_t c0 = 0; c0 < columns; c0 += kTile)
    for (int64_t r0 = 0; r0 < rows; r0 += kTile) {
      const int64_t r1 = std::min(rows, r0 + kTile), c1 = std::min(columns, c0 + kTile);
      if constexpr (kIsHalf<T>) {
        T square[kTile * kTile];
        for (int64_t c = c0; c < c1; ++c)
          for (int64_t r = r0; r < r1; ++r)
            square[(c - c0) * kTile + r - r0] = from[r * row_stride + c * column_stride];
        kernels.transpose(square, kTile, c1 - c0, r1 - r0, to + r0 / kernels.pair * width + c0, width);
      } else {
        for (int64_t c = c0; c < c1; ++c)
          for (int64_t r = r0; r < r1; ++r) to[r * width + c] = from[r * row_stride + c * column_stride];
      }
    }
}

// to[r * step + k] = words of from[r * row_stride + k * stride], k < depth: rows that are multiplied as they are.
template <typename T>
void pack_rows(const Kernels<T>& kernels, const T* from, int64_t row_stride, int64_t stride, int64_t rows,
               int64_t depth, Word<T>* to, int64_t step) {
  if (stride == 1 || depth == 1) return kernels.copy_rows(from, row_stride, rows, depth, to, step);
  if constexpr (!kIsHalf<T>) return pack_matrix(kernels, from, row_stride, stride, rows, depth, to, step);
  constexpr int64_t kTile = 32;
  T square[kTile * kTile];
  for (int64_t r0 = 0; r0 < rows; r0 += kTile)
    for (int64_t k0 = 0; k0 < depth; k0 += kTile) {
      const int64_t r1 = std::min(rows, r0 + kTile), k1 = std::min(depth, k0 + kTile);
      for (int64_t k = k0; k < k1; ++k)
        for (int64_t r = r0; r < r1; ++r) square[(r - r0) * kTile + k - k0] = from[r * row_stride + k * stride];
      kernels.copy_rows(square, kTile, r1 - r0, k1 - k0, to + r0 * step + k0 / kernels.pair, step);
    }
}

// Whether rows of `depth` values that follow each other are multiplied where they lie, and not as packed words.
template <typename T>
bool reads_in_place(const Kernels<T>& kernels, int64_t depth) {
  return !kIsHalf<T> || (kernels.pair > 1 && depth % kernels.pair == 0);
}
template <typename T>
const Word<T>* as_words(const T* values) {
  return reinterpret_cast<const Word<T>*>(values);
}

// The bias as it is added to sums, of 16-bit types a copy.
template <typename T>
class Bias {
 public:
  Bias(const Microkernels& m, const void* bias, int64_t channels) : bias_(static_cast<const Word<T>*>(bias)) {
    if (!kIsHalf<T> || !bias) return;
    copy_.resize(channels);
    kernels_of<T>(m).copy_rows(static_cast<const T*>(bias), 0, 1, channels, copy_.data(), 0);
    bias_ = copy_.data();
  }
  const Word<T>* get() const { return bias_; }

 private:
  const Word<T>* bias_;
  c10::SmallVector<Word<T>, 64> copy_;
};

// NHWC: whether a tile fetches the lines that it will write. That pays where results are larger than the caches and each of
// several panels writes a part of a pixel, which the processor does not see coming.
constexpr int64_t kLargeResults = 8 << 20;
inline bool fetches_results(int64_t bytes, const Panels& panels, int64_t large = kLargeResults) {
  return panels.count > 1 && bytes > large;
}

// Any number of rows, in tiles of nearly equal height; t.tiles is filled in here. Returns the end of what was fetched.
template <typename T>
const Word<T>* multiply_rows(const Kernels<T>& kernels, GemmRows<T> t, int64_t rows) {
  if (rows == 0) return t.next;
  const int64_t tiles = ceil_div(rows, kernels.rows), height = rows / tiles, higher = rows % tiles;
  const auto next_to_each_other = [&t](int64_t of_tile) {
    t.a_tile = of_tile * t.a_row, t.c_tile = of_tile * t.c_row, t.partial_tile = of_tile * t.partial_step;
  };
  t.tiles = higher;
  next_to_each_other(height + 1);
  if (higher > 0) t.next = kernels.gemm_rows[height](t);
  t.a += higher * t.a_tile;
  t.c += higher * t.c_tile;
  t.partial += higher * t.partial_tile;
  if (t.row_bias) t.row_bias += higher * (height + 1);
  t.tiles = tiles - higher;
  next_to_each_other(height);
  return kernels.gemm_rows[height - 1](t);
}

}  // namespace myconv::cpu
