// The operators on the CPU: check, settle the layout, allocate, pick a row, run it.
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <cstddef>
#include <cstdlib>
#include <cstring>

#include "checks.h"
#include "complex.h"
#include "cpu/algorithms.h"
#include "cpu/microkernels.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/tables.h"
#include "operators.h"

namespace myconv::cpu {
namespace {

const char* accept_all(const ConvShape&) { return nullptr; }
int64_t no_workspace(const ConvShape&, int) { return 0; }

const Algorithm kForward[] = {
    {"depthwise", depthwise_forward_decline, depthwise_forward_workspace, depthwise_forward},
    {"direct", direct_forward_decline, direct_forward_workspace, direct_forward},
    {"implicit_gemm", implicit_gemm_forward_decline, implicit_gemm_forward_workspace, implicit_gemm_forward},
    {"reference", accept_all, no_workspace, reference_forward},
};
const Algorithm kBackwardInput[] = {
    {"depthwise", depthwise_backward_input_decline, depthwise_backward_input_workspace, depthwise_backward_input},
    {"direct", direct_backward_input_decline, direct_backward_input_workspace, direct_backward_input},
    {"implicit_gemm", implicit_gemm_backward_input_decline, implicit_gemm_backward_input_workspace,
     implicit_gemm_backward_input},
    {"reference", accept_all, no_workspace, reference_backward_input},
};
const Algorithm kBackwardWeight[] = {
    {"depthwise", depthwise_backward_weight_decline, depthwise_backward_weight_workspace, depthwise_backward_weight},
    {"implicit_gemm", implicit_gemm_backward_weight_decline, implicit_gemm_backward_weight_workspace,
     implicit_gemm_backward_weight},
    {"reference", accept_all, no_workspace, reference_backward_weight},
};

constexpr int64_t kStackBytes = 16 << 10;  // up to here the allocator would cost more than it gives

// `result` is dense, or the weight gradient, whose strides are in the shape.
void run(Direction direction, const ConvShape& shape, ConvPointers pointers, const Tensor& result) {
  const Algorithm& algorithm = first_match(table(direction), direction, shape);
  const int threads = at::get_num_threads();
  const int64_t bytes = algorithm.workspace(shape, threads);
  if (Recording* r = recording()) {
    r->choices.push_back({direction, shape, &algorithm, reasons(table(direction), shape), microkernels().isa, bytes,
                          std::exchange(r->copies, {})});
    result.zero_();
    return;
  }
  pointers.result = result.data_ptr();
  // Float16 denormals are ordinary numbers in float32, in which they are summed.
  const DenormalMode mode(flush_denormals() && (shape.dtype == Dtype::kFloat32 || shape.dtype == Dtype::kBFloat16));
  // MYCONV_WORKSPACE=heap is for tests that watch the allocator's memory.
  static const bool heap_only = std::getenv("MYCONV_WORKSPACE") != nullptr;
  if (bytes <= kStackBytes && !heap_only) {
    alignas(64) std::byte workspace[kStackBytes];
    return algorithm.run(shape, pointers, workspace, threads);
  }
  const c10::DataPtr workspace = bytes > 0 ? c10::GetCPUAllocator()->allocate(bytes) : c10::DataPtr();
  algorithm.run(shape, pointers, workspace.get(), threads);
}

// --- layout ----------------------------------------------------------------------------------------------------------

// Whether one sample of t lies in channels_last order. Dimension 0 is left out, so that a sample is computed alike in
// every batch; where dimension 0 has ordinary strides this is torch's suggest_memory_format.
bool sample_is_channels_last(const Tensor& t) {
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
bool is_dense(const Tensor& t, bool channels_last) {
  int64_t expected = 1;
  const int64_t last = t.dim() - 1;
  for (int64_t i = last; i >= 0; --i) {
    const int64_t d = !channels_last || i == 0 ? i : i == last ? 1 : i + 1;
    if (t.size(d) != 1 && t.stride(d) != expected) return false;
    expected *= t.size(d);
  }
  return true;
}

// empty_result without a trip through the dispatcher, which costs as much as a small convolution.
Tensor empty_result_cpu(c10::IntArrayRef sizes, at::ScalarType dtype, bool channels_last) {
  if (channels_last && sizes.size() == 3) return empty_result(c10::fromIntArrayRefSlow(sizes), at::dtype(dtype), true);
  const at::MemoryFormat format = !channels_last || sizes[0] == 0 ? at::MemoryFormat::Contiguous
                                  : sizes.size() == 4             ? at::MemoryFormat::ChannelsLast
                                                                  : at::MemoryFormat::ChannelsLast3d;
  return Tensor(at::detail::empty_cpu(sizes, dtype, /*pin_memory=*/false, format));
}

void note_copy(const char* name, const Tensor& t) {
  if (Recording* r = recording()) r->copies.emplace_back(name, static_cast<int64_t>(t.nbytes()));
}

Tensor dense(const char* name, const Tensor& t, bool channels_last) {
  if (is_dense(t, channels_last)) return t;
  note_copy(name, t);
  return empty_result_cpu(t.sizes(), t.scalar_type(), channels_last).copy_(t);
}

// Runs f(result) on a result of the given sizes whose memory is dense in the layout that is computed in. That is the
// memory format the result has by torch's rule, except when strides of dimension 0 say otherwise: then it is copied at
// the end.
template <typename F>
Tensor with_result(c10::IntArrayRef sizes, at::ScalarType dtype, bool channels_last, bool computed_channels_last,
                   const F& f) {
  const Tensor result = empty_result_cpu(sizes, dtype, channels_last);
  if (result.numel() == 0) return result;
  if (is_dense(result, computed_channels_last)) {
    f(result);
    return result;
  }
  const Tensor computed = empty_result_cpu(sizes, dtype, computed_channels_last);
  note_copy("result", computed);
  f(computed);
  return result.copy_(computed), result;
}

Sizes full_size(int64_t first, int64_t second, c10::IntArrayRef spatial) {
  Sizes sizes{first, second};
  sizes.append(spatial.begin(), spatial.end());
  return sizes;
}

std::optional<c10::IntArrayRef> sizes_of(const OptionalTensor& t) {
  return t ? std::make_optional(t->sizes()) : std::nullopt;
}

const void* data_of(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }

// Our kernels run below autograd; autocast has had its say.
struct BelowAutograd {
  at::AutoDispatchBelowADInplaceOrView below;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

// --- the operators ---------------------------------------------------------------------------------------------------

Tensor forward(const Tensor& x, const Tensor& w, const OptionalTensor& bias, c10::IntArrayRef output_size,
               c10::IntArrayRef stride, c10::IntArrayRef padding, c10::IntArrayRef dilation, int64_t groups,
               int64_t padding_mode) {
  const BelowAutograd guard;
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
  return with_result(size, x.scalar_type(), channels_last, computed, [&](const Tensor& y) {
    const Tensor xd = dense("input", x, computed);
    const OptionalTensor b = bias ? OptionalTensor(bias->contiguous()) : std::nullopt;
    run(Direction::kForward, shape, {.input = xd.const_data_ptr(), .weight = w.const_data_ptr(), .bias = data_of(b)},
        y);
  });
}

Tensor backward_input(const Tensor& gy, const Tensor& w, const OptionalTensor& bias, c10::IntArrayRef input_size,
                      c10::IntArrayRef stride, c10::IntArrayRef padding, c10::IntArrayRef dilation, int64_t groups,
                      int64_t padding_mode) {
  const BelowAutograd guard;
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
  return with_result(size, gy.scalar_type(), channels_last, computed, [&](const Tensor& gx) {
    const Tensor gyd = dense("grad_output", gy, computed);
    const OptionalTensor b = bias ? OptionalTensor(bias->contiguous()) : std::nullopt;
    run(Direction::kBackwardInput, shape,
        {.weight = w.const_data_ptr(), .bias = data_of(b), .grad_output = gyd.const_data_ptr()}, gx);
  });
}

// Fills gw, which may have any non-overlapping strides, and gb where it is defined.
void backward_weight_into(const Tensor& gw, const Tensor& gb, const Tensor& gy, const Tensor& x,
                          const OperatorCall<int64_t>& call) {
  const bool computed =
      x.dim() == 3 ? result_is_channels_last(x, gy) : sample_is_channels_last(x) || sample_is_channels_last(gy);
  const ConvShape shape = make_conv_shape(call, gw.strides(), gw.scalar_type(), computed);
  const Tensor gyd = dense("grad_output", gy, computed), xd = dense("input", x, computed);
  if (gb.defined()) bias_backward(shape, gyd.const_data_ptr(), gb.data_ptr());
  if (gw.numel() == 0) return;
  run(Direction::kBackwardWeight, shape, {.input = xd.const_data_ptr(), .grad_output = gyd.const_data_ptr()}, gw);
}

Tensor backward_weight(const Tensor& gy, const Tensor& x, c10::IntArrayRef kernel_size, c10::IntArrayRef stride,
                       c10::IntArrayRef padding, c10::IntArrayRef dilation, int64_t groups, int64_t padding_mode) {
  const BelowAutograd guard;
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
  const Tensor gw = empty_result_cpu(size, x.scalar_type(), result_is_channels_last(gy, x));
  backward_weight_into(gw, Tensor(), gy, x, call);
  return gw;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& gy, const Tensor& x, const Tensor& w, c10::IntArrayRef stride,
                                            c10::IntArrayRef padding, c10::IntArrayRef dilation, int64_t groups,
                                            int64_t padding_mode, std::array<bool, 3> output_mask) {
  const BelowAutograd guard;
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
  Tensor gx, gw, gb;
  if (output_mask[0])
    gx = backward_input(gy, w, std::nullopt, x.sizes().slice(2), stride, padding, dilation, groups, padding_mode);
  if (output_mask[1]) {
    gw = w.is_contiguous() ? empty_result_cpu(w.sizes(), w.scalar_type(), false) : at::empty_like(w);
    // Here gy is at hand in the layout of the computation.
    if (output_mask[2] && (w.scalar_type() == at::kFloat || w.scalar_type() == at::kDouble))
      gb = Tensor(at::detail::empty_cpu({gy.size(1)}, gy.scalar_type()));
    if (gw.is_complex())
      gw.copy_(backward_weight(gy, x, w.sizes().slice(2), stride, padding, dilation, groups, padding_mode));
    else
      backward_weight_into(gw, gb, gy, x, call);
  }
  if (output_mask[2] && !gb.defined()) gb = bias_gradient(gy);
  return {gx, gw, gb};
}

}  // namespace

const AlgorithmTable& table(Direction direction) {
  static const AlgorithmTable tables[] = {{kForward, std::size(kForward)},
                                          {kBackwardInput, std::size(kBackwardInput)},
                                          {kBackwardWeight, std::size(kBackwardWeight)}};
  return tables[static_cast<int>(direction)];
}

}  // namespace myconv::cpu

TORCH_LIBRARY_IMPL(myconv, CPU, m) {
  m.impl("conv_forward", &myconv::cpu::forward);
  m.impl("conv_backward_input", &myconv::cpu::backward_input);
  m.impl("conv_backward_weight", &myconv::cpu::backward_weight);
  m.impl("conv_backward", &myconv::cpu::backward);
}
