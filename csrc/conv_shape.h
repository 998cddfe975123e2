// The convolution problem as plain data. Nothing here knows torch: kernels for every device include this file.
//
//   y[n, g*Kg + k, o] = bias[g*Kg + k] + sum over c < Cg and taps t of  x[n, g*Cg + c, source(o, t)] * w[g*Kg + k, c,
//   t] source(o, t) = o * stride + t * dilation - pad        (one equation for each of the axes D, H, W)
//
// A source outside [0, in) is sent through the padding mode; in zeros mode it reads zero, and that zero is multiplied
// like any other value (0 * inf is NaN, as if the input had been padded by hand).
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define MYCONV_HD __host__ __device__
#else
#define MYCONV_HD
#endif

namespace myconv {

enum class Dtype : int8_t { kFloat64, kFloat32, kBFloat16, kFloat16, kInt64, kInt32, kInt16, kInt8, kUInt8 };
enum class Layout : int8_t { kChannelsFirst, kChannelsLast };
enum class PaddingMode : int8_t { kZeros, kReflect, kReplicate, kCircular };  // the values the schemas use

inline constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

inline constexpr bool is_half(Dtype dtype) { return dtype == Dtype::kBFloat16 || dtype == Dtype::kFloat16; }
inline constexpr int64_t dtype_size(Dtype dtype) {
  constexpr int64_t size[] = {8, 4, 2, 2, 8, 4, 2, 1, 1};
  return size[static_cast<int>(dtype)];
}

// Spatial order is D, H, W; the axes that a 1d or 2d problem lacks have extent, kernel, stride and dilation 1 and pad
// 0.
struct ConvShape {
  int64_t batch, groups, in_per_group, out_per_group;
  int64_t in[3], out[3], kernel[3], stride[3], pad[3], dilation[3];
  int64_t weight_stride[5];  // in elements: out channel, in channel of its group, D, H, W
  Dtype dtype;
  Layout layout;  // of x, y and their gradients: (N, C, D, H, W) or (N, D, H, W, C), dense
  PaddingMode padding_mode;

  MYCONV_HD int64_t in_channels() const { return groups * in_per_group; }
  MYCONV_HD int64_t out_channels() const { return groups * out_per_group; }
  MYCONV_HD int64_t in_pixels() const { return in[0] * in[1] * in[2]; }
  MYCONV_HD int64_t out_pixels() const { return out[0] * out[1] * out[2]; }
  MYCONV_HD int64_t taps() const { return kernel[0] * kernel[1] * kernel[2]; }
  // Multiply-adds of any of the three directions.
  MYCONV_HD double macs() const {
    return static_cast<double>(batch) * groups * in_per_group * out_per_group * taps() * out_pixels();
  }
  MYCONV_HD bool channels_last() const { return layout == Layout::kChannelsLast; }
};

// Element strides of an activation in the order N, C, D, H, W.
struct ActivationStrides {
  int64_t batch, channel, axis[3];
};

MYCONV_HD inline ActivationStrides activation_strides(Layout layout, int64_t channels, const int64_t (&extent)[3]) {
  const int64_t plane = extent[1] * extent[2];
  const int64_t pixels = extent[0] * plane;
  if (layout == Layout::kChannelsLast)
    return {pixels * channels, 1, {plane * channels, extent[2] * channels, channels}};
  return {pixels * channels, pixels, {plane, extent[2], 1}};
}

// source(o, t) of one axis, before the padding mode. make_conv_shape has checked that the result fits; a partial sum
// may not (padding and dilation go up to 2**62), and unsigned arithmetic is right either way.
MYCONV_HD inline int64_t source_index(int64_t o, int64_t stride, int64_t t, int64_t dilation, int64_t pad) {
  return static_cast<int64_t>(static_cast<uint64_t>(o) * static_cast<uint64_t>(stride) +
                              static_cast<uint64_t>(t) * static_cast<uint64_t>(dilation) - static_cast<uint64_t>(pad));
}

// The element of [0, extent) that index stands for, or -1 for a zero.
MYCONV_HD inline int64_t padded_index(int64_t index, int64_t extent, PaddingMode mode) {
  if (index >= 0 && index < extent) return index;
  switch (mode) {
    case PaddingMode::kReflect:
      return index < 0 ? -index : 2 * (extent - 1) - index;
    case PaddingMode::kReplicate:
      return index < 0 ? 0 : extent - 1;
    case PaddingMode::kCircular:
      return index < 0 ? index + extent : index - extent;
    default:
      return -1;
  }
}

// What a kernel reads and writes. The direction says which are set:
//   forward: input, weight, bias? -> result = y      backward_input: grad_output, weight, bias? -> result = gx
//   backward_weight: grad_output, input -> result = gw (addressed by weight_stride)
struct ConvPointers {
  const void* input = nullptr;
  const void* weight = nullptr;
  const void* bias = nullptr;
  const void* grad_output = nullptr;
  void* result = nullptr;
  void* stream = nullptr;     // of CUDA
  void* grad_bias = nullptr;  // beside a weight gradient, if it is asked for and the device's rows sum it
  int64_t bytes_after = 0;    // of what the call reads once the result is written
};

enum class Direction : int8_t { kForward, kBackwardInput, kBackwardWeight };
inline constexpr int kDirections = 3;

}  // namespace myconv
