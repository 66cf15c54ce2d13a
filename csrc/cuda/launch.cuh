// What every CUDA file includes: the language, real or emulated, and the one way to start a kernel.
#pragma once

#include <stdexcept>
#include <string>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#define LORA_ENGINE_DYNAMIC_SHARED(type, name)                \
  extern __shared__ __align__(16) unsigned char name##_raw[]; \
  type* name = reinterpret_cast<type*>(name##_raw)
#else
#include "emulation.hpp"
#endif

namespace lora_engine {
namespace cuda {

constexpr unsigned kFullWarp = 0xffffffffu;

#ifdef __CUDACC__

static inline void check(cudaError_t error, const char* name) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(name) + ": CUDA: " + cudaGetErrorString(error));
}

// Puts `kernel` on `stream`; errors of the launch itself become a std::runtime_error.
template <class... Params, class... Args>
void launch(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block,
            size_t dynamic_shared, void* stream, Args... args) {
  constexpr size_t kUnasked = 48 * 1024;
  if (dynamic_shared > kUnasked)
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(dynamic_shared)),
          name);
  kernel<<<grid, block, dynamic_shared, static_cast<cudaStream_t>(stream)>>>(args...);
  check(cudaGetLastError(), name);
}

// Multiprocessors of the current device.
static inline int multiprocessors(const char* name) {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), name);
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), name);
  return count;
}

#else

template <class... Params, class... Args>
void launch(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block,
            size_t dynamic_shared, void*, Args... args) {
  emulation::run(name, grid, block, dynamic_shared, [=] { kernel(args...); });
}

static inline int multiprocessors(const char*) { return 1; }

#endif

static inline bool aligned(const void* address, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(address) % bytes == 0;
}

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace cuda
}  // namespace lora_engine
