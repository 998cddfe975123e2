// Threads: torch's own pool, and only for work that is worth waking it.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

namespace myconv::cpu {

// The calling thread's treatment of denormals, for the life of the object: as it was, or as zeros, read and written. On
// x86; elsewhere denormals stay what they are.
class DenormalMode {
 public:
  explicit DenormalMode(bool flush);
  ~DenormalMode();
  DenormalMode(const DenormalMode&) = delete;
  DenormalMode& operator=(const DenormalMode&) = delete;

 private:
  uint32_t before_;
};

// Calls body(context, begin, end) for consecutive pieces of [0, tasks), one piece a thread, as at::parallel_for does.
// Inside a piece, at::get_thread_num() is below at::get_num_threads(), and the floating-point mode is the caller's.
void run_parallel(int64_t tasks, int64_t grain, void (*body)(void* context, int64_t begin, int64_t end), void* context);

// Whether the runtime that torch is linked with opens parallel regions. If not, one thread does everything.
bool parallel_regions();

// Runs f(begin, end) over [0, tasks); a thread gets no less than about 10 microseconds of work.
template <typename F>
void parallel_tasks(int64_t tasks, double macs_per_task, const F& f) {
  constexpr double kLeastMacs = 1e6;
  const auto grain = static_cast<int64_t>(std::clamp(kLeastMacs / std::max(macs_per_task, 1.0), 1.0, 1e9));
  run_parallel(
      tasks, grain, [](void* context, int64_t begin, int64_t end) { (*static_cast<const F*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace myconv::cpu
