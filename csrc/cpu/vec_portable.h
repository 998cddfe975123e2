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
  static void transpose(V (&v)[kLanes]) {
    V t[kLanes] = {};
    for (int i = 0; i < kLanes; ++i)
      for (int j = 0; j < kLanes; ++j) t[i][j] = v[j][i];
    for (int i = 0; i < kLanes; ++i) v[i] = t[i];
  }
};

using F32 = Vec<float>;
using F64 = Vec<double>;
inline constexpr int kRows = 4, kVectors = 2;  // 8 accumulators + 2 of B + 1 of A: 11 of 16 registers

}  // namespace myconv::cpu::portable
