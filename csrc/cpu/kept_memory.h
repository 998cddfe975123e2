// Memory that outlives its use. What is fresh from the system costs a page fault for each 4 KiB, which together take as
// long as many a convolution, and the C library returns to the system what a large tensor leaves behind.
// It all comes from where torch's own comes from. The environment variable MYCONV_KEPT_MIB bounds what is kept of
// results (256 MiB unless it is set); with 0 nothing is kept of anything.
#pragma once

#include <c10/core/Allocator.h>

#include <atomic>
#include <cstdint>

namespace myconv::cpu {

// For results: their memory comes back to it and is used again for results that nearly fill it.
c10::Allocator* result_allocator();

// For a call. One is kept for the process, of up to 32 MiB; calls that run at the same time allocate their own.
class Workspace {
 public:
  explicit Workspace(int64_t bytes);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  void* get() const { return memory_->data.get(); }
  static void release() { delete kept_.exchange(nullptr); }

 private:
  struct Memory {
    int64_t bytes;
    c10::DataPtr data;
  };
  static std::atomic<Memory*> kept_;
  Memory* memory_;
};

bool keeps_memory();
int64_t kept_memory();       // bytes of results that nobody uses now
void release_kept_memory();  // those, and the workspace

}  // namespace myconv::cpu
