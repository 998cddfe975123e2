// The microkernels compiled for avx2. The target is set here and not by a compiler flag: nothing outside may inherit
// it.
#include "cpu/microkernels.h"

#ifdef MYCONV_X86
#include <immintrin.h>
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#include "cpu/vec_avx2.h"

namespace myconv::cpu::avx2 {
#include "cpu/microkernels.inc"

extern const Microkernels kMicrokernels = {"avx2", kernels<F32>(), kernels<F64>(), MYCONV_WINOGRADS, MYCONV_WIDENING};
}  // namespace myconv::cpu::avx2
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
