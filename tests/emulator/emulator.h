// CUDA on the host: enough of it to run the kernels of csrc/cuda/ on a CPU, in every order that could matter.
//
// A thread is a fiber. It runs until it waits (a barrier, a collective of its warp) or ends; then the schedule picks
// another one. Threads that wait together meet: the last to come does what the meeting is for, reading and writing the
// records that the others left on their stacks, and all of them go on.
//
// What was not written is poison, bytes of 0xff: NaN in every floating-point type, -1 in integers. docs/emulator.md
// says what is found in this way and what is not.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

// --- words of CUDA ---------------------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

// The kernel is a name or a template's, in parentheses if it has commas.
#define MYCONV_LAUNCH(kernel, blocks, threads, stream, ...) \
  (static_cast<void>(stream), ::myconv::cuda::emulator::launch((blocks), (threads), [&] { kernel(__VA_ARGS__); }))

// One array a block, whichever thread asks first. `name` is a reference to an array, as a __shared__ one would be.
#define MYCONV_SHARED(type, name, count) \
  static char name##_identity;           \
  auto& name = ::myconv::cuda::emulator::shared<type, (count)>(&name##_identity)

namespace myconv::cuda {

int last_error();  // 0, or kFailed or kRefused: then error_text() of abi.h tells what happened

namespace emulator {

inline constexpr unsigned char kPoison = 0xff;
inline constexpr int kRefused = 9;   // cudaErrorInvalidConfiguration: too many threads, or no blocks
inline constexpr int kFailed = 719;  // cudaErrorLaunchFailure: a kernel did what it must not do

// A line of the kernel. As a default argument `= {}` it is the caller's.
struct Place {
  const char* file;
  int line;
  Place(const char* file = __builtin_FILE(), int line = __builtin_LINE()) : file(file), line(line) {}
};

// --- what emulator.cpp does ------------------------------------------------------------------------------------------

void run(dim3 grid, dim3 block, void (*call)(const void* kernel), const void* kernel);
void* shared_array(const void* identity, size_t bytes);
int lane();  // of the thread that runs
// Ends the launch with a message that begins with the thread that runs.
[[noreturn, gnu::format(printf, 1, 2)]] void fail(const char* format, ...);

// Waits until all threads of the block, or all lanes of the mask, are here. The last calls together(records), where
// records has a place for each thread of the block or lane of the warp: null for those that do not take part.
using Together = void (*)(void* const* records, int count);
void meet_block(void* record, Together together, Place place);
void meet_warp(unsigned mask, void* record, Together together, Place place);

template <typename Kernel>
void launch(dim3 grid, dim3 block, const Kernel& kernel) {
  run(grid, block, [](const void* k) { (*static_cast<const Kernel*>(k))(); }, &kernel);
}

template <typename T, size_t kCount>
T (&shared(const void* identity))
[kCount] { return *static_cast<T(*)[kCount]>(shared_array(identity, sizeof(T[kCount]))); }

// The records of a meeting with their type.
template <typename Record>
struct Records {
  void* const* pointers;
  int count;
  Record* operator[](int i) const { return static_cast<Record*>(pointers[i]); }
};

// F is a lambda without captures: what it needs stands in the records.
template <typename Record, typename F>
void meet_warp(unsigned mask, Record& record, F, Place place) {
  meet_warp(mask, &record, [](void* const* all, int count) { F{}(Records<Record>{all, count}); }, place);
}
template <typename Record, typename F>
void meet_block(Record& record, F, Place place) {
  meet_block(&record, [](void* const* all, int count) { F{}(Records<Record>{all, count}); }, place);
}

// --- collectives -----------------------------------------------------------------------------------------------------

// Every lane gets the value of the lane it names. One that does not take part has no value: poison.
template <typename T>
T shuffle(unsigned mask, T value, int source, Place place) {
  struct Record {
    T value, result;
    int source;
  } mine{value, value, source};
  meet_warp(
      mask, mine,
      [](Records<Record> lanes) {
        for (int i = 0; i < lanes.count; ++i) {
          if (!lanes[i]) continue;
          memset(static_cast<void*>(&lanes[i]->result), kPoison, sizeof(T));
          if (const Record* from = lanes[lanes[i]->source]) lanes[i]->result = from->value;
        }
      },
      place);
  return mine.result;
}

inline int first_lane(int width) { return lane() & ~(width - 1); }  // of this lane's part of the warp

inline unsigned ballot(unsigned mask, bool predicate, Place place) {
  struct Record {
    bool predicate;
    unsigned result;
  } mine{predicate, 0};
  meet_warp(
      mask, mine,
      [](Records<Record> lanes) {
        unsigned votes = 0;
        for (int i = 0; i < lanes.count; ++i)
          if (lanes[i] && lanes[i]->predicate) votes |= 1u << i;
        for (int i = 0; i < lanes.count; ++i)
          if (lanes[i]) lanes[i]->result = votes;
      },
      place);
  return mine.result;
}

inline int block_count(bool predicate, Place place) {
  struct Record {
    bool predicate;
    int result;
  } mine{predicate, 0};
  meet_block(
      mine,
      [](Records<Record> threads) {
        int total = 0;
        for (int i = 0; i < threads.count; ++i) total += threads[i]->predicate;
        for (int i = 0; i < threads.count; ++i) threads[i]->result = total;
      },
      place);
  return mine.result;
}

}  // namespace emulator
}  // namespace myconv::cuda

using KernelPlace = myconv::cuda::emulator::Place;

inline void __syncthreads(KernelPlace place = {}) { myconv::cuda::emulator::block_count(true, place); }
inline int __syncthreads_count(int predicate, KernelPlace place = {}) {
  return myconv::cuda::emulator::block_count(predicate, place);
}
inline int __syncthreads_or(int predicate, KernelPlace place = {}) {
  return myconv::cuda::emulator::block_count(predicate, place) > 0;
}
inline int __syncthreads_and(int predicate, KernelPlace place = {}) {
  return myconv::cuda::emulator::block_count(!predicate, place) == 0;
}

inline unsigned __ballot_sync(unsigned mask, int predicate, KernelPlace place = {}) {
  return myconv::cuda::emulator::ballot(mask, predicate, place);
}
inline int __any_sync(unsigned mask, int predicate, KernelPlace place = {}) {
  return myconv::cuda::emulator::ballot(mask, predicate, place) != 0;
}
inline int __all_sync(unsigned mask, int predicate, KernelPlace place = {}) {
  return myconv::cuda::emulator::ballot(mask, !predicate, place) == 0;
}
inline void __syncwarp(unsigned mask = ~0u, KernelPlace place = {}) {
  myconv::cuda::emulator::ballot(mask, true, place);
}
unsigned __activemask();  // the lanes that have not ended

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, KernelPlace place = {}) {
  using namespace myconv::cuda::emulator;
  return shuffle(mask, value, first_lane(width) + (source & (width - 1)), place);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, KernelPlace place = {}) {
  using namespace myconv::cuda::emulator;
  const int source = lane() - static_cast<int>(delta);
  return shuffle(mask, value, source >= first_lane(width) ? source : lane(), place);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, KernelPlace place = {}) {
  using namespace myconv::cuda::emulator;
  const int source = lane() + static_cast<int>(delta);
  return shuffle(mask, value, source < first_lane(width) + width ? source : lane(), place);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = warpSize, KernelPlace place = {}) {
  using namespace myconv::cuda::emulator;
  const int source = lane() ^ bits;
  return shuffle(mask, value, source < first_lane(width) + width ? source : lane(), place);
}

// No atomics: the order in which threads reach one is the hardware's, and the bits of a result may depend on the shape
// alone.
#define MYCONV_FORBIDDEN(name)     \
  template <typename... Arguments> \
  void name(Arguments&&...) = delete
MYCONV_FORBIDDEN(atomicAdd);
MYCONV_FORBIDDEN(atomicSub);
MYCONV_FORBIDDEN(atomicExch);
MYCONV_FORBIDDEN(atomicMin);
MYCONV_FORBIDDEN(atomicMax);
MYCONV_FORBIDDEN(atomicInc);
MYCONV_FORBIDDEN(atomicDec);
MYCONV_FORBIDDEN(atomicCAS);
MYCONV_FORBIDDEN(atomicAnd);
MYCONV_FORBIDDEN(atomicOr);
MYCONV_FORBIDDEN(atomicXor);
#undef MYCONV_FORBIDDEN
