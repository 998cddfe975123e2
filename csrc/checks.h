// The one place where user input is checked, in torch's words where those are clear. Everything behind it trusts its
// input.
//
//   check_call   a call of the functional interface: what torch.nn.functional would refuse; returns the output size
//   check_*      a call of an operator, on plain or symbolic sizes; the CPU, CUDA and Meta kernels begin with it
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>
#include <c10/util/SmallVector.h>

#include <optional>

#include "conv_shape.h"

namespace myconv {

using Sizes = c10::SmallVector<int64_t, 5>;

// One call of conv1d .. conv_transpose3d with concrete sizes. Lists may have one entry or one per axis.
struct Call {
  const char* name;
  int rank;
  bool transposed;
  c10::IntArrayRef input, weight;
  std::optional<c10::IntArrayRef> bias;
  c10::IntArrayRef stride, padding, padding_high, output_padding, dilation;  // padding: the low side
  int64_t groups;
  PaddingMode padding_mode;
};

// The spatial size of the result. Throws as torch does for any illegal size or parameter.
Sizes check_call(const Call& call);

// Dense strided storage on one supported device. Before dispatch, which would only say that a kernel is missing.
void check_storage(const at::Tensor& x, const at::Tensor& w, const std::optional<at::Tensor>& bias);

// The kernels of a device are about to read both.
void check_device(const at::Tensor& first, const at::Tensor& other);
inline void check_device(const at::Tensor& first, const std::optional<at::Tensor>& other) {
  if (other) check_device(first, *other);
}

// One supported dtype. Inside the operators, behind autocast.
void check_dtypes(const at::Tensor& x, const at::Tensor& w, const std::optional<at::Tensor>& bias, bool transposed);

// Full sizes of the three tensors of a convolution; `input` and `output` are (N, C, spatial...).
template <typename Int>
struct OperatorCall {
  const char* name;
  Direction direction;
  c10::ArrayRef<Int> input, weight, output;
  std::optional<c10::ArrayRef<Int>> bias;
  c10::ArrayRef<Int> stride, padding, dilation;
  Int groups;
  int64_t padding_mode;
};

template <typename Int>
void check_operator(const OperatorCall<Int>& call);

// The shape of a call that check_operator has found right. weight_strides has one entry per dimension of the weight.
ConvShape make_conv_shape(const OperatorCall<int64_t>& call, c10::IntArrayRef weight_strides, at::ScalarType dtype,
                          bool channels_last);

}  // namespace myconv
