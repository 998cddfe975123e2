// Autocast: the operators that users call run in the region's dtype, with torch's own cache of casted weights.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "operators.h"

namespace myconv {
namespace {

template <c10::DeviceType device, typename Operator>
Tensor in_autocast_dtype(const Operator& op, const Tensor& first, const Tensor& second, const OptionalTensor& bias,
                         c10::SymIntArrayRef size, c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
                         c10::SymIntArrayRef dilation, c10::SymInt groups, int64_t padding_mode) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const at::ScalarType type = at::autocast::get_autocast_dtype(device);
  return op(at::autocast::cached_cast(type, first, device), at::autocast::cached_cast(type, second, device),
            at::autocast::cached_cast(type, bias, device), size, stride, padding, dilation, std::move(groups),
            padding_mode);
}

template <c10::DeviceType device>
Tensor conv_forward_autocast(const Tensor& x, const Tensor& w, const OptionalTensor& bias,
                             c10::SymIntArrayRef output_size, c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
                             c10::SymIntArrayRef dilation, c10::SymInt groups, int64_t padding_mode) {
  return in_autocast_dtype<device>(conv_forward, x, w, bias, output_size, stride, padding, dilation, std::move(groups),
                                   padding_mode);
}

template <c10::DeviceType device>
Tensor conv_backward_input_autocast(const Tensor& gy, const Tensor& w, const OptionalTensor& bias,
                                    c10::SymIntArrayRef input_size, c10::SymIntArrayRef stride,
                                    c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, c10::SymInt groups,
                                    int64_t padding_mode) {
  return in_autocast_dtype<device>(conv_backward_input, gy, w, bias, input_size, stride, padding, dilation,
                                   std::move(groups), padding_mode);
}

}  // namespace
}  // namespace myconv

TORCH_LIBRARY_IMPL(myconv, AutocastCPU, m) {
  m.impl("conv_forward", &myconv::conv_forward_autocast<c10::kCPU>);
  m.impl("conv_backward_input", &myconv::conv_backward_input_autocast<c10::kCPU>);
}

TORCH_LIBRARY_IMPL(myconv, AutocastCUDA, m) {
  m.impl("conv_forward", &myconv::conv_forward_autocast<c10::kCUDA>);
  m.impl("conv_backward_input", &myconv::conv_backward_input_autocast<c10::kCUDA>);
}
