// What every kernel file needs: the element types, the sums, and the launch.
//
// Kernels are ordinary CUDA C++ with three words of our own, so that the emulator (tests/emulator) can compile the same
// source with the host's compiler, where a launch is a function call and shared memory is an array with guards:
//
//   MYCONV_LAUNCH(kernel, blocks, threads, stream, arguments...)   kernel<<<blocks, threads, 0, stream>>>(arguments...)
//   MYCONV_SHARED(type, name, count)                               __shared__ type name[count]
//   last_error()                                                   of the launches since it was last asked
#pragma once

#include <cstdint>

#include "conv_shape.h"

#if defined(MYCONV_EMULATOR)
#include "emulator.h"
#else
#include <cuda_runtime_api.h>

#define MYCONV_LAUNCH(kernel, blocks, threads, stream, ...) \
  kernel<<<(blocks), (threads), 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define MYCONV_SHARED(type, name, count) __shared__ type name[count]

namespace myconv::cuda {
inline int last_error() { return cudaGetLastError(); }
}  // namespace myconv::cuda
#endif

namespace myconv::cuda {

// --- element types ---------------------------------------------------------------------------------------------------
//
// A kernel computes in Compute<T>: load() widens and store() rounds once, to nearest even. The 16-bit types are bits in
// memory and nothing else, converted by integer arithmetic, which needs no header and is the same on host and device.

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <typename T>
struct ComputeType {
  using type = uint64_t;  // integers wrap modulo 2**64 and are cut to their width
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <>
struct ComputeType<float> {
  using type = float;
};
template <>
struct ComputeType<Half> {
  using type = float;
};
template <>
struct ComputeType<BFloat16> {
  using type = float;
};
template <typename T>
using Compute = typename ComputeType<T>::type;

MYCONV_HD inline float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

MYCONV_HD inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

template <typename T>
MYCONV_HD inline Compute<T> load(const T& value) {
  return static_cast<Compute<T>>(value);
}
MYCONV_HD inline float load(const BFloat16& value) { return float_of_bits(static_cast<uint32_t>(value.bits) << 16); }
MYCONV_HD inline float load(const Half& value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
  const uint32_t exponent = value.bits >> 10 & 31, fraction = value.bits & 1023;
  if (exponent == 31) return float_of_bits(sign | 0x7f800000 | fraction << 13);
  if (exponent) return float_of_bits(sign | (exponent + 112) << 23 | fraction << 13);
  const float denormal = static_cast<float>(fraction) * 5.9604644775390625e-8f;  // 2**-24
  return sign ? -denormal : denormal;
}

template <typename T>
MYCONV_HD inline void store(T& place, Compute<T> value) {
  place = static_cast<T>(value);
}
MYCONV_HD inline void store(BFloat16& place, float value) {
  const uint32_t bits = bits_of_float(value);
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  place.bits = nan ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
MYCONV_HD inline void store(Half& place, float value) {
  const uint32_t bits = bits_of_float(value);
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;  // NaN
  } else if (magnitude >= 0x477ff000) {
    half = 0x7c00;  // rounds to 65536 or more: infinity
  } else if (magnitude >= 0x38800000) {
    half = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  } else {  // denormal: adding 0.5 puts the last place of the result at the last place of the sum
    half = bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000;
  }
  place.bits = static_cast<uint16_t>(sign | half);
}

// --- sums ------------------------------------------------------------------------------------------------------------

// A sum of products in the order they come. Each run of kTerms products has an accumulator of its own, so that the
// error does not grow with the length.
template <typename C>
struct Sum {
  static constexpr int kTerms = 256;
  C total, run = 0;
  int terms = 0;

  MYCONV_HD explicit Sum(C start) : total(start) {}
  MYCONV_HD void add(C a, C b) {
    run += a * b;
    if (++terms == kTerms) {
      total += run;
      run = 0;
      terms = 0;
    }
  }
  MYCONV_HD C value() const { return total + run; }
};

// Calls f(zero) with a value of the element type.
template <typename F>
inline int with_element_type(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::kFloat32:
      return f(float{});
#if defined(MYCONV_EMULATOR_FLOAT32)  // for kernels with a planted fault, which must compile quickly
    default:
      return -1;
#else
    case Dtype::kFloat64:
      return f(double{});
    case Dtype::kBFloat16:
      return f(BFloat16{});
    case Dtype::kFloat16:
      return f(Half{});
    case Dtype::kInt64:
      return f(int64_t{});
    case Dtype::kInt32:
      return f(int32_t{});
    case Dtype::kInt16:
      return f(int16_t{});
    case Dtype::kInt8:
      return f(int8_t{});
    default:
      return f(uint8_t{});
#endif
  }
}

}  // namespace myconv::cuda

// --- instructions: matrix products of a warp, asynchronous copies ----------------------------------------------------
#if defined(MYCONV_EMULATOR)
#include "instructions.h"
#else
#include "cuda/instructions.cuh"
#endif
