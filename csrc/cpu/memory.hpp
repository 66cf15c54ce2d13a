// The C library's allocator, tuned for a loop that allocates the same sizes every step.
#pragma once

#include <cstdint>

namespace lora_engine {

// Serve large allocations from the heap too, and keep the heap when they are freed, instead of
// mapping and unmapping pages that the system must zero each time. False where there is no mallopt.
//
// What of the heap is touched first from then on is of huge pages, where the system gives them on
// request (transparent_hugepage "madvise"). Room for `expected_bytes` is made at once: what is
// written before the next kernel is called is of huge pages only there. Where the process's address
// space is limited nothing is made in advance.
bool keep_freed_memory(int64_t expected_bytes);

// Has what the heap grew by since the last call be of huge pages: before kernels write to it.
void advise_heap();

}  // namespace lora_engine
