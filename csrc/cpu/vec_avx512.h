// AVX-512 (F, BW, DQ, VL): 512-bit vectors, tails through masks.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace myconv::cpu::avx512 {

struct F32 {
  using T = float;
  using V = __m512;
  using Mask = __mmask16;
  static constexpr int kLanes = 16;
  static Mask mask(int64_t lanes) { return static_cast<Mask>((1u << lanes) - 1); }
  static V zero() { return _mm512_setzero_ps(); }
  static V broadcast(float value) { return _mm512_set1_ps(value); }
  static V load(const float* p) { return _mm512_loadu_ps(p); }
  static V load(const float* p, Mask m) { return _mm512_maskz_loadu_ps(m, p); }
  static V load_range(const float* p, int64_t first, int64_t last) {  // zero outside [first, last)
    return _mm512_maskz_loadu_ps(mask(last) & ~mask(first), p);
  }
  static void store(float* p, V v) { _mm512_storeu_ps(p, v); }
  static void store(float* p, V v, Mask m) { _mm512_mask_storeu_ps(p, m, v); }
  static V add(V a, V b) { return _mm512_add_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
};

struct F64 {
  using T = double;
  using V = __m512d;
  using Mask = __mmask8;
  static constexpr int kLanes = 8;
  static Mask mask(int64_t lanes) { return static_cast<Mask>((1u << lanes) - 1); }
  static V zero() { return _mm512_setzero_pd(); }
  static V broadcast(double value) { return _mm512_set1_pd(value); }
  static V load(const double* p) { return _mm512_loadu_pd(p); }
  static V load(const double* p, Mask m) { return _mm512_maskz_loadu_pd(m, p); }
  static V load_range(const double* p, int64_t first, int64_t last) {
    return _mm512_maskz_loadu_pd(mask(last) & ~mask(first), p);
  }
  static void store(double* p, V v) { _mm512_storeu_pd(p, v); }
  static void store(double* p, V v, Mask m) { _mm512_mask_storeu_pd(p, m, v); }
  static V add(V a, V b) { return _mm512_add_pd(a, b); }
  static V fma(V a, V b, V c) { return _mm512_fmadd_pd(a, b, c); }
};

inline constexpr int kRows = 8, kVectors = 3;  // 24 accumulators + 3 of B + 1 of A: 28 of 32 registers

}  // namespace myconv::cpu::avx512
