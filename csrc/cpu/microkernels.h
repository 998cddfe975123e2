// The function table of one ISA. Microkernels work on one register tile; loops, packing and threads live in the
// algorithms.
//
// Matrix names are GEMM's: rows x cols tiles of C, reduced over depth. What they stand for:
//   algorithm                 rows            cols            depth
//   forward NCHW              out channels    pixels          in channels x taps
//   forward NHWC              pixels          out channels    taps x in channels
//   backward_input            as forward, with in and out channels exchanged
//   backward_weight           out channels    in channels     pixels
//
// This header and everything an ISA file includes hold plain structs only: a std:: template instantiated in a file
// that is compiled for AVX-512 could be the copy that the linker keeps for every machine.
#pragma once

#include <cstdint>

#include "cpu/depthwise.h"

namespace myconv::cpu {

inline constexpr int kMaxRows = 8;     // register tile rows of any ISA
inline constexpr int kMaxVectors = 3;  // register tile columns of any ISA, in vectors

// C[row][0, cols) = sum over tap < taps, k < depth of
//                     a[tap * rows + row][a_offset + k * a_step] * b[b_offset(tap) + k * ldb + col]
//                   + (accumulate ? C : bias of the row or the column or 0)
// b_offset(tap) is b_offsets[tap], or tap * depth * ldb where there is no such list. The sum starts at zero and the
// other term is added last, so that a long reduction is a sum of short ones.
template <typename T>
struct GemmTile {
  int64_t taps, depth;
  const T* const* a;  // [taps][rows]
  int64_t a_offset, a_step;
  const T* b;
  const int64_t* b_offsets;  // [taps] or nullptr
  int64_t ldb;
  T* const* c;  // [rows] pointers, each to cols contiguous elements
  int64_t cols;
  const T* row_bias;     // [rows] or nullptr
  const T* column_bias;  // [cols] or nullptr
  bool accumulate;
  const T* next = nullptr;  // what the next tile reads first, rows x depth values: fetched into L2 meanwhile
  T* packed = nullptr;      // of gemm_packing: a copy of B is left here, [tap][k][cols up to a whole vector]
};

// A term of a sum whose operands both lie anywhere: offsets of the value of A, in every row, and of the vectors of B.
struct Term {
  int64_t a, b;
};

// A vector of columns that lies anywhere: offsets in B and C, and how many of its lanes are columns.
struct StripVector {
  int64_t b, c, lanes;
};

// C[row][v.c + l] = sum over terms of  a[row * a_row + term.a] * b[term.b + v.b + l]  + (as in GemmTile)
// for l < v.lanes of each vector v. B is read in whole vectors.
template <typename T>
struct StripTile {
  int64_t terms;
  const Term* term;
  const T* a;
  int64_t a_row;
  const T* b;
  T* c;
  int64_t c_row;
  int vectors;  // up to Kernels::vectors
  const StripVector* vector;
  const T* row_bias;     // [rows] or nullptr
  const T* column_bias;  // at v.c + l, or nullptr
  bool accumulate;
};

// C[row][0, cols) += sum over p < depth of  a[p * lda + row] * b[p][col]          (C is always accumulated into)
template <typename T>
struct OuterTile {
  int64_t depth;
  const T* a;
  int64_t lda;
  const T* const* b;
  int64_t b_offset;  // added to every b pointer: one pointer list serves all column tiles
  T* c;
  int64_t ldc;
  int64_t cols;
};

// c[col][row * c_step] = sum over k < depth of a[row * lda + k] * b[col * ldb + k], + bias[row]
// Both operands have depth innermost: nothing is packed. A lane sums every kLanes-th term.
template <typename T>
struct DotTile {
  int64_t depth;
  const T* a;
  int64_t lda, rows;  // at most kLanes
  const T* b;
  int64_t ldb, cols;
  const T* bias;  // [rows] or nullptr
  T* const* c;    // [cols]
  int64_t c_step;
};

inline constexpr int kWinograds = 11;

// A run of one packed row: length elements to target; those in [first, last) come from the plane at source + i * step,
// the others are zero.
struct Segment {
  int64_t source, step;
  int32_t target, length, first, last;
};

// Winograd transforms of one tile, all channels: [position] is a step of position_step. Arrays of two: height, width.
template <typename T>
struct WinogradKernels {
  int out[2], taps[2], in[2];  // results of a tile, taps of the kernel, pixels that are read
  int positions;
  int stride;  // of the axes with more than one tap
  bool exact;  // on small integers
  // v[position][channel], from pixels[in * in] that each point to the channels of one
  void (*input)(const T* const* pixels, int64_t channels, T* v, int64_t position_step);
  // u[position][lane], from taps[tap_offsets[taps * taps]][lane], for a number of whole vectors
  void (*weight)(const T* taps, const int64_t* tap_offsets, int64_t vectors, T* u, int64_t position_step);
  // pixels[out * out][channel], from m[position][channel]; whether all results are finite
  bool (*output)(const T* m, int64_t position_step, int64_t channels, const T* bias, T* const* pixels);
};

template <typename T>
struct Kernels {
  int rows, lanes, vectors;                      // register tile: rows x (vectors * lanes)
  void (*gemm[kMaxRows])(const GemmTile<T>&);    // [rows - 1]
  void (*gemm_packing)(const GemmTile<T>&);      // of `rows` rows
  void (*strip[kMaxRows])(const StripTile<T>&);  // [rows - 1]
  void (*outer[kMaxRows])(const OuterTile<T>&);  // [rows - 1]
  void (*dot)(const DotTile<T>&);
  // to[r * to_step][0, length) = from[r * from_step][0, length)
  void (*copy_rows)(const T* from, int64_t from_step, int64_t count, int64_t length, T* to, int64_t to_step);
  void (*add_row)(T* sums, const T* row, int64_t length);  // sums[i] += row[i]
  T (*sum_row)(const T* row, int64_t length);
  bool (*all_finite)(const T* row, int64_t length);
  // panel row r holds channel r / taps and tap r % taps: segments[first[tap], first[tap + 1]) of that channel's plane.
  void (*pack)(int64_t channels, int64_t taps, const T* plane, int64_t plane_stride, const Segment* segments,
               const int32_t* first, T* panel, int64_t width);
  // to[c * to_step + r] = from[r * from_step + c],  r < rows, c < cols
  void (*transpose)(const T* from, int64_t from_step, int64_t rows, int64_t cols, T* to, int64_t to_step);
  DepthwiseKernels<T> depthwise;
};

// A 16-bit type against float32; narrowing rounds to nearest, ties to even.
struct Widening {
  void (*widen)(const uint16_t* from, int64_t count, float* to);
  void (*narrow)(const float* from, int64_t count, uint16_t* to);
};

struct Microkernels {
  const char* isa;
  Kernels<float> f32;
  Kernels<double> f64;
  WinogradKernels<float> winograd[kWinograds];
  Widening widening[2];  // bfloat16, float16
};

template <typename T>
const Kernels<T>& kernels_of(const Microkernels& m) {
  if constexpr (sizeof(T) == 4)
    return m.f32;
  else
    return m.f64;
}

namespace portable {
extern const Microkernels kMicrokernels;
}
#if defined(__x86_64__) && !defined(MYCONV_PORTABLE_ONLY)
#define MYCONV_X86 1
namespace avx2 {
extern const Microkernels kMicrokernels;
}
namespace avx512 {
extern const Microkernels kMicrokernels;
}
#endif

}  // namespace myconv::cpu
