// One head's rotary rotation, shared by rope and by attention, which rotates as it loads.
#pragma once

#include "simd/numeric.hpp"

namespace lora_engine {
namespace {

// y = rotation of x; `write` turns the arithmetic type into y's. x and y may be the same.
template <class X, class Y, class A, class Write>
inline void rotate(const X* x, Y* y, const A* cos, const A* sin, int64_t head_dim, bool inverse,
                   Write write) {
  const int64_t half = head_dim / 2;
  if (!inverse) {
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) {
      const A x1 = load(x[i]), x2 = load(x[i + half]);
      y[i] = write(x1 * cos[i] - x2 * sin[i]);
      y[i + half] = write(x2 * cos[i + half] + x1 * sin[i + half]);
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) {
      const A x1 = load(x[i]), x2 = load(x[i + half]);
      y[i] = write(x1 * cos[i] + x2 * sin[i + half]);
      y[i + half] = write(x2 * cos[i + half] - x1 * sin[i]);
    }
  }
}

}  // namespace
}  // namespace lora_engine
