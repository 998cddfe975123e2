// Calls microkernels of csrc/cpu and libtorch's brgemm `times` times on one tile. microkernels.py times these calls.
#include "cpu/microkernels.h"

#include <ATen/native/CPUBlas.h>

#include <cstring>

using namespace myconv::cpu;

namespace {

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

// C [rows][cols] += A [depth][rows], transposed, * B [depth][cols]
template <typename T>
void outer(const Kernels<T>& k, int rows, int cols, int depth, const T* a, const T* b, T* c, int64_t times) {
  constexpr int kMaxDepth = 4096;
  const T* b_rows[kMaxDepth];
  if (depth > kMaxDepth) return;
  for (int p = 0; p < depth; ++p) b_rows[p] = b + p * cols;
  OuterTile<T> tile{};
  tile.depth = depth;
  tile.a = a;
  tile.lda = rows;
  tile.b = b_rows;
  tile.c = c;
  tile.ldc = cols;
  tile.cols = cols;
  for (int64_t i = 0; i < times; ++i) k.outer[rows - 1](tile);
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

#define EXPORT(name)                                                                                             \
  void run_##name(const char* isa, bool is_double, int rows, int cols, int depth, const void* a, const void* b,  \
                  void* c, int64_t times) {                                                                      \
    const auto run = [&]<typename T>(const Kernels<T>& k) {                                                      \
      name(k, rows, cols, depth, static_cast<const T*>(a), static_cast<const T*>(b), static_cast<T*>(c), times); \
    };                                                                                                           \
    is_double ? run(find(isa)->f64) : run(find(isa)->f32);                                                       \
  }
EXPORT(gemm)
EXPORT(outer)

bool run_brgemm(bool is_bfloat16, int rows, int cols, int depth, const void* a, const void* b, void* c, int64_t times) {
  return (is_bfloat16 ? brgemm<at::BFloat16> : brgemm<float>)(rows, cols, depth, a, b, c, times);
}
}
