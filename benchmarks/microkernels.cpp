// Calls microkernels of csrc/cpu and libtorch's brgemm `times` times on one tile. microkernels.py times these calls. All
// that come from the same tables have one signature: rows, cols, depth, two operands and a result.
#include "cpu/microkernels.h"

#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <type_traits>
#include <vector>

using namespace myconv::cpu;

namespace {

constexpr int kRolledLines = 7;

const Microkernels* const kIsas[] = {
    &portable::kMicrokernels,
#ifdef MYCONV_X86
    &avx2::kMicrokernels,
    &avx512::kMicrokernels,
#endif
};

const Microkernels* find(const char* isa) {
  for (const Microkernels* m : kIsas)
    if (!std::strcmp(m->isa, isa)) return m;
  return nullptr;
}

// C [rows][cols] = A [rows][depth] * B [depth][cols]
template <typename T>
void gemm(const Kernels<T>& k, int rows, int cols, int depth, const T* a, const T* b, T* c, int64_t times) {
  const T* a_rows[kMaxRows];
  T* c_rows[kMaxRows];
  for (int i = 0; i < rows; ++i) {
    a_rows[i] = a + i * depth;
    c_rows[i] = c + i * cols;
  }
  GemmTile<T> tile{};
  tile.taps = 1;
  tile.depth = depth;
  tile.a = a_rows;
  tile.a_step = 1;
  tile.b = b;
  tile.ldb = cols;
  tile.c = c_rows;
  tile.cols = cols;
  for (int64_t i = 0; i < times; ++i) k.gemm[rows - 1](tile);
}

// As gemm, of a tile whose rows lie at one distance.
template <typename T>
void gemm_rows(const Kernels<T>& k, int rows, int cols, int depth, const T* a, const T* b, T* c, int64_t times) {
  const Term run{};
  GemmRows<T> tile{};
  tile.tiles = tile.runs = 1;
  tile.depth = depth;
  tile.run = &run;
  tile.a = a;
  tile.a_row = depth;
  tile.b = b;
  tile.ldb = tile.c_row = tile.cols = cols;
  tile.c = c;
  for (int64_t i = 0; i < times; ++i) k.gemm_rows[rows - 1](tile);
}

// As gemm, through lists of terms and of vectors. B is read in whole vectors.
template <typename T>
void strip(const Kernels<T>& k, int rows, int cols, int depth, const T* a, const T* b, T* c, int64_t times) {
  std::vector<Term> terms;
  for (int p = 0; p < depth; ++p) terms.push_back({p, p * cols});
  StripVector vectors[kMaxVectors];
  int count = 0;
  for (int at = 0; at < cols; at += k.lanes) vectors[count++] = {at, at, std::min(k.lanes, cols - at)};
  StripTile<T> tile{};
  tile.terms = depth;
  tile.term = terms.data();
  tile.a = a;
  tile.a_row = depth;
  tile.b = b;
  tile.c = c;
  tile.c_row = cols;
  tile.vectors = count;
  tile.vector = vectors;
  for (int64_t i = 0; i < times; ++i) k.strip[rows - 1](tile);
}

// As gemm, with B transposed: [cols][depth].
template <typename T>
void dot(const Kernels<T>& k, int rows, int cols, int depth, const T* a, const T* b, T* c, int64_t times) {
  std::vector<T*> columns;
  for (int j = 0; j < cols; ++j) columns.push_back(c + j);
  DotTile<T> tile{};
  tile.depth = depth;
  tile.a = a;
  tile.lda = depth;
  tile.rows = rows;
  tile.b = b;
  tile.ldb = depth;
  tile.cols = cols;
  tile.c = columns.data();
  tile.c_step = cols;
  for (int64_t i = 0; i < times; ++i) k.dot(tile);
}

// As gemm, of whole vectors, with A transposed: [depth][rows].
template <typename T>
void winograd_product(const Kernels<T>& k, int rows, int cols, int depth, const T* a, const T* b, T* c, int64_t times) {
  const WinogradProduct<T> product{depth, a, rows, rows, b, cols, cols, c, cols};
  for (int64_t i = 0; i < times; ++i) k.winograd_product(product);
}

// Groups of depth channels that share vectors: C [rows][cols] from A [rows][cols] and B [depth][cols].
template <typename T>
void groups(const Kernels<T>& k, int rows, int cols, int depth, const T* a, const T* b, T* c, int64_t times) {
  std::vector<int32_t> lane(int64_t{depth} * kMostIndices);
  for (int p = 0; p < depth; ++p)
    for (int l = 0; l < k.lanes; ++l) lane[p * kMostIndices + l] = l / depth * depth + p;
  GroupsProduct<T> product{};
  product.taps = 1;
  product.depth = depth;
  product.vectors = cols / k.lanes;
  product.lane = reinterpret_cast<const int32_t (*)[kMostIndices]>(lane.data());
  product.a = a;
  product.a_row = product.ldb = product.c_row = cols;
  product.a_vector = k.lanes;
  product.rows = rows;
  product.b = b;
  product.c = c;
  for (int64_t i = 0; i < times; ++i) k.groups_product(product);
}

// A square kernel of depth taps without padding, with stride S. False if there is no such kernel that rolls, or reads in order.
//   lines    y [rows][cols] from x [..][(cols - 1) * S + side] and w [side][side]
//   pixels   y [rows][cols] from x [side][..][cols] and w [side][side][cols]: rows pixels of a line, cols channels;
//            where they roll, or are read in order, of kRolledLines lines at once
enum Walk { kTiles, kRolls, kInOrder };
template <typename T, bool kLines, int S, Walk kWalk>
bool depthwise(const Kernels<T>& k, int rows, int cols, int depth, const T* x, const T* w, T* y, int64_t times) {
  const RollingKernels<T>& rolling = k.depthwise.rolling;
  const auto rolls = (kWalk == kInOrder ? rolling.pixels_in_order : kLines ? rolling.lines : rolling.pixels)[S - 1];
  if (kWalk != kTiles && !rolls) return false;
  constexpr int64_t kLists = kWalk != kTiles && !kLines ? kRolledLines : 1;
  int side = 1, row = 0;
  while (side * side < depth) ++side;
  const auto& tiles = (kLines ? k.depthwise.lines : k.depthwise.pixels)[S - 1];
  const int width = side / 2;  // of odd ones
  // The highest tile there is that takes these rows.
  for (int r = 0; r < int(std::size(kDepthwiseRows)); ++r)
    if (tiles[width][r] && rows % kDepthwiseRows[r] == 0) row = r;
  const int64_t units = (rows - 1) * S + side, unit = kLines ? (cols - 1) * S + side : cols;
  std::vector<int64_t> unit_offsets, row_offsets;
  for (int64_t i = 0; i < units; ++i) unit_offsets.push_back(i * unit);
  for (int64_t i = 0; i < (kLines ? 1 : (kLists - 1) * S + side); ++i) row_offsets.push_back(i * units * unit);
  // Packed weights hold whole vectors: [block][tap][lane].
  const int64_t blocks = kLines ? 1 : (cols + k.lanes - 1) / k.lanes;
  std::vector<T> packed(blocks * depth * k.lanes);
  for (int64_t t = 0; !kLines && t < depth; ++t)
    for (int64_t c = 0; c < cols; ++c) packed[(c / k.lanes * depth + t) * k.lanes + c % k.lanes] = w[t * cols + c];
  std::vector<DepthwiseTap> taps;
  for (int64_t t = 0; t < side; t += kLines ? S : 1) {
    DepthwiseTap tap{};
    if (kLines)
      tap.column = t, tap.weight = t, tap.paired = S == 2 && t + 1 < side;
    else
      tap.row = t, tap.weight = t * side * k.lanes;
    taps.push_back(tap);
  }
  DepthwiseTile<T> tile{};
  tile.planes = blocks;
  tile.from_plane = tile.to_plane = k.lanes;
  tile.weight_plane = depth * k.lanes;
  tile.taps = taps.size();
  tile.tap = taps.data();
  tile.lists = kLists;
  tile.list_step = int64_t{rows} * cols;
  tile.rows = row_offsets.data();
  tile.count = rows;
  tile.unit_step = S;
  tile.units = tile.first_inside = unit_offsets.data();
  tile.end_inside = tile.units + units;
  tile.unit_size = unit;
  tile.from = x;
  tile.extent = unit;
  tile.weight = kLines ? w : packed.data();
  tile.weight_step = kLines ? side : k.lanes;
  tile.pair_step = 1;
  tile.to = y;
  tile.to_step = cols;
  tile.length = cols;
  tile.skip_zeros = true;
  const auto run = kWalk != kTiles ? rolls : tiles[width][row];
  for (int64_t i = 0; i < times; ++i) run(tile);
  return true;
}

template <typename T>
constexpr auto lines = depthwise<T, true, 1, kTiles>;
template <typename T>
constexpr auto lines_stride_2 = depthwise<T, true, 2, kTiles>;
template <typename T>
constexpr auto pixels = depthwise<T, false, 1, kTiles>;
template <typename T>
constexpr auto pixels_stride_2 = depthwise<T, false, 2, kTiles>;
template <typename T>
constexpr auto rolling_lines = depthwise<T, true, 1, kRolls>;
template <typename T>
constexpr auto rolling_lines_stride_2 = depthwise<T, true, 2, kRolls>;
template <typename T>
constexpr auto rolling_pixels = depthwise<T, false, 1, kRolls>;
template <typename T>
constexpr auto rolling_pixels_stride_2 = depthwise<T, false, 2, kRolls>;
template <typename T>
constexpr auto pixels_in_order = depthwise<T, false, 1, kInOrder>;
template <typename T>
constexpr auto pixels_in_order_stride_2 = depthwise<T, false, 2, kInOrder>;

// The transforms of one Winograd tile of rows x rows results, of a 3x3 kernel and cols channels: [pixel][channel], [position][channel].
template <typename T>
const WinogradKernels<T>& winograd(const Kernels<T>& k, int rows) {
  return k.winograd[rows == 2 ? 0 : 1];
}

template <typename T>
void winograd_input(const Kernels<T>& k, int rows, int cols, int, const T* x, const T*, T* v, int64_t times) {
  const auto& w = winograd(k, rows);
  std::vector<const T*> pixels;
  for (int i = 0; i < w.in[0] * w.in[1]; ++i) pixels.push_back(x + i * cols);
  for (int64_t i = 0; i < times; ++i) w.input(pixels.data(), cols, v, cols);
}

template <typename T>
void winograd_weight(const Kernels<T>& k, int rows, int cols, int, const T* taps, const T*, T* u, int64_t times) {
  int64_t offsets[9];
  for (int i = 0; i < 9; ++i) offsets[i] = i * cols;
  for (int64_t i = 0; i < times; ++i) winograd(k, rows).weight(taps, offsets, cols / k.lanes, u, cols);
}

template <typename T>
void winograd_output(const Kernels<T>& k, int rows, int cols, int, const T* m, const T*, T* y, int64_t times) {
  std::vector<T*> pixels;
  for (int i = 0; i < rows * rows; ++i) pixels.push_back(y + i * cols);
  for (int64_t i = 0; i < times; ++i) winograd(k, rows).output(m, cols, cols, nullptr, pixels.data());
}

// What loads and stores can do: a copy of cols values.
template <typename T>
void copy(const Kernels<T>& k, int, int cols, int, const T* from, const T*, T* to, int64_t times) {
  for (int64_t i = 0; i < times; ++i) k.copy_rows(from, cols, 1, cols, to, cols);
}

// As gemm. B is in pairs of rows for bfloat16: [depth / 2][cols][2]. False if this torch or machine does not have it.
template <typename T>
bool brgemm(int rows, int cols, int depth, const void* a, const void* b, void* c, int64_t times) try {
  constexpr bool kPairs = sizeof(T) == 2;
  for (int64_t i = 0; i < times; ++i)
    at::native::cpublas::brgemm(rows, cols, depth, depth, cols, cols, false, static_cast<const T*>(a),
                                static_cast<const T*>(b), static_cast<float*>(c), kPairs);
  at::native::cpublas::brgemm_release(kPairs);
  return true;
} catch (const std::exception&) {
  return false;
}

// Whether the kernel was there; those that say nothing always are.
template <typename F, typename... A>
bool there(F function, const A&... arguments) {
  if constexpr (std::is_void_v<decltype(function(arguments...))>)
    return function(arguments...), true;
  else
    return function(arguments...);
}

}  // namespace

extern "C" {

// The register tile: rows, lanes and vectors.
void tile_of(const char* isa, bool is_double, int* tile) {
  const auto read = [tile](const auto& k) {
    tile[0] = k.rows;
    tile[1] = k.lanes;
    tile[2] = k.vectors;
  };
  is_double ? read(find(isa)->f64) : read(find(isa)->f32);
}

// Results are false where there is no such kernel.
#define EXPORT(name)                                                                                            \
  bool run_##name(const char* isa, bool is_double, int rows, int cols, int depth, const void* a, const void* b, \
                  void* c, int64_t times) {                                                                     \
    const auto run = [&]<typename T>(const Kernels<T>& k) {                                                     \
      return there(name<T>, k, rows, cols, depth, static_cast<const T*>(a), static_cast<const T*>(b),           \
                   static_cast<T*>(c), times);                                                                  \
    };                                                                                                          \
    return is_double ? run(find(isa)->f64) : run(find(isa)->f32);                                               \
  }
EXPORT(gemm)
EXPORT(gemm_rows)
EXPORT(winograd_product)
EXPORT(groups)
EXPORT(strip)
EXPORT(dot)
EXPORT(lines)
EXPORT(lines_stride_2)
EXPORT(pixels)
EXPORT(pixels_stride_2)
EXPORT(rolling_lines)
EXPORT(rolling_lines_stride_2)
EXPORT(rolling_pixels)
EXPORT(rolling_pixels_stride_2)
EXPORT(pixels_in_order)
EXPORT(pixels_in_order_stride_2)
EXPORT(winograd_input)
EXPORT(winograd_weight)
EXPORT(winograd_output)
EXPORT(copy)

bool run_brgemm(bool is_bfloat16, int rows, int cols, int depth, const void* a, const void* b, void* c, int64_t times) {
  return (is_bfloat16 ? brgemm<at::BFloat16> : brgemm<float>)(rows, cols, depth, a, b, c, times);
}
}
