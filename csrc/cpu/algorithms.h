// The algorithms of the CPU: what their files offer to the tables in conv_cpu.cpp.
#pragma once

#include "algorithm.h"

namespace myconv::cpu {

// reference.cpp
void reference_forward(const ConvShape&, const ConvPointers&, void* workspace, int threads);
void reference_backward_input(const ConvShape&, const ConvPointers&, void* workspace, int threads);
void reference_backward_weight(const ConvShape&, const ConvPointers&, void* workspace, int threads);

// implicit_gemm.cpp
const char* implicit_gemm_forward_decline(const ConvShape&);
int64_t implicit_gemm_forward_workspace(const ConvShape&, int threads);
void implicit_gemm_forward(const ConvShape&, const ConvPointers&, void* workspace, int threads);
const char* implicit_gemm_backward_input_decline(const ConvShape&);
int64_t implicit_gemm_backward_input_workspace(const ConvShape&, int threads);
void implicit_gemm_backward_input(const ConvShape&, const ConvPointers&, void* workspace, int threads);

// implicit_gemm_backward_weight.cpp
const char* implicit_gemm_backward_weight_decline(const ConvShape&);
int64_t implicit_gemm_backward_weight_workspace(const ConvShape&, int threads);
void implicit_gemm_backward_weight(const ConvShape&, const ConvPointers&, void* workspace, int threads);

// widened.cpp
template <Direction>
Algorithm widened();

// winograd.cpp
template <Direction, bool small_tiles>
Algorithm winograd();

// winograd_backward_weight.cpp
Algorithm winograd_backward_weight();

// pointwise.cpp
const char* pointwise_decline(const ConvShape&);
const char* pointwise_forward_yield(const ConvShape&);
int64_t pointwise_forward_workspace(const ConvShape&, int threads);
void pointwise_forward(const ConvShape&, const ConvPointers&, void* workspace, int threads);
int64_t pointwise_backward_input_workspace(const ConvShape&, int threads);
void pointwise_backward_input(const ConvShape&, const ConvPointers&, void* workspace, int threads);

// direct.cpp
const char* direct_forward_decline(const ConvShape&);
int64_t direct_forward_workspace(const ConvShape&, int threads);
void direct_forward(const ConvShape&, const ConvPointers&, void* workspace, int threads);
const char* direct_backward_input_decline(const ConvShape&);
int64_t direct_backward_input_workspace(const ConvShape&, int threads);
void direct_backward_input(const ConvShape&, const ConvPointers&, void* workspace, int threads);

// depthwise.cpp
const char* depthwise_forward_decline(const ConvShape&);
const char* depthwise_forward_yield(const ConvShape&);
int64_t depthwise_forward_workspace(const ConvShape&, int threads);
void depthwise_forward(const ConvShape&, const ConvPointers&, void* workspace, int threads);
const char* depthwise_backward_input_decline(const ConvShape&);
const char* depthwise_backward_input_yield(const ConvShape&);
int64_t depthwise_backward_input_workspace(const ConvShape&, int threads);
void depthwise_backward_input(const ConvShape&, const ConvPointers&, void* workspace, int threads);

// depthwise_backward_weight.cpp
const char* depthwise_backward_weight_decline(const ConvShape&);
const char* depthwise_backward_weight_yield(const ConvShape&);
int64_t depthwise_backward_weight_workspace(const ConvShape&, int threads);
void depthwise_backward_weight(const ConvShape&, const ConvPointers&, void* workspace, int threads);

// padding_adjoint.cpp
const char* padding_adjoint_decline(const ConvShape&);
int64_t padding_adjoint_workspace(const ConvShape&, int threads);
void padding_adjoint(const ConvShape&, const ConvPointers&, void* workspace, int threads);

}  // namespace myconv::cpu
