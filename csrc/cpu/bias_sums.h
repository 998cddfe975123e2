// The gradient of a bias: gb[k] = sum over samples and pixels of gy[n, k, p]. Whoever reads gy for the gradient of the
// weight sums it up too, a share at a time, while that lies near.
#pragma once

#include <vector>

#include "conv_shape.h"
#include "cpu/microkernels.h"

namespace myconv::cpu {

// A share is added to the sums of its part, in order, and parts are added up in order at the end: shares and parts that
// are cut by the shape alone give bits that do not depend on threads.
template <typename T>
class BiasSums {
 public:
  BiasSums(const ConvShape& s, const ConvPointers& p, int64_t parts);

  // Channels [k, k + count) of the shares [begin, end) of `all`, equal ones of the pixels of all samples. Nothing is done
  // if the gradient is not asked for.
  void add(int64_t part, int64_t begin, int64_t end, int64_t all, int64_t k, int64_t count) {
    if (result_)
      add_pixels(sums_.data() + part * channels_ + k, pixels_before(begin, all), pixels_before(end, all), k, count);
  }
  void store();

 private:
  int64_t pixels_before(int64_t share, int64_t all) const {
    return pixels_ / all * share + pixels_ % all * share / all;
  }
  void add_pixels(Word<T>* sums, int64_t first, int64_t last, int64_t k, int64_t count) const;

  const Kernels<T>& kernels_;  // of the calling thread, whose choice of ISA others do not know
  const T* const gy_;
  T* const result_;
  const bool along_channels_;  // of a pixel, which lie together
  const int64_t channels_, plane_, pixels_;
  std::vector<Word<T>> sums_;
};

}  // namespace myconv::cpu
