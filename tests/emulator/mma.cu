// C = A * B for 16x32 and 32x8 row-major matrices, a product a block of one warp: exercises instructions.cuh.
#include <cstring>

#include "cuda/abi.h"
#include "cuda/device.cuh"

namespace myconv::cuda {
namespace {

constexpr int kRows = 16, kDepth = 32, kColumns = 8, kWarp = 32;

__device__ inline uint32_t pair(uint16_t low, uint16_t high) { return low | static_cast<uint32_t>(high) << 16; }

__device__ inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Half) {
  mma_f16(d, a, b);
}
__device__ inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], BFloat16) {
  mma_bf16(d, a, b);
}

__device__ inline void write(float* c, const float (&d)[4]) {
  const int g = threadIdx.x / 4, i = threadIdx.x % 4;
  for (int j = 0; j < 4; ++j) c[(g + 8 * (j / 2)) * kColumns + 2 * i + j % 2] = d[j];
}

// Each lane gathers its fragments from memory.
template <typename T>
__global__ void gathered(const uint16_t* a, const uint16_t* b, float* c) {
  a += blockIdx.x * kRows * kDepth, b += blockIdx.x * kDepth * kColumns, c += blockIdx.x * kRows * kColumns;
  const int g = threadIdx.x / 4, i = threadIdx.x % 4;
  float d[4] = {};
  for (int k = 0; k < kDepth; k += 16) {
    uint32_t fragment_a[4], fragment_b[2];
    for (int j = 0; j < 4; ++j) {
      const uint16_t* const from = a + (g + 8 * (j % 2)) * kDepth + k + 2 * i + 8 * (j / 2);
      fragment_a[j] = pair(from[0], from[1]);
    }
    for (int j = 0; j < 2; ++j) {
      const uint16_t* const from = b + (k + 2 * i + 8 * j) * kColumns + g;
      fragment_b[j] = pair(from[0], from[kColumns]);
    }
    multiply_add(d, fragment_a, fragment_b, T{});
  }
  write(c, d);
}

// The fragments come through shared memory: two groups of copies, the second under way while the first is multiplied.
template <typename T>
__global__ void staged(const uint16_t* a, const uint16_t* b, float* c) {
  MYCONV_SHARED(uint4, tiles_a, 2 * 16 * 2);  // [k / 16][row][half of 16 columns]
  MYCONV_SHARED(uint4, tiles_b, 2 * 16);      // [k / 16][k % 16]
  a += blockIdx.x * kRows * kDepth, b += blockIdx.x * kDepth * kColumns, c += blockIdx.x * kRows * kColumns;
  const int lane = threadIdx.x;
  for (int tile = 0; tile < 2; ++tile) {
    cp_async<16>(&tiles_a[tile * 32 + lane], a + lane / 2 * kDepth + tile * 16 + lane % 2 * 8);
    if (lane < 16) cp_async<16>(&tiles_b[tile * 16 + lane], b + (tile * 16 + lane) * kColumns);
    cp_async_commit();
  }
  float d[4] = {};
  for (int tile = 0; tile < 2; ++tile) {
    if (tile == 0)
      cp_async_wait<1>();
    else
      cp_async_wait<0>();
    __syncwarp();
    uint32_t fragment_a[4], fragment_b[4];  // of B there are two matrices: lanes from 16 on name them again
    ldmatrix(fragment_a, &tiles_a[tile * 32 + lane % 16 * 2 + lane / 16]);
    ldmatrix_transposed(fragment_b, &tiles_b[tile * 16 + lane % 16]);
    const uint32_t two[2] = {fragment_b[0], fragment_b[1]};
    multiply_add(d, fragment_a, two, T{});
  }
  write(c, d);
}

__global__ void gathered_tf32(const float* a, const float* b, float* c) {
  a += blockIdx.x * kRows * kDepth, b += blockIdx.x * kDepth * kColumns, c += blockIdx.x * kRows * kColumns;
  const int g = threadIdx.x / 4, i = threadIdx.x % 4;
  float d[4] = {};
  for (int k = 0; k < kDepth; k += 8) {
    uint32_t fragment_a[4], fragment_b[2];
    for (int j = 0; j < 4; ++j) fragment_a[j] = to_tf32(a[(g + 8 * (j % 2)) * kDepth + k + i + 4 * (j / 2)]);
    for (int j = 0; j < 2; ++j) fragment_b[j] = to_tf32(b[(k + i + 4 * j) * kColumns + g]);
    mma_tf32(d, fragment_a, fragment_b);
  }
  write(c, d);
}

struct Row {
  const char* name;
  void (*launch)(const void* a, const void* b, float* c, int count);
};

template <typename T>
void launch_gathered(const void* a, const void* b, float* c, int count) {
  MYCONV_LAUNCH((gathered<T>), count, kWarp, nullptr, static_cast<const uint16_t*>(a), static_cast<const uint16_t*>(b),
                c);
}
template <typename T>
void launch_staged(const void* a, const void* b, float* c, int count) {
  MYCONV_LAUNCH((staged<T>), count, kWarp, nullptr, static_cast<const uint16_t*>(a), static_cast<const uint16_t*>(b),
                c);
}
void launch_tf32(const void* a, const void* b, float* c, int count) {
  MYCONV_LAUNCH(gathered_tf32, count, kWarp, nullptr, static_cast<const float*>(a), static_cast<const float*>(b), c);
}

constexpr Row kTable[] = {
    {"gathered float16", launch_gathered<Half>}, {"gathered bfloat16", launch_gathered<BFloat16>},
    {"staged float16", launch_staged<Half>},     {"staged bfloat16", launch_staged<BFloat16>},
    {"gathered float32", launch_tf32},
};

}  // namespace
}  // namespace myconv::cuda

extern "C" int multiply(const char* name, const void* a, const void* b, float* c, int count) {
  using namespace myconv::cuda;
  for (const Row& row : kTable)
    if (strcmp(row.name, name) == 0) {
      row.launch(a, b, c, count);
      return last_error();
    }
  return -1;
}
