// Typed handles of the four operators and what their kernels on every device share.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/SymIntArrayRef.h>

#include <array>
#include <optional>
#include <tuple>

#include "conv_shape.h"

namespace myconv {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Calls through the dispatcher.
Tensor conv_forward(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                    c10::SymIntArrayRef output_size, c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
                    c10::SymIntArrayRef dilation, c10::SymInt groups, int64_t padding_mode);
Tensor conv_backward_input(const Tensor& grad_output, const Tensor& weight, const OptionalTensor& bias,
                           c10::SymIntArrayRef input_size, c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
                           c10::SymIntArrayRef dilation, c10::SymInt groups, int64_t padding_mode);
Tensor conv_backward_weight(const Tensor& grad_output, const Tensor& input, c10::SymIntArrayRef kernel_size,
                            c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                            c10::SymInt groups, int64_t padding_mode);
std::tuple<Tensor, Tensor, Tensor> conv_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                                 c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
                                                 c10::SymIntArrayRef dilation, c10::SymInt groups, int64_t padding_mode,
                                                 std::array<bool, 3> output_mask);

// The memory format of a result is torch's: channels_last if either of the two tensors it is made from suggests it.
bool result_is_channels_last(const Tensor& first, const Tensor& second);

// An uninitialised result: (N, C, spatial...) in the given memory format, which 1d tensors have too, as torch sees them
// (2d with one row). A result without elements is always contiguous.
Tensor empty_result(c10::SymIntArrayRef sizes, const at::TensorOptions& options, bool channels_last);

// The sum of grad_output over everything but channels: the gradient of a bias.
Tensor bias_gradient(const Tensor& grad_output);

// In a function of this namespace, `handle` of the operator `name`.
// A handle is looked up once; a call is then one indirection into the dispatch table.
#define MYCONV_HANDLE(name)  \
  static const auto handle = \
      c10::Dispatcher::singleton().findSchemaOrThrow("myconv::" #name, "").typed<decltype(name)>()

}  // namespace myconv
