#include "checks.h"

#include "algorithm.h"

#include <c10/util/accumulate.h>
#include <c10/util/irange.h>

#include <limits>
#include <sstream>

namespace myconv {
namespace {

// Sizes are computed in 128 bits: padding, stride and dilation may each be as large as an int64_t holds.
using Wide = __int128;
constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
constexpr int64_t kMostPadding = kMost / 2;

std::string joined(c10::ArrayRef<Wide> values) {
  std::ostringstream out;
  for (const auto i : c10::irange(values.size())) {
    const Wide v = values[i];
    out << (i ? " x " : "");
    if (v > kMost)
      out << "over " << kMost;
    else
      out << static_cast<int64_t>(v);
  }
  return out.str();
}

template <typename Int>
void check_signs(c10::ArrayRef<Int> stride, c10::ArrayRef<Int> padding, c10::ArrayRef<Int> output_padding,
                 c10::ArrayRef<Int> dilation) {
  for (const Int& p : padding) TORCH_CHECK(p >= 0, "negative padding is not supported, got padding=", padding);
  for (const Int& p : output_padding)
    TORCH_CHECK(p >= 0, "negative output_padding is not supported, got output_padding=", output_padding);
  for (const Int& s : stride) TORCH_CHECK(s > 0, "non-positive stride is not supported, got stride=", stride);
  for (const Int& d : dilation)
    TORCH_CHECK(
        d > 0, "non-positive dilation is not supported: dilation should be greater than zero, got dilation=", dilation);
}

// What channels, groups and bias must agree on. `input` are the full sizes of what the call's user hands in: of the
// convolution's output if transposed.
template <typename Int>
void check_channels(bool transposed, c10::ArrayRef<Int> input, c10::ArrayRef<Int> weight,
                    const std::optional<c10::ArrayRef<Int>>& bias, const Int& groups) {
  TORCH_CHECK(weight[0] >= groups, "Given groups=", groups, ", expected weight to be at least ", groups,
              " at dimension 0, but got weight of size ", weight, " instead");
  TORCH_CHECK(weight[0] % groups == 0, "Given groups=", groups, ", expected weight to be divisible by ", groups,
              " at dimension 0, but got weight of size ", weight, " instead");
  const Int expected = transposed ? weight[0] : weight[1] * groups;
  TORCH_CHECK(input[1] == expected, "Given ",
              transposed ? "transposed=1" : "groups=", transposed ? "" : c10::str(groups), ", weight of size ", weight,
              ", expected input", input, " to have ", expected, " channels, but got ", input[1], " channels instead");
  if (bias) {
    const Int channels = transposed ? weight[1] * groups : weight[0];
    TORCH_CHECK(bias->size() == 1 && (*bias)[0] == channels, "Given ", transposed ? "transposed=1, " : "",
                "weight of size ", weight, ", expected bias to be 1-dimensional with ", channels,
                " elements, but got bias of size ", *bias, " instead");
  }
}

Sizes expanded(const Call& call, c10::IntArrayRef values, const char* argument, const char* hint = "") {
  const size_t axes = call.weight.size() - 2;
  TORCH_CHECK(values.size() == axes || values.size() == 1, "expected ", argument,
              " to be a single integer value or a list of ", axes,
              " values to match the convolution dimensions, but got ", argument, "=", values, hint);
  Sizes full(values.begin(), values.end());
  full.resize(axes, values[0]);
  return full;
}

void check_kernel(c10::IntArrayRef weight) {
  for (const int64_t k : weight.slice(2))
    TORCH_CHECK(k > 0, "kernel size should be greater than zero, but got weight of size ", weight);
}

Sizes conv_size(const Call& call, const Sizes& stride, const Sizes& low, const Sizes& high, const Sizes& dilation) {
  c10::SmallVector<Wide, 3> padded, kernel;
  bool fits = true;
  for (const auto d : c10::irange(stride.size())) {
    padded.push_back(Wide(call.input[d + 2]) + low[d] + high[d]);
    kernel.push_back(Wide(dilation[d]) * (call.weight[d + 2] - 1) + 1);
    fits = fits && kernel[d] <= padded[d];
  }
  TORCH_CHECK(fits, "Calculated padded input size per channel: (", joined(padded), "). Kernel size: (", joined(kernel),
              "). Kernel size can't be greater than actual input size");
  Sizes size;
  for (const auto d : c10::irange(stride.size())) {
    const Wide out = (padded[d] - kernel[d]) / stride[d] + 1;
    TORCH_CHECK(out <= kMost, "padding=", call.padding, " gives an output size of ", joined(out),
                "; it must fit in 64 bits");
    size.push_back(static_cast<int64_t>(out));
  }
  return size;
}

Sizes conv_transpose_size(const Call& call, const Sizes& stride, const Sizes& low, const Sizes& high,
                          const Sizes& output_padding, const Sizes& dilation) {
  for (const auto d : c10::irange(stride.size()))
    TORCH_CHECK(output_padding[d] < stride[d] || output_padding[d] < dilation[d],
                "output padding must be smaller than either stride or dilation, but got output_padding=",
                call.output_padding, ", stride=", call.stride, ", dilation=", call.dilation);
  c10::SmallVector<Wide, 3> in, out;
  bool large_enough = true;
  for (const auto d : c10::irange(stride.size())) {
    in.push_back(call.input[d + 2]);
    out.push_back((in[d] - 1) * stride[d] - low[d] - high[d] + Wide(dilation[d]) * (call.weight[d + 2] - 1) +
                  output_padding[d] + 1);
    large_enough = large_enough && out[d] >= 1;
  }
  TORCH_CHECK(large_enough, "Given input size per channel: (", joined(in), "). Calculated output size per channel: (",
              joined(out), "). Output size is too small");
  Sizes size;
  for (const Wide o : out) {
    TORCH_CHECK(o <= kMost, "the output size per channel (", joined(out), ") must fit in 64 bits");
    size.push_back(static_cast<int64_t>(o));
  }
  return size;
}

// The border that an index map fills must lie where the map is defined. `padded` is the size of what is padded.
template <typename Int>
void check_border(PaddingMode mode, c10::ArrayRef<Int> padded, const Int& low, const Int& high, size_t dimension) {
  const Int& extent = padded[dimension];
  if (mode == PaddingMode::kReflect)
    TORCH_CHECK(low < extent && high < extent,
                "Padding size should be less than the corresponding input dimension, but got: padding (", low, ", ",
                high, ") at dimension ", dimension, " of input ", padded);
  if (mode == PaddingMode::kCircular)
    TORCH_CHECK(low <= extent && high <= extent, "Padding value causes wrapping around more than once: padding (", low,
                ", ", high, ") at dimension ", dimension, " of input ", padded);
}

}  // namespace

Sizes check_call(const Call& call) {
  const size_t dims = call.rank + 2;
  TORCH_CHECK(call.input.size() == dims || call.input.size() == dims - 1, "Expected ", dims - 1, "D (unbatched) or ",
              dims, "D (batched) input to ", call.name, ", but got input of size: ", call.input);
  TORCH_CHECK(call.weight.size() >= 3, "weight should have at least three dimensions, but got weight of size ",
              call.weight);
  TORCH_CHECK(call.groups > 0, "non-positive groups is not supported, got groups=", call.groups);
  Sizes batched(call.input.begin(), call.input.end());
  if (batched.size() < dims) batched.insert(batched.begin(), 1);
  TORCH_CHECK(call.weight.size() == dims, "Expected ", call.weight.size(), "-dimensional input for ",
              call.weight.size(), "-dimensional weight ", call.weight, ", but got ", dims,
              "-dimensional input of size ", batched, " instead");
  const Sizes stride = expanded(call, call.stride, "stride");
  const Sizes low =
      expanded(call, call.padding, "padding",
               call.padding.size() == 2 ? "; the low and high side of one axis are written ((low, high),)" : "");
  const Sizes high = expanded(call, call.padding_high, "padding");
  const Sizes dilation = expanded(call, call.dilation, "dilation");
  Sizes output_padding;
  if (call.transposed) output_padding = expanded(call, call.output_padding, "output_padding");
  check_signs<int64_t>(stride, low, output_padding, dilation);
  check_signs<int64_t>({}, high, {}, {});
  Call full = call;
  full.input = batched;
  check_channels<int64_t>(call.transposed, batched, call.weight, call.bias, call.groups);
  for (const auto d : c10::irange(low.size())) {
    const int64_t most = std::max(low[d], high[d]);
    TORCH_CHECK(most <= kMostPadding, "Given padding=", most, " at dimension ", d, " , expected padding to be at most ",
                kMostPadding);
  }
  check_kernel(call.weight);
  TORCH_CHECK(!call.transposed || call.weight[1] > 0, "expected weight to have out channels, but got weight of size ",
              call.weight);
  const Sizes size = call.transposed ? conv_transpose_size(full, stride, low, high, output_padding, dilation)
                                     : conv_size(full, stride, low, high, dilation);
  if (batched[0] != 0 && batched[1] != 0)
    for (const auto d : c10::irange(2, dims))
      TORCH_CHECK(batched[d] != 0,
                  "Only zero batch or zero channel inputs are supported, but got input shape: ", call.input);
  // What is declared must fit, also where no tap reaches it. The padded side is the convolution's input.
  Sizes padded = batched;
  if (call.transposed) {
    padded.resize(2);
    padded.append(size.begin(), size.end());
  }
  for (const auto d : c10::irange(low.size())) check_border<int64_t>(call.padding_mode, padded, low[d], high[d], d + 2);
  return size;
}

void check_device(const at::Tensor& first, const at::Tensor& other) {
  if (!first.defined() || !other.defined()) return;  // for the check of dimensions to refuse
  TORCH_CHECK(other.device() == first.device(),
              "Expected all tensors to be on the same device, but found at least two devices, ", first.device(),
              " and ", other.device(), "!");
}

void check_storage(const at::Tensor& x, const at::Tensor& w, const std::optional<at::Tensor>& bias) {
  const auto check_one = [&](const at::Tensor& t, const char* name) {
    TORCH_CHECK_NOT_IMPLEMENTED(!t.is_nested(), name,
                                " is a nested tensor; convert it with torch.nested.to_padded_tensor");
    TORCH_CHECK(t.layout() == at::kStrided, name, " must be a dense strided tensor, but has layout ", t.layout(),
                "; convert it with to_dense()");
    const char* const quantized = " is quantized; convert it with dequantize()";
    if (&t == &x) TORCH_CHECK_NOT_IMPLEMENTED(!t.is_quantized(), name, quantized);
    TORCH_CHECK(!t.is_quantized(), name, quantized);
    TORCH_CHECK(kCudaKernels || !t.is_cuda(), name, " is on ", t.device(),
                ", but this build has no CUDA kernels: move it with .to('cpu')");
    TORCH_CHECK(t.is_cpu() || t.is_cuda() || t.is_meta(), name, " is on ", t.device(),
                "; myconv runs on cpu, cuda and meta tensors: move it with .to('cpu')");
    check_device(x, t);
  };
  check_one(x, "input");
  check_one(w, "weight");
  if (bias) check_one(*bias, "bias");
}

void check_dtypes(const at::Tensor& x, const at::Tensor& w, const std::optional<at::Tensor>& bias, bool transposed) {
  if (bias)
    TORCH_CHECK(x.scalar_type() == bias->scalar_type(), "Input type (", x.dtype().name(), ") and bias type (",
                bias->dtype().name(), ") should be the same");
  TORCH_CHECK(x.scalar_type() == w.scalar_type(), "Input type (", x.toString(), ") and weight type (", w.toString(),
              ") should be the same");
  const at::ScalarType type = x.scalar_type();
  const bool integer = at::isIntegralType(type, /*includeBool=*/false) && !at::isBarebonesUnsignedType(type);
  const bool supported = at::isComplexType(type) || type == at::kDouble || type == at::kFloat || type == at::kHalf ||
                         type == at::kBFloat16 || (transposed ? type == at::kLong : integer);
  TORCH_CHECK_NOT_IMPLEMENTED(supported, transposed ? "transposed convolution" : "convolution",
                              " is not implemented for '", c10::toString(type), "'");
}

template <typename Int>
void check_operator(const OperatorCall<Int>& call) {
  const size_t dims = call.weight.size();
  const size_t axes = dims - 2;
  TORCH_CHECK(dims >= 3 && dims <= 5, call.name, ": weight must have 3, 4 or 5 dimensions, but has size ", call.weight);
  const auto check_length = [&](c10::ArrayRef<Int> values, size_t length, const char* argument) {
    TORCH_CHECK(values.size() == length, call.name, ": expected ", length, " values for ", argument, " with a ", dims,
                "-dimensional weight, but got ", values);
  };
  check_length(call.input, dims, "input size");
  check_length(call.output, dims, "output size");
  check_length(call.stride, axes, "stride");
  check_length(call.padding, axes, "padding");
  check_length(call.dilation, axes, "dilation");
  TORCH_CHECK(call.groups > 0, "non-positive groups is not supported, got groups=", call.groups);
  check_signs<Int>(call.stride, call.padding, {}, call.dilation);
  for (const auto d : c10::irange(2, dims)) {
    TORCH_CHECK(call.weight[d] > 0, call.name, ": kernel size should be greater than zero, but got weight of size ",
                call.weight);
    TORCH_CHECK(call.input[d] >= 0 && call.output[d] >= 0, call.name, ": a size must not be negative, got ", call.input,
                " and ", call.output);
  }
  const bool input_given = call.direction == Direction::kForward;
  check_channels<Int>(!input_given, input_given ? call.input : call.output, call.weight, call.bias, call.groups);
  if (call.direction == Direction::kBackwardWeight) {
    TORCH_CHECK(call.input[0] == call.output[0], call.name, ": grad_output of size ", call.output,
                " and input of size ", call.input, " have different batch sizes");
    TORCH_CHECK(call.input[1] == call.weight[1] * call.groups, call.name, ": groups=", call.groups,
                " and weight of size ", call.weight, " do not fit the channels of input of size ", call.input);
  }
  TORCH_CHECK(call.padding_mode >= 0 && call.padding_mode <= 3, call.name,
              ": padding_mode must be 0 (zeros), 1 (reflect), 2 (replicate) or 3 (circular), got ", call.padding_mode);
  const auto mode = static_cast<PaddingMode>(call.padding_mode);
  if (mode == PaddingMode::kZeros) return;
  // A border that is read through an index map must lie where that map is defined, on both sides.
  for (const auto d : c10::irange(axes)) {
    const Int &in = call.input[d + 2], &pad = call.padding[d];
    const Int last = (call.output[d + 2] - 1) * call.stride[d] + (call.weight[d + 2] - 1) * call.dilation[d] - pad;
    const Int high = last - (in - 1);
    TORCH_CHECK(in > 0 || call.input[0] == 0 || call.output[d + 2] == 0, call.name,
                ": cannot pad an empty dimension, got input of size ", call.input);
    check_border<Int>(mode, call.input, pad, high, d + 2);
  }
}

template void check_operator<int64_t>(const OperatorCall<int64_t>&);
template void check_operator<c10::SymInt>(const OperatorCall<c10::SymInt>&);

namespace {

Dtype dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kDouble:
      return Dtype::kFloat64;
    case at::kFloat:
      return Dtype::kFloat32;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    case at::kHalf:
      return Dtype::kFloat16;
    case at::kLong:
      return Dtype::kInt64;
    case at::kInt:
      return Dtype::kInt32;
    case at::kShort:
      return Dtype::kInt16;
    case at::kChar:
      return Dtype::kInt8;
    case at::kByte:
      return Dtype::kUInt8;
    default:
      TORCH_CHECK(false, "no kernel for ", type);
  }
}

}  // namespace

namespace {

// A kernel as large as the image, contiguous: the image is one pixel of more channels.
void fold_image(ConvShape& s) {
  int64_t step = 1;
  for (int d = 2; d >= 0; step *= s.kernel[d--])
    if (s.out[d] != 1 || s.in[d] != s.kernel[d] || s.pad[d] != 0 || (s.kernel[d] > 1 && s.dilation[d] != 1) ||
        (s.kernel[d] > 1 && s.weight_stride[d + 2] != step))
      return;
  if (step == 1 || (s.in_per_group > 1 && s.weight_stride[1] != step)) return;
  s.in_per_group *= step, s.weight_stride[1] = 1;
  for (int d = 0; d < 3; ++d) s.in[d] = s.kernel[d] = s.stride[d] = 1;
}

// Patches that lie side by side in channels_last (kernel = stride, no padding; or one patch, the whole axis) are pixels
// of more channels: memory is the same, and so are the sums. A row of 16x16 patches has 48 channels of 16 taps instead
// of 3 of 256. Inner axes first: an outer one is folded if nothing is left of them.
void fold_patches(ConvShape& s) {
  if (s.groups != 1) return;
  if (!s.channels_last()) return fold_image(s);
  for (int d = 2; d >= 0; --d) {
    const bool side_by_side = s.kernel[d] == s.stride[d] && s.in[d] == s.out[d] * s.stride[d];
    const bool whole = s.out[d] == 1 && s.in[d] == s.kernel[d];
    const bool contiguous = s.in_per_group == 1 || s.weight_stride[d + 2] == s.in_per_group * s.weight_stride[1];
    if (s.kernel[d] > 1 && s.pad[d] == 0 && s.dilation[d] == 1 && (side_by_side || whole) && contiguous) {
      if (s.in_per_group == 1) s.weight_stride[1] = s.weight_stride[d + 2];
      s.in_per_group *= s.kernel[d];
      s.in[d] = s.out[d], s.kernel[d] = s.stride[d] = 1;
    }
    if (s.in[d] != 1 || s.kernel[d] != 1) return;
  }
}

}  // namespace

ConvShape make_conv_shape(const OperatorCall<int64_t>& call, c10::IntArrayRef weight_strides, at::ScalarType dtype,
                          bool channels_last) {
  const int axes = static_cast<int>(call.weight.size()) - 2;
  ConvShape s;
  s.batch = call.input[0];
  s.groups = call.groups;
  s.in_per_group = call.weight[1];
  s.out_per_group = call.weight[0] / call.groups;
  s.weight_stride[0] = weight_strides[0];
  s.weight_stride[1] = weight_strides[1];
  for (int d = 0; d < 3; ++d) {
    const int a = d - (3 - axes);  // the axes that are there come last
    s.in[d] = a < 0 ? 1 : call.input[a + 2];
    s.out[d] = a < 0 ? 1 : call.output[a + 2];
    s.kernel[d] = a < 0 ? 1 : call.weight[a + 2];
    s.stride[d] = a < 0 ? 1 : call.stride[a];
    s.pad[d] = a < 0 ? 0 : call.padding[a];
    s.dilation[d] = a < 0 ? 1 : call.dilation[a];
    s.weight_stride[d + 2] = a < 0 ? 0 : weight_strides[a + 2];
    const Wide reach =
        Wide(s.out[d] > 0 ? s.out[d] - 1 : 0) * s.stride[d] + Wide(s.kernel[d] - 1) * s.dilation[d] - s.pad[d];
    TORCH_CHECK(s.pad[d] <= kMostPadding && reach <= kMostPadding * Wide(2) - 1, call.name,
                ": stride, padding and dilation reach past 64 bits at dimension ", d);
  }
  s.dtype = dtype_of(dtype);
  s.layout = channels_last ? Layout::kChannelsLast : Layout::kChannelsFirst;
  s.padding_mode = static_cast<PaddingMode>(call.padding_mode);
  fold_patches(s);
  // Of one pixel both layouts are the same.
  if (s.in_pixels() == 1 && s.out_pixels() == 1) s.layout = Layout::kChannelsLast;
  return s;
}

}  // namespace myconv
