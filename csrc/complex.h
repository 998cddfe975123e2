// A complex convolution is four real ones. This happens above any kernel, once for every device: with z = a + ib,
// the bilinear f(z1, z2) = f(a1, a2) - f(b1, b2) + i (f(a1, b2) + f(b1, a2)).
#pragma once

#include <ATen/ops/complex.h>
#include <ATen/ops/imag.h>
#include <ATen/ops/real.h>

#include "operators.h"

namespace myconv {

// f(first, second, bias) is a real convolution of any direction.
template <typename F>
Tensor complex_convolution(const Tensor& first, const Tensor& second, const OptionalTensor& bias, const F& f) {
  const auto real = [](const OptionalTensor& t) { return t ? OptionalTensor(at::real(*t)) : std::nullopt; };
  const auto imag = [](const OptionalTensor& t) { return t ? OptionalTensor(at::imag(*t)) : std::nullopt; };
  const Tensor a1 = at::real(first), b1 = at::imag(first), a2 = at::real(second), b2 = at::imag(second);
  const Tensor re = f(a1, a2, real(bias)).sub_(f(b1, b2, std::nullopt));
  const Tensor im = f(a1, b2, imag(bias)).add_(f(b1, a2, std::nullopt));
  return at::complex(re, im);
}

}  // namespace myconv
