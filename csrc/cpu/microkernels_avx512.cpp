// The microkernels compiled for avx512. The target is set here and not by a compiler flag: nothing outside may inherit
// it.
#include "cpu/microkernels.h"

#ifdef MYCONV_X86
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in GCC's own header: gcc.gnu.org/PR105593
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#include "cpu/vec_avx512.h"

namespace myconv::cpu::avx512 {
#include "cpu/microkernels.inc"

extern constinit const Microkernels kMicrokernels = microkernels_of("avx512");
}  // namespace myconv::cpu::avx512
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
