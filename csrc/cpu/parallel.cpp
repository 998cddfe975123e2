// at::parallel_for is a header template: compiled without OpenMP it runs on one thread, and compiled with another
// OpenMP runtime than torch's (clang's, or a second libgomp) it brings a second pool of threads that
// torch.set_num_threads does not reach. So the parallel region is opened here, once, by the entry point that the
// runtime torch is linked with exports under this name whether it is GNU's, LLVM's or Intel's: no compiler flag, no
// second runtime. Without it: one thread.
#include "cpu/parallel.h"

#include <atomic>
#include <exception>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "cpu/isa.h"

extern "C" {
void GOMP_parallel(void (*body)(void*), void* context, unsigned threads, unsigned flags) __attribute__((weak));
int omp_get_thread_num() __attribute__((weak));
int omp_get_num_threads() __attribute__((weak));
}

namespace myconv::cpu {
namespace {

#if defined(__x86_64__)
constexpr uint32_t kFlush = 0x8040;  // flush to zero (results), denormals are zeros (operands)
uint32_t float_mode() { return _mm_getcsr(); }
void set_float_mode(uint32_t mode) { _mm_setcsr(mode); }
#else
constexpr uint32_t kFlush = 0;
uint32_t float_mode() { return 0; }
void set_float_mode(uint32_t) {}
#endif

struct Region {
  int64_t tasks, grain;
  void (*body)(void*, int64_t, int64_t);
  void* context;
  uint32_t mode;  // and what else is in force on the thread that opens the region
  const Microkernels* kernels;
  std::atomic_flag failed = ATOMIC_FLAG_INIT;
  std::exception_ptr error;
};

void piece(void* argument) {
  Region& region = *static_cast<Region*>(argument);
  // The team has its usual size even if fewer pieces are worth it: a team of another size would cost the runtime new
  // threads.
  const int64_t pieces = std::min<int64_t>(omp_get_num_threads(), (region.tasks + region.grain - 1) / region.grain);
  const int64_t length = (region.tasks + pieces - 1) / pieces, thread = omp_get_thread_num();
  const int64_t begin = thread * length, end = std::min(region.tasks, begin + length);
  if (begin >= end) return;
  const uint32_t mode = float_mode();
  set_float_mode(region.mode);
  const Microkernels* const capped = exchange_capped_kernels(region.kernels);
  try {
    const at::internal::ThreadIdGuard guard(static_cast<int>(thread));
    region.body(region.context, begin, end);
  } catch (...) {
    if (!region.failed.test_and_set()) region.error = std::current_exception();
  }
  exchange_capped_kernels(capped);
  set_float_mode(mode);
}

}  // namespace

DenormalMode::DenormalMode(bool flush) : before_(float_mode()) {
  if (flush) set_float_mode(before_ | kFlush);
}

DenormalMode::~DenormalMode() { set_float_mode(before_); }

bool parallel_regions() { return GOMP_parallel != nullptr; }

void run_parallel(int64_t tasks, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
  if (tasks <= 0) return;
  at::internal::lazy_init_num_threads();
  if (tasks <= grain || !GOMP_parallel || at::get_num_threads() == 1 || at::in_parallel_region()) {
    const at::internal::ThreadIdGuard guard(0);
    return body(context, 0, tasks);
  }
  Region region{tasks, grain, body, context, float_mode(), &microkernels()};
  GOMP_parallel(piece, &region, 0, 0);
  if (region.error) std::rethrow_exception(region.error);
}

}  // namespace myconv::cpu
