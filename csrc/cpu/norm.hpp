// What the norms share: sums along a row, and gradients that are sums over all rows.
#pragma once

#include "numeric.hpp"
#include "scratch.hpp"

namespace lora_engine {
namespace {

// The sum of term(i) for i in [0, count). Four running vectors, one for each quarter of the row:
// with one, every addition would wait for the one before.
template <class A, class Term>
inline A row_sum(int64_t count, Term term) {
  const int64_t quarter = count / 4;
  A s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
  for (int64_t i = 0; i < quarter; ++i) {
    s0 += term(i);
    s1 += term(i + quarter);
    s2 += term(i + 2 * quarter);
    s3 += term(i + 3 * quarter);
  }
  A sum = (s0 + s1) + (s2 + s3);
  for (int64_t i = 4 * quarter; i < count; ++i) sum += term(i);
  return sum;
}

// Calls rows(begin, end, partial) for blocks of rows in parallel, where partial[width] holds zeros
// at first and the block's sums afterwards, and writes the sums over the blocks to `total`. Blocks
// depend on the number of rows alone and are added in order: the same bits for any number of
// threads. With width 0 there is no partial and nothing is summed.
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
