#include "cpu/isa.h"

#include <c10/util/Exception.h>

#include <cstdlib>
#include <utility>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace myconv::cpu {
namespace {

struct Isa {
  const Microkernels* kernels;
  bool (*runs_here)();
};

#ifdef MYCONV_X86
// AMD's family 19h, Zen 4: 512 bits take two passes of units for 256.
bool runs_in_halves() {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return false;
  return __builtin_cpu_is("amd") && (a >> 8 & 15) + (a >> 20 & 255) == 0x19;
}

const Microkernels kAvx512 = [] {
  Microkernels kernels = avx512::kMicrokernels;
  if (runs_in_halves()) kernels.half = &avx2::kMicrokernels;  // which every such processor runs
  return kernels;
}();

bool has_avx512() {
  return bool(__builtin_cpu_supports("avx512f")) && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

const Microkernels kAvx512Bf16 = [] {
  Microkernels kernels = kAvx512;
  kernels.isa = "avx512_bf16";
  kernels.bfloat16_pairs = &avx512_bf16::kPairs;
  if (has_avx512_bf16()) avx512_bf16::round_in_hardware(kernels.bf16);  // its code is compiled for such processors
  kernels.keeping_denormals = &kAvx512;
  return kernels;
}();
#endif

#ifdef MYCONV_X86
// Every CPU with AVX2 has F16C; not every compiler knows its name in __builtin_cpu_supports.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
}
#endif

// Worst first. __builtin_cpu_supports asks the processor and the operating system.
const Isa kIsas[] = {
    {&portable::kMicrokernels, [] { return true; }},
#ifdef MYCONV_X86
    {&avx2::kMicrokernels,
     [] { return bool(__builtin_cpu_supports("avx2")) && __builtin_cpu_supports("fma") && has_f16c(); }},
    {&kAvx512, has_avx512},
    {&kAvx512Bf16, has_avx512_bf16},
#endif
};

// The best runnable one that is not above the one called `cap` ("" caps nothing).
const Microkernels& best(const std::string& cap) {
  const Microkernels* found = nullptr;
  bool known = cap.empty();
  for (const Isa& isa : kIsas) {
    if (isa.runs_here()) found = isa.kernels;
    if (cap == isa.kernels->isa) {
      known = true;
      break;
    }
  }
#ifndef MYCONV_X86
  known = known || cap == "avx2" || cap == "avx512" || cap == "avx512_bf16";  // caps that this build is under anyway
#endif
  TORCH_CHECK_VALUE(known, "MYCONV_ISA: '", cap,
                    "' is not an instruction set of this build; use portable, avx2, avx512 or avx512_bf16");
  return *found;
}

const Microkernels& process_default() {
  static const Microkernels& chosen = [&]() -> const Microkernels& {
    const char* cap = std::getenv("MYCONV_ISA");
    return best(cap ? cap : "");
  }();
  return chosen;
}

thread_local const Microkernels* capped = nullptr;
thread_local std::string cap;

const Microkernels& in_force() { return capped ? *capped : process_default(); }

}  // namespace

const Microkernels& microkernels() {
  const Microkernels& m = in_force();
  return m.keeping_denormals && !flush_denormals() ? *m.keeping_denormals : m;
}
const Microkernels* exchange_capped_kernels(const Microkernels* kernels) { return std::exchange(capped, kernels); }

template <>
const Kernels<bfloat16>& dense_kernels() {
  const Microkernels& m = microkernels();
  return m.bfloat16_pairs ? *m.bfloat16_pairs : m.bf16;
}

std::vector<std::string> runnable_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : kIsas)
    if (isa.runs_here()) names.emplace_back(isa.kernels->isa);
  return names;
}

std::string isa_in_force() { return in_force().isa; }

void cap_isa(const std::string& name) {
  capped = name.empty() ? nullptr : &best(name);
  cap = name;
}

std::string isa_cap() { return cap; }

}  // namespace myconv::cpu
