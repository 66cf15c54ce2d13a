// What the norms share: sums along a row, storing a row, gradients that are sums over all rows.
#pragma once

#include "numeric.hpp"
#include "scratch.hpp"
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace lora_engine {
namespace {

// a * b + c, rounded once. Left to itself the compiler contracts d * w - n * p one way or the
// other, and a gradient's bits would depend on which others are asked for beside it.
inline float multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double multiply_add(double a, double b, double c) { return __builtin_fma(a, b, c); }

// The sum of term(i) for i in [0, count). Four running vectors, one for every quarter of the row:
// with one, each addition would wait for the one before.
template <class A, class Term>
inline A row_sum(int64_t count, Term term) {
  constexpr int64_t kLanes = 64 / sizeof(A);
  A s0[kLanes] = {}, s1[kLanes] = {}, s2[kLanes] = {}, s3[kLanes] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
#pragma omp simd
    for (int64_t j = 0; j < kLanes; ++j) s0[j] += term(i + j);
#pragma omp simd
    for (int64_t j = 0; j < kLanes; ++j) s1[j] += term(i + kLanes + j);
#pragma omp simd
    for (int64_t j = 0; j < kLanes; ++j) s2[j] += term(i + 2 * kLanes + j);
#pragma omp simd
    for (int64_t j = 0; j < kLanes; ++j) s3[j] += term(i + 3 * kLanes + j);
  }
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < kLanes; ++j) sum += (s0[j] + s1[j]) + (s2[j] + s3[j]);
#pragma omp simd reduction(+ : sum)
  for (int64_t j = i; j < count; ++j) sum += term(j);
  return sum;
}

template <class A>
struct Pair {
  A first, second;
};

// Two sums at once: term(i) gives the addends of both.
template <class A, class Term>
inline Pair<A> row_sums(int64_t count, Term term) {
  const int64_t half = count / 2;
  A a0 = 0, a1 = 0, b0 = 0, b1 = 0;
#pragma omp simd reduction(+ : a0, a1, b0, b1)
  for (int64_t i = 0; i < half; ++i) {
    const Pair<A> t0 = term(i), t1 = term(i + half);
    a0 += t0.first, a1 += t1.first;
    b0 += t0.second, b1 += t1.second;
  }
  Pair<A> sums = {a0 + a1, b0 + b1};
  if (count % 2) {
    const Pair<A> last = term(count - 1);
    sums.first += last.first, sums.second += last.second;
  }
  return sums;
}

// y[i] = value(i) for i in [0, count). `value` is called once for every i and may write what
// belongs to i.
template <class T, class Value>
inline void store_row(int64_t count, T* y, Value value) {
  int64_t i = 0;
#ifdef __AVX512BF16__
  // The compiler does not know the instruction that rounds to bfloat16, and without it rounding is
  // half of a norm's work.
  if constexpr (sizeof(T) == sizeof(bf16)) {
    constexpr int64_t kChunk = 64;
    alignas(64) float chunk[kChunk];
    for (; i + kChunk <= count; i += kChunk) {
#pragma omp simd
      for (int64_t j = 0; j < kChunk; ++j) chunk[j] = value(i + j);
      for (int64_t j = 0; j < kChunk; j += 32) {
        const __m512bh pairs =
            _mm512_cvtne2ps_pbh(_mm512_load_ps(chunk + j + 16), _mm512_load_ps(chunk + j));
        std::memcpy(y + i + j, &pairs, sizeof pairs);
      }
    }
  }
#endif
#pragma omp simd
  for (int64_t j = i; j < count; ++j) y[j] = store<T>(value(j));
}

// weight + offset in the arithmetic type, converted once for all rows; null stands for zeros.
template <class T>
inline acc_t<T>* parameter_row(Scratch& scratch, const void* weight, acc_t<T> offset,
                               int64_t cols) {
  acc_t<T>* row = scratch.allocate<acc_t<T>>(cols);
  for (int64_t i = 0; i < cols; ++i)
    row[i] = weight ? load(static_cast<const T*>(weight)[i]) + offset : offset;
  return row;
}

// Calls body(begin, end, partial) for blocks of rows in parallel, where partial[width] holds zeros
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
