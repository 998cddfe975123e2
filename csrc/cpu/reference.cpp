// The specification: every legal call, every direction, one output element at a time.
//
//   forward:          y[n, k, o] = b[k] + sum of  x[n, c, at(o, t)] * w[k, c, t]    over c, t
//   backward_input:   gx[n, c, i] = b[c] + sum of gy[n, k, o]       * w[k, c, t]    over k and all (o, t) with at(o,
//   t) = i
//   backward_weight:  gw[k, c, t] = sum of        gy[n, k, o]       * x[n, c, at(o, t)]    over n, o
//                     gb[k] = sum of gy[n, k, o]    over n, o    if it is asked for
//   at(o, t) = padded_index(o * stride + t * dilation - pad)     (-1 reads zero)
//
// Groups cut channels into independent problems. The three axes are independent, so each has its own small index table
// and the loops run over their product. In backward_input, zeros mode, a tap of the right phase whose o lies outside
// [0, out) reads a zero that is multiplied like any value, which is what a dense kernel over a zero border computes.
//
// Sums: float32 and float64 in double, 16-bit types in float32, integers wrap modulo 2**64 and are cut to their width.
// Selected when nothing faster accepts; parallel over outputs, so that the order of a sum never depends on threads.
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <array>
#include <type_traits>
#include <vector>

#include "cpu/algorithms.h"
#include "cpu/parallel.h"

namespace myconv::cpu {
namespace {

template <typename T>
using Accumulator =
    std::conditional_t<std::is_integral_v<T>, uint64_t, std::conditional_t<(sizeof(T) >= 4), double, float>>;

// The pairs (position read, tap) that one output position of one axis sums over. position -1 reads zero.
struct Term {
  int64_t position, tap;
};
using AxisTerms = std::vector<std::vector<Term>>;
using Terms = std::array<AxisTerms, 3>;

AxisTerms forward_terms(const ConvShape& s, int d) {
  AxisTerms terms(s.out[d]);
  for (int64_t o = 0; o < s.out[d]; ++o)
    for (int64_t t = 0; t < s.kernel[d]; ++t) {
      const int64_t source = source_index(o, s.stride[d], t, s.dilation[d], s.pad[d]);
      terms[o].push_back({padded_index(source, s.in[d], s.padding_mode), t});
    }
  return terms;
}

AxisTerms backward_input_terms(const ConvShape& s, int d) {
  AxisTerms terms(s.in[d]);
  if (s.padding_mode == PaddingMode::kZeros) {
    for (int64_t i = 0; i < s.in[d]; ++i)
      for (int64_t t = 0; t < s.kernel[d]; ++t) {
        const __int128 numerator = static_cast<__int128>(i) + s.pad[d] - static_cast<__int128>(t) * s.dilation[d];
        if (numerator % s.stride[d] != 0) continue;  // falls between outputs: no such term
        const __int128 o = numerator / s.stride[d];
        terms[i].push_back({o >= 0 && o < s.out[d] ? static_cast<int64_t>(o) : -1, t});
      }
    return terms;
  }
  for (int64_t o = 0; o < s.out[d]; ++o)
    for (int64_t t = 0; t < s.kernel[d]; ++t) {
      const int64_t source = source_index(o, s.stride[d], t, s.dilation[d], s.pad[d]);
      terms[padded_index(source, s.in[d], s.padding_mode)].push_back({o, t});
    }
  return terms;
}

// One loop nest for both gathers. "from" is what is read (x or gy), "to" what is written (y or gx).
template <typename T, bool kForward>
void gather(const ConvShape& s, const T* from, const T* weight, const T* bias, T* to) {
  const int64_t (&from_extent)[3] = kForward ? s.in : s.out;
  const int64_t (&to_extent)[3] = kForward ? s.out : s.in;
  const int64_t from_per_group = kForward ? s.in_per_group : s.out_per_group;
  const int64_t to_per_group = kForward ? s.out_per_group : s.in_per_group;
  const int64_t to_channels = s.groups * to_per_group;
  const auto from_stride = activation_strides(s.layout, s.groups * from_per_group, from_extent);
  const auto to_stride = activation_strides(s.layout, to_channels, to_extent);
  // weight_stride is (out channel, in channel): what is summed over is the other one of the two.
  const int64_t weight_to = s.weight_stride[kForward ? 0 : 1], weight_from = s.weight_stride[kForward ? 1 : 0];
  Terms terms;
  for (int d = 0; d < 3; ++d) terms[d] = kForward ? forward_terms(s, d) : backward_input_terms(s, d);

  const int64_t rows = s.batch * to_channels * to_extent[0] * to_extent[1];
  parallel_tasks(rows, 30.0 * s.macs() / rows, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t h = row % to_extent[1], d = row / to_extent[1] % to_extent[0];
      const int64_t channel = row / (to_extent[1] * to_extent[0]) % to_channels;
      const int64_t n = row / (to_extent[1] * to_extent[0] * to_channels);
      const int64_t group = channel / to_per_group;
      const T* from_group = from + n * from_stride.batch + group * from_per_group * from_stride.channel;
      const T* w_channel = kForward
                               ? weight + channel * weight_to
                               : weight + group * s.out_per_group * weight_from + channel % to_per_group * weight_to;
      T* to_row =
          to + n * to_stride.batch + channel * to_stride.channel + d * to_stride.axis[0] + h * to_stride.axis[1];
      for (int64_t w = 0; w < to_extent[2]; ++w) {
        Accumulator<T> sum = bias ? static_cast<Accumulator<T>>(bias[channel]) : Accumulator<T>(0);
        for (const Term& td : terms[0][d])
          for (const Term& th : terms[1][h])
            for (const Term& tw : terms[2][w]) {
              const bool inside = td.position >= 0 && th.position >= 0 && tw.position >= 0;
              const T* source = from_group + td.position * from_stride.axis[0] + th.position * from_stride.axis[1] +
                                tw.position * from_stride.axis[2];
              const T* tap =
                  w_channel + td.tap * s.weight_stride[2] + th.tap * s.weight_stride[3] + tw.tap * s.weight_stride[4];
              for (int64_t c = 0; c < from_per_group; ++c)
                sum += (inside ? static_cast<Accumulator<T>>(source[c * from_stride.channel]) : Accumulator<T>(0)) *
                       static_cast<Accumulator<T>>(tap[c * weight_from]);
            }
        to_row[w * to_stride.axis[2]] = static_cast<T>(sum);
      }
    }
  });
}

template <typename T>
void backward_weight(const ConvShape& s, const T* gy, const T* x, T* gw) {
  const auto x_stride = activation_strides(s.layout, s.in_channels(), s.in);
  const auto y_stride = activation_strides(s.layout, s.out_channels(), s.out);
  Terms terms;
  for (int d = 0; d < 3; ++d) terms[d] = forward_terms(s, d);
  const int64_t taps = s.taps();
  const int64_t elements = s.out_channels() * s.in_per_group * taps;
  parallel_tasks(elements, 30.0 * s.macs() / elements, [&](int64_t begin, int64_t end) {
    for (int64_t element = begin; element < end; ++element) {
      const int64_t tw = element % s.kernel[2], th = element / s.kernel[2] % s.kernel[1];
      const int64_t td = element / (s.kernel[2] * s.kernel[1]) % s.kernel[0];
      const int64_t c = element / taps % s.in_per_group, k = element / (taps * s.in_per_group);
      const T* x_channel = x + (k / s.out_per_group * s.in_per_group + c) * x_stride.channel;
      const T* gy_channel = gy + k * y_stride.channel;
      Accumulator<T> sum(0);
      for (int64_t n = 0; n < s.batch; ++n)
        for (int64_t d = 0; d < s.out[0]; ++d)
          for (int64_t h = 0; h < s.out[1]; ++h)
            for (int64_t w = 0; w < s.out[2]; ++w) {
              const int64_t id = terms[0][d][td].position, ih = terms[1][h][th].position, iw = terms[2][w][tw].position;
              const T* g =
                  gy_channel + n * y_stride.batch + d * y_stride.axis[0] + h * y_stride.axis[1] + w * y_stride.axis[2];
              const bool inside = id >= 0 && ih >= 0 && iw >= 0;
              const T* v = x_channel + n * x_stride.batch + id * x_stride.axis[0] + ih * x_stride.axis[1] +
                           iw * x_stride.axis[2];
              sum += static_cast<Accumulator<T>>(*g) * (inside ? static_cast<Accumulator<T>>(*v) : Accumulator<T>(0));
            }
      gw[k * s.weight_stride[0] + c * s.weight_stride[1] + td * s.weight_stride[2] + th * s.weight_stride[3] +
         tw * s.weight_stride[4]] = static_cast<T>(sum);
    }
  });
}

template <typename T>
void backward_bias(const ConvShape& s, const T* gy, T* gb) {
  const auto stride = activation_strides(s.layout, s.out_channels(), s.out);
  parallel_tasks(s.out_channels(), static_cast<double>(s.batch * s.out_pixels()), [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      Accumulator<T> sum(0);
      for (int64_t n = 0; n < s.batch; ++n)
        for (int64_t pixel = 0; pixel < s.out_pixels(); ++pixel)
          sum += static_cast<Accumulator<T>>(gy[n * stride.batch + k * stride.channel + pixel * stride.axis[2]]);
      gb[k] = static_cast<T>(sum);
    }
  });
}

template <typename F>
void dispatch(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::kFloat64:
      return f(double{});
    case Dtype::kFloat32:
      return f(float{});
    case Dtype::kBFloat16:
      return f(c10::BFloat16{});
    case Dtype::kFloat16:
      return f(c10::Half{});
    case Dtype::kInt64:
      return f(int64_t{});
    case Dtype::kInt32:
      return f(int32_t{});
    case Dtype::kInt16:
      return f(int16_t{});
    case Dtype::kInt8:
      return f(int8_t{});
    case Dtype::kUInt8:
      return f(uint8_t{});
  }
}

}  // namespace

void reference_forward(const ConvShape& s, const ConvPointers& p, void*, int) {
  dispatch(s.dtype, [&](auto zero) {
    using T = decltype(zero);
    gather<T, true>(s, static_cast<const T*>(p.input), static_cast<const T*>(p.weight), static_cast<const T*>(p.bias),
                    static_cast<T*>(p.result));
  });
}

void reference_backward_input(const ConvShape& s, const ConvPointers& p, void*, int) {
  dispatch(s.dtype, [&](auto zero) {
    using T = decltype(zero);
    gather<T, false>(s, static_cast<const T*>(p.grad_output), static_cast<const T*>(p.weight),
                     static_cast<const T*>(p.bias), static_cast<T*>(p.result));
  });
}

void reference_backward_weight(const ConvShape& s, const ConvPointers& p, void*, int) {
  dispatch(s.dtype, [&](auto zero) {
    using T = decltype(zero);
    backward_weight<T>(s, static_cast<const T*>(p.grad_output), static_cast<const T*>(p.input),
                       static_cast<T*>(p.result));
    if (p.grad_bias) backward_bias<T>(s, static_cast<const T*>(p.grad_output), static_cast<T*>(p.grad_bias));
  });
}

}  // namespace myconv::cpu
