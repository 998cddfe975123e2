// Which instruction set runs. Detected once; the environment variable MYCONV_ISA caps it; tests may cap it per thread.
#pragma once

#include <string>
#include <vector>

#include "algorithm.h"
#include "cpu/microkernels.h"

namespace myconv::cpu {

inline constexpr double kIdleShare = 0.1;  // of the columns

// The kernels in force on the calling thread, and on those of a parallel region that it opens (parallel.cpp). Those of
// bfloat16 treat denormals as zeros if its calls may.
const Microkernels& microkernels();
// Caps the calling thread to some (nullptr: to none); returns what it was capped to.
const Microkernels* exchange_capped_kernels(const Microkernels* kernels);

// Those that matrix products of a type run on: of bfloat16, pairs where there are.
template <typename T>
const Kernels<T>& dense_kernels() {
  return kernels_of<T>(microkernels());
}
template <>
const Kernels<bfloat16>& dense_kernels();

// Cycles of one core that multiply-adds of 128 floats take: of its longest vectors it adds two a cycle, of those that run
// in halves one.
inline double multiply_cycles() {
  const Microkernels& kernels = microkernels();
  return 64.0 / kernels.f32.lanes * (kernels.half ? 2 : 1);
}

// Those for a product of so many columns: with shorter vectors where long ones run in halves and would leave many more
// lanes idle.
template <typename T>
const Kernels<T>& dense_kernels(int64_t columns) {
  const Kernels<T>& whole = dense_kernels<T>();
  const Microkernels* const half = microkernels().half;
  if (half == nullptr || whole.pair > 1) return whole;
  const Kernels<T>& shorter = kernels_of<T>(*half);
  const auto idle = [&](int64_t lanes) { return (lanes - columns % lanes) % lanes; };
  return idle(whole.lanes) - idle(shorter.lanes) > kIdleShare * columns ? shorter : whole;
}

// f(T()) for the floating-point type T that a dtype is stored as.
template <typename F>
decltype(auto) with_type(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::kFloat64:
      return f(double());
    case Dtype::kBFloat16:
      return f(bfloat16());
    case Dtype::kFloat16:
      return f(float16());
    default:
      return f(float());
  }
}
inline bool is_floating_point(Dtype dtype) { return dtype <= Dtype::kFloat16; }

std::vector<std::string> runnable_isas();  // in this build and on this machine, worst first
std::string isa_in_force();
void cap_isa(const std::string& name);  // calling thread; "" lifts the cap
std::string isa_cap();                  // what cap_isa was told

}  // namespace myconv::cpu
