// Preloaded by test_guard_pages.py: every block that torch's CPU allocator asks for (outputs and workspaces) lies against
// a page that may not be touched, at its end or, with GUARD_SIDE=start, at its beginning. A stray access ends the process.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { kBlocks = 1 << 16 };

// Open addressing by pointer; a freed slot keeps its place with base = NULL.
static struct {
  void* pointer;
  void* base;
  size_t length;
} blocks[kBlocks];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static size_t slot_of(const void* pointer) { return ((uintptr_t)pointer >> 2) * 0x9E3779B97F4A7C15u >> 48 & (kBlocks - 1); }

// The end touches the page to the byte: the block is aligned to its element only, which is all that kernels may count on.
int posix_memalign(void** result, size_t alignment, size_t size) {
  (void)alignment;
  const size_t page = (size_t)sysconf(_SC_PAGESIZE), pages = (size + page - 1) / page;
  char* base = mmap(NULL, (pages + 2) * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED) return ENOMEM;
  mprotect(base, page, PROT_NONE);
  mprotect(base + (pages + 1) * page, page, PROT_NONE);
  const char* side = getenv("GUARD_SIDE");
  char* pointer = base + page + (side && strcmp(side, "start") == 0 ? 0 : pages * page - size);
  pthread_mutex_lock(&lock);
  size_t i = slot_of(pointer);
  while (blocks[i].base) i = (i + 1) & (kBlocks - 1);
  blocks[i].pointer = pointer;
  blocks[i].base = base;
  blocks[i].length = (pages + 2) * page;
  pthread_mutex_unlock(&lock);
  *result = pointer;
  return 0;
}

void free(void* pointer) {
  static void (*next)(void*);
  if (!pointer) return;
  pthread_mutex_lock(&lock);
  for (size_t i = slot_of(pointer); blocks[i].pointer; i = (i + 1) & (kBlocks - 1)) {
    if (blocks[i].pointer != pointer || !blocks[i].base) continue;
    munmap(blocks[i].base, blocks[i].length);
    blocks[i].base = NULL;
    pthread_mutex_unlock(&lock);
    return;
  }
  pthread_mutex_unlock(&lock);
  if (!next) next = (void (*)(void*))dlsym(RTLD_NEXT, "free");
  next(pointer);
}
