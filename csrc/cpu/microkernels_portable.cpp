// The microkernels for any machine.
#include "cpu/microkernels.h"
#include "cpu/vec_portable.h"

namespace myconv::cpu::portable {
#include "cpu/microkernels.inc"

extern const Microkernels kMicrokernels = {"portable", kernels<F32>(), kernels<F64>(), MYCONV_WINOGRADS,
                                           MYCONV_WIDENING};
}  // namespace myconv::cpu::portable
