// Small kernels that show what the emulator does: collectives with known answers, and one fault each.
#include <cstring>

#include "cuda/abi.h"
#include "cuda/device.cuh"

namespace myconv::cuda {
namespace {

constexpr unsigned kAll = ~0u;

// --- right ones: two warps, `n` results a thread ---------------------------------------------------------------------

__global__ void shuffles(float* out, int n) {
  float* const mine = out + threadIdx.x * n;
  const float value = static_cast<float>(threadIdx.x);
  mine[0] = __shfl_sync(kAll, value, 5);
  mine[1] = __shfl_sync(kAll, value, threadIdx.x + 1, 8);
  mine[2] = __shfl_up_sync(kAll, value, 3);
  mine[3] = __shfl_down_sync(kAll, value, 3, 16);
  mine[4] = __shfl_xor_sync(kAll, value, 1);
  // Two halves of a warp at different lines.
  if (threadIdx.x % 32 < 16)
    mine[5] = __shfl_xor_sync(0x0000ffffu, value, 2);
  else
    mine[5] = __shfl_xor_sync(0xffff0000u, value, 4);
}

__global__ void votes(float* out, int n) {
  float* const mine = out + threadIdx.x * n;
  const bool third = threadIdx.x % 3 == 0;
  mine[0] = static_cast<float>(__ballot_sync(kAll, third) & 0xffff);
  mine[1] = static_cast<float>(__any_sync(kAll, threadIdx.x == 40));
  mine[2] = static_cast<float>(__all_sync(kAll, threadIdx.x < 40));
  mine[3] = static_cast<float>(__syncthreads_count(third));
  mine[4] = static_cast<float>(__syncthreads_or(threadIdx.x == 40) + 2 * __syncthreads_or(false));
  mine[5] = static_cast<float>(__syncthreads_and(threadIdx.x != 40) + 2 * __syncthreads_and(true));
}

// --- wrong ones ------------------------------------------------------------------------------------------------------

__global__ void leaves_before_the_barrier(float*, int) {
  if (threadIdx.x == 3) return;
  __syncthreads();
}

__global__ void two_barriers(float*, int) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
}

__global__ void leaves_before_the_shuffle(float* out, int) {
  if (threadIdx.x == 3) return;
  out[threadIdx.x] = __shfl_xor_sync(kAll, 1.0f, 1);
}

__global__ void not_in_the_mask(float*, int) { __syncwarp(2); }

__global__ void reads_a_lane_outside_the_mask(float* out, int) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, 1.0f, 16);
}

__global__ void no_barrier(float* out, int) {
  MYCONV_SHARED(float, values, 64);
  values[threadIdx.x] = 1;
  out[threadIdx.x] = values[63 - threadIdx.x];
}

__global__ void writes_behind_shared(float*, int n) {
  MYCONV_SHARED(float, values, 64);
  if (threadIdx.x == 0) values[n + 58] = 1;  // 64
}

__global__ void writes_before_shared(float*, int n) {
  MYCONV_SHARED(float, values, 64);
  if (threadIdx.x == 0) values[5 - n] = 1;  // -1
}

__global__ void reads_behind_shared(float* out, int n) {
  MYCONV_SHARED(float, values, 64);
  values[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x + n];
}

__global__ void shared_of_the_block_before(float* out, int) {
  MYCONV_SHARED(float, values, 64);
  if (blockIdx.x == 0) values[threadIdx.x] = 1;
  out[threadIdx.x] = values[threadIdx.x];
}

__global__ void too_much_shared(float*, int) {
  MYCONV_SHARED(double, values, 6145);
  values[0] = 1;
}

__global__ void reads_behind(float* out, int n) { out[0] = out[blockDim.x * n + threadIdx.x]; }
__global__ void writes_before(float* out, int) { out[-1] = 1; }

template <bool kWait>
__global__ void copies(float* out, int n) {
  MYCONV_SHARED(float, values, 64);
  cp_async<4>(&values[threadIdx.x], out + threadIdx.x * n, threadIdx.x % 2 * 4);
  cp_async_commit();
  if (kWait) cp_async_wait<0>();
  out[threadIdx.x * n + 1] = values[threadIdx.x];
}

__global__ void copies_from_an_odd_address(float* out, int) {
  MYCONV_SHARED(float, values, 64);
  cp_async<8>(&values[0], out + 1);
}

struct Probe {
  const char* name;
  void (*kernel)(float* out, int n);
  unsigned blocks = 1, threads = 64;
};
#define PROBE(kernel) {#kernel, kernel}
constexpr Probe kProbes[] = {
    PROBE(shuffles),
    PROBE(votes),
    PROBE(leaves_before_the_barrier),
    PROBE(two_barriers),
    PROBE(leaves_before_the_shuffle),
    PROBE(not_in_the_mask),
    PROBE(reads_a_lane_outside_the_mask),
    PROBE(no_barrier),
    PROBE(writes_behind_shared),
    PROBE(writes_before_shared),
    PROBE(reads_behind_shared),
    {"shared_of_the_block_before", shared_of_the_block_before, 2},
    PROBE(too_much_shared),
    PROBE(reads_behind),
    PROBE(writes_before),
    {"copies", copies<true>},
    {"copies_without_wait", copies<false>},
    PROBE(copies_from_an_odd_address),
    {"too_many_threads", votes, 1, 1025},
    {"no_blocks", votes, 0},
};

template <typename T>
__global__ void widen(const T* from, float* to, int n) {
  for (int i = threadIdx.x; i < n; i += blockDim.x) to[i] = load(from[i]);
}
template <typename T>
__global__ void narrow(const float* from, T* to, int n) {
  for (int i = threadIdx.x; i < n; i += blockDim.x) store(to[i], from[i]);
}

template <typename T>
int convert(bool widens, void* narrow_values, float* wide_values, int n) {
  T* const values = static_cast<T*>(narrow_values);
  if (widens)
    MYCONV_LAUNCH((widen<T>), 1, 64, nullptr, values, wide_values, n);
  else
    MYCONV_LAUNCH((narrow<T>), 1, 64, nullptr, wide_values, values, n);
  return last_error();
}

}  // namespace
}  // namespace myconv::cuda

extern "C" int probe(const char* name, float* out, int n) {
  using namespace myconv::cuda;
  for (const Probe& p : kProbes)
    if (strcmp(p.name, name) == 0) {
      MYCONV_LAUNCH(p.kernel, p.blocks, p.threads, nullptr, out, n);
      return last_error();
    }
  return -1;
}

extern "C" int convert(bool half, bool widens, void* narrow_values, float* wide_values, int n) {
  using namespace myconv::cuda;
  return half ? convert<Half>(widens, narrow_values, wide_values, n)
              : convert<BFloat16>(widens, narrow_values, wide_values, n);
}
