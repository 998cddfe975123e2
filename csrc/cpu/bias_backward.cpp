// The gradient of a bias: gb[k] = sum over samples and pixels of gy[n, k, p].
//
// NCHW: pieces of a plane; NHWC: pieces of the pixels, vectors along channels. Threads split the channels. Each piece
// is summed from zero and added to the total in order, so the bits do not depend on threads.
#include <vector>

#include "cpu/algorithms.h"
#include "cpu/gemm_blocks.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace myconv::cpu {
namespace {

constexpr int64_t kPiece = 64;  // terms of a partial sum (per lane): there is no product, so precision is nearly free

template <typename T>
void sum_planes(const ConvShape& s, const Kernels<T>& kernels, const T* gy, T* gb) {
  const int64_t pixels = s.out_pixels(), channels = s.out_channels();
  parallel_tasks(channels, static_cast<double>(s.batch) * pixels, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      T sum = 0;
      for (int64_t n = 0; n < s.batch; ++n)
        for (int64_t p = 0; p < pixels; p += kPiece * kernels.lanes)
          sum += kernels.sum_row(gy + (n * channels + k) * pixels + p, std::min(kPiece * kernels.lanes, pixels - p));
      gb[k] = sum;
    }
  });
}

template <typename T>
void sum_pixels(const ConvShape& s, const Kernels<T>& kernels, const T* gy, T* gb) {
  const int64_t pixels = s.batch * s.out_pixels(), channels = s.out_channels();
  const int64_t vectors = ceil_div(channels, kernels.lanes);
  std::fill_n(gb, channels, T(0));
  parallel_tasks(vectors, static_cast<double>(pixels) * kernels.lanes, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kernels.lanes, count = std::min(channels, end * kernels.lanes) - first;
    std::vector<T> partial(count);
    for (int64_t p = 0; p < pixels; p += kPiece) {
      std::fill(partial.begin(), partial.end(), T(0));
      for (int64_t i = p; i < std::min(pixels, p + kPiece); ++i)
        kernels.add_row(partial.data(), gy + i * channels + first, count);
      kernels.add_row(gb + first, partial.data(), count);
    }
  });
}

}  // namespace

void bias_backward(const ConvShape& s, const void* gy, void* gb) {
  const auto typed = [&](auto zero) {
    using T = decltype(zero);
    (s.channels_last() ? sum_pixels<T> : sum_planes<T>)(s, kernels_of<T>(microkernels()), static_cast<const T*>(gy),
                                                        static_cast<T*>(gb));
  };
  s.dtype == Dtype::kFloat32 ? typed(float{}) : typed(double{});
}

}  // namespace myconv::cpu
