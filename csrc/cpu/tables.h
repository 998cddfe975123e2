// The selection tables of the CPU, one for each direction.
#pragma once

#include "algorithm.h"

namespace myconv::cpu {

const AlgorithmTable& table(Direction direction);

}  // namespace myconv::cpu
