#include "cpu/kept_memory.h"

#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <vector>

namespace myconv::cpu {
namespace {

constexpr size_t kLeastResult = 128 << 10;  // smaller ones the C library does not return
constexpr int64_t kMostWorkspace = 32 << 20;

size_t most_kept() {
  static const size_t bytes = [] {
    const char* const mib = std::getenv("MYCONV_KEPT_MIB");
    return static_cast<size_t>(mib ? std::max(0ll, std::atoll(mib)) : 256) << 20;
  }();
  return bytes;
}

struct Result {
  size_t bytes;
  void* data;
  explicit Result(size_t bytes) : bytes(bytes), data(c10::alloc_cpu(bytes)) {}
  ~Result() { c10::free_cpu(data); }
  Result(const Result&) = delete;
  Result& operator=(const Result&) = delete;
};
using Results = std::vector<std::unique_ptr<Result>>;

// Results that nobody uses, the oldest first. Whoever finds it locked does without: a lock may have been taken by a
// thread that a fork has left behind.
struct KeptResults {
  std::mutex mutex;
  Results results;
  size_t bytes = 0;

  // The youngest that `size` bytes fill to four fifths at least: it is likely to be in a cache.
  std::unique_ptr<Result> take(size_t size) {
    const std::unique_lock lock(mutex, std::try_to_lock);
    if (!lock) return nullptr;
    for (auto at = results.rbegin(); at != results.rend(); ++at)
      if ((*at)->bytes >= size && (*at)->bytes - size <= size / 4) {
        std::unique_ptr<Result> result = std::move(*at);
        results.erase(std::next(at).base());
        bytes -= result->bytes;
        return result;
      }
    return nullptr;
  }

  void keep(std::unique_ptr<Result> result) {
    Results too_many;  // given back when the lock is open
    if (result->bytes > most_kept()) return;
    const std::unique_lock lock(mutex, std::try_to_lock);
    if (!lock) return;
    bytes += result->bytes;
    results.push_back(std::move(result));
    auto last = results.begin();
    for (; bytes > most_kept(); ++last) bytes -= (*last)->bytes;
    too_many.assign(std::move_iterator(results.begin()), std::move_iterator(last));
    results.erase(results.begin(), last);
  }

  void release() {
    Results all;
    const std::unique_lock lock(mutex, std::try_to_lock);
    if (!lock) return;
    all.swap(results), bytes = 0;
  }
};

// Tensors may outlive every other object: these are never destroyed.
KeptResults& kept_results() {
  static KeptResults* const kept = new KeptResults;
  return *kept;
}

void keep(void* context) {
  std::unique_ptr<Result> result(static_cast<Result*>(context));
  c10::profiledCPUMemoryReporter().Delete(result->data);
  kept_results().keep(std::move(result));
}

// What torch's own allocator does, and tells its profiler, but for where memory comes from and goes to.
struct ResultAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    c10::Allocator* const torchs = c10::GetCPUAllocator();
    if (bytes < kLeastResult || !keeps_memory() || torchs != c10::GetDefaultCPUAllocator())
      return torchs->allocate(bytes);
    std::unique_ptr<Result> result = kept_results().take(bytes);
    if (!result) result = std::make_unique<Result>(bytes);
    void* const data = result->data;
    c10::profiledCPUMemoryReporter().New(data, bytes);
    return {data, result.release(), &keep, c10::Device(c10::DeviceType::CPU)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

}  // namespace

bool keeps_memory() { return most_kept() > 0; }

c10::Allocator* result_allocator() {
  static ResultAllocator* const allocator = new ResultAllocator;
  return allocator;
}

constinit std::atomic<Workspace::Memory*> Workspace::kept_ = nullptr;

Workspace::Workspace(int64_t bytes) : memory_(nullptr) {
  const bool kept = keeps_memory() && bytes <= kMostWorkspace;
  if (kept) memory_ = kept_.exchange(nullptr);
  if (memory_ && memory_->bytes >= bytes) return;
  delete memory_;
  memory_ = new Memory{bytes, bytes > 0 ? c10::GetCPUAllocator()->allocate(bytes) : c10::DataPtr()};
}

Workspace::~Workspace() {
  const bool kept = keeps_memory() && memory_->bytes <= kMostWorkspace;
  delete (kept ? kept_.exchange(memory_) : memory_);
}

int64_t kept_memory() {
  KeptResults& kept = kept_results();
  const std::unique_lock lock(kept.mutex, std::try_to_lock);
  return lock ? static_cast<int64_t>(kept.bytes) : 0;
}

void release_kept_memory() {
  kept_results().release();
  Workspace::release();
}

}  // namespace myconv::cpu
