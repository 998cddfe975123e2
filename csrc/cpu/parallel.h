// Threads: torch's own pool, and only for work that is worth waking it.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>

namespace myconv::cpu {

// Runs f(begin, end) over [0, tasks); a thread gets no less than about 10 microseconds of work.
template <typename F>
void parallel_tasks(int64_t tasks, double macs_per_task, const F& f) {
  constexpr double kLeastMacs = 1e6;
  const auto grain = static_cast<int64_t>(std::clamp(kLeastMacs / std::max(macs_per_task, 1.0), 1.0, 1e9));
  at::parallel_for(0, tasks, grain, f);
}

}  // namespace myconv::cpu
