// AVX-512 (F, BW, DQ, VL): 512-bit vectors, tails through masks.
#pragma once

#include <immintrin.h>

#include <cstdint>

// In a namespace of its own for each target that this is compiled for.
#ifndef MYCONV_AVX512
#define MYCONV_AVX512 avx512
#endif

namespace myconv::cpu::MYCONV_AVX512 {

struct F32 {
  using T = float;
  using V = __m512;
  using Mask = __mmask16;
  static constexpr int kLanes = 16;
  static Mask mask(int64_t lanes) { return static_cast<Mask>((1u << lanes) - 1); }
  static Mask range(int64_t first, int64_t last) { return mask(last) & ~mask(first); }  // the lanes [first, last)
  static V zero() { return _mm512_setzero_ps(); }
  static V broadcast(float value) { return _mm512_set1_ps(value); }
  static V load(const float* p) { return _mm512_loadu_ps(p); }
  static V load(const float* p, Mask m) { return _mm512_maskz_loadu_ps(m, p); }
  static V load_range(const float* p, int64_t first, int64_t last) {  // zero outside [first, last)
    return _mm512_maskz_loadu_ps(mask(last) & ~mask(first), p);
  }
  static void store(float* p, V v) { _mm512_storeu_ps(p, v); }
  static void store(float* p, V v, Mask m) { _mm512_mask_storeu_ps(p, m, v); }
  static void store_past(float* p, V v) { _mm512_stream_ps(p, v); }  // the caches: an aligned vector
  static V add(V a, V b) { return _mm512_add_ps(a, b); }
  static V mul(V a, V b) { return _mm512_mul_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  // 16-bit values in memory: all lanes, the first few, or any.
  static constexpr bool kMasksBits = true;
  static __m256i load_bits(const uint16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static __m256i load_bits(const uint16_t* p, int64_t values) { return _mm256_maskz_loadu_epi16(mask(values), p); }
  static void store_bits(uint16_t* p, __m256i bits) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bits); }
  static void store_bits(uint16_t* p, __m256i bits, int64_t values) { _mm256_mask_storeu_epi16(p, mask(values), bits); }
  static void store_bits(uint16_t* p, __m256i bits, Mask m) { _mm256_mask_storeu_epi16(p, m, bits); }
  static V load_bfloat16(const uint16_t* p, auto... values) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_bits(p, values...)), 16));
  }
  static void store_bfloat16(uint16_t* p, V v, auto... values) {
    const __m512i bits = _mm512_castps_si512(v),
                  odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __m512i nan = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __m512i kept = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), nan);
    store_bits(p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)), values...);
  }
  static V load_float16(const uint16_t* p, auto... values) { return _mm512_cvtph_ps(load_bits(p, values...)); }
  // Any lanes: one instruction each, which does not touch what its mask leaves out. From intrinsics it would be two.
  static V load_bfloat16(const uint16_t* p, Mask m) {
    __m512i v;
    asm("vpmovzxwd %1, %0%{%2%}%{z%}" : "=v"(v) : "m"(*reinterpret_cast<const __m256i_u*>(p)), "Yk"(m));
    return _mm512_castsi512_ps(_mm512_slli_epi32(v, 16));
  }
  static V load_float16(const uint16_t* p, Mask m) {
    V v;
    asm("vcvtph2ps %1, %0%{%2%}%{z%}" : "=v"(v) : "m"(*reinterpret_cast<const __m256i_u*>(p)), "Yk"(m));
    return v;
  }
  static void store_float16(uint16_t* p, V v, auto... values) {
    store_bits(p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT), values...);
  }
  // Of the 2 * kLanes values of a and b, those at even and at odd places.
  static void deinterleave(V a, V b, V& even, V& odd) {
    const __m512i at = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    even = _mm512_permutex2var_ps(a, at, b);
    odd = _mm512_permutex2var_ps(a, _mm512_add_epi32(at, _mm512_set1_epi32(1)), b);
  }
  static void interleave(V even, V odd, V& a, V& b) {  // its inverse
    const __m512i at = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    a = _mm512_permutex2var_ps(even, at, odd);
    b = _mm512_permutex2var_ps(even, _mm512_add_epi32(at, _mm512_set1_epi32(8)), odd);
  }
  static V keep(V v, Mask m) { return _mm512_maskz_mov_ps(m, v); }  // zero outside
  // Lane 0 is the last one of `before`, lane l is v[l - 1]; zero outside the mask.
  static V shift_in(V before, V v, Mask m) {
    return _mm512_castsi512_ps(
        _mm512_maskz_alignr_epi32(m, _mm512_castps_si512(v), _mm512_castps_si512(before), kLanes - 1));
  }
  using Index = __m512i;
  static Index index(const int32_t* lanes) { return _mm512_loadu_si512(lanes); }
  static V permute(V v, Index at) { return _mm512_permutexvar_ps(at, v); }               // lane l is v[at[l]]
  static V permute(V a, V b, Index at) { return _mm512_permutex2var_ps(a, at, b); }      // of the 2 * kLanes of a and b
  static V load_few(const float* p) { return _mm512_castps128_ps512(_mm_loadu_ps(p)); }  // 4 values or a vector
  // v, but few[at] in m.
  static V insert(V v, Mask m, V few, Index at) { return _mm512_mask_permutexvar_ps(v, m, at, few); }
  static void transpose(V (&v)[16]) {  // pairs, then quads of rows inside 128 bits, then the 128-bit quarters
    V t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
      t[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
      v[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
      v[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
      v[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      v[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const V a = _mm512_shuffle_f32x4(v[i], v[4 + i], 0x88), b = _mm512_shuffle_f32x4(v[i], v[4 + i], 0xdd);
      const V c = _mm512_shuffle_f32x4(v[8 + i], v[12 + i], 0x88), d = _mm512_shuffle_f32x4(v[8 + i], v[12 + i], 0xdd);
      v[i] = _mm512_shuffle_f32x4(a, c, 0x88);
      v[4 + i] = _mm512_shuffle_f32x4(b, d, 0x88);
      v[8 + i] = _mm512_shuffle_f32x4(a, c, 0xdd);
      v[12 + i] = _mm512_shuffle_f32x4(b, d, 0xdd);
    }
  }
};

struct F64 {
  using T = double;
  using V = __m512d;
  using Mask = __mmask8;
  static constexpr int kLanes = 8;
  static Mask mask(int64_t lanes) { return static_cast<Mask>((1u << lanes) - 1); }
  static Mask range(int64_t first, int64_t last) { return mask(last) & ~mask(first); }  // the lanes [first, last)
  static V zero() { return _mm512_setzero_pd(); }
  static V broadcast(double value) { return _mm512_set1_pd(value); }
  static V load(const double* p) { return _mm512_loadu_pd(p); }
  static V load(const double* p, Mask m) { return _mm512_maskz_loadu_pd(m, p); }
  static V load_range(const double* p, int64_t first, int64_t last) {
    return _mm512_maskz_loadu_pd(mask(last) & ~mask(first), p);
  }
  static void store(double* p, V v) { _mm512_storeu_pd(p, v); }
  static void store(double* p, V v, Mask m) { _mm512_mask_storeu_pd(p, m, v); }
  static void store_past(double* p, V v) { _mm512_stream_pd(p, v); }
  static V add(V a, V b) { return _mm512_add_pd(a, b); }
  static V mul(V a, V b) { return _mm512_mul_pd(a, b); }
  static V fma(V a, V b, V c) { return _mm512_fmadd_pd(a, b, c); }
  static void deinterleave(V a, V b, V& even, V& odd) {
    const __m512i at = _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14);
    even = _mm512_permutex2var_pd(a, at, b);
    odd = _mm512_permutex2var_pd(a, _mm512_add_epi64(at, _mm512_set1_epi64(1)), b);
  }
  static void interleave(V even, V odd, V& a, V& b) {
    const __m512i at = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
    a = _mm512_permutex2var_pd(even, at, odd);
    b = _mm512_permutex2var_pd(even, _mm512_add_epi64(at, _mm512_set1_epi64(4)), odd);
  }
  static V keep(V v, Mask m) { return _mm512_maskz_mov_pd(m, v); }
  static V shift_in(V before, V v, Mask m) {
    return _mm512_castsi512_pd(
        _mm512_maskz_alignr_epi64(m, _mm512_castpd_si512(v), _mm512_castpd_si512(before), kLanes - 1));
  }
  using Index = __m512i;
  static Index index(const int32_t* lanes) {
    return _mm512_cvtepi32_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes)));
  }
  static V permute(V v, Index at) { return _mm512_permutexvar_pd(at, v); }
  static V permute(V a, V b, Index at) { return _mm512_permutex2var_pd(a, at, b); }
  static V load_few(const double* p) { return _mm512_castpd256_pd512(_mm256_loadu_pd(p)); }
  static V insert(V v, Mask m, V few, Index at) { return _mm512_mask_permutexvar_pd(v, m, at, few); }
  static void transpose(V (&v)[8]) {
    V t[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm512_unpacklo_pd(v[i], v[i + 1]);
      t[i + 1] = _mm512_unpackhi_pd(v[i], v[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const V a = _mm512_shuffle_f64x2(t[i], t[2 + i], 0x88), b = _mm512_shuffle_f64x2(t[i], t[2 + i], 0xdd);
      const V c = _mm512_shuffle_f64x2(t[4 + i], t[6 + i], 0x88), d = _mm512_shuffle_f64x2(t[4 + i], t[6 + i], 0xdd);
      v[i] = _mm512_shuffle_f64x2(a, c, 0x88);
      v[2 + i] = _mm512_shuffle_f64x2(b, d, 0x88);
      v[4 + i] = _mm512_shuffle_f64x2(a, c, 0xdd);
      v[6 + i] = _mm512_shuffle_f64x2(b, d, 0xdd);
    }
  }
};

inline constexpr int kRows = 8, kVectors = 3;  // 24 accumulators + 3 of B + 1 of A: 28 of 32 registers

}  // namespace myconv::cpu::MYCONV_AVX512
