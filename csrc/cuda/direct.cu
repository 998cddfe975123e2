// The floor: every legal call, every direction, by the definition in conv_shape.h. Accepts everything; nothing is tiled.
//
//   forward:          y[n, k, o] = b[k] + sum over taps t, then c, of  x[n, c, at(o, t)] * w[k, c, t]
//   backward_input:   gx[n, c, i] = b[c] + sum over taps t, then the o with at(o, t) = i, then k, of
//                     gy[n, k, o] * w[k, c, t]
//   backward_weight:  gw[k, c, t] = sum over n, o of  gy[n, k, o] * x[n, c, at(o, t)]
//
// forward and backward_input: one thread makes one element of the result, neighbours in memory by neighbouring threads,
// and sums alone, so the order of a sum depends on nothing but the shape without its batch. A tap in the padding
// multiplies a zero (0 * inf is NaN), as on the CPU.
//
// backward_weight: one block makes one element. Thread i of kThreads sums the products i, i + kThreads, ... of the
// line (n, o), and the block adds the threads' sums pairwise in shared memory, always in the same order. No atomics.
//
// All index arithmetic is in 64 bits. Sums: see Sum in device.cuh.
#include "cuda/abi.h"
#include "cuda/device.cuh"

namespace myconv::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kMostBlocks = 1 << 24;  // then blocks take several turns

// Index of an element of a dense activation -> sample, channel and position.
struct Element {
  int64_t sample, channel;
  int64_t at[3];
};

MYCONV_HD inline Element element_at(int64_t index, Layout layout, int64_t channels, const int64_t (&extent)[3]) {
  Element e;
  if (layout == Layout::kChannelsLast) {
    e.channel = index % channels;
    index /= channels;
  }
  for (int d = 2; d >= 0; --d) {
    e.at[d] = index % extent[d];
    index /= extent[d];
  }
  if (layout == Layout::kChannelsFirst) {
    e.channel = index % channels;
    index /= channels;
  }
  e.sample = index;
  return e;
}

// How many outputs o >= 0 have at(o, t) < j before the padding mode, that is o * stride + t * dilation < j + pad. The left
// side may pass 63 bits.
MYCONV_HD inline int64_t outputs_before(const ConvShape& s, int d, int64_t t, int64_t j) {
  const uint64_t reach = static_cast<uint64_t>(t) * static_cast<uint64_t>(s.dilation[d]);
  const int64_t room = j + s.pad[d];
  if (room <= 0 || static_cast<uint64_t>(room) <= reach) return 0;
  return static_cast<int64_t>((static_cast<uint64_t>(room) - reach - 1) / static_cast<uint64_t>(s.stride[d])) + 1;
}

// The positions that the padding mode sends to `to` are up to three runs [from, until): `to` itself, one below the input
// and one above it. False: there is no i-th run. kAll means no end.
constexpr int64_t kAll = static_cast<int64_t>(1) << 62;

MYCONV_HD inline bool preimage(const ConvShape& s, int d, int64_t to, int i, int64_t& from, int64_t& until) {
  const int64_t extent = s.in[d], last = extent - 1;
  from = to;
  if (i == 1 && s.padding_mode == PaddingMode::kReflect) from = -to;
  if (i == 2 && s.padding_mode == PaddingMode::kReflect) from = 2 * last - to;
  if (i == 1 && s.padding_mode == PaddingMode::kCircular) from = to - extent;
  if (i == 2 && s.padding_mode == PaddingMode::kCircular) from = to + extent;
  until = from + 1;
  if (s.padding_mode != PaddingMode::kReplicate) return i == 0 || from < 0 || from > last;
  if (i == 1) from = -kAll, until = 0;
  if (i == 2) from = extent, until = kAll;
  return i == 0 || to == (i == 1 ? 0 : last);
}

// Calls f(position, tap) for each term of position `to` on one axis; position -1 reads zero.
template <bool kForward, typename F>
__device__ inline void for_each_term(const ConvShape& s, int d, int64_t to, const F& f) {
  for (int64_t t = 0; t < s.kernel[d]; ++t) {
    if (kForward) {
      f(padded_index(source_index(to, s.stride[d], t, s.dilation[d], s.pad[d]), s.in[d], s.padding_mode), t);
    } else if (s.padding_mode == PaddingMode::kZeros) {
      // at(o, t) = to  <=>  o * stride = to + pad - t * dilation
      const uint64_t room = static_cast<uint64_t>(to + s.pad[d]);
      const uint64_t reach = static_cast<uint64_t>(t) * static_cast<uint64_t>(s.dilation[d]);
      const uint64_t distance = room >= reach ? room - reach : reach - room;
      if (distance % static_cast<uint64_t>(s.stride[d]) != 0) continue;  // falls between outputs: no such term
      const int64_t o = static_cast<int64_t>(distance / static_cast<uint64_t>(s.stride[d]));
      f(room >= reach && o < s.out[d] ? o : -1, t);
    } else {
      for (int i = 0; i < 3; ++i) {
        int64_t from, until;
        if (!preimage(s, d, to, i, from, until)) continue;
        int64_t o = outputs_before(s, d, t, from);
        int64_t end = until == kAll ? s.out[d] : outputs_before(s, d, t, until);
        if (end > s.out[d]) end = s.out[d];
        for (; o < end; ++o) f(o, t);
      }
    }
  }
}

// "from" is what is read (x or gy), "to" what is written (y or gx).
template <typename T, bool kForward>
__global__ void gather(ConvShape s, ConvPointers p, int64_t elements) {
  const T* const from = static_cast<const T*>(kForward ? p.input : p.grad_output);
  const T* const weight = static_cast<const T*>(p.weight);
  const T* const bias = static_cast<const T*>(p.bias);
  T* const result = static_cast<T*>(p.result);
  const int64_t from_per_group = kForward ? s.in_per_group : s.out_per_group;
  const int64_t to_per_group = kForward ? s.out_per_group : s.in_per_group;
  const int64_t (&from_extent)[3] = kForward ? s.in : s.out;
  const int64_t (&to_extent)[3] = kForward ? s.out : s.in;
  const ActivationStrides from_stride = activation_strides(s.layout, s.groups * from_per_group, from_extent);
  const int64_t weight_from = s.weight_stride[kForward ? 1 : 0];

  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < elements; i += step) {
    const Element e = element_at(i, s.layout, s.groups * to_per_group, to_extent);
    const int64_t group = e.channel / to_per_group;
    const T* const from_group = from + e.sample * from_stride.batch + group * from_per_group * from_stride.channel;
    const T* const taps = weight + (kForward ? e.channel * s.weight_stride[0]
                                             : group * s.out_per_group * s.weight_stride[0] +
                                                   e.channel % to_per_group * s.weight_stride[1]);
    Sum<Compute<T>> sum(bias ? load(bias[e.channel]) : Compute<T>(0));
    for_each_term<kForward>(s, 0, e.at[0], [&](int64_t pd, int64_t td) {
      for_each_term<kForward>(s, 1, e.at[1], [&](int64_t ph, int64_t th) {
        for_each_term<kForward>(s, 2, e.at[2], [&](int64_t pw, int64_t tw) {
          const bool inside = pd >= 0 && ph >= 0 && pw >= 0;
          const T* const source =
              from_group + pd * from_stride.axis[0] + ph * from_stride.axis[1] + pw * from_stride.axis[2];
          const T* const tap = taps + td * s.weight_stride[2] + th * s.weight_stride[3] + tw * s.weight_stride[4];
          for (int64_t c = 0; c < from_per_group; ++c)
            sum.add(inside ? load(source[c * from_stride.channel]) : Compute<T>(0), load(tap[c * weight_from]));
        });
      });
    });
    store(result[i], sum.value());
  }
}

template <typename T>
__global__ void backward_weight(ConvShape s, ConvPointers p, int64_t elements) {
  MYCONV_SHARED(Compute<T>, sums, kThreads);
  const T* const x = static_cast<const T*>(p.input);
  const T* const gy = static_cast<const T*>(p.grad_output);
  T* const gw = static_cast<T*>(p.result);
  const ActivationStrides x_stride = activation_strides(s.layout, s.in_channels(), s.in);
  const ActivationStrides y_stride = activation_strides(s.layout, s.out_channels(), s.out);
  const int64_t taps = s.taps(), pixels = s.out_pixels();
  const int thread = threadIdx.x;

  for (int64_t element = blockIdx.x; element < elements; element += gridDim.x) {
    const int64_t t[3] = {element / (s.kernel[1] * s.kernel[2]) % s.kernel[0], element / s.kernel[2] % s.kernel[1],
                          element % s.kernel[2]};
    const int64_t c = element / taps % s.in_per_group, k = element / (taps * s.in_per_group);
    const T* const x_channel = x + (k / s.out_per_group * s.in_per_group + c) * x_stride.channel;
    const T* const gy_channel = gy + k * y_stride.channel;

    Sum<Compute<T>> sum(0);
    for (int64_t i = thread; i < s.batch * pixels; i += kThreads) {
      const int64_t n = i / pixels;
      const int64_t o[3] = {i / (s.out[1] * s.out[2]) % s.out[0], i / s.out[2] % s.out[1], i % s.out[2]};
      const T* g = gy_channel + n * y_stride.batch;
      const T* v = x_channel + n * x_stride.batch;
      bool inside = true;
      for (int d = 0; d < 3; ++d) {
        const int64_t source = source_index(o[d], s.stride[d], t[d], s.dilation[d], s.pad[d]);
        const int64_t position = padded_index(source, s.in[d], s.padding_mode);
        inside = inside && position >= 0;
        g += o[d] * y_stride.axis[d];
        v += position * x_stride.axis[d];
      }
      sum.add(load(*g), inside ? load(*v) : Compute<T>(0));
    }

    sums[thread] = sum.value();
    __syncthreads();
    for (int half = kThreads / 2; half > 0; half /= 2) {
      if (thread < half) sums[thread] += sums[thread + half];
      __syncthreads();  // the last of them also lets the other threads write sums again
    }
    if (thread == 0)
      store(gw[k * s.weight_stride[0] + c * s.weight_stride[1] + t[0] * s.weight_stride[2] + t[1] * s.weight_stride[3] +
               t[2] * s.weight_stride[4]],
            sums[0]);
  }
}

unsigned blocks_for(int64_t wanted) {
  return static_cast<unsigned>(wanted < 1 ? 1 : wanted > kMostBlocks ? kMostBlocks : wanted);
}

template <bool kForward>
int launch_gather(const ConvShape& s, const ConvPointers& p, Stream stream) {
  const int64_t elements = s.batch * (kForward ? s.out_channels() * s.out_pixels() : s.in_channels() * s.in_pixels());
  return with_element_type(s.dtype, [&](auto zero) {
    using T = decltype(zero);
    MYCONV_LAUNCH((gather<T, kForward>), blocks_for((elements + kThreads - 1) / kThreads), kThreads, stream, s, p,
                  elements);
    return last_error();
  });
}

}  // namespace

int direct_forward(const ConvShape& s, const ConvPointers& p, Stream stream) {
  return launch_gather<true>(s, p, stream);
}

int direct_backward_input(const ConvShape& s, const ConvPointers& p, Stream stream) {
  return launch_gather<false>(s, p, stream);
}

int direct_backward_weight(const ConvShape& s, const ConvPointers& p, Stream stream) {
  const int64_t elements = s.out_channels() * s.in_per_group * s.taps();
  return with_element_type(s.dtype, [&](auto zero) {
    using T = decltype(zero);
    MYCONV_LAUNCH((backward_weight<T>), blocks_for(elements), kThreads, stream, s, p, elements);
    return last_error();
  });
}

#if !defined(MYCONV_EMULATOR)
const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
#endif

}  // namespace myconv::cuda
