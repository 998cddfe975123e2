// Loops of multiply-adds that touch nothing but registers: the most arithmetic that a core does in a second. And a line of
// the cache that two threads write in turn.
//
// Each loop has as many independent chains as hide the latency of its instruction and fit the registers. The
// multiply-add of vectors is one instruction where the target has it, else a product and a sum.
#include <atomic>
#include <cstdint>
#include <thread>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

// Chains begin apart, so that no compiler makes one of them; the asm is there to use their ends.
#define VECTOR_LOOP(name, target, scalar, bytes, chains)                                                              \
  target void name(int64_t rounds) {                                                                                  \
    typedef scalar V __attribute__((vector_size(bytes)));                                                             \
    V acc[chains];                                                                                                    \
    const V a = V{} + scalar(0.999), b = V{} + scalar(1e-4);                                                          \
    UNROLL for (int i = 0; i < chains; ++i) acc[i] = V{} + scalar(i);                                                 \
    for (int64_t round = 0; round < rounds; ++round) UNROLL for (int i = 0; i < chains; ++i) acc[i] = acc[i] * a + b; \
    UNROLL for (int i = 0; i < chains; ++i) USE(acc[i]);                                                              \
  }
#define UNROLL _Pragma("GCC unroll 32")

#if defined(__x86_64__)
#define USE(value) asm volatile("" : : "v"(value))
#define AVX2 __attribute__((target("avx2,fma")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#define AVX512_BF16 __attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
constexpr int kPortableChains = 12;  // of 16 registers
VECTOR_LOOP(avx2_float32, AVX2, float, 32, 12)
VECTOR_LOOP(avx2_float64, AVX2, double, 32, 12)
VECTOR_LOOP(avx512_float32, AVX512, float, 64, 24)
VECTOR_LOOP(avx512_float64, AVX512, double, 64, 24)

AVX512_BF16 void avx512_bfloat16(int64_t rounds) {
  constexpr int chains = 24;
  __m512 acc[chains];
  const __m512bh a = _mm512_cvtne2ps_pbh(_mm512_set1_ps(1e-3f), _mm512_set1_ps(1e-3f));
  UNROLL for (int i = 0; i < chains; ++i) acc[i] = _mm512_set1_ps(float(i));
  for (int64_t round = 0; round < rounds; ++round)
    UNROLL for (int i = 0; i < chains; ++i) acc[i] = _mm512_dpbf16_ps(acc[i], a, a);
  UNROLL for (int i = 0; i < chains; ++i) USE(acc[i]);
}

bool has_avx2() { return bool(__builtin_cpu_supports("avx2")) && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return bool(__builtin_cpu_supports("avx512f")) && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#elif defined(__aarch64__)
#define USE(value) asm volatile("" : : "w"(value))
constexpr int kPortableChains = 24;  // of 32 registers
#else
#define USE(value) asm volatile("" : : "m"(value))
constexpr int kPortableChains = 12;
#endif
VECTOR_LOOP(portable_float32, , float, 16, kPortableChains)
VECTOR_LOOP(portable_float64, , double, 16, kPortableChains)

struct Loop {
  const char *isa, *dtype;
  int flops;  // of a round
  bool (*runs_here)();
  void (*run)(int64_t rounds);
};

bool always() { return true; }

const Loop kLoops[] = {
    {"portable", "float32", 2 * 4 * kPortableChains, always, portable_float32},
    {"portable", "float64", 2 * 2 * kPortableChains, always, portable_float64},
#if defined(__x86_64__)
    {"avx2", "float32", 2 * 8 * 12, has_avx2, avx2_float32},
    {"avx2", "float64", 2 * 4 * 12, has_avx2, avx2_float64},
    {"avx512", "float32", 2 * 16 * 24, has_avx512, avx512_float32},
    {"avx512", "float64", 2 * 8 * 24, has_avx512, avx512_float64},
    {"avx512", "bfloat16", 2 * 32 * 24, has_avx512_bf16, avx512_bfloat16},
#endif
};

// Its value counts how often it has been passed on.
void pass_on(std::atomic<int64_t>& line, int64_t first, int64_t rounds) {
  for (int64_t i = 0; i < rounds; ++i) {
    const int64_t mine = 2 * i + first;
    while (line.load(std::memory_order_acquire) != mine) {
    }
    line.store(mine + 1, std::memory_order_release);
  }
}

}  // namespace

// The index of a loop counts from 0; behind the last one its names are null.
extern "C" {
const char* loop_isa(unsigned index) { return index < sizeof(kLoops) / sizeof(Loop) ? kLoops[index].isa : nullptr; }
const char* loop_dtype(unsigned index) { return kLoops[index].dtype; }
int loop_flops(unsigned index) { return kLoops[index].flops; }
bool loop_runs_here(unsigned index) { return kLoops[index].runs_here(); }
void loop_run(unsigned index, int64_t rounds) { kLoops[index].run(rounds); }

// So many times to another thread and back.
void round_trips(int64_t rounds) {
  alignas(128) std::atomic<int64_t> line = 0;
  std::thread other([&] { pass_on(line, 1, rounds); });
  pass_on(line, 0, rounds);
  other.join();
}
}
