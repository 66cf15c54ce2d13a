// What the norms share: their parameters, and gradients that are sums over all rows.
#pragma once

#include "scratch.hpp"
#include "simd/chunk.hpp"

namespace lora_engine {
namespace {

// a * b + c, rounded once. Otherwise the compiler may contract d * w - n * p in two ways, and the
// bits of one gradient would depend on which other gradients are computed.
inline float multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double multiply_add(double a, double b, double c) { return __builtin_fma(a, b, c); }

// weight + offset in the arithmetic type, converted once for all rows; null stands for zeros.
template <class T>
inline LaneRow<T, const acc_t<T>> parameter_row(Scratch& scratch, const void* weight,
                                                acc_t<T> offset, int64_t cols) {
  using A = acc_t<T>;
  A* row = scratch.allocate<A>(whole_chunks<A>(cols));
  for (int64_t i = 0; i < cols; ++i)
    row[lane_of<T>(i)] = weight ? load(static_cast<const T*>(weight)[i]) + offset : offset;
  return {row};
}

// Writes a LaneRow's elements to dst in the order in memory.
template <class T, class A>
inline void copy_lanes(LaneRow<T, A> row, int64_t cols, A* dst) {
  for (int64_t i = 0; i < cols; ++i) dst[i] = row.data[lane_of<T>(i)];
}

// Calls body(begin, end, partial) for row blocks [begin, end) in parallel; body adds the block's
// sums to partial[width], which holds zeros. The blocks' sums are added in order to `total`. Blocks
// depend on the number of rows alone: the same bits for any number of threads. With width 0 partial
// is null and nothing is summed.
template <class A, class Rows>
inline void for_row_blocks(int64_t rows, int64_t width, A* total, Rows body) {
  constexpr int64_t kLeastRows = 64, kMostBlocks = 256;
  const int64_t even = (rows + kMostBlocks - 1) / kMostBlocks;
  const int64_t step = even > kLeastRows ? even : kLeastRows;
  const int64_t blocks = (rows + step - 1) / step;
  Scratch scratch;
  A* partial = width ? scratch.allocate<A>(blocks * width) : nullptr;
#pragma omp parallel for schedule(static)
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t begin = block * step;
    A* sums = width ? partial + block * width : nullptr;
    if (width) std::memset(sums, 0, sizeof(A) * width);
    body(begin, begin + step < rows ? begin + step : rows, sums);
  }
  if (width) std::memset(total, 0, sizeof(A) * width);
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t i = 0; i < width; ++i) total[i] += partial[block * width + i];
}

}  // namespace
}  // namespace lora_engine
