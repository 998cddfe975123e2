// Fibers, schedules, meetings, shared memory and its guards: what emulator.h declares.
#undef _FORTIFY_SOURCE  // its longjmp takes a jump to another stack for an error

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "cuda/abi.h"
#include "emulator.h"
#include "instructions.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace myconv::cuda {
namespace emulator {
namespace {

constexpr size_t kMostThreads = 1024, kMostShared = 48 << 10;  // of a block
constexpr size_t kStack = 128 << 10, kGuard = 256;             // bytes

// The order of a block's threads between two waits, and of the blocks. In kForward and kReverse, of any two threads
// each once comes first; in kWarps a warp runs for as long as it can before the next one starts.
enum Schedule { kForward, kReverse, kRandom, kWarps };

enum class State { kReady, kAtBlock, kAtWarp, kEnded };

struct Copy {  // a cp.async under way
  void* to;
  unsigned char data[16];
  int bytes, group;
};

struct Thread {
  uint3 index;
  State state;
  // while it waits
  Place place;
  unsigned mask;
  void* record;
  // its asynchronous copies, and how many groups it has committed
  std::vector<Copy> copies;
  int groups;
  // its fiber
  bool started;
  ucontext_t start;
  jmp_buf context;
};

struct Array {  // of shared memory
  const void* identity;
  unsigned char* begin;
  size_t bytes;
};

Schedule schedule = kForward;
std::mt19937 random_source;

int status = 0;
char text[512] = "";

std::vector<Thread> threads;  // of the block that runs
Thread* current = nullptr;    // null: the scheduler runs
jmp_buf scheduler;
void (*call_kernel)(const void*);
const void* kernel_to_call;

alignas(128) unsigned char shared_memory[4 * kMostShared];
std::vector<Array> arrays;                 // each with a guard on either side
size_t shared_end = sizeof shared_memory;  // of the last guard

size_t at_block = 0;  // threads that wait at the block's barrier

void report(const char* who, const char* format, va_list arguments) {
  if (status) return;  // the first failure is the one to know
  status = kFailed;
  int length = snprintf(text, sizeof text, "block (%u, %u, %u): %s", blockIdx.x, blockIdx.y, blockIdx.z, who);
  vsnprintf(text + length, sizeof text - length, format, arguments);
}

[[gnu::format(printf, 1, 2)]] void report(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  report("", format, arguments);
  va_end(arguments);
}

// --- fibers: ucontext starts one, longjmp, which makes no system call, goes back and forth ---------------------------

char* stack(size_t i) {
  static std::vector<char*> stacks;
  while (stacks.size() <= i) {
    void* const memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    mprotect(memory, sysconf(_SC_PAGESIZE), PROT_NONE);  // an overflow ends the process
    stacks.push_back(static_cast<char*>(memory));
  }
  return stacks[i];
}

void suspend() {
  if (_setjmp(current->context) == 0) _longjmp(scheduler, 1);
}

void fiber() {
  for (;;) {  // a turn is a block
    call_kernel(kernel_to_call);
    current->state = State::kEnded;
    suspend();
  }
}

void resume(Thread& thread) {
  current = &thread;
  threadIdx = thread.index;
  if (_setjmp(scheduler) == 0) {
    if (thread.started) _longjmp(thread.context, 1);
    thread.started = true;
    setcontext(&thread.start);
  }
  current = nullptr;
}

void make_threads(dim3 block) {
  threads.resize(block.x * block.y * block.z);
  for (size_t i = 0; i < threads.size(); ++i) {
    Thread& thread = threads[i];
    const unsigned n = static_cast<unsigned>(i);
    thread.index = {n % block.x, n / block.x % block.y, n / block.x / block.y};
    thread.started = false;
    getcontext(&thread.start);
    thread.start.uc_stack.ss_sp = stack(i);
    thread.start.uc_stack.ss_size = kStack;
    makecontext(&thread.start, fiber, 0);
  }
}

// --- shared memory ---------------------------------------------------------------------------------------------------

void poison_shared() {
  memset(shared_memory, kPoison, shared_end);
  shared_end = kGuard;
  arrays.clear();
}

void check_guards() {
  const auto poisoned = [](const unsigned char* from) {
    return std::all_of(from, from + kGuard, [](unsigned char byte) { return byte == kPoison; });
  };
  for (const Array& a : arrays)
    if (!poisoned(a.begin - kGuard) || !poisoned(a.begin + a.bytes))
      report("something was written outside a shared array of %zu bytes", a.bytes);
}

// --- meetings --------------------------------------------------------------------------------------------------------

bool same(Place a, Place b) { return a.line == b.line && strcmp(a.file, b.file) == 0; }

// All have come: the `count` threads from `first` on or, in a warp, those of them that the mask names.
void hold_meeting(size_t first, size_t count, Together together) {
  const bool all = current->state == State::kAtBlock;
  const Place here = current->place;
  void* records[kMostThreads];
  for (size_t i = 0; i < count; ++i) {
    Thread& thread = threads[first + i];
    records[i] = nullptr;
    if (!all && !(current->mask >> i & 1)) continue;
    if (!same(thread.place, here))
      fail("is at %s:%d, where it meets a thread from %s:%d", here.file, here.line, thread.place.file,
           thread.place.line);
    records[i] = thread.record;
    thread.state = State::kReady;
  }
  together(records, static_cast<int>(count));
}

size_t warp_begin() { return (current - threads.data()) / warpSize * warpSize; }
size_t warp_end() { return std::min(warp_begin() + warpSize, threads.size()); }

// --- the schedule ----------------------------------------------------------------------------------------------------

// Runs those of threads [begin, end) that are ready, each until it waits or ends. Whether any was.
bool pass(size_t begin, size_t end) {
  static std::vector<size_t> order;
  order.resize(end - begin);
  std::iota(order.begin(), order.end(), begin);
  if (schedule == kReverse) std::reverse(order.begin(), order.end());
  if (schedule == kRandom) std::shuffle(order.begin(), order.end(), random_source);
  bool any = false;
  for (size_t i : order) {
    if (status) return false;
    if (threads[i].state != State::kReady) continue;
    any = true;
    if (schedule == kRandom && random_source() % 2) continue;  // in a later pass
    resume(threads[i]);
  }
  return any;
}

void run_block() {
  poison_shared();
  at_block = 0;
  for (Thread& thread : threads) thread.state = State::kReady, thread.groups = 0, thread.copies.clear();
  const size_t at_once = schedule == kWarps ? warpSize : threads.size();
  for (bool any = true; any;) {
    any = false;
    for (size_t begin = 0; begin < threads.size(); begin += at_once)
      while (pass(begin, std::min(begin + at_once, threads.size()))) any = true;
  }
  check_guards();
  for (const Thread& t : threads)
    if (t.state != State::kEnded)
      report("thread (%u, %u, %u) waits at %s:%d for threads that never come", t.index.x, t.index.y, t.index.z,
             t.place.file, t.place.line);
}

uint3 block_at(uint64_t i) {
  return {static_cast<unsigned>(i % gridDim.x), static_cast<unsigned>(i / gridDim.x % gridDim.y),
          static_cast<unsigned>(i / gridDim.x / gridDim.y)};
}

// A kernel that touches memory it may not touch fails; a fault outside kernels is not ours.
struct sigaction outer_handlers[2];
constexpr int kSignals[] = {SIGSEGV, SIGBUS};

void restore_handlers() {
  for (int i = 0; i < 2; ++i) sigaction(kSignals[i], &outer_handlers[i], nullptr);
}

void on_fault(int, siginfo_t* info, void*) {
  if (!current) return restore_handlers();
  fail("touches memory that is not its own, at %p", info->si_addr);
}

void install_handlers() {
  struct sigaction handler = {};
  handler.sa_sigaction = on_fault;
  handler.sa_flags = SA_SIGINFO | SA_NODEFER;  // the handler does not return
  for (int i = 0; i < 2; ++i) sigaction(kSignals[i], &handler, &outer_handlers[i]);
}

}  // namespace

void fail(const char* format, ...) {
  char who[64];
  snprintf(who, sizeof who, "thread (%u, %u, %u) ", threadIdx.x, threadIdx.y, threadIdx.z);
  va_list arguments;
  va_start(arguments, format);
  report(who, format, arguments);
  va_end(arguments);
  _longjmp(scheduler, 1);
}

int lane() { return static_cast<int>(current - threads.data()) % warpSize; }

void run(dim3 grid, dim3 block, void (*call)(const void*), const void* kernel) {
  if (status) return;
  const uint64_t blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
  const uint64_t count = static_cast<uint64_t>(block.x) * block.y * block.z;
  if (blocks == 0 || grid.x > INT32_MAX || grid.y > UINT16_MAX || grid.z > UINT16_MAX || count == 0 ||
      count > kMostThreads || block.z > 64) {
    status = kRefused;
    snprintf(text, sizeof text, "a launch of %llu blocks of %llu threads", static_cast<unsigned long long>(blocks),
             static_cast<unsigned long long>(count));
    return;
  }
  gridDim = grid, blockDim = block, call_kernel = call, kernel_to_call = kernel;
  make_threads(block);
  std::vector<uint64_t> order(blocks);
  std::iota(order.begin(), order.end(), uint64_t{0});
  if (schedule == kReverse) std::reverse(order.begin(), order.end());
  if (schedule == kRandom) std::shuffle(order.begin(), order.end(), random_source);
  install_handlers();
  for (uint64_t i : order) {
    blockIdx = block_at(i);
    if (!status) run_block();
  }
  restore_handlers();
}

void* shared_array(const void* identity, size_t bytes) {
  for (const Array& a : arrays)
    if (a.identity == identity) return a.begin;
  size_t used = bytes;
  for (const Array& a : arrays) used += a.bytes;
  const size_t offset = (shared_end + 127) / 128 * 128;
  if (used > kMostShared || offset + bytes + kGuard > sizeof shared_memory)
    fail("wants %zu bytes of shared memory, more than a block has", used);
  shared_end = offset + bytes + kGuard;
  arrays.push_back({identity, shared_memory + offset, bytes});
  return arrays.back().begin;
}

void meet_block(void* record, Together together, Place place) {
  current->state = State::kAtBlock, current->mask = 0, current->record = record, current->place = place;
  if (++at_block < threads.size()) return suspend();
  at_block = 0;
  check_guards();
  hold_meeting(0, threads.size(), together);
}

void meet_warp(unsigned mask, void* record, Together together, Place place) {
  const size_t first = warp_begin(), count = warp_end() - first;
  if (!(mask >> lane() & 1)) fail("is not in the mask that it names");
  if (count < warpSize) mask &= (1u << count) - 1;  // a block's last warp may be short
  current->state = State::kAtWarp, current->mask = mask, current->record = record, current->place = place;
  for (size_t i = 0; i < count; ++i) {
    const Thread& thread = threads[first + i];
    if (mask >> i & 1 && (thread.state != State::kAtWarp || thread.mask != mask)) return suspend();
  }
  hold_meeting(first, count, together);
}

// --- asynchronous copies: the data is read at once and arrives as late as it may -------------------------------------

void start_copy(void* to, const void* from, int bytes, int valid) {
  if (reinterpret_cast<uintptr_t>(to) % bytes || reinterpret_cast<uintptr_t>(from) % bytes)
    fail("copies to or from an address that is not a multiple of the size");
  Copy copy{to, {}, bytes, current->groups};
  memcpy(copy.data, from, valid);  // and zeros behind it
  memset(to, kPoison, bytes);
  current->copies.push_back(copy);
}

void commit_copies() { ++current->groups; }

void await_copies(int groups_left) {
  std::erase_if(current->copies, [&](const Copy& copy) {
    if (copy.group >= current->groups - groups_left) return false;
    memcpy(copy.to, copy.data, copy.bytes);
    return true;
  });
}

}  // namespace emulator

int last_error() { return std::exchange(emulator::status, 0); }

const char* error_text(int) { return emulator::text; }

}  // namespace myconv::cuda

unsigned __activemask() {
  using namespace myconv::cuda::emulator;
  unsigned mask = 0;
  for (size_t i = warp_begin(); i < warp_end(); ++i)
    if (threads[i].state != State::kEnded) mask |= 1u << (i - warp_begin());
  return mask;
}

extern "C" void emulator_schedule(int schedule, unsigned seed) {
  myconv::cuda::emulator::schedule = static_cast<myconv::cuda::emulator::Schedule>(schedule);
  myconv::cuda::emulator::random_source.seed(seed);
}
extern "C" const char* emulator_error() { return myconv::cuda::error_text(0); }
