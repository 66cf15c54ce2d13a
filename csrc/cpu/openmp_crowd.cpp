#include "openmp_crowd.hpp"

#include <omp.h>

#include <future>
#include <system_error>
#include <thread>
#include <utility>

namespace lora_engine {

namespace {

// On larger machines so many idle threads would be a noticeable cost.
constexpr int kMostThreads = 65;

}  // namespace

bool crowd_openmp() {
  const int wanted = omp_get_num_procs() + 1;
  if (wanted > kMostThreads) return false;
  // A team lives as long as the thread that started it, so this thread never ends.
  std::promise<int> started;
  std::future<int> threads = started.get_future();
  try {
    std::thread([started = std::move(started), wanted]() mutable {
      int team = 1;
#pragma omp parallel num_threads(wanted)
      {
#pragma omp single
        team = omp_get_num_threads();
      }
      started.set_value(team);
      std::promise<void>().get_future().wait();
    }).detach();
  } catch (const std::system_error&) {
    return false;
  }
  return threads.get() == wanted;
}

}  // namespace lora_engine
