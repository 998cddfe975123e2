// CUDA: its selection tables, and what running a row takes. Device-generic ATen only: it compiles against a torch
// without CUDA too, whose dispatcher then never calls it.
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include "conv_entry.h"
#include "cuda/abi.h"
#include "cuda/tables.h"

namespace myconv::cuda {
namespace {

const char* accept_all(const ConvShape&) { return nullptr; }
int64_t no_workspace(const ConvShape&, int) { return 0; }

template <int (*launch)(const ConvShape&, const ConvPointers&, Stream)>
void row(const ConvShape& shape, const ConvPointers& pointers, void*, int) {
  const int error = launch(shape, pointers, pointers.stream);
  TORCH_CHECK(!error, "myconv could not launch a CUDA kernel: ", error_text(error));
}

const Algorithm kForward[] = {{"direct", accept_all, no_workspace, row<direct_forward>}};
const Algorithm kBackwardInput[] = {{"direct", accept_all, no_workspace, row<direct_backward_input>}};
const Algorithm kBackwardWeight[] = {{"direct", accept_all, no_workspace, row<direct_backward_weight>}};

struct Cuda {
  static const AlgorithmTable& table(Direction direction) { return cuda::table(direction); }
  static int threads() { return 1; }  // no row asks
  static const char* isa() { return "cuda"; }

  static Tensor empty(const Tensor& like, c10::IntArrayRef sizes, bool channels_last) {
    return empty_result(c10::fromIntArrayRefSlow(sizes), like.options(), channels_last);
  }

  // The workspace is torch's allocator's: freed here, it is used again by the same stream at the earliest, behind the
  // kernel. No synchronisation, so a graph can be captured.
  static void run(const Algorithm& algorithm, const ConvShape& shape, ConvPointers pointers, const Tensor& result,
                  int64_t bytes, int threads) {
    pointers.stream = c10::impl::VirtualGuardImpl(c10::DeviceType::CUDA).getStream(result.device()).native_handle();
    const Tensor workspace = bytes > 0 ? at::empty({bytes}, result.options().dtype(at::kByte)) : Tensor();
    algorithm.run(shape, pointers, bytes > 0 ? workspace.data_ptr() : nullptr, threads);
  }

  static bool sums_bias(at::ScalarType) { return false; }

  struct Guard {
    explicit Guard(const Tensor& t) : guard(t.device()) {}
    c10::DeviceGuard guard;
  };
};

}  // namespace

const AlgorithmTable& table(Direction direction) {
  static const AlgorithmTable tables[] = {{kForward, std::size(kForward)},
                                          {kBackwardInput, std::size(kBackwardInput)},
                                          {kBackwardWeight, std::size(kBackwardWeight)}};
  return tables[static_cast<int>(direction)];
}

MYCONV_OPERATORS(CUDA, Cuda)

}  // namespace myconv::cuda
