// The microkernels for any machine.
#include "cpu/microkernels.h"
#include "cpu/vec_portable.h"

namespace myconv::cpu::portable {
#include "cpu/microkernels.inc"

extern constinit const Microkernels kMicrokernels = microkernels_of("portable");
}  // namespace myconv::cpu::portable
