// The gradient of a bias: gb[k] = sum over samples and pixels of gy[n, k, p].
//
// NCHW: pieces of a plane, threads split channels. NHWC, or planes of one pixel: pieces of the pixels, vectors along
// channels, threads split channels, or where pixels are many, chunks of these. Each piece is summed from zero and added
// to the sum of its chunk in order, as are the chunks: the bits do not depend on threads.
#include <vector>

#include "cpu/algorithms.h"
#include "cpu/gemm_blocks.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace myconv::cpu {
namespace {

constexpr int64_t kPiece = 64;   // terms of a partial sum (per lane): there is no product, so precision is nearly free
constexpr int64_t kChunk = 256;  // pixels
constexpr int64_t kMostChunks = 64;
constexpr int64_t kPartVectors = 8;  // of channels

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
  const int64_t chunks = std::clamp<int64_t>(pixels / kChunk, 1, kMostChunks);
  // Threads take chunks, or if there is only one, pieces of the channels.
  const int64_t part = chunks > 1 ? channels : std::min(channels, kPartVectors * kernels.lanes);
  const int64_t parts = ceil_div(channels, part);
  std::vector<T> sums(chunks * channels);
  parallel_tasks(chunks * parts, static_cast<double>(pixels / chunks) * part, [&](int64_t begin, int64_t end) {
    std::vector<T> partial(part);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t chunk = i / parts, first = i % parts * part, count = std::min(part, channels - first);
      const int64_t last = pixels * (chunk + 1) / chunks;
      for (int64_t p = pixels * chunk / chunks; p < last; p += kPiece) {
        std::fill(partial.begin(), partial.end(), T(0));
        for (int64_t j = p; j < std::min(last, p + kPiece); ++j)
          kernels.add_row(partial.data(), gy + j * channels + first, count);
        kernels.add_row(sums.data() + chunk * channels + first, partial.data(), count);
      }
    }
  });
  std::copy_n(sums.data(), channels, gb);
  for (int64_t chunk = 1; chunk < chunks; ++chunk) kernels.add_row(gb, sums.data() + chunk * channels, channels);
}

}  // namespace

void bias_backward(const ConvShape& s, const void* gy, void* gb) {
  const auto typed = [&](auto zero) {
    using T = decltype(zero);
    (s.channels_last() || s.out_pixels() == 1 ? sum_pixels<T> : sum_planes<T>)(s, kernels_of<T>(microkernels()),
                                                                               static_cast<const T*>(gy),
                                                                               static_cast<T*>(gb));
  };
  s.dtype == Dtype::kFloat32 ? typed(float{}) : typed(double{});
}

}  // namespace myconv::cpu
