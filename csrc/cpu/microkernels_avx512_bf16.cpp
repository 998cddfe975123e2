// The microkernels of bfloat16 for AVX-512 with BF16: words are pairs, which vdpbf16ps multiplies and adds up, or values
// whose results vcvtneps2bf16 rounds. Both treat denormals as zeros whatever they are told. As in
// microkernels_avx512.cpp, the target is set here.
#include "cpu/microkernels.h"

#ifdef MYCONV_X86
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in GCC's own header: gcc.gnu.org/PR105593
#pragma GCC diagnostic ignored "-Wuninitialized"
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

// Rounds to nearest even; denormals become zeros, as in the products.
void store_rounded(bfloat16* p, F32::V v, auto... values) {
  F32::store_bits(&p->bits, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)), values...);
}

struct Rounded : Widened<F32, bfloat16> {
  static void write(S* p, V v, Mask m) { store_rounded(p, v, m); }
  static void store_sum(S* p, V v, auto... values) { store_rounded(p, v, values...); }
};

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
  // `words` words, `of_step` at a time from `values` neighbours each: index tells which two are whose; 32 is a zero.
  static void pick(const S* from, int64_t values, const uint16_t (&index)[32], T* to, int64_t words, int64_t of_step) {
    const __m512i at = _mm512_loadu_si512(index);
    const __mmask32 there = _mm512_cmplt_epu16_mask(at, _mm512_set1_epi16(32));
    const __mmask32 loaded = static_cast<__mmask32>((1ull << values) - 1);
    for (; words > 0; words -= of_step, from += values, to += of_step) {
      const bool whole = words >= of_step;
      const __mmask32 mask = whole ? loaded : static_cast<__mmask32>((1ull << values * words / of_step) - 1);
      const __m512i v = _mm512_maskz_permutexvar_epi16(there, at, _mm512_maskz_loadu_epi16(mask, from));
      store(to, _mm512_castsi512_ps(v), F32::mask(whole ? of_step : words));
    }
  }
  // Values `step` apart, of as many words at a time as a vector of neighbours has.
  static bool copy_strided(const S* from, int64_t step, int64_t length, T* to) {
    if (step > kLanes) return false;
    const int64_t at_once = kLanes / step * 2;
    uint16_t index[32];
    for (int64_t i = 0; i < 32; ++i) index[i] = static_cast<uint16_t>(i < at_once ? i * step : 32);
    const __m512i at = _mm512_loadu_si512(index);
    const __mmask32 there = _mm512_cmplt_epu16_mask(at, _mm512_set1_epi16(32));
    for (; length > 0; length -= at_once, from += at_once * step, to += at_once / 2) {
      const int64_t values = least(at_once, length);
      const auto loaded = static_cast<__mmask32>((1ull << ((values - 1) * step + 1)) - 1);
      const __m512i v = _mm512_maskz_permutexvar_epi16(there, at, _mm512_maskz_loadu_epi16(loaded, from));
      store(to, _mm512_castsi512_ps(v), F32::mask((values + 1) / 2));
    }
    return true;
  }
  // Dense rows of few values, each of which fills up its own last word.
  static bool copy_few(const S* from, int64_t count, int64_t length, T* to) {
    if (length % 2 == 0 || length > 15) return false;
    const int64_t words = (length + 1) / 2, rows = kLanes / words;
    uint16_t index[32];
    for (int64_t i = 0; i < 32; ++i) {
      const int64_t row = i / (2 * words), value = i % (2 * words);
      index[i] = static_cast<uint16_t>(row < rows && value < length ? row * length + value : 32);
    }
    pick(from, rows * length, index, to, count * words, rows * words);
    return true;
  }
  // Dense rows of few values, two of which make a row of words.
  static bool pair_few(const S* from, int64_t count, int64_t length, T* to) {
    if (length > kLanes || count % 2 != 0) return false;
    const int64_t pairs = kLanes / length;
    uint16_t index[32];
    for (int64_t i = 0; i < 32; ++i) {
      const int64_t word = i / 2, pair = word / length;
      index[i] = static_cast<uint16_t>(pair < pairs ? (2 * pair + i % 2) * length + word % length : 32);
    }
    pick(from, 2 * pairs * length, index, to, count / 2 * length, pairs * length);
    return true;
  }
  static void store_sum(S* p, V v, auto... values) { store_rounded(p, v, values...); }
};

}  // namespace

extern constinit const Kernels<bfloat16> kPairs = kernels<Pairs>();

void round_in_hardware(Kernels<bfloat16>& k) {
  k.store_rows = store_rows<Rounded>;
  k.store_transposed = store_transposed<Rounded>;
  k.interleave = interleave<Rounded>;
  winograds<Rounded>(k.winograd);
  set_gathers<Rounded>(k.depthwise);
}
}  // namespace myconv::cpu::avx512_bf16
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
