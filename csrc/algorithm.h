// One row of a selection table. The first row that neither declines a problem nor yields runs it; the last row accepts
// everything.
//
// decline() and yield() of forward and backward_input rows may look at anything in the shape except batch, and at nothing else:
// not at the thread count, not at pointers. That is what makes results the same bits at any batch size and thread
// count.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "conv_shape.h"

namespace myconv {

#if defined(MYCONV_CUDA)
inline constexpr bool kCudaKernels = true;
#else
inline constexpr bool kCudaKernels = false;
#endif

// For explain(): what a row packs piece by piece as it runs.
struct Packing {
  const char* channels_first = "nothing";
  const char* channels_last = "nothing";
};

struct Algorithm {
  const char* name;
  const char* (*decline)(const ConvShape&);             // nullptr: accepts; otherwise the reason
  int64_t (*workspace)(const ConvShape&, int threads);  // bytes
  void (*run)(const ConvShape&, const ConvPointers&, void* workspace, int threads);
  Packing packing = {};
  const char* (*yield)(const ConvShape&) = nullptr;  // why a later row is better at it; not asked where a row is forced
};

struct AlgorithmTable {
  const Algorithm* rows;
  int size;
};

// The row that runs `shape`: the forced one of `direction` if there is one (an error if it declines), else the first
// acceptor. Defined with the flags in selection.cpp.
const Algorithm& first_match(const AlgorithmTable& table, Direction direction, const ConvShape& shape);

// The row that takes `shape` by itself, whatever is forced; nullptr: only the last one does. For rows that run others.
const Algorithm* first_fast(const AlgorithmTable& table, const ConvShape& shape);

// Every row of the table and why it does not take `shape` ("": it does).
std::vector<std::pair<std::string, std::string>> reasons(const AlgorithmTable& table, const ConvShape& shape);
// Every row of the table and why it cannot, even if forced ("": it can).
std::vector<std::pair<std::string, std::string>> declines(const AlgorithmTable& table, const ConvShape& shape);

// --- flags: each holds for the calling thread's future calls ---------------------------------------------------------

// Forces the row called `name`; nullptr lifts it.
void force_algorithm(Direction direction, const char* name);
const char* forced_algorithm(Direction direction);

// Takes rows out of every table (the last row of a table cannot be taken out).
void exclude_algorithms(std::vector<std::string> names);
const std::vector<std::string>& excluded_algorithms();

// float32 and bfloat16 calls treat denormals as zeros. On by default.
void set_flush_denormals(bool on);
bool flush_denormals();

// --- explain: while a thread records, its calls are checked, laid out and matched, but their kernels do not run ------

struct Choice {
  Direction direction;
  ConvShape shape;
  const Algorithm* algorithm;
  std::vector<std::pair<std::string, std::string>> rows;  // as reasons() gives them
  const char* isa;
  int64_t workspace;                                    // bytes
  std::vector<std::pair<const char*, int64_t>> copies;  // tensors copied into the layout of the call, in bytes
};

struct Recording {
  std::vector<Choice> choices;
  std::vector<std::pair<const char*, int64_t>> copies;  // of the choice that comes next
};

void record_into(Recording* recording);  // nullptr: stop
Recording* recording();

}  // namespace myconv
