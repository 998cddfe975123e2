// AVX2 + FMA: 256-bit vectors.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace myconv::cpu::avx2 {

struct F32 {
  using T = float;
  using V = __m256;
  using Mask = __m256i;
  static constexpr int kLanes = 8;
  static Mask mask(int64_t lanes) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(lanes)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static Mask range(int64_t first, int64_t last) { return _mm256_andnot_si256(mask(first), mask(last)); }
  static V zero() { return _mm256_setzero_ps(); }
  static V broadcast(float value) { return _mm256_set1_ps(value); }
  static V load(const float* p) { return _mm256_loadu_ps(p); }
  static V load(const float* p, Mask m) { return _mm256_maskload_ps(p, m); }
  static V load_range(const float* p, int64_t first, int64_t last) {  // zero outside [first, last)
    return _mm256_maskload_ps(p, _mm256_andnot_si256(mask(first), mask(last)));
  }
  static void store(float* p, V v) { _mm256_storeu_ps(p, v); }
  static void store(float* p, V v, Mask m) { _mm256_maskstore_ps(p, m, v); }
  static void store_past(float* p, V v) { _mm256_stream_ps(p, v); }  // the caches: an aligned vector
  static V add(V a, V b) { return _mm256_add_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  // 16-bit values in memory, all lanes or the first few: these in pieces of 4, 2 and 1.
  static constexpr bool kMasksBits = false;
  static __m128i load_bits(const uint16_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
  static __m128i load_bits(const uint16_t* p, int64_t values) {
    if (values >= kLanes) return load_bits(p);
    uint64_t rest = 0, four = 0;
    const uint16_t* const last = p + (values & 4);
    if (values & 4) __builtin_memcpy(&four, p, 8);
    if (values & 2) __builtin_memcpy(&rest, last, 4);
    if (values & 1) rest |= uint64_t{last[values & 2]} << 16 * (values & 2);
    return values & 4 ? _mm_set_epi64x(static_cast<int64_t>(rest), static_cast<int64_t>(four))
                      : _mm_set_epi64x(0, static_cast<int64_t>(rest));
  }
  static void store_bits(uint16_t* p, __m128i bits) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bits); }
  static void store_bits(uint16_t* p, __m128i bits, int64_t values) {
    if (values >= kLanes) return store_bits(p, bits);
    uint64_t rest = static_cast<uint64_t>(_mm_cvtsi128_si64(bits));
    if (values & 4) {
      __builtin_memcpy(p, &rest, 8);
      rest = static_cast<uint64_t>(_mm_extract_epi64(bits, 1)), p += 4;
    }
    if (values & 2) {
      __builtin_memcpy(p, &rest, 4);
      rest >>= 32, p += 2;
    }
    if (values & 1) *p = static_cast<uint16_t>(rest);
  }
  static V load_bfloat16(const uint16_t* p, auto... values) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_bits(p, values...)), 16));
  }
  static void store_bfloat16(uint16_t* p, V v, auto... values) {
    const __m256i bits = _mm256_castps_si256(v),
                  odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i nan = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i kept = _mm256_blendv_epi8(rounded, nan, _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
    const __m256i high = _mm256_srli_epi32(kept, 16);
    store_bits(p, _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1)), values...);
  }
  static V load_float16(const uint16_t* p, auto... values) { return _mm256_cvtph_ps(load_bits(p, values...)); }
  static void store_float16(uint16_t* p, V v, auto... values) {
    store_bits(p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT), values...);
  }
  // Of the 2 * kLanes values of a and b, those at even and at odd places.
  static void deinterleave(V a, V b, V& even, V& odd) {
    const V low = _mm256_permute2f128_ps(a, b, 0x20), high = _mm256_permute2f128_ps(a, b, 0x31);
    even = _mm256_shuffle_ps(low, high, 0x88);
    odd = _mm256_shuffle_ps(low, high, 0xdd);
  }
  static void interleave(V even, V odd, V& a, V& b) {  // its inverse
    const V low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
    a = _mm256_permute2f128_ps(low, high, 0x20);
    b = _mm256_permute2f128_ps(low, high, 0x31);
  }
  static V keep(V v, Mask m) { return _mm256_and_ps(v, _mm256_castsi256_ps(m)); }  // zero outside
  using Index = __m256i;
  static Index index(const int32_t* lanes) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes)); }
  static V permute(V v, Index at) { return _mm256_permutevar8x32_ps(v, at); }  // lane l is v[at[l]]
  static V permute(V a, V b, Index at) {                                       // of the 2 * kLanes of a and b
    const __m256i from_b = _mm256_slli_epi32(at, 28);
    return _mm256_blendv_ps(permute(a, at), permute(b, at), _mm256_castsi256_ps(from_b));
  }
  static V load_few(const float* p) { return _mm256_castps128_ps256(_mm_loadu_ps(p)); }  // 4 values or a vector
  static V insert(V v, Mask m, V few, Index at) {                                        // v, but few[at] in m
    return _mm256_blendv_ps(v, permute(few, at), _mm256_castsi256_ps(m));
  }
  static void transpose(V (&v)[8]) {  // pairs, then quads of rows inside 128 bits, then the halves
    V t[8], q[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
      t[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
      q[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
      q[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
      q[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      q[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      v[i] = _mm256_permute2f128_ps(q[i], q[4 + i], 0x20);
      v[4 + i] = _mm256_permute2f128_ps(q[i], q[4 + i], 0x31);
    }
  }
};

struct F64 {
  using T = double;
  using V = __m256d;
  using Mask = __m256i;
  static constexpr int kLanes = 4;
  static Mask mask(int64_t lanes) {
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(lanes), _mm256_setr_epi64x(0, 1, 2, 3));
  }
  static Mask range(int64_t first, int64_t last) { return _mm256_andnot_si256(mask(first), mask(last)); }
  static V zero() { return _mm256_setzero_pd(); }
  static V broadcast(double value) { return _mm256_set1_pd(value); }
  static V load(const double* p) { return _mm256_loadu_pd(p); }
  static V load(const double* p, Mask m) { return _mm256_maskload_pd(p, m); }
  static V load_range(const double* p, int64_t first, int64_t last) {
    return _mm256_maskload_pd(p, _mm256_andnot_si256(mask(first), mask(last)));
  }
  static void store(double* p, V v) { _mm256_storeu_pd(p, v); }
  static void store(double* p, V v, Mask m) { _mm256_maskstore_pd(p, m, v); }
  static void store_past(double* p, V v) { _mm256_stream_pd(p, v); }
  static V add(V a, V b) { return _mm256_add_pd(a, b); }
  static V fma(V a, V b, V c) { return _mm256_fmadd_pd(a, b, c); }
  static void deinterleave(V a, V b, V& even, V& odd) {
    const V low = _mm256_permute2f128_pd(a, b, 0x20), high = _mm256_permute2f128_pd(a, b, 0x31);
    even = _mm256_unpacklo_pd(low, high);
    odd = _mm256_unpackhi_pd(low, high);
  }
  static void interleave(V even, V odd, V& a, V& b) {
    const V low = _mm256_unpacklo_pd(even, odd), high = _mm256_unpackhi_pd(even, odd);
    a = _mm256_permute2f128_pd(low, high, 0x20);
    b = _mm256_permute2f128_pd(low, high, 0x31);
  }
  static V keep(V v, Mask m) { return _mm256_and_pd(v, _mm256_castsi256_pd(m)); }
  using Index = __m256i;  // of the 32-bit halves
  static Index index(const int32_t* lanes) {
    const __m256i low =
        _mm256_slli_epi64(_mm256_cvtepi32_epi64(_mm_loadu_si128(reinterpret_cast<const __m128i*>(lanes))), 1);
    return _mm256_or_si256(low, _mm256_slli_epi64(_mm256_add_epi64(low, _mm256_set1_epi64x(1)), 32));
  }
  static V permute(V v, Index at) { return _mm256_castps_pd(_mm256_permutevar8x32_ps(_mm256_castpd_ps(v), at)); }
  static V permute(V a, V b, Index at) {
    const __m256i from_b = _mm256_slli_epi64(at, 60);
    return _mm256_blendv_pd(permute(a, at), permute(b, at), _mm256_castsi256_pd(from_b));
  }
  static V load_few(const double* p) { return load(p); }
  static V insert(V v, Mask m, V few, Index at) {
    return _mm256_blendv_pd(v, permute(few, at), _mm256_castsi256_pd(m));
  }
  static void transpose(V (&v)[4]) {
    const V a = _mm256_unpacklo_pd(v[0], v[1]), b = _mm256_unpackhi_pd(v[0], v[1]);
    const V c = _mm256_unpacklo_pd(v[2], v[3]), d = _mm256_unpackhi_pd(v[2], v[3]);
    v[0] = _mm256_permute2f128_pd(a, c, 0x20);
    v[1] = _mm256_permute2f128_pd(b, d, 0x20);
    v[2] = _mm256_permute2f128_pd(a, c, 0x31);
    v[3] = _mm256_permute2f128_pd(b, d, 0x31);
  }
};

inline constexpr int kRows = 6, kVectors = 2;  // 12 accumulators + 2 of B + 1 of A: 15 of 16 registers

}  // namespace myconv::cpu::avx2
