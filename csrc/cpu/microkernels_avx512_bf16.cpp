// The microkernels of bfloat16 for AVX-512 with BF16: words are pairs, multiplied and added to two at a time by vdpbf16ps,
// which treats denormals as zeros whatever it is told. As in microkernels_avx512.cpp, the target is set here.
#include "cpu/microkernels.h"

#ifdef MYCONV_X86
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in GCC's own header: gcc.gnu.org/PR105593
#endif
#include <immintrin.h>
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
#endif
#define MYCONV_ONLY_PAIRS
#define MYCONV_AVX512 avx512_bf16
#include "cpu/vec_avx512.h"

namespace myconv::cpu::avx512_bf16 {
#include "cpu/microkernels.inc"

namespace {

struct Pairs : F32 {
  using S = bfloat16;
  static constexpr int kPair = 2;
  static constexpr bool kHalf = true;
  static __m512bh bits(V v) { return reinterpret_cast<__m512bh>(v); }
  static V fma(V a, V b, V sum) { return _mm512_dpbf16_ps(sum, bits(a), bits(b)); }
  static V along(const S* p) { return _mm512_castsi512_ps(_mm512_loadu_si512(p)); }
  static V along(const S* p, int64_t values) {
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(static_cast<__mmask32>((1ull << values) - 1), p));
  }
  // One vector of pairs from two rows; the second may be missing.
  static V across(const S* p, const S* second, auto... values) {
    const __m512i low = _mm512_cvtepu16_epi32(load_bits(&p->bits, values...));
    if (!second) return _mm512_castsi512_ps(low);
    const __m512i high = _mm512_cvtepu16_epi32(load_bits(&second->bits, values...));
    return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
  // What the processor's own conversion does but for denormals, which are kept.
  static void store_sum(S* p, V v, auto... values) { store_bfloat16(&p->bits, v, values...); }
};

}  // namespace

extern constinit const Kernels<bfloat16> kPairs = kernels<Pairs>();
}  // namespace myconv::cpu::avx512_bf16
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
