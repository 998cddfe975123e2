// Vectors of 16 bytes through the compiler's vector extension: SSE2 on any x86-64, NEON on AArch64, plain code
// elsewhere.
#pragma once

#include <cstdint>
#include <cstring>

namespace myconv::cpu::portable {

template <typename Scalar>
struct Vec {
  using T = Scalar;
  typedef Scalar V __attribute__((vector_size(16)));
  struct Mask {  // the lanes [first, last)
    int64_t first, last;
  };
  static constexpr int kLanes = 16 / sizeof(Scalar);
  static Mask mask(int64_t lanes) { return {0, lanes}; }
  static Mask range(int64_t first, int64_t last) { return {first, last}; }
  static V zero() { return V{}; }
  static V broadcast(T value) { return V{} + value; }
  static V load(const T* p) {
    V v;
    std::memcpy(&v, p, sizeof(V));
    return v;
  }
  static V load(const T* p, Mask m) {
    V v{};
    for (int64_t i = m.first; i < m.last; ++i) v[i] = p[i];
    return v;
  }
  static V load_range(const T* p, int64_t first, int64_t last) { return load(p, Mask{first, last}); }
  static void store(T* p, V v) { std::memcpy(p, &v, sizeof(V)); }
  static void store(T* p, V v, Mask m) {
    for (int64_t i = m.first; i < m.last; ++i) p[i] = v[i];
  }
  static V add(V a, V b) { return a + b; }
  static V fma(V a, V b, V c) { return a * b + c; }
  // Of the 2 * kLanes values of a and b, those at even and at odd places.
  static void deinterleave(V a, V b, V& even, V& odd) {
    for (int i = 0; i < kLanes; ++i) {
      const int at = 2 * i % kLanes;
      even[i] = i < kLanes / 2 ? a[at] : b[at];
      odd[i] = i < kLanes / 2 ? a[at + 1] : b[at + 1];
    }
  }
  static void interleave(V even, V odd, V& a, V& b) {  // its inverse
    for (int i = 0; i < kLanes; ++i) {
      a[i] = (i % 2 ? odd : even)[i / 2];
      b[i] = (i % 2 ? odd : even)[(kLanes + i) / 2];
    }
  }
  static V keep(V v, Mask m) {  // zero outside
    V kept{};
    for (int64_t i = m.first; i < m.last; ++i) kept[i] = v[i];
    return kept;
  }
  using Index = const int32_t*;
  static Index index(const int32_t* lanes) { return lanes; }
  static V permute(V v, Index at) { return permute(v, v, at); }  // lane l is v[at[l]]
  static V permute(V a, V b, Index at) {                         // of the 2 * kLanes of a and b
    V v;
    for (int i = 0; i < kLanes; ++i) v[i] = at[i] < kLanes ? a[at[i]] : b[at[i] - kLanes];
    return v;
  }
  static V load_few(const T* p) { return load(p); }  // 4 values or a vector
  static V insert(V v, Mask m, V few, Index at) {    // v, but few[at] in m
    for (int64_t i = m.first; i < m.last; ++i) v[i] = few[at[i]];
    return v;
  }
  static void transpose(V (&v)[kLanes]) {
    T t[kLanes][kLanes];
    for (int i = 0; i < kLanes; ++i)
      for (int j = 0; j < kLanes; ++j) t[j][i] = v[i][j];
    for (int i = 0; i < kLanes; ++i) v[i] = load(t[i]);
  }
};

struct F32 : Vec<float> {
  static constexpr bool kMasksBits = false;  // of 16-bit values in memory
  static V load_bfloat16(const uint16_t* p, int64_t values = kLanes) {
    V v{};
    for (int i = 0; i < values; ++i) {
      const uint32_t bits = uint32_t{p[i]} << 16;
      float value;
      std::memcpy(&value, &bits, sizeof(value));
      v[i] = value;
    }
    return v;
  }
  static void store_bfloat16(uint16_t* p, V v, int64_t values = kLanes) {
    for (int i = 0; i < values; ++i) {
      uint32_t bits;
      const float value = v[i];
      std::memcpy(&bits, &value, sizeof(bits));
      p[i] = static_cast<uint16_t>((value != value ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
  }
  // float16: sign, 5 bits of exponent, 10 of mantissa. The products and sums with powers of two below are exact but for
  // the one rounding that is wanted, and meet no float32 denormal.
  static V load_float16(const uint16_t* p, int64_t values = kLanes) {
    V v{};
    for (int i = 0; i < values; ++i) {
      const uint32_t h = p[i], sign = (h & 0x8000) << 16, exponent = h >> 10 & 0x1f, mantissa = h & 0x3ff;
      uint32_t bits = exponent == 31 ? 0x7f800000 | mantissa << 13 : (exponent + 112) << 23 | mantissa << 13;
      if (exponent == 0) {
        const float small = static_cast<float>(mantissa) * 0x1p-24f;
        std::memcpy(&bits, &small, sizeof(bits));
      }
      bits |= sign;
      float value;
      std::memcpy(&value, &bits, sizeof(value));
      v[i] = value;
    }
    return v;
  }
  static void store_float16(uint16_t* p, V v, int64_t values = kLanes) {
    for (int i = 0; i < values; ++i) {
      uint32_t bits;
      float value = v[i];
      std::memcpy(&bits, &value, sizeof(bits));
      const uint32_t sign = bits >> 16 & 0x8000;
      bits &= 0x7fffffff;
      uint32_t h;
      if (bits > 0x7f800000)
        h = 0x7e00 | (bits >> 13 & 0x3ff);
      else if (bits >= 0x477ff000)  // rounds beyond the largest
        h = 0x7c00;
      else if (bits >= 0x38800000)
        h = (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13;
      else {  // denormal: the addition rounds at its last place
        std::memcpy(&value, &bits, sizeof(value));
        const float shifted = value + 0.5f;
        std::memcpy(&bits, &shifted, sizeof(bits));
        h = bits - 0x3f000000;
      }
      p[i] = static_cast<uint16_t>(sign | h);
    }
  }
};
using F64 = Vec<double>;
inline constexpr int kRows = 4, kVectors = 2;  // 8 accumulators + 2 of B + 1 of A: 11 of 16 registers

}  // namespace myconv::cpu::portable
