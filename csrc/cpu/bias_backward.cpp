// The gradient of a bias: gb[k] = sum over samples and pixels of gy[n, k, p].
//
// NCHW: pieces of a plane, threads split channels. NHWC, or planes of one pixel: pieces of the pixels, vectors along
// channels, threads split channels, or where pixels are many, chunks of these. Each piece is summed from zero and added
// to the sum of its chunk in order, as are the chunks: the bits do not depend on threads.
#include <type_traits>
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
constexpr int64_t kWidened = 4096;   // values of a 16-bit type: what they become stays in L1

// Values as they are summed: 16-bit types as float32.
template <typename T>
class Widened {
 public:
  Widened(const Microkernels& m, int64_t most)
      : convert_(m.widening[std::is_same_v<T, float16>]), words_(kIsHalf<T> ? most : 0) {}
  const Word<T>* operator()(const T* from, int64_t count) {
    if constexpr (!kIsHalf<T>) {
      return from;
    } else {
      convert_.widen(reinterpret_cast<const uint16_t*>(from), count, words_.data());
      return words_.data();
    }
  }
  void store(const Word<T>* sums, int64_t count, T* to) const {
    if constexpr (kIsHalf<T>)
      convert_.narrow(sums, count, reinterpret_cast<uint16_t*>(to));
    else
      std::copy_n(sums, count, to);
  }

 private:
  const Widening& convert_;
  std::vector<Word<T>> words_;
};

template <typename T>
void sum_planes(const ConvShape& s, const Microkernels& m, const T* gy, T* gb) {
  using W = Word<T>;
  const Kernels<W>& kernels = kernels_of<W>(m);
  const int64_t pixels = s.out_pixels(), channels = s.out_channels(), piece = kPiece * kernels.lanes;
  parallel_tasks(channels, static_cast<double>(s.batch) * pixels, [&](int64_t begin, int64_t end) {
    Widened<T> words(m, std::min(piece, pixels));
    for (int64_t k = begin; k < end; ++k) {
      W sum = 0;
      for (int64_t n = 0; n < s.batch; ++n)
        for (int64_t p = 0, count; p < pixels; p += count) {
          count = std::min(piece, pixels - p);
          sum += kernels.sum_row(words(gy + (n * channels + k) * pixels + p, count), count);
        }
      words.store(&sum, 1, gb + k);
    }
  });
}

template <typename T>
void sum_pixels(const ConvShape& s, const Microkernels& m, const T* gy, T* gb) {
  using W = Word<T>;
  const Kernels<W>& kernels = kernels_of<W>(m);
  const int64_t pixels = s.batch * s.out_pixels(), channels = s.out_channels();
  const int64_t chunks = std::clamp<int64_t>(pixels / kChunk, 1, kMostChunks);
  // Threads take chunks, or if there is only one, pieces of the channels.
  const int64_t part = chunks > 1 ? channels : std::min(channels, kPartVectors * kernels.lanes);
  const int64_t parts = ceil_div(channels, part);
  // Pixels that are widened at once, if they are whole.
  const int64_t together = part == channels ? std::clamp<int64_t>(kWidened / channels, 1, kPiece) : 1;
  std::vector<W> sums(chunks * channels);
  parallel_tasks(chunks * parts, static_cast<double>(pixels / chunks) * part, [&](int64_t begin, int64_t end) {
    std::vector<W> partial(part);
    Widened<T> words(m, together * part);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t chunk = i / parts, first = i % parts * part, count = std::min(part, channels - first);
      const int64_t last = pixels * (chunk + 1) / chunks;
      for (int64_t p = pixels * chunk / chunks; p < last; p += kPiece) {
        std::fill(partial.begin(), partial.end(), W(0));
        for (int64_t j = p, end_of_piece = std::min(last, p + kPiece), at_once; j < end_of_piece; j += at_once) {
          at_once = std::min(together, end_of_piece - j);
          const W* const rows = words(gy + j * channels + first, (at_once - 1) * channels + count);
          for (int64_t r = 0; r < at_once; ++r) kernels.add_row(partial.data(), rows + r * channels, count);
        }
        kernels.add_row(sums.data() + chunk * channels + first, partial.data(), count);
      }
    }
  });
  for (int64_t chunk = 1; chunk < chunks; ++chunk)
    kernels.add_row(sums.data(), sums.data() + chunk * channels, channels);
  Widened<T>(m, 0).store(sums.data(), channels, gb);
}

}  // namespace

void bias_backward(const ConvShape& s, const void* gy, void* gb) {
  with_type(s.dtype, [&](auto type) {
    using T = decltype(type);
    (s.channels_last() || s.out_pixels() == 1 ? sum_pixels<T> : sum_planes<T>)(s, microkernels(),
                                                                               static_cast<const T*>(gy),
                                                                               static_cast<T*>(gb));
  });
}

}  // namespace myconv::cpu
