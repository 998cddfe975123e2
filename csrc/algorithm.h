// One row of a selection table. The first row that does not decline a problem runs it; the last row accepts everything.
//
// decline() of forward and backward_input rows may look at anything in the shape except batch, and at nothing else:
// not at the thread count, not at pointers. That is what makes results the same bits at any batch size and thread
// count.
#pragma once

#include "conv_shape.h"

namespace myconv {

struct Algorithm {
  const char* name;
  const char* (*decline)(const ConvShape&);             // nullptr: accepts; otherwise the reason
  int64_t (*workspace)(const ConvShape&, int threads);  // bytes
  void (*run)(const ConvShape&, const ConvPointers&, void* workspace, int threads);
};

struct AlgorithmTable {
  const Algorithm* rows;
  int size;
};

// The row that runs `shape`: the forced one of `direction` if there is one (an error if it declines), else the first
// acceptor. Defined with the flags in selection.cpp.
const Algorithm& first_match(const AlgorithmTable& table, Direction direction, const ConvShape& shape);

// Forces the row called `name` for a direction on the calling thread's future calls; nullptr lifts it.
void force_algorithm(Direction direction, const char* name);
const char* forced_algorithm(Direction direction);

}  // namespace myconv
