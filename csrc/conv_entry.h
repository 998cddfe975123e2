// The operators on a device: check, settle the layout, allocate, pick a row, run it. One source for every device.
//
// A Device says what differs:
//   table(direction)                              its selection table
//   empty(like, sizes, channels_last)             an uninitialised tensor of like's dtype and device
//   run(row, shape, pointers, result, bytes, threads)   allocates that much workspace and runs the row
//   threads(), isa()                              what the row is told, and what explain() tells
//   sums_bias(dtype)                              whether rows of backward_weight make the gradient of a bias too
//   Guard(tensor)                                 makes the tensor's device the current one
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty_like.h>

#include <utility>

#include "algorithm.h"
#include "checks.h"
#include "complex.h"
#include "operators.h"

namespace myconv {

// `result` is dense, or the weight gradient, whose strides are in the shape.
template <typename Device>
void run(Direction direction, const ConvShape& shape, ConvPointers pointers, const Tensor& result) {
  const AlgorithmTable& table = Device::table(direction);
  const Algorithm& algorithm = first_match(table, direction, shape);
  const int threads = Device::threads();
  const int64_t workspace = algorithm.workspace(shape, threads);
  if (Recording* r = recording()) {
    r->choices.push_back(
        {direction, shape, &algorithm, reasons(table, shape), Device::isa(), workspace, std::exchange(r->copies, {})});
    result.zero_();
    return;
  }
  pointers.result = result.data_ptr();
  Device::run(algorithm, shape, pointers, result, workspace, threads);
}

// --- layout ----------------------------------------------------------------------------------------------------------

// Whether one sample of t lies in channels_last order. Dimension 0 is left out, so that a sample is computed alike in
// every batch; where dimension 0 has ordinary strides this is torch's suggest_memory_format.
inline bool sample_is_channels_last(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  int64_t least = 0;
  for (int64_t i = 0; i < last; ++i) {
    const int64_t d = i == 0 ? 1 : last - i + 1;  // C, then W, H, D
    if (t.size(d) == 0 || t.stride(d) < least) return false;
    least = t.stride(d) * std::max<int64_t>(t.size(d), 1);
  }
  return least != t.stride(1);
}

// The strides of a dense tensor in one of the two layouts, as far as they matter (extents above 1).
inline bool is_dense(const Tensor& t, bool channels_last) {
  int64_t expected = 1;
  const int64_t last = t.dim() - 1;
  for (int64_t i = last; i >= 0; --i) {
    const int64_t d = !channels_last || i == 0 ? i : i == last ? 1 : i + 1;
    if (t.size(d) != 1 && t.stride(d) != expected) return false;
    expected *= t.size(d);
  }
  return true;
}

// Contiguous to the letter: is_contiguous() leaves out the strides of extents of 1, which a gradient is to have, too.
inline bool has_contiguous_strides(const Tensor& t) {
  int64_t expected = 1;
  for (int64_t i = t.dim() - 1; i >= 0; --i) {
    if (t.stride(i) != expected) return false;
    expected *= std::max<int64_t>(t.size(i), 1);
  }
  return true;
}

inline void note_copy(const char* name, const Tensor& t) {
  if (Recording* r = recording()) r->copies.emplace_back(name, static_cast<int64_t>(t.nbytes()));
}

template <typename Device>
Tensor dense(const char* name, const Tensor& t, bool channels_last) {
  if (is_dense(t, channels_last)) return t;
  note_copy(name, t);
  return Device::empty(t, t.sizes(), channels_last).copy_(t);
}

// The same, of a tensor that two computations read: `kept` is the copy of the one before, if there was one.
template <typename Device>
const Tensor& dense(const char* name, const Tensor& t, bool channels_last, Tensor& kept) {
  if (!kept.defined() || !is_dense(kept, channels_last)) kept = dense<Device>(name, t, channels_last);
  return kept;
}

// A bias as it is added: for channels that stand for those of a patch (fold_patches) as often as there are pixels in it.
inline Tensor bias_of(const Tensor& bias, int64_t channels, bool channels_last) {
  const Tensor b = bias.contiguous();
  if (b.numel() == channels) return b;
  const int64_t times = channels / b.numel();
  return channels_last ? b.repeat({times}) : b.repeat_interleave(times);
}

// Runs f(result) on a result of the given sizes whose memory is dense in the layout that is computed in. That is the
// memory format the result has by torch's rule, except when strides of dimension 0 say otherwise: then it is copied at
// the end.
template <typename Device, typename F>
Tensor with_result(const Tensor& like, c10::IntArrayRef sizes, bool channels_last, bool computed_channels_last,
                   const F& f) {
  const Tensor result = Device::empty(like, sizes, channels_last);
  if (result.numel() == 0) return result;
  if (is_dense(result, computed_channels_last)) {
    f(result);
    return result;
  }
  const Tensor computed = Device::empty(like, sizes, computed_channels_last);
  note_copy("result", computed);
  f(computed);
  return result.copy_(computed), result;
}

inline Sizes full_size(int64_t first, int64_t second, c10::IntArrayRef spatial) {
  Sizes sizes{first, second};
  sizes.append(spatial.begin(), spatial.end());
  return sizes;
}

inline std::optional<c10::IntArrayRef> sizes_of(const OptionalTensor& t) {
  return t ? std::make_optional(t->sizes()) : std::nullopt;
}

inline const void* data_of(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }

// --- the operators ---------------------------------------------------------------------------------------------------

template <typename Device>
struct Operators {
  // Our kernels run below autograd; autocast has had its say.
  struct Below {
    template <typename... Tensors>
    explicit Below(const Tensor& first, const Tensors&... others) : device(first) {
      (check_device(first, others), ...);
    }
    at::AutoDispatchBelowADInplaceOrView below;
    c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
    typename Device::Guard device;
  };

  static Tensor forward(const Tensor& x, const Tensor& w, const OptionalTensor& bias, c10::IntArrayRef output_size,
                        c10::IntArrayRef stride, c10::IntArrayRef padding, c10::IntArrayRef dilation, int64_t groups,
                        int64_t padding_mode) {
    const Below guard(x, w, bias);
    TORCH_CHECK(x.dim() > 2 && w.dim() > 2, "conv_forward: input and weight must have 3, 4 or 5 dimensions");
    const Sizes size = full_size(x.size(0), w.size(0), output_size);
    const OperatorCall<int64_t> call{
        "conv_forward", Direction::kForward, x.sizes(), w.sizes(), size, sizes_of(bias), stride, padding, dilation,
        groups,         padding_mode};
    check_operator(call);
    check_dtypes(x, w, bias, false);
    if (x.is_complex())
      return complex_convolution(x, w, bias, [&](const Tensor& a, const Tensor& b, const OptionalTensor& c) {
        return forward(a, b, c, output_size, stride, padding, dilation, groups, padding_mode);
      });
    const bool channels_last = result_is_channels_last(x, w);
    const bool computed = x.dim() == 3 ? channels_last : sample_is_channels_last(x) || sample_is_channels_last(w);
    const ConvShape shape = make_conv_shape(call, w.strides(), x.scalar_type(), computed);
    return with_result<Device>(x, size, channels_last, computed, [&](const Tensor& y) {
      const Tensor xd = dense<Device>("input", x, computed);
      OptionalTensor b;
      if (bias) b = bias->contiguous();
      run<Device>(Direction::kForward, shape,
                  {.input = xd.const_data_ptr(), .weight = w.const_data_ptr(), .bias = data_of(b)}, y);
    });
  }

  static Tensor backward_input(const Tensor& gy, const Tensor& w, const OptionalTensor& bias,
                               c10::IntArrayRef input_size, c10::IntArrayRef stride, c10::IntArrayRef padding,
                               c10::IntArrayRef dilation, int64_t groups, int64_t padding_mode) {
    Tensor gy_kept;
    return backward_input_with(gy_kept, gy, w, bias, input_size, stride, padding, dilation, groups, padding_mode, 0);
  }

  static Tensor backward_input_with(Tensor& gy_kept, const Tensor& gy, const Tensor& w, const OptionalTensor& bias,
                                    c10::IntArrayRef input_size, c10::IntArrayRef stride, c10::IntArrayRef padding,
                                    c10::IntArrayRef dilation, int64_t groups, int64_t padding_mode,
                                    int64_t bytes_after) {
    const Below guard(gy, w, bias);
    TORCH_CHECK(gy.dim() > 2 && w.dim() > 2,
                "conv_backward_input: grad_output and weight must have 3, 4 or 5 dimensions");
    TORCH_CHECK(groups > 0, "non-positive groups is not supported, got groups=", groups);
    const Sizes size = full_size(gy.size(0), w.size(1) * groups, input_size);
    const OperatorCall<int64_t> call{"conv_backward_input",
                                     Direction::kBackwardInput,
                                     size,
                                     w.sizes(),
                                     gy.sizes(),
                                     sizes_of(bias),
                                     stride,
                                     padding,
                                     dilation,
                                     groups,
                                     padding_mode};
    check_operator(call);
    check_dtypes(gy, w, bias, true);
    if (gy.is_complex())
      return complex_convolution(gy, w, bias, [&](const Tensor& a, const Tensor& b, const OptionalTensor& c) {
        return backward_input(a, b, c, input_size, stride, padding, dilation, groups, padding_mode);
      });
    const bool channels_last = result_is_channels_last(gy, w);
    const bool computed = gy.dim() == 3 ? channels_last : sample_is_channels_last(gy) || sample_is_channels_last(w);
    const ConvShape shape = make_conv_shape(call, w.strides(), gy.scalar_type(), computed);
    return with_result<Device>(gy, size, channels_last, computed, [&](const Tensor& gx) {
      const Tensor& gyd = dense<Device>("grad_output", gy, computed, gy_kept);
      OptionalTensor b;
      if (bias) b = bias_of(*bias, shape.in_channels(), computed);
      run<Device>(Direction::kBackwardInput, shape,
                  {.weight = w.const_data_ptr(),
                   .bias = data_of(b),
                   .grad_output = gyd.const_data_ptr(),
                   .bytes_after = bytes_after},
                  gx);
    });
  }

  // Fills gw, which may have any non-overlapping strides, and gb where it is defined.
  static void backward_weight_into(const Tensor& gw, const Tensor& gb, const Tensor& gy, const Tensor& x,
                                   const OperatorCall<int64_t>& call, Tensor& gy_kept) {
    const bool computed =
        x.dim() == 3 ? result_is_channels_last(x, gy) : sample_is_channels_last(x) || sample_is_channels_last(gy);
    const ConvShape shape = make_conv_shape(call, gw.strides(), gw.scalar_type(), computed);
    const Tensor &gyd = dense<Device>("grad_output", gy, computed, gy_kept), xd = dense<Device>("input", x, computed);
    if (gw.numel() == 0) return;
    run<Device>(Direction::kBackwardWeight, shape,
                {.input = xd.const_data_ptr(),
                 .grad_output = gyd.const_data_ptr(),
                 .grad_bias = gb.defined() ? gb.data_ptr() : nullptr},
                gw);
  }

  static Tensor backward_weight(const Tensor& gy, const Tensor& x, c10::IntArrayRef kernel_size,
                                c10::IntArrayRef stride, c10::IntArrayRef padding, c10::IntArrayRef dilation,
                                int64_t groups, int64_t padding_mode) {
    const Below guard(gy, x);
    TORCH_CHECK(gy.dim() > 2 && x.dim() > 2,
                "conv_backward_weight: grad_output and input must have 3, 4 or 5 dimensions");
    TORCH_CHECK(groups > 0, "non-positive groups is not supported, got groups=", groups);
    const Sizes size = full_size(gy.size(1), x.size(1) / groups, kernel_size);
    const OperatorCall<int64_t> call{"conv_backward_weight",
                                     Direction::kBackwardWeight,
                                     x.sizes(),
                                     size,
                                     gy.sizes(),
                                     std::nullopt,
                                     stride,
                                     padding,
                                     dilation,
                                     groups,
                                     padding_mode};
    check_operator(call);
    check_dtypes(gy, x, std::nullopt, false);
    if (gy.is_complex())
      return complex_convolution(gy, x, std::nullopt, [&](const Tensor& a, const Tensor& b, const OptionalTensor&) {
        return backward_weight(a, b, kernel_size, stride, padding, dilation, groups, padding_mode);
      });
    const Tensor gw = Device::empty(x, size, result_is_channels_last(gy, x));
    Tensor gy_kept;
    backward_weight_into(gw, Tensor(), gy, x, call, gy_kept);
    return gw;
  }

  static std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& gy, const Tensor& x, const Tensor& w,
                                                     c10::IntArrayRef stride, c10::IntArrayRef padding,
                                                     c10::IntArrayRef dilation, int64_t groups, int64_t padding_mode,
                                                     std::array<bool, 3> output_mask) {
    const Below guard(gy, x, w);
    TORCH_CHECK(gy.dim() > 2 && x.dim() > 2 && w.dim() > 2,
                "conv_backward: grad_output, input and weight must have 3, 4 or 5 dimensions");
    const OperatorCall<int64_t> call{"conv_backward", Direction::kBackwardWeight,
                                     x.sizes(),       w.sizes(),
                                     gy.sizes(),      std::nullopt,
                                     stride,          padding,
                                     dilation,        groups,
                                     padding_mode};
    check_operator(call);
    check_dtypes(gy, w, std::nullopt, false);
    check_dtypes(x, w, std::nullopt, false);
    Tensor gx, gw, gb, gy_kept;
    if (output_mask[0])
      gx = backward_input_with(gy_kept, gy, w, std::nullopt, x.sizes().slice(2), stride, padding, dilation, groups,
                               padding_mode, output_mask[1] ? static_cast<int64_t>(x.nbytes()) : 0);
    if (output_mask[1]) {
      gw = has_contiguous_strides(w) ? Device::empty(w, w.sizes(), false) : at::empty_like(w);
      // Beside gw, by the row that makes it.
      if (output_mask[2] && Device::sums_bias(w.scalar_type()) && gw.numel() > 0)
        gb = Device::empty(gy, {gy.size(1)}, false);
      if (gw.is_complex())
        gw.copy_(backward_weight(gy, x, w.sizes().slice(2), stride, padding, dilation, groups, padding_mode));
      else
        backward_weight_into(gw, gb, gy, x, call, gy_kept);
    }
    if (output_mask[2] && !gb.defined()) gb = bias_gradient(gy);
    return {gx, gw, gb};
  }
};

// Registers them for the device's dispatch key.
#define MYCONV_OPERATORS(key, Device)                                            \
  TORCH_LIBRARY_IMPL(myconv, key, m) {                                           \
    m.impl("conv_forward", &myconv::Operators<Device>::forward);                 \
    m.impl("conv_backward_input", &myconv::Operators<Device>::backward_input);   \
    m.impl("conv_backward_weight", &myconv::Operators<Device>::backward_weight); \
    m.impl("conv_backward", &myconv::Operators<Device>::backward);               \
  }

}  // namespace myconv
