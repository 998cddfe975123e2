// NCHW: pieces of a plane, summed by all lanes of a vector. NHWC, or planes of one pixel: pieces of the pixels, vectors
// along channels. Each piece is summed from zero, 16-bit types in float32.
#include "cpu/bias_sums.h"

#include <algorithm>

#include "cpu/isa.h"

namespace myconv::cpu {
namespace {

constexpr int64_t kPiece = 64;  // terms of a partial sum (per lane): there is no product, so precision is nearly free

}  // namespace

template <typename T>
BiasSums<T>::BiasSums(const ConvShape& s, const ConvPointers& p, int64_t parts)
    : kernels_(kernels_of<T>(microkernels())),
      gy_(static_cast<const T*>(p.grad_output)),
      result_(static_cast<T*>(p.grad_bias)),
      along_channels_((s.channels_last() && s.out_channels() > 1) || s.out_pixels() == 1),
      channels_(s.out_channels()),
      plane_(s.out_pixels()),
      pixels_(s.batch * plane_),
      sums_(result_ ? parts * channels_ : 0) {}

template <typename T>
void BiasSums<T>::add_pixels(Word<T>* sums, int64_t first, int64_t last, int64_t k, int64_t count) const {
  const int64_t most = along_channels_ ? kPiece : kPiece * kernels_.lanes;
  for (int64_t p = first, length; p < last; p += length) {
    const int64_t n = p / plane_, at = p % plane_;
    length = std::min(most, last - p);
    if (along_channels_) {
      kernels_.add_rows(sums, gy_ + p * channels_ + k, channels_, length, count);
      continue;
    }
    length = std::min(length, plane_ - at);
    for (int64_t c = 0; c < count; ++c)
      sums[c] += kernels_.sum_row(gy_ + (n * channels_ + k + c) * plane_ + at, length);
  }
}

template <typename T>
void BiasSums<T>::store() {
  if (!result_) return;
  Word<T>* const sums = sums_.data();
  const auto parts = static_cast<int64_t>(sums_.size()) / channels_;
  kernels_of<Word<T>>(microkernels()).add_rows(sums, sums + channels_, channels_, parts - 1, channels_);
  kernels_.store_rows(sums, 0, 1, channels_, result_, 0);
}

template class BiasSums<float>;
template class BiasSums<double>;
template class BiasSums<bfloat16>;
template class BiasSums<float16>;

}  // namespace myconv::cpu
