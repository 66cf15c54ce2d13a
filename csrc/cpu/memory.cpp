#include "memory.hpp"

#include <climits>
#include <cstdlib>  // defines __GLIBC__

#ifdef __GLIBC__
#include <malloc.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#endif

namespace lora_engine {

#ifdef __GLIBC__

namespace {

// Of one growth of the heap beyond what is asked for: many huge pages, since none reaches from one
// growth into the next.
constexpr int kGrowth = 64 * 1024 * 1024;

std::atomic<uintptr_t> advised_end{0};  // 0: nobody has asked to keep memory

// The heap's end where the system tells no beginning.
uintptr_t heap_begin() {
  uintptr_t begin = reinterpret_cast<uintptr_t>(sbrk(0));
  std::FILE* maps = std::fopen("/proc/self/maps", "r");
  if (!maps) return begin;
  char line[512];
  while (std::fgets(line, sizeof line, maps)) {
    if (!std::strstr(line, "[heap]")) continue;
    begin = std::strtoull(line, nullptr, 16);
    break;
  }
  std::fclose(maps);
  return begin;
}

uintptr_t heap_end() { return reinterpret_cast<uintptr_t>(sbrk(0)); }

bool address_space_is_limited() {
  rlimit limit;
  return getrlimit(RLIMIT_AS, &limit) != 0 || limit.rlim_cur != RLIM_INFINITY;
}

}  // namespace

bool keep_freed_memory(int64_t expected_bytes) {
  if (mallopt(M_MMAP_MAX, 0) != 1 || mallopt(M_TRIM_THRESHOLD, INT_MAX) != 1) return false;
  malloc_trim(0);  // pages of freed memory go back, to come again as parts of huge ones
  uintptr_t unknown = 0;
  advised_end.compare_exchange_strong(unknown, heap_begin());
  advise_heap();
  if (address_space_is_limited()) return true;
  mallopt(M_TOP_PAD, kGrowth);
  void* room = expected_bytes > 0 ? std::malloc(static_cast<size_t>(expected_bytes)) : nullptr;
  advise_heap();
  std::free(room);
  return true;
}

void advise_heap() {
  const uintptr_t begin = advised_end.load(std::memory_order_relaxed), end = heap_end();
  if (begin == 0 || begin == end) return;
  advised_end.store(end, std::memory_order_relaxed);
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE)), first = begin / page * page;
  // Kernels are as right on small pages: a system without huge ones refuses, or does nothing.
  if (begin < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
}

#else

bool keep_freed_memory(int64_t) { return false; }

void advise_heap() {}

#endif

}  // namespace lora_engine
