// The function table of one ISA. Microkernels work on one register tile; loops, packing and threads live in the algorithms.
//
// Matrix names are GEMM's: rows x cols tiles of C, reduced over depth. What they stand for:
//   algorithm                 rows            cols            depth
//   forward NCHW              out channels    pixels          in channels x taps
//   forward NHWC              pixels          out channels    taps x in channels
//   backward_input            as forward, with in and out channels exchanged
//   backward_weight           out channels    in channels     pixels
//
// This header and everything an ISA file includes hold plain structs only: a std:: template instantiated in a file that is
// compiled for AVX-512 could be the copy that the linker keeps for every machine.
#pragma once

#include <cstdint>

namespace myconv::cpu {

inline constexpr int kMaxRows = 8;     // register tile rows of any ISA
inline constexpr int kMaxVectors = 3;  // register tile columns of any ISA, in vectors
inline constexpr int kMaxDepthwiseRows = 8;
inline constexpr int kMaxDepthwiseTaps = 8;

// C[row][0, cols) = sum over tap < taps, k < depth of  a[tap * rows + row][a_offset + k] * b[(tap * depth + k) * ldb + col]
//                   + (accumulate ? C : bias of the row or the column or 0)
// The sum starts at zero and the other term is added last, so that a long reduction is a sum of short ones.
template <typename T>
struct GemmTile {
  int64_t taps, depth;
  const T* const* a;  // [taps][rows] pointers, each to depth contiguous elements at a_offset
  int64_t a_offset;
  const T* b;
  int64_t ldb;
  T* const* c;  // [rows] pointers, each to cols contiguous elements
  int64_t cols;
  const T* row_bias;     // [rows] or nullptr
  const T* column_bias;  // [cols] or nullptr
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

// A run of one packed row: length elements from the plane, step apart, or zeros where source is -1.
struct Segment {
  int64_t source, step;
  int32_t target, length;
};

// Depthwise rows: to[r][i] = bias + sum over tap of from[tap * rows + r][i] * weight, for i < length.
// NCHW: i is a position in a row, weight[tap] and bias[0] are broadcast. NHWC (per_lane): i is a channel, the weight is
// weight[tap * weight_stride + i] and the bias is bias[i].
template <typename T>
struct DepthwiseTile {
  int64_t taps, length;
  const T* const* from;  // [taps][rows]
  const T* weight;
  int64_t weight_stride;
  const T* bias;  // or nullptr
  T* const* to;   // [rows]
};

// sums[tap * lanes + l] += sum over p < count and vectors v of a row of  gy[p][v + l] * from[p * taps + tap][v + l]
template <typename T>
struct DepthwiseWeightTile {
  int64_t count, length;
  const T* const* gy;
  const T* const* from;
  int64_t offset;  // added to every pointer
  T* sums;
};

template <typename T>
struct Kernels {
  int rows, lanes, vectors;  // register tile: rows x (vectors * lanes)
  void (*gemm[kMaxRows])(const GemmTile<T>&);    // [rows - 1]
  void (*outer[kMaxRows])(const OuterTile<T>&);  // [rows - 1]
  void (*depthwise[2][kMaxDepthwiseRows])(const DepthwiseTile<T>&);  // [per_lane][rows - 1]
  void (*depthwise_weight[kMaxDepthwiseTaps])(const DepthwiseWeightTile<T>&);  // [taps - 1]
  // panel row r holds channel r / taps and tap r % taps: segments[first[tap], first[tap + 1]) of that channel's plane.
  void (*pack)(int64_t channels, int64_t taps, const T* plane, int64_t plane_stride, const Segment* segments,
               const int32_t* first, T* panel, int64_t width);
};

struct Microkernels {
  const char* isa;
  Kernels<float> f32;
  Kernels<double> f64;
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
