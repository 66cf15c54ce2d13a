// The products of few_rows.cpp for bfloat16 on a matrix unit: Y' = W X' + (scaling B) S'.
//
// Rows of W, and of A and B, are left operands where they are; X and S are turned once, into pairs
// of their columns. A block of 32 rows of W is read from memory once, for up to 32 rows of X at a
// time.
#pragma once

#include "few_rows.hpp"
#include "gemm/unit_gemm.hpp"
#include "isa.hpp"
#include "scratch.hpp"

#ifdef LORA_ENGINE_TILES

namespace lora_engine {
namespace {

// One product w x of a sum of products: w [.., k], and x [k, ldx] in pairs.
struct UnitTerm {
  int64_t k;
  const bf16* w;
  int64_t ldw;
  const bf16* x;
};

// dst [k, ld] in pairs = columns first to last of src [rows, k], turned; zeros beyond the rows.
inline void turn_columns(int64_t first, int64_t last, int64_t rows, const bf16* src, int64_t lds,
                         int64_t k, bf16* dst, int64_t ld) {
  for (int64_t j = first; j < last; j += 2) {
    bf16* pair = dst + j * ld;
    if (j + 1 < k)
      for (int64_t m = 0; m < rows; ++m) std::memcpy(pair + 2 * m, src + m * lds + j, 4);
    else
      for (int64_t m = 0; m < rows; ++m) {
        pair[2 * m] = src[m * lds + j];
        pair[2 * m + 1] = bf16{};
      }
    std::memset(pair + 2 * rows, 0, 2 * sizeof(bf16) * (ld - rows));
  }
}

// sums [rows, 16 kAcross] of the terms, from a column of x on; w has up to 16 kDown rows.
template <int kDown, int kAcross>
inline void sum_unit_terms(int64_t rows, const UnitTerm* terms, int64_t count, int64_t column,
                           int64_t ldx, float* sums) {
  zero_sums();
  for (int64_t i = 0; i < count; ++i) {
    const UnitTerm& a = terms[i];
    for (int64_t j = 0; j < a.k; j += kUnitDepth) {
      if (column == 0)  // the block of rows after this one
        for (int64_t n = 0; n < kDown * kUnitRows; ++n)
          __builtin_prefetch(a.w + (n + kUnitBlock) * a.ldw + j, 0, 2);
      multiply_step<kDown, kAcross>(a.w + j, a.ldw, a.x + 2 * column + j * ldx, ldx, rows, a.k - j);
    }
  }
  store_sums<kDown, kAcross>(sums, kUnitBlock);
}

// sums [rows, 32] for up to 32 rows of w.
inline void sum_unit_block(int64_t rows, const UnitTerm* terms, int64_t count, int64_t column,
                           int64_t ldx, float* sums) {
  const bool two = ldx - column > kUnitRows;
  if (rows > kUnitRows) {
    if (two)
      sum_unit_terms<2, 2>(rows, terms, count, column, ldx, sums);
    else
      sum_unit_terms<2, 1>(rows, terms, count, column, ldx, sums);
  } else if (two) {
    sum_unit_terms<1, 2>(rows, terms, count, column, ldx, sums);
  } else {
    sum_unit_terms<1, 1>(rows, terms, count, column, ldx, sums);
  }
}

inline void unit_few_rows(const FewRowsArgs& a) {
  const bf16 *x = static_cast<const bf16*>(a.x), *weight = static_cast<const bf16*>(a.weight);
  const bf16* residual = static_cast<const bf16*>(a.residual);
  bf16* y = static_cast<bf16*>(a.y);
  const int64_t ldx = round_up(a.rows, kUnitRows), depth = round_up(a.cols, 2);
  Scratch scratch;
  bf16* turned = scratch.allocate<bf16>(depth * ldx);
  bf16** low_rank = scratch.allocate<bf16*>(a.adapter_count);  // S of each, in pairs
  int64_t widest = 0, most = 0;
  for (int64_t i = 0; i < a.adapter_count; ++i) {
    const int64_t width = round_up(a.adapters[i].ranks, kUnitDepth);
    low_rank[i] = scratch.allocate<bf16>(width * ldx);
    std::memset(low_rank[i], 0, sizeof(bf16) * width * ldx);
    if (width > widest) widest = width;
  }
  for (int64_t i = 0; i < a.linear_count; ++i)
    if (a.linears[i].adapters > most) most = a.linears[i].adapters;
  const int64_t of_a = kUnitRows * depth, of_b = most * kUnitBlock * widest;
#pragma omp parallel
  {
    const MatrixUnit unit;
    Scratch own;
    bf16* factors = own.allocate<bf16>(of_a > of_b ? of_a : of_b);
    UnitTerm* terms = own.allocate<UnitTerm>(1 + most);
    alignas(64) float sums[kUnitBlock * kUnitBlock];
    alignas(64) float row[kUnitBlock];
#pragma omp for schedule(static)
    for (int64_t j = 0; j < depth; j += kUnitDepth)
      turn_columns(j, j + kUnitDepth < depth ? j + kUnitDepth : depth, a.rows, x, a.x_stride,
                   a.cols, turned, ldx);
    for (int64_t i = 0; i < a.adapter_count; ++i) {
      const LoraAdapter& adapter = a.adapters[i];
#pragma omp for schedule(static) nowait
      for (int64_t r = 0; r < adapter.ranks; r += kUnitRows) {
        const int64_t ranks = adapter.ranks - r < kUnitRows ? adapter.ranks - r : kUnitRows;
        for (int64_t n = 0; n < ranks; ++n)
          take_row(adapter.dtype, adapter.lora_a, (r + n) * adapter.a_stride, a.cols, 1.0,
                   factors + n * depth, depth);
        terms[0] = {a.cols, factors, depth, turned};
        for (int64_t column = 0; column < ldx; column += kUnitBlock) {
          sum_unit_block(ranks, terms, 1, column, ldx, sums);
          const int64_t end = ldx - column < kUnitBlock ? ldx - column : kUnitBlock;
          for (int64_t n = 0; n < ranks; ++n) {
            bf16* pairs = low_rank[i] + ((r + n) / 2 * ldx + column) * 2 + n % 2;
            for (int64_t m = 0; m < end; ++m) pairs[2 * m] = store<bf16>(sums[n * kUnitBlock + m]);
          }
        }
      }
    }
#pragma omp barrier
    int64_t start = 0, first = 0;
    for (int64_t i = 0; i < a.linear_count; ++i) {
      const LoraBase& linear = a.linears[i];
      const bf16* bias = static_cast<const bf16*>(linear.bias);
#pragma omp for schedule(static) nowait
      for (int64_t begin = 0; begin < linear.rows; begin += kUnitBlock) {
        const int64_t count = linear.rows - begin < kUnitBlock ? linear.rows - begin : kUnitBlock;
        terms[0] = {a.cols, weight + (start + begin) * a.w_stride, a.w_stride, turned};
        for (int64_t j = 0; j < linear.adapters; ++j) {
          const LoraAdapter& adapter = a.adapters[first + j];
          const int64_t width = round_up(adapter.ranks, kUnitDepth);
          bf16* scaled = factors + j * kUnitBlock * widest;
          for (int64_t n = 0; n < count; ++n)
            take_row(adapter.dtype, adapter.lora_b, (begin + n) * adapter.b_stride, adapter.ranks,
                     adapter.scaling, scaled + n * width, width);
          terms[1 + j] = {width, scaled, width, low_rank[first + j]};
        }
        for (int64_t column = 0; column < a.rows; column += kUnitBlock) {
          sum_unit_block(count, terms, 1 + linear.adapters, column, ldx, sums);
          const int64_t end = a.rows - column < kUnitBlock ? a.rows : column + kUnitBlock;
          for (int64_t m = column; m < end; ++m) {
            for (int64_t n = 0; n < count; ++n) row[n] = sums[n * kUnitBlock + m - column];
            const int64_t place = start + begin;
            finish_row(count, row, bias ? bias + begin : nullptr,
                       residual ? residual + m * a.residual_stride + place : nullptr,
                       y + m * a.y_stride + place);
          }
        }
      }
      start += linear.rows;
      first += linear.adapters;
    }
  }
}

}  // namespace
}  // namespace lora_engine
#endif
