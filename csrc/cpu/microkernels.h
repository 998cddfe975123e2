// The function table of one ISA. Microkernels work on one register tile; loops, packing and threads live in the
// algorithms.
//
// Matrix names are GEMM's: rows x cols tiles of C, reduced over depth. What they stand for:
//   algorithm                 rows            cols            depth
//   forward NCHW              out channels    pixels          in channels x taps
//   forward NHWC              pixels          out channels    taps x in channels
//   backward_input            as forward, with in and out channels exchanged
//   backward_weight           in channels     out channels    pixels
//
// This header and everything an ISA file includes hold plain structs only: a std:: template instantiated in a file
// that is compiled for AVX-512 could be the copy that the linker keeps for every machine.
#pragma once

#include <cstdint>

#include "cpu/depthwise.h"
#include "cpu/stored.h"

namespace myconv::cpu {

inline constexpr int kMaxRows = 8;     // register tile rows of any ISA
inline constexpr int kMaxVectors = 3;  // register tile columns of any ISA, in vectors

// C[row][0, cols) = sum over tap < taps, k < depth of
//                     a[tap * rows + row][a_offset + k * a_step] * b[b_offset(tap) + k * ldb + col]
//                   + (accumulate ? C : bias of the row or the column or 0)
// b_offset(tap) is b_offsets[tap], or tap * depth * ldb where there is no such list. The sum starts at zero and the
// other term is added last, so that a long reduction is a sum of short ones. depth counts words.
template <typename T>
struct GemmTile {
  using W = Word<T>;
  int64_t taps, depth;
  const W* const* a;  // [taps][rows]
  int64_t a_offset, a_step;
  const W* b;
  const int64_t* b_offsets;  // [taps] or nullptr
  int64_t ldb;
  T* const* c;  // [rows] pointers, each to cols contiguous elements
  int64_t cols;
  const W* row_bias;     // [rows] or nullptr
  const W* column_bias;  // [cols] or nullptr
  bool accumulate;
  const W* next = nullptr;  // what the next tile reads first, rows x depth values: fetched into L2 meanwhile
  W* packed = nullptr;      // of gemm_packing: a copy of B is left here, [tap][k][cols up to a whole vector]
  // Of 16-bit types only: C while its sum is in the making, partial[row * partial_step + col], and whether it still is
  // after this part.
  W* partial = nullptr;
  int64_t partial_step = 0;
  bool unfinished = false;
};

// A term of a sum, or the first one of a run of them, whose operands both lie anywhere: offsets of the value of A, in
// every row, and of the vectors of B.
struct Term {
  int64_t a, b;
};

// Tiles whose rows all lie at one distance, as do the tiles: `a_tile` from a tile's first row to the next one's. Of a tile:
// C[row][0, cols) = sum over run, k < depth of  a[row * a_row + run.a + k] * b[run.b + k * ldb + col]  + (as in GemmTile)
template <typename T>
struct GemmRows {
  using W = Word<T>;
  int64_t tiles, runs, depth;
  const Term* run;
  const W* a;
  int64_t a_row, a_tile;
  const W* b;
  int64_t ldb;
  T* c;
  int64_t c_row, c_tile, cols;
  const W* column_bias;  // [cols] or nullptr
  bool accumulate;
  const W* row_bias = nullptr;  // [rows of all tiles] or nullptr; not where there is one of columns
  bool results_ahead = false;   // where the results of a tile go is fetched while it is multiplied
  bool ahead = false;           // the rows of the next tile are fetched into L2 meanwhile
  const W* next = nullptr;      // or what lies here, so many words for every two k
  int64_t next_step = 0;
  W* partial = nullptr;  // as in GemmTile
  int64_t partial_step = 0, partial_tile = 0;
  bool unfinished = false;
};

// A vector of columns that lies anywhere: offsets in B and C, and how many of its lanes are columns.
struct StripVector {
  int64_t b, c, lanes;
};

// C[row][v.c + l] = sum over terms of  a[row * a_row + term.a] * b[term.b + v.b + l]  + (as in GemmTile)
// for l < v.lanes of each vector v. B is read in whole vectors.
template <typename T>
struct StripTile {
  using W = Word<T>;
  int64_t terms;
  const Term* term;
  const W* a;
  int64_t a_row;
  const W* b;
  T* c;
  int64_t c_row;
  int vectors;  // up to Kernels::vectors
  const StripVector* vector;
  const W* row_bias;     // [rows] or nullptr
  const W* column_bias;  // at v.c + l, or nullptr
  bool accumulate;
  W* partial = nullptr;  // of 16-bit types, if not null: C is written here, and not rounded, at the same offsets
};

// Of grouped convolutions, a vector of columns that belong to several groups: lane l multiplies the channels of its own.
// C[tap][i][l] = sum over run < runs, p < depth of
//                    a[run * taps + tap][p * a_step + l / group_cols * channels + i] *
//                    b[b_offsets[run] + p * ldb + l]         for i < channels, l < cols,     + (accumulate ? C : 0)
template <typename T>
struct LaneTile {
  int64_t runs, depth;
  int64_t taps, channels, group_cols;  // group_cols at least cols: all lanes are one group, and channels any number
  const T* const* a;                   // [runs][taps]
  int64_t a_step;
  const T* b;
  const int64_t* b_offsets;
  int64_t ldb;
  T* c;
  int64_t c_tap, c_channel, cols;
  bool accumulate;
  const T* next = nullptr;  // fetched into L2 meanwhile, a cache line for each pixel of a tile
};

// c[col][row * c_step] = sum over k < depth of a[row * lda + k] * b[col * ldb + k], + bias[row]
// Both operands have depth innermost: nothing is packed. A lane sums every kLanes-th word.
template <typename T>
struct DotTile {
  int64_t depth;
  const T* a;
  int64_t lda, rows;  // at most kLanes
  const T* b;
  int64_t ldb, cols;
  const Word<T>* bias;  // [rows] or nullptr
  T* const* c;          // [cols]
  int64_t c_step;
};

inline constexpr int kWinograds = 13;

// A run of one packed row: length elements to target; those in [first, last) come from the plane at source + i * step,
// the others are zero. `planes` runs whose sources follow each other have their targets `apart`.
struct Segment {
  int64_t source, step;
  int32_t target, length, first, last;
  int32_t planes = 1, apart = 0;
};

// A vector of a packed row, whose values come from two windows of the plane: lane[l] counts through the lanes of both. What
// is not read is zero; the first window is less than a vector, so its last lane is a zero.
struct Shuffle {
  int64_t source[2];
  int32_t count[2];  // values of each window
  int32_t target, length;
  bool onto;  // instead of the first window: what lies at the target
  int32_t lane[16];
};

// Winograd transforms of one tile, all channels: [position] is a step of position_step. 16-bit types are transformed as
// float32. Arrays of two: height, width.
template <typename T>
struct WinogradKernels {
  using W = Word<T>;
  int out[2], taps[2], in[2];  // results of a tile, taps of the kernel, pixels that are read
  int positions;
  int stride, result_stride;  // of the axes with more than one tap, where they read and where they write
  bool exact;                 // on small integers
  // v[position][channel], from pixels[in * in] that each point to the channels of one
  void (*input)(const T* const* pixels, int64_t channels, W* v, int64_t position_step);
  // u[position][lane], from taps[tap_offsets[taps * taps]][lane], for a number of whole vectors
  void (*weight)(const W* taps, const int64_t* tap_offsets, int64_t vectors, W* u, int64_t position_step);
  // pixels[out * out][channel], from m[position][channel]; whether all results are finite
  bool (*output)(const W* m, int64_t position_step, int64_t channels, const W* bias, T* const* pixels);
  // Of the gradient of the weight: z[position][channel], from pixels[out * out] of a tile of gy
  void (*result)(const T* const* pixels, int64_t channels, W* z, int64_t position_step);
  // taps[t * tap_step + channel], from m[position][channel], or added to; whether all are finite. Of float32 alone.
  bool (*gradient)(const W* m, int64_t position_step, int64_t channels, W* taps, int64_t tap_step, bool add);
};

// c[row * ldc + col] = sum over p < depth of  a[p * lda + row] * b[p * ldb + col]
// Columns are read and written in whole vectors.
template <typename T>
struct WinogradProduct {
  int64_t depth;
  const T* a;
  int64_t lda, rows;
  const T* b;
  int64_t ldb, cols;  // at most Kernels::vectors of them
  T* c;
  int64_t ldc;
};

// Of groups that share vectors: each lane multiplies channels of its own group, which are permuted into place.
// c[row * c_row + v * lanes + l] = sum over t < taps, k < depth of
//     a[row * a_row + t * a_tap + v * a_vector + lane[k][l]] * b[(t * depth + k) * ldb + v * lanes + l]
template <typename T>
struct GroupsProduct {
  int64_t taps, depth, vectors;
  const int32_t (*lane)[kMostIndices];  // [depth]
  const T* a;                           // read in whole vectors
  int64_t a_row, a_tap, a_vector, rows;
  const T* b;
  int64_t ldb;
  T* c;
  int64_t c_row;
};

// Whatever reads a tensor reads stored values and makes words, of `pair` values each (1 unless words are pairs).
template <typename T>
struct Kernels {
  using W = Word<T>;
  int rows, lanes, vectors;                    // register tile: rows x (vectors * lanes)
  int pair;                                    // values of a word
  void (*gemm[kMaxRows])(const GemmTile<T>&);  // [rows - 1]
  void (*gemm_packing)(const GemmTile<T>&);    // of `rows` rows
  const W* (*gemm_rows[kMaxRows])(
      const GemmRows<T>&);                       // [rows of a tile - 1]; the end of what it fetched from `next` on
  void (*strip[kMaxRows])(const StripTile<T>&);  // [rows - 1]
  void (*lanes_of_groups)(const LaneTile<T>&);
  void (*dot)(const DotTile<T>&);
  // to[r * to_step][0, length) = from[r * from_step][0, length)           words are made of neighbours in a row
  void (*copy_rows)(const T* from, int64_t from_step, int64_t count, int64_t length, W* to, int64_t to_step);
  // The same, of rows that are channels: words are made of neighbouring rows, count of which become count / pair.
  void (*copy_channels)(const T* from, int64_t from_step, int64_t count, int64_t length, W* to, int64_t to_step);
  // to[i] = from[i * step] for i < length                                 words are made of neighbours in this order
  void (*copy_strided)(const T* from, int64_t step, int64_t length, W* to);
  // to[r * to_step][0, length) = round(from[r * from_step][0, length))    of float32 sums, whatever words are
  void (*store_rows)(const W* from, int64_t from_step, int64_t count, int64_t length, T* to, int64_t to_step);
  // to[j * phases + f] = round(from[f * from_step + j]), values of them in all: float32 sums, as in store_rows
  void (*interleave)(const W* from, int64_t from_step, int64_t phases, int64_t values, T* to);
  // sums[i] += rows[i] + rows[step + i] + ...  of count rows; and the sum of one, of `length` values. Not of pairs.
  void (*add_rows)(W* sums, const T* rows, int64_t step, int64_t count, int64_t length);
  W (*sum_row)(const T* row, int64_t length);
  void (*sum_lanes)(const T* vectors, int64_t count, T* sums);  // sums[i]: of vector i's lanes
  bool (*all_finite)(const W* row, int64_t length);
  // panel row r holds channel r / taps and tap r % taps: segments[first[tap], first[tap + 1]) of that channel's plane.
  // Words are made of neighbouring channels.
  void (*pack)(int64_t channels, int64_t taps, const T* plane, int64_t plane_stride, const Segment* segments,
               const int32_t* first, W* panel, int64_t width);
  // The same of rows that are too short for runs, and for taps = 1: a row to each word of channels.
  void (*shuffle)(int64_t channels, const T* plane, int64_t plane_stride, const Shuffle* first, const Shuffle* last,
                  W* rows, int64_t width);
  WinogradKernels<T> winograd[kWinograds];              // of float32 and the 16-bit types, the same ones
  void (*winograd_product)(const WinogradProduct<T>&);  // of float32
  void (*groups_product)(const GroupsProduct<T>&);      // of float32
  // to[c * to_step + r] = from[r * from_step + c],  r < rows, c < cols    words are made of neighbours in a row
  void (*transpose)(const T* from, int64_t from_step, int64_t rows, int64_t cols, W* to, int64_t to_step);
  // The same of float32 sums, rounded.
  void (*store_transposed)(const W* from, int64_t from_step, int64_t rows, int64_t cols, T* to, int64_t to_step);
  // Not of 16-bit types, as are gemm_packing, lanes_of_groups and sum_lanes: no row of theirs asks for these.
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
  Kernels<bfloat16> bf16;
  Kernels<float16> f16;
  Widening widening[2];                               // bfloat16, float16
  const Kernels<bfloat16>* bfloat16_pairs = nullptr;  // where the processor multiplies bfloat16: words are pairs,
  const Microkernels* keeping_denormals = nullptr;    // and all of bfloat16 treats denormals as zeros, unlike these
  const Microkernels* half = nullptr;                 // where vectors run in halves: kernels of those
};

inline const Kernels<float>& kernels_for(const Microkernels& m, float) { return m.f32; }
inline const Kernels<double>& kernels_for(const Microkernels& m, double) { return m.f64; }
inline const Kernels<bfloat16>& kernels_for(const Microkernels& m, bfloat16) { return m.bf16; }
inline const Kernels<float16>& kernels_for(const Microkernels& m, float16) { return m.f16; }

template <typename T>
const Kernels<T>& kernels_of(const Microkernels& m) {
  return kernels_for(m, T{});
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
namespace avx512_bf16 {
extern const Kernels<bfloat16> kPairs;
void round_in_hardware(Kernels<bfloat16>& kernels);  // whatever rounds results
}  // namespace avx512_bf16
#endif

}  // namespace myconv::cpu
