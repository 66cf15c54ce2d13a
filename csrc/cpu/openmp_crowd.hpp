// How GNU's OpenMP threads wait, for a process that loaded the runtime before it could be told.
#pragma once

namespace lora_engine {

// Starts a team of one more thread than there are processors and leaves it asleep for the rest of
// the process. GNU's libgomp lets a thread spin at a barrier for 300,000 turns, some 3 ms, but for
// 100 turns only while it holds more threads than the process has processors (its manual,
// GOMP_SPINCOUNT). False where the team would be too large, or the runtime gave fewer threads.
bool crowd_openmp();

}  // namespace lora_engine
