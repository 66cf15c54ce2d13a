// What the ways of few_rows.cpp have in common.
#pragma once

#include <cstring>

#include "gemm/tile_gemm.hpp"

namespace lora_engine {
namespace {

// dst [width] = factor * src [n], rounded to T; zeros from n on.
template <class T>
inline void take_row(DType type, const void* src, int64_t start, int64_t n, double factor, T* dst,
                     int64_t width) {
  using A = acc_t<T>;
  const A scale = static_cast<A>(factor);
  dispatch(type, [&](auto s) {
    const decltype(s)* from = static_cast<const decltype(s)*>(src) + start;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) dst[i] = store<T>(static_cast<A>(load(from[i])) * scale);
  });
  std::memset(dst + n, 0, sizeof(T) * (width - n));
}

// y = sums [count] + bias + residual, each of the two where there is one; sums are written.
template <class T>
inline void finish_row(int64_t count, acc_t<T>* sums, const T* bias, const T* residual, T* y) {
  if (bias)
    for (int64_t n = 0; n < count; ++n) sums[n] += load(bias[n]);
  if (residual)
    for (int64_t n = 0; n < count; ++n) sums[n] += load(residual[n]);
  convert_row(count, sums, y);
}

}  // namespace
}  // namespace lora_engine
