// Results that are written past the caches. A store to memory that no cache holds reads its line first, and of tensors
// beyond the last cache it gives each result back before anyone reads it: half of what moves would move in vain.
#pragma once

#include <atomic>
#include <cstdint>

namespace myconv::cpu {

inline constexpr double kLastCache = 32e6;  // bytes
inline constexpr int64_t kCacheLine = 64;   // such stores are of whole lines

// Results of so many bytes that begin at `to`, in runs of `run` bytes, and what the call reads to make them or after
// them. Those that would leave most of the last cache to what is read stay in it.
inline bool goes_past_caches(double read, double written, const void* to, int64_t run) {
  return read + written > kLastCache && 4 * written > kLastCache && reinterpret_cast<uintptr_t>(to) % kCacheLine == 0 &&
         run % kCacheLine == 0;
}

// At the end of a thread's work: others may see such stores late.
inline void finish_stores() { std::atomic_thread_fence(std::memory_order_seq_cst); }

}  // namespace myconv::cpu
