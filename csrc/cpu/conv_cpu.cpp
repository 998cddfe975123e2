// The CPU: its selection tables, and what running a row takes.
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cstddef>

#include "conv_entry.h"
#include "cpu/algorithms.h"
#include "cpu/isa.h"
#include "cpu/kept_memory.h"
#include "cpu/parallel.h"
#include "cpu/tables.h"

namespace myconv::cpu {
namespace {

const char* accept_all(const ConvShape&) { return nullptr; }
int64_t no_workspace(const ConvShape&, int) { return 0; }

constexpr Packing kDepthwisePacks{"lines of the activations, into padded strips"};
constexpr Packing kDirectPacks{"lines of what is read, into padded strips",
                               "pixels of what is read, transposed into padded strips, and back"};
constexpr Packing kGemmPacks{"nothing", "weights, into panels"};
constexpr Packing kPointwisePacks{"pixels of what is read, into panels, and weights, unless they lie as they are used",
                                  "weights, into panels"};
constexpr Packing kBordersPacks{"as the row that runs; borders are computed beside the result",
                                "as the row that runs; borders are computed beside the result"};
constexpr Packing kGemmWeightPacks{"gradient, transposed into panels, and padded lines where in channels are few",
                                   "gradient, into panels if wide, and padded lines where in channels are few"};

const Algorithm kForward[] = {
    {"depthwise", depthwise_forward_decline, depthwise_forward_workspace, depthwise_forward, kDepthwisePacks,
     depthwise_forward_yield},
    {"pointwise", pointwise_decline, pointwise_forward_workspace, pointwise_forward, kPointwisePacks,
     pointwise_forward_yield},
    winograd<Direction::kForward, false>(),
    winograd<Direction::kForward, true>(),
    {"direct", direct_forward_decline, direct_forward_workspace, direct_forward, kDirectPacks},
    {"implicit_gemm", implicit_gemm_forward_decline, implicit_gemm_forward_workspace, implicit_gemm_forward,
     kGemmPacks},
    widened<Direction::kForward>(),
    {"reference", accept_all, no_workspace, reference_forward},
};
const Algorithm kBackwardInput[] = {
    {"depthwise", depthwise_backward_input_decline, depthwise_backward_input_workspace, depthwise_backward_input,
     kDepthwisePacks, depthwise_backward_input_yield},
    {"pointwise", pointwise_decline, pointwise_backward_input_workspace, pointwise_backward_input, kPointwisePacks},
    winograd<Direction::kBackwardInput, false>(),
    winograd<Direction::kBackwardInput, true>(),
    {"direct", direct_backward_input_decline, direct_backward_input_workspace, direct_backward_input, kDirectPacks},
    {"implicit_gemm", implicit_gemm_backward_input_decline, implicit_gemm_backward_input_workspace,
     implicit_gemm_backward_input, kGemmPacks},
    {"padding_adjoint", padding_adjoint_decline, padding_adjoint_workspace, padding_adjoint, kBordersPacks},
    widened<Direction::kBackwardInput>(),
    {"reference", accept_all, no_workspace, reference_backward_input},
};
const Algorithm kBackwardWeight[] = {
    {"depthwise", depthwise_backward_weight_decline, depthwise_backward_weight_workspace, depthwise_backward_weight,
     kDepthwisePacks, depthwise_backward_weight_yield},
    winograd_backward_weight(),
    {"implicit_gemm", implicit_gemm_backward_weight_decline, implicit_gemm_backward_weight_workspace,
     implicit_gemm_backward_weight, kGemmWeightPacks},
    {"reference", accept_all, no_workspace, reference_backward_weight},
};

constexpr int64_t kStackBytes = 16 << 10;  // up to here the allocator would cost more than it gives

struct Cpu {
  static const AlgorithmTable& table(Direction direction) { return cpu::table(direction); }
  static int threads() { return at::get_num_threads(); }
  static const char* isa() { return microkernels().isa; }

  // empty_result without a trip through the dispatcher, which costs as much as a small convolution.
  static Tensor empty(const Tensor& like, c10::IntArrayRef sizes, bool channels_last) {
    if (channels_last && sizes.size() == 3) return empty_result(c10::fromIntArrayRefSlow(sizes), like.options(), true);
    const at::MemoryFormat format = !channels_last || sizes[0] == 0 ? at::MemoryFormat::Contiguous
                                    : sizes.size() == 4             ? at::MemoryFormat::ChannelsLast
                                                                    : at::MemoryFormat::ChannelsLast3d;
    return Tensor(at::detail::empty_generic(sizes, result_allocator(), c10::DispatchKeySet(c10::DispatchKey::CPU),
                                            like.scalar_type(), format));
  }

  static void run(const Algorithm& algorithm, const ConvShape& shape, const ConvPointers& pointers, const Tensor&,
                  int64_t bytes, int threads) {
    // Float16 denormals are ordinary numbers in float32, in which they are summed.
    const DenormalMode mode(flush_denormals() && (shape.dtype == Dtype::kFloat32 || shape.dtype == Dtype::kBFloat16));
    // The stack is not watched by those who watch the allocator's memory.
    if (bytes <= kStackBytes && keeps_memory()) {
      alignas(64) std::byte workspace[kStackBytes];
      return algorithm.run(shape, pointers, workspace, threads);
    }
    const Workspace workspace(bytes);
    algorithm.run(shape, pointers, workspace.get(), threads);
  }

  static bool sums_bias(at::ScalarType type) {
    return type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16;
  }

  struct Guard {
    explicit Guard(const Tensor&) {}
  };
};

}  // namespace

const AlgorithmTable& table(Direction direction) {
  static const AlgorithmTable tables[] = {{kForward, std::size(kForward)},
                                          {kBackwardInput, std::size(kBackwardInput)},
                                          {kBackwardWeight, std::size(kBackwardWeight)}};
  return tables[static_cast<int>(direction)];
}

MYCONV_OPERATORS(CPU, Cpu)

}  // namespace myconv::cpu
