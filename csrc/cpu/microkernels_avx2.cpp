// The microkernels compiled for avx2. The target is set here and not by a compiler flag: nothing outside may inherit
// it.
#include "cpu/microkernels.h"

#ifdef MYCONV_X86
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wstringop-overflow"  // where `bits` of the first of many 16-bit values is written to
#endif
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

extern constinit const Microkernels kMicrokernels = microkernels_of("avx2");
}  // namespace myconv::cpu::avx2
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
