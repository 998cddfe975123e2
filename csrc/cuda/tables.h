// The selection tables of CUDA, one for each direction.
#pragma once

#include "algorithm.h"

namespace myconv::cuda {

const AlgorithmTable& table(Direction direction);

}  // namespace myconv::cuda
