// The schemas, the Meta kernels, and the memory-format rule that the Meta kernels share with every device.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/sum.h>
#include <c10/core/MemoryFormat.h>
#include <c10/util/irange.h>
#include <torch/library.h>

#include "checks.h"
#include "operators.h"

namespace myconv {
namespace {

using SymSizes = c10::SymDimVector;

// Nothing where the answer depends on data.
std::optional<bool> known(const c10::SymBool& answer) {
  if (TORCH_GUARD_OR_FALSE(answer)) return true;
  if (!TORCH_GUARD_OR_TRUE(answer)) return false;
  return std::nullopt;
}

// Torch's rule: strides do not shrink in the order C, W, H, D, N. A batch size that depends on data is taken to be
// large; nothing where the answer depends on another size that depends on data.
std::optional<bool> strides_suggest_channels_last(c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  if (known(stride[1].sym_eq(0)).value_or(false)) return false;
  c10::SymInt least = 0;
  for (const auto i : c10::irange(size.size() - 1)) {
    const size_t d = i == 0 ? 1 : size.size() - i;
    const std::optional<bool> absent = known(size[d].sym_eq(0)), shrinks = known(stride[d].sym_lt(least));
    const std::optional<bool> several = known(size[d].sym_gt(1));
    if (!absent || !shrinks || !several) return std::nullopt;
    if (*absent || *shrinks) return false;
    least = *several ? stride[d] * size[d] : stride[d];
  }
  const bool absent = known(size[0].sym_eq(0)).value_or(false);
  const std::optional<bool> shrinks = known(stride[0].sym_lt(least)), ambiguous = known(least.sym_eq(stride[1]));
  return !absent && !shrinks.value_or(false) && !ambiguous.value_or(false);
}

bool suggests_channels_last(const Tensor& t, bool activation) {
  const bool symbolic = t.unsafeGetTensorImpl()->has_symbolic_sizes_strides();
  if (t.dim() == 3) {
    // It is judged as torch judges it: as a 2d one with one row. Torch makes a 1d activation contiguous first, and so
    // only a weight can make a 1d result channels_last (or an activation whose strides are contiguous and channels_last
    // at once).
    if (activation && !t.is_contiguous()) return false;
    const auto size = t.sym_sizes(), stride = t.sym_strides();
    return strides_suggest_channels_last({size[0], size[1], 1, size[2]},
                                         {stride[0], stride[1], size[2] * stride[2], stride[2]})
        .value_or(false);
  }
  const at::MemoryFormat format = t.dim() == 4 ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::ChannelsLast3d;
  if (!symbolic) return t.suggest_memory_format() == format;
  const std::optional<bool> answer = strides_suggest_channels_last(t.sym_sizes(), t.sym_strides());
  return answer ? *answer : TORCH_GUARD_OR_FALSE(t.sym_is_contiguous(format));
}

SymSizes with_spatial(const c10::SymInt& first, const c10::SymInt& second, c10::SymIntArrayRef spatial) {
  SymSizes sizes{first, second};
  sizes.append(spatial.begin(), spatial.end());
  return sizes;
}

std::optional<c10::SymIntArrayRef> sizes_of(const OptionalTensor& t) {
  return t ? std::make_optional(t->sym_sizes()) : std::nullopt;
}

Tensor conv_forward_meta(const Tensor& x, const Tensor& w, const OptionalTensor& bias, c10::SymIntArrayRef output_size,
                         c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                         c10::SymInt groups, int64_t padding_mode) {
  TORCH_CHECK(x.dim() > 2 && w.dim() > 2, "conv_forward: input and weight must have 3, 4 or 5 dimensions");
  const SymSizes size = with_spatial(x.sym_size(0), w.sym_size(0), output_size);
  check_operator<c10::SymInt>({"conv_forward", Direction::kForward, x.sym_sizes(), w.sym_sizes(), size, sizes_of(bias),
                               stride, padding, dilation, groups, padding_mode});
  check_dtypes(x, w, bias, false);
  return empty_result(size, x.options(), result_is_channels_last(x, w));
}

Tensor conv_backward_input_meta(const Tensor& gy, const Tensor& w, const OptionalTensor& bias,
                                c10::SymIntArrayRef input_size, c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
                                c10::SymIntArrayRef dilation, c10::SymInt groups, int64_t padding_mode) {
  TORCH_CHECK(gy.dim() > 2 && w.dim() > 2,
              "conv_backward_input: grad_output and weight must have 3, 4 or 5 dimensions");
  const SymSizes size = with_spatial(gy.sym_size(0), w.sym_size(1) * groups, input_size);
  check_operator<c10::SymInt>({"conv_backward_input", Direction::kBackwardInput, size, w.sym_sizes(), gy.sym_sizes(),
                               sizes_of(bias), stride, padding, dilation, groups, padding_mode});
  check_dtypes(gy, w, bias, true);
  return empty_result(size, gy.options(), result_is_channels_last(gy, w));
}

Tensor conv_backward_weight_meta(const Tensor& gy, const Tensor& x, c10::SymIntArrayRef kernel_size,
                                 c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                                 c10::SymInt groups, int64_t padding_mode) {
  TORCH_CHECK(gy.dim() > 2 && x.dim() > 2,
              "conv_backward_weight: grad_output and input must have 3, 4 or 5 dimensions");
  TORCH_CHECK(groups > 0, "non-positive groups is not supported, got groups=", groups);
  const SymSizes size = with_spatial(gy.sym_size(1), x.sym_size(1) / groups, kernel_size);
  check_operator<c10::SymInt>({"conv_backward_weight", Direction::kBackwardWeight, x.sym_sizes(), size, gy.sym_sizes(),
                               std::nullopt, stride, padding, dilation, groups, padding_mode});
  check_dtypes(gy, x, std::nullopt, false);
  return empty_result(size, x.options(), result_is_channels_last(gy, x));
}

std::tuple<Tensor, Tensor, Tensor> conv_backward_meta(const Tensor& gy, const Tensor& x, const Tensor& w,
                                                      c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
                                                      c10::SymIntArrayRef dilation, c10::SymInt groups,
                                                      int64_t padding_mode, std::array<bool, 3> output_mask) {
  TORCH_CHECK(gy.dim() > 2 && x.dim() > 2 && w.dim() > 2,
              "conv_backward: grad_output, input and weight must have 3, 4 or 5 dimensions");
  check_operator<c10::SymInt>({"conv_backward", Direction::kBackwardWeight, x.sym_sizes(), w.sym_sizes(),
                               gy.sym_sizes(), std::nullopt, stride, padding, dilation, groups, padding_mode});
  check_dtypes(gy, w, std::nullopt, false);
  check_dtypes(x, w, std::nullopt, false);
  Tensor gx, gw, gb;
  if (output_mask[0]) gx = empty_result(x.sym_sizes(), gy.options(), result_is_channels_last(gy, w));
  if (output_mask[1]) gw = at::empty_like(w);
  if (output_mask[2]) gb = at::empty_symint({gy.sym_size(1)}, gy.options());
  return {gx, gw, gb};
}

}  // namespace

bool result_is_channels_last(const Tensor& first, const Tensor& second) {
  return suggests_channels_last(first, true) || suggests_channels_last(second, false);
}

Tensor empty_result(c10::SymIntArrayRef sizes, const at::TensorOptions& options, bool channels_last) {
  // A batch size that depends on data is taken not to be 0, as torch takes it.
  if (TORCH_GUARD_OR_FALSE(sizes[0].sym_eq(0))) channels_last = false;
  if (!channels_last) return at::empty_symint(sizes, options);
  if (sizes.size() != 3)
    return at::empty_symint(sizes, options,
                            sizes.size() == 4 ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::ChannelsLast3d);
  return at::empty_strided_symint(sizes, SymSizes{sizes[1] * sizes[2], 1, sizes[1]}, options);
}

Tensor bias_gradient(const Tensor& gy) {
  // Torch splits a reduction among threads along what is left of it. With a single result it splits the sum itself, whose
  // bits then depend on threads: there one axis at a time. 16-bit types in float32, or every step would round; torch has
  // no sum of complex32.
  const at::ScalarType type = gy.scalar_type();
  const bool half = type == at::kHalf || type == at::kBFloat16;
  Tensor sum = half ? gy.to(at::kFloat) : type == at::kComplexHalf ? gy.to(at::kComplexFloat) : gy;
  if (sum.sym_size(1) != 1 && sum.dim() > 3) sum = sum.dim() == 4 ? sum.sum({2, 3}) : sum.sum({2, 3, 4});
  while (sum.dim() > 2) sum = sum.sum(-1);
  return sum.sum(0).to(type);
}

Tensor conv_forward(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                    c10::SymIntArrayRef output_size, c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
                    c10::SymIntArrayRef dilation, c10::SymInt groups, int64_t padding_mode) {
  MYCONV_HANDLE(conv_forward);
  return handle.call(input, weight, bias, output_size, stride, padding, dilation, std::move(groups), padding_mode);
}

Tensor conv_backward_input(const Tensor& grad_output, const Tensor& weight, const OptionalTensor& bias,
                           c10::SymIntArrayRef input_size, c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
                           c10::SymIntArrayRef dilation, c10::SymInt groups, int64_t padding_mode) {
  MYCONV_HANDLE(conv_backward_input);
  return handle.call(grad_output, weight, bias, input_size, stride, padding, dilation, std::move(groups), padding_mode);
}

Tensor conv_backward_weight(const Tensor& grad_output, const Tensor& input, c10::SymIntArrayRef kernel_size,
                            c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                            c10::SymInt groups, int64_t padding_mode) {
  MYCONV_HANDLE(conv_backward_weight);
  return handle.call(grad_output, input, kernel_size, stride, padding, dilation, std::move(groups), padding_mode);
}

std::tuple<Tensor, Tensor, Tensor> conv_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                                 c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
                                                 c10::SymIntArrayRef dilation, c10::SymInt groups, int64_t padding_mode,
                                                 std::array<bool, 3> output_mask) {
  MYCONV_HANDLE(conv_backward);
  return handle.call(grad_output, input, weight, stride, padding, dilation, std::move(groups), padding_mode,
                     output_mask);
}

}  // namespace myconv

TORCH_LIBRARY(myconv, m) {
  m.def(
      "conv_forward(Tensor input, Tensor weight, Tensor? bias, SymInt[] output_size, SymInt[] stride, SymInt[] "
      "padding, "
      "SymInt[] dilation, SymInt groups, int padding_mode=0) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "conv_backward_input(Tensor grad_output, Tensor weight, Tensor? bias, SymInt[] input_size, SymInt[] stride, "
      "SymInt[] padding, SymInt[] dilation, SymInt groups, int padding_mode=0) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "conv_backward_weight(Tensor grad_output, Tensor input, SymInt[] kernel_size, SymInt[] stride, SymInt[] padding, "
      "SymInt[] dilation, SymInt groups, int padding_mode=0) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "conv_backward(Tensor grad_output, Tensor input, Tensor weight, SymInt[] stride, SymInt[] padding, SymInt[] "
      "dilation, "
      "SymInt groups, int padding_mode, bool[3] output_mask) -> (Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(myconv, Meta, m) {
  m.impl("conv_forward", &myconv::conv_forward_meta);
  m.impl("conv_backward_input", &myconv::conv_backward_input_meta);
  m.impl("conv_backward_weight", &myconv::conv_backward_weight_meta);
  m.impl("conv_backward", &myconv::conv_backward_meta);
}
