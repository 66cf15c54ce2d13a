// The C library's allocator, tuned for a loop that allocates the same sizes every step.
#pragma once

namespace lora_engine {

// Serve large allocations from the heap too, and keep the heap when they are freed, instead of
// mapping and unmapping pages that the system must zero each time. False where there is no mallopt.
bool keep_freed_memory();

}  // namespace lora_engine
