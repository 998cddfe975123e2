// Threads: torch's own pool, and only for work that is worth waking it.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

namespace myconv::cpu {

// Calls body(context, begin, end) for consecutive pieces of [0, tasks), one piece a thread, as at::parallel_for does.
// Inside a piece, at::get_thread_num() is below at::get_num_threads().
void run_parallel(int64_t tasks, int64_t grain, void (*body)(void* context, int64_t begin, int64_t end), void* context);

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
