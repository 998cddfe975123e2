// Which instruction set runs. Detected once; the environment variable MYCONV_ISA caps it; tests may cap it per thread.
#pragma once

#include <string>
#include <vector>

#include "cpu/microkernels.h"

namespace myconv::cpu {

// The kernels in force on the calling thread. Resolve it before a parallel region, never inside.
const Microkernels& microkernels();

std::vector<std::string> runnable_isas();  // in this build and on this machine, worst first
std::string isa_in_force();
void cap_isa(const std::string& name);  // calling thread; "" lifts the cap
std::string isa_cap();                  // what cap_isa was told

}  // namespace myconv::cpu
