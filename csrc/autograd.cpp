// The Autograd keys: reverse mode to any order, forward mode, compiled autograd.
//
// A convolution is bilinear, and with a functional on its output trilinear: the three operators are each other's
// derivatives. `g` is the gradient of the result, and saved tensors are conjugated (which is free for real ones).
//
//   operator                    by its 1st tensor            by its 2nd tensor
//   conv_forward(x, w)          conv_backward_input(g, w)    conv_backward_weight(g, x)
//   conv_backward_input(gy, w)  conv_forward(g, w)           conv_backward_weight(gy, g)
//   conv_backward_weight(gy, x) conv_forward(x, g)           conv_backward_input(gy, g)
//
// A node saves a tensor only if a gradient that somebody asked for reads it: a frozen weight does not keep the input
// alive.
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/FunctionsManual.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/library.h>

#include "operators.h"

namespace myconv {
namespace {

using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using torch::dynamo::autograd::CompiledNodeArgs;
using torch::dynamo::autograd::SwapSavedVariables;
using SymSizes = c10::SymDimVector;

// The part of a call that is no tensor.
struct Parameters {
  SymSizes stride, padding, dilation;
  c10::SymInt groups;
  int64_t padding_mode;
};

Parameters parameters_of(c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                         const c10::SymInt& groups, int64_t padding_mode) {
  return {SymSizes(stride), SymSizes(padding), SymSizes(dilation), groups, padding_mode};
}

c10::SymIntArrayRef spatial(c10::SymIntArrayRef sizes) { return sizes.slice(2); }

// The operator of one direction. `size` is what that operator is told: the spatial size of its result.
template <Direction direction>
Tensor call(const Tensor& first, const Tensor& second, const OptionalTensor& bias, c10::SymIntArrayRef size,
            const Parameters& p) {
  if constexpr (direction == Direction::kForward)
    return conv_forward(first, second, bias, size, p.stride, p.padding, p.dilation, p.groups, p.padding_mode);
  else if constexpr (direction == Direction::kBackwardInput)
    return conv_backward_input(first, second, bias, size, p.stride, p.padding, p.dilation, p.groups, p.padding_mode);
  else
    return conv_backward_weight(first, second, size, p.stride, p.padding, p.dilation, p.groups, p.padding_mode);
}

// A gradient with the strides of the tensor it belongs to (DistributedDataParallel warns about any other).
Tensor with_strides(Tensor gradient, c10::SymIntArrayRef strides) {
  if (!gradient.defined() || strides.empty() || gradient.sym_strides() == strides) return gradient;
  return gradient.new_empty_strided_symint(gradient.sym_sizes(), strides).copy_(gradient);  // new_: batched under vmap
}

template <Direction direction>
struct ConvBackward : Node {
  SavedVariable first, second;
  SymSizes first_size, second_size;  // full sizes
  SymSizes weight_strides;           // of conv_forward's and conv_backward_input's weight; empty: any will do
  Parameters parameters;
  bool has_bias = false;

  std::string name() const override {
    constexpr const char* names[] = {"ConvForwardBackward", "ConvBackwardInputBackward", "ConvBackwardWeightBackward"};
    return names[static_cast<int>(direction)];
  }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    first.reset_data();
    second.reset_data();
  }

  variable_list apply(variable_list&& gradients) override {
    std::lock_guard<std::mutex> lock(mutex_);
    // The backward of a float32 graph stays float32, inside an autocast region too.
    c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const Tensor& g = gradients[0];
    variable_list result(has_bias ? 3 : 2);
    if (!g.defined()) return result;
    const bool need_first = task_should_compute_output(0), need_second = task_should_compute_output(1);
    const bool need_bias = has_bias && task_should_compute_output(2);
    const Parameters& p = parameters;
    const auto saved = [](const SavedVariable& v) {
      const Tensor t = v.unpack();
      return t.is_complex() ? t.conj() : t;
    };
    if constexpr (direction == Direction::kForward) {
      if (need_first && need_second) {
        auto [gx, gw, gb] = conv_backward(g, saved(first), saved(second), p.stride, p.padding, p.dilation, p.groups,
                                          p.padding_mode, {true, true, need_bias});
        result[0] = std::move(gx);
        result[1] = with_strides(std::move(gw), weight_strides);
        if (need_bias) result[2] = std::move(gb);
        return result;
      }
      if (need_first)
        result[0] = call<Direction::kBackwardInput>(g, saved(second), std::nullopt, spatial(first_size), p);
      if (need_second)
        result[1] = with_strides(
            call<Direction::kBackwardWeight>(g, saved(first), std::nullopt, spatial(second_size), p), weight_strides);
    } else if constexpr (direction == Direction::kBackwardInput) {
      if (need_first) result[0] = call<Direction::kForward>(g, saved(second), std::nullopt, spatial(first_size), p);
      if (need_second)
        result[1] = with_strides(
            call<Direction::kBackwardWeight>(saved(first), g, std::nullopt, spatial(second_size), p), weight_strides);
    } else {
      if (need_first) result[0] = call<Direction::kForward>(saved(second), g, std::nullopt, spatial(first_size), p);
      if (need_second)
        result[1] = call<Direction::kBackwardInput>(saved(first), g, std::nullopt, spatial(second_size), p);
    }
    if (need_bias) result[2] = bias_gradient(g);
    return result;
  }

  // Compiled autograd: everything the node holds goes into the cache key, and is swapped for proxies while tracing.
  template <typename Self, typename F>
  static void each_size(Self& self, const F& f) {
    for (auto* list : {&self.first_size, &self.second_size, &self.weight_strides, &self.parameters.stride,
                       &self.parameters.padding, &self.parameters.dilation})
      for (auto& size : *list) f(size);
    f(self.parameters.groups);
  }

  void compiled_args(CompiledNodeArgs& args) const override {
    args.collect(first, false);
    args.collect(second, false);
    each_size(*this, [&](const c10::SymInt& size) { args.collect(size); });
    args.collect(parameters.padding_mode);
    args.collect(has_bias);
  }

  variable_list apply_with_saved(const variable_list& gradients, SwapSavedVariables& saved) override {
    saved.before(first);
    saved.before(second);
    each_size(*this, [&](c10::SymInt& size) { saved.before(size); });
    variable_list result = apply(variable_list(gradients));
    saved.after(first);
    saved.after(second);
    each_size(*this, [&](c10::SymInt& size) { saved.after(size); });
    return result;
  }
};

// Torch 2.11 holds nodes in a shared_ptr, later releases in an intrusive_ptr.
template <typename N>
auto make_node() {
#if __has_include(<torch/csrc/autograd/node.h>)
  return c10::make_intrusive<N>();
#else
  return std::shared_ptr<N>(new N(), torch::autograd::deleteNode);
#endif
}

template <Direction direction, typename Redispatch>
Tensor differentiable(const Tensor& first, const Tensor& second, const OptionalTensor& bias, c10::SymIntArrayRef size,
                      c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                      const c10::SymInt& groups, int64_t padding_mode, const Redispatch& redispatch) {
  using torch::autograd::isFwGradDefined;
  const bool reverse = torch::autograd::compute_requires_grad(first, second, bias);
  const bool forward = isFwGradDefined(first) || isFwGradDefined(second) || isFwGradDefined(bias);
  if (!reverse && !forward) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return redispatch();
  }
  decltype(make_node<ConvBackward<direction>>()) node;
  if (reverse) {
    node = make_node<ConvBackward<direction>>();
    node->has_bias = bias.has_value();
    if (bias)
      node->set_next_edges(torch::autograd::collect_next_edges(first, second, *bias));
    else
      node->set_next_edges(torch::autograd::collect_next_edges(first, second));
    if (second.requires_grad()) node->first = SavedVariable(first, false);
    if (first.requires_grad()) node->second = SavedVariable(second, false);
    node->first_size = first.sym_sizes();
    node->second_size = second.sym_sizes();
    if (direction != Direction::kBackwardWeight && second.requires_grad() && second.is_non_overlapping_and_dense())
      node->weight_strides = second.sym_strides();
    node->parameters = parameters_of(stride, padding, dilation, groups, padding_mode);
  }
  Tensor result;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    result = redispatch();
  }
  if (reverse) torch::autograd::set_history(result, node);
  if (forward) {
    using namespace torch::autograd::generated::details;
    const Parameters p = parameters_of(stride, padding, dilation, groups, padding_mode);
    const Tensor first_t = toNonOptFwGrad(first), second_t = toNonOptFwGrad(second);
    const Tensor bias_t = toNonOptFwGrad(bias);
    OptionalTensor with_bias = bias_t.defined() ? OptionalTensor(bias_t) : std::nullopt;
    Tensor tangent;
    if (first_t.defined()) {
      tangent = call<direction>(first_t, toNonOptPrimal(second), with_bias, size, p);
      with_bias.reset();
    }
    if (second_t.defined()) {
      const Tensor t = call<direction>(toNonOptPrimal(first), second_t, with_bias, size, p);
      tangent = tangent.defined() ? tangent + t : t;
      with_bias.reset();
    }
    if (with_bias) {
      SymSizes channels(result.dim(), 1);
      channels[1] = bias_t.sym_size(0);
      tangent = bias_t.view_symint(channels).expand_symint(result.sym_sizes());
    }
    result._set_fw_grad(tangent, /*level=*/0, /*is_inplace_op=*/false);
  }
  return result;
}

Tensor conv_forward_autograd(c10::DispatchKeySet keys, const Tensor& x, const Tensor& w, const OptionalTensor& bias,
                             c10::SymIntArrayRef size, c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
                             c10::SymIntArrayRef dilation, c10::SymInt groups, int64_t padding_mode) {
  MYCONV_HANDLE(conv_forward);
  return differentiable<Direction::kForward>(x, w, bias, size, stride, padding, dilation, groups, padding_mode, [&] {
    return handle.redispatch(keys & c10::after_autograd_keyset, x, w, bias, size, stride, padding, dilation, groups,
                             padding_mode);
  });
}

Tensor conv_backward_input_autograd(c10::DispatchKeySet keys, const Tensor& gy, const Tensor& w,
                                    const OptionalTensor& bias, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                                    c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, c10::SymInt groups,
                                    int64_t padding_mode) {
  MYCONV_HANDLE(conv_backward_input);
  return differentiable<Direction::kBackwardInput>(
      gy, w, bias, size, stride, padding, dilation, groups, padding_mode, [&] {
        return handle.redispatch(keys & c10::after_autograd_keyset, gy, w, bias, size, stride, padding, dilation,
                                 groups, padding_mode);
      });
}

Tensor conv_backward_weight_autograd(c10::DispatchKeySet keys, const Tensor& gy, const Tensor& x,
                                     c10::SymIntArrayRef size, c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
                                     c10::SymIntArrayRef dilation, c10::SymInt groups, int64_t padding_mode) {
  MYCONV_HANDLE(conv_backward_weight);
  return differentiable<Direction::kBackwardWeight>(
      gy, x, std::nullopt, size, stride, padding, dilation, groups, padding_mode, [&] {
        return handle.redispatch(keys & c10::after_autograd_keyset, gy, x, size, stride, padding, dilation, groups,
                                 padding_mode);
      });
}

// The fused operator exists for eager speed. Where its own derivative is wanted, or under vmap, it is what it fuses.
std::tuple<Tensor, Tensor, Tensor> conv_backward_unfused(const Tensor& gy, const Tensor& x, const Tensor& w,
                                                         c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
                                                         c10::SymIntArrayRef dilation, c10::SymInt groups,
                                                         int64_t padding_mode, std::array<bool, 3> output_mask) {
  const Parameters p = parameters_of(stride, padding, dilation, groups, padding_mode);
  Tensor gx, gw, gb;
  if (output_mask[0]) gx = call<Direction::kBackwardInput>(gy, w, std::nullopt, spatial(x.sym_sizes()), p);
  if (output_mask[1]) gw = call<Direction::kBackwardWeight>(gy, x, std::nullopt, spatial(w.sym_sizes()), p);
  if (output_mask[2]) gb = bias_gradient(gy);
  return {gx, gw, gb};
}

std::tuple<Tensor, Tensor, Tensor> conv_backward_autograd(c10::DispatchKeySet keys, const Tensor& gy, const Tensor& x,
                                                          const Tensor& w, c10::SymIntArrayRef stride,
                                                          c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                                                          c10::SymInt groups, int64_t padding_mode,
                                                          std::array<bool, 3> output_mask) {
  using torch::autograd::isFwGradDefined;
  if (torch::autograd::compute_requires_grad(gy, x, w) || isFwGradDefined(gy) || isFwGradDefined(x) ||
      isFwGradDefined(w))
    return conv_backward_unfused(gy, x, w, stride, padding, dilation, std::move(groups), padding_mode, output_mask);
  MYCONV_HANDLE(conv_backward);
  at::AutoDispatchBelowADInplaceOrView guard;
  return handle.redispatch(keys & c10::after_autograd_keyset, gy, x, w, stride, padding, dilation, std::move(groups),
                           padding_mode, output_mask);
}

}  // namespace
}  // namespace myconv

TORCH_LIBRARY_IMPL(myconv, Autograd, m) {
  m.impl("conv_forward", &myconv::conv_forward_autograd);
  m.impl("conv_backward_input", &myconv::conv_backward_input_autograd);
  m.impl("conv_backward_weight", &myconv::conv_backward_weight_autograd);
  m.impl("conv_backward", &myconv::conv_backward_autograd);
}

TORCH_LIBRARY_IMPL(myconv, FuncTorchBatched, m) { m.impl("conv_backward", &myconv::conv_backward_unfused); }
