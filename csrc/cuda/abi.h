// What crosses between ATen (conv_cuda.cpp) and the kernels (*.cu): plain data, raw pointers, a stream, an error code.
// No torch header and no CUDA header, so that each side compiles without the other's.
#pragma once

#include "conv_shape.h"

namespace myconv::cuda {

// Launches on `stream` (a cudaStream_t) and returns at once: 0, or a cudaError_t that error_text explains. The current
// device is the tensors'. Pointers are to device memory.
using Stream = void*;

int direct_forward(const ConvShape&, const ConvPointers&, Stream);
int direct_backward_input(const ConvShape&, const ConvPointers&, Stream);
int direct_backward_weight(const ConvShape&, const ConvPointers&, Stream);

const char* error_text(int error);

}  // namespace myconv::cuda
