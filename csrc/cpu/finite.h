// Whether all weights, or all values of a gradient, are finite: then what they multiply in the padding may be left out,
// since 0 times each of them is 0.
#pragma once

#include <atomic>
#include <bit>
#include <type_traits>

#include "conv_shape.h"
#include "cpu/gemm_blocks.h"
#include "cpu/microkernels.h"
#include "cpu/parallel.h"

namespace myconv::cpu {

template <typename T>
using BitsOf = std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;

template <typename T>
BitsOf<T> not_finite(T value) {
  using Bits = BitsOf<T>;
  constexpr auto kExponent = static_cast<Bits>(std::is_same_v<T, float16>    ? 0x7c00
                                               : std::is_same_v<T, bfloat16> ? 0x7f80
                                               : std::is_same_v<T, float>    ? 0x7f800000
                                                                             : 0x7ff0000000000000);
  return Bits((std::bit_cast<Bits>(value) & kExponent) == kExponent);
}

template <typename T>
bool all_finite(const Kernels<T>& kernels, const T* values, int64_t count) {
  constexpr int64_t kPiece = 4096;
  std::atomic<bool> finite = true;
  parallel_tasks(ceil_div(count, kPiece), kPiece / 4.0, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kPiece, length = std::min(count, end * kPiece) - first;
    BitsOf<T> found = 0;
    if constexpr (sizeof(T) > 2)
      found = !kernels.all_finite(values + first, length);
    else
      for (int64_t i = first; i < first + length; ++i) found |= not_finite(values[i]);
    if (found) finite = false;
  });
  return finite;
}

template <typename T>
bool all_finite(const ConvShape& s, const T* weight) {
  using Bits = BitsOf<T>;
  const int64_t extent[4] = {s.in_per_group, s.kernel[0], s.kernel[1], s.kernel[2]};
  const int64_t* const stride = s.weight_stride + 1;
  int64_t values = 1, span = 1;  // of one out channel
  for (int d = 0; d < 4; ++d) values *= extent[d], span += (extent[d] - 1) * stride[d];

  std::atomic<bool> finite = true;
  parallel_tasks(s.out_channels(), static_cast<double>(values), [&](int64_t begin, int64_t end) {
    Bits found = 0;
    for (int64_t k = begin; k < end; ++k) {
      const T* const of_channel = weight + k * s.weight_stride[0];
      if (span == values) {
        for (int64_t i = 0; i < values; ++i) found |= not_finite(of_channel[i]);
        continue;
      }
      for (int64_t d = 0; d < extent[1]; ++d)
        for (int64_t h = 0; h < extent[2]; ++h)
          for (int64_t w = 0; w < extent[3]; ++w)
            for (int64_t c = 0; c < extent[0]; ++c)
              found |= not_finite(of_channel[c * stride[0] + d * stride[1] + h * stride[2] + w * stride[3]]);
    }
    if (found) finite = false;
  });
  return finite;
}

}  // namespace myconv::cpu
