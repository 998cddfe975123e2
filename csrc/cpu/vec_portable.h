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
  using Mask = int64_t;  // how many leading lanes are in use
  static constexpr int kLanes = 16 / sizeof(Scalar);
  static Mask mask(int64_t lanes) { return lanes; }
  static V zero() { return V{}; }
  static V broadcast(T value) { return V{} + value; }
  static V load(const T* p) {
    V v;
    std::memcpy(&v, p, sizeof(V));
    return v;
  }
  static V load(const T* p, Mask lanes) {
    V v{};
    for (int64_t i = 0; i < lanes; ++i) v[i] = p[i];
    return v;
  }
  static V load_range(const T* p, int64_t first, int64_t last) {  // zero outside [first, last)
    V v{};
    for (int64_t i = first; i < last; ++i) v[i] = p[i];
    return v;
  }
  static void store(T* p, V v) { std::memcpy(p, &v, sizeof(V)); }
  static void store(T* p, V v, Mask lanes) {
    for (int64_t i = 0; i < lanes; ++i) p[i] = v[i];
  }
  static V add(V a, V b) { return a + b; }
  static V fma(V a, V b, V c) { return a * b + c; }
  static V even(V a, V b) {  // the lanes of even number of both
    V v{};
    for (int i = 0; i < kLanes; ++i) v[i] = i < kLanes / 2 ? a[2 * i] : b[2 * i - kLanes];
    return v;
  }
  static void transpose(V (&v)[kLanes]) {
    T t[kLanes][kLanes];
    for (int i = 0; i < kLanes; ++i)
      for (int j = 0; j < kLanes; ++j) t[j][i] = v[i][j];
    for (int i = 0; i < kLanes; ++i) v[i] = load(t[i]);
  }
};

using F32 = Vec<float>;
using F64 = Vec<double>;
inline constexpr int kRows = 4, kVectors = 2;  // 8 accumulators + 2 of B + 1 of A: 11 of 16 registers

}  // namespace myconv::cpu::portable
