// The operands of a LoRA adapter's thin products (gemm/thin_gemm.hpp): parts of X, packed factors,
// and sums over X's rows.
#pragma once

#include <omp.h>

#include "gemm/thin_gemm.hpp"
#include "scratch.hpp"

namespace lora_engine {
namespace {

constexpr int64_t kPackRows = 64;  // of a thin matrix, packed at a time

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// A part of X as elements to multiply, in whole groups.
template <class E>
struct Part {
  const E* data;
  int64_t ld;
};

// Copies x [rows, cols] to `copy` [padded_rows, padded_cols], rows `ld` apart; the padding is zero.
template <class T, class E>
inline Part<E> copy_part(const T* x, int64_t ldx, int64_t rows, int64_t cols, int64_t padded_rows,
                         int64_t padded_cols, E* copy, int64_t ld) {
  for (int64_t i = 0; i < padded_rows; ++i) {
    E* row = copy + i * ld;
    const int64_t filled = i < rows ? cols : 0;
    if (filled) convert_row(filled, x + i * ldx, row);
    std::memset(row + filled, 0, sizeof(E) * (padded_cols - filled));
  }
  return {copy, ld};
}

// x itself where it `may_stay`, needs no padding and is of type E already; a copy otherwise.
template <class T, class E>
inline Part<E> part_of(bool, const T* x, int64_t ldx, int64_t rows, int64_t cols,
                       int64_t padded_rows, int64_t padded_cols, E* copy, int64_t ld) {
  return copy_part(x, ldx, rows, cols, padded_rows, padded_cols, copy, ld);
}
template <class E>
inline Part<E> part_of(bool may_stay, const E* x, int64_t ldx, int64_t rows, int64_t cols,
                       int64_t padded_rows, int64_t padded_cols, E* copy, int64_t ld) {
  if (may_stay && rows == padded_rows && cols == padded_cols) return {x, ldx};
  return copy_part(x, ldx, rows, cols, padded_rows, padded_cols, copy, ld);
}

// A thin matrix [k, ranks] packed as the products with X read it: rows in whole groups, ranks in
// whole vectors.
template <class T>
struct Packed {
  using E = typename Element<T>::type;
  int64_t k, ranks, pieces, ld;
  E* data;

  Packed(Scratch& scratch, int64_t rows, int64_t ranks)
      : k(rows),
        ranks(ranks),
        pieces((rows + kPackRows - 1) / kPackRows),
        ld(round_up(ranks, kLanes<E>)),
        data(scratch.allocate<E>(pieces * kPackRows * ld)) {}

  // Rows [64 i, 64 i + 64) of p [k, ranks].
  void pack(int64_t i, const T* p, int64_t stride) {
    const int64_t begin = i * kPackRows;
    E* out = data + begin * ld;
    std::memset(out, 0, sizeof(E) * kPackRows * ld);
    pack_rows(smaller(k - begin, kPackRows), ranks, p + begin * stride, stride, out, ld);
  }

  // The same for the left operand of `collect`: where a matrix unit takes it, 32 rows of 16 ranks
  // after the other, transposed.
  void pack_columns(int64_t i, const T* p, int64_t stride) {
    pack(i, p, stride);
    if constexpr (kOnUnit<E>) {
      using Word = GroupWord<E>;
      constexpr int64_t kPairs = kUnitDepth / 2;
      Word* piece = reinterpret_cast<Word*>(data + i * kPackRows * ld);
      Scratch scratch;
      Word* copy = scratch.allocate<Word>(kPairs * ld);
      for (int64_t pair = 0; pair < kPackRows / 2; pair += kPairs) {
        std::memcpy(copy, piece + pair * ld, sizeof(Word) * kPairs * ld);
        for (int64_t rank = 0; rank < ld; rank += kUnitRows)
          transpose(kPairs, kUnitRows, copy + rank, ld, piece + pair * ld + rank * kPairs, kPairs);
      }
    }
  }

  // `pack` of the transpose of p [ranks, k]. `work` holds kPackRows * ld elements.
  void pack_transpose(int64_t i, const T* p, int64_t stride, E* work) {
    const int64_t begin = i * kPackRows;
    copy_part(p + begin, stride, ranks, smaller(k - begin, kPackRows), ld, kPackRows, work,
              kPackRows);
    pack_transposed(kPackRows, ld, work, kPackRows, data + begin * ld, ld);
  }
};

// Sums over rows for every column of X: strips of kTileN columns, each [ranks, kTileN].
template <class T>
struct Sums {
  using A = acc_t<T>;
  using E = typename Packed<T>::E;
  int64_t ranks, cols, strips;
  A* data;

  Sums(Scratch& scratch, int64_t ranks, int64_t cols)
      : ranks(ranks),
        cols(cols),
        strips((cols + kTileN<E> - 1) / kTileN<E>),
        data(scratch.allocate<A>(strips * size())) {}

  int64_t size() const { return round_up(ranks, kCollectRanks<E>) * kTileN<E>; }
  A* strip(int64_t i) const { return data + i * size(); }
  int64_t width(int64_t i) const { return smaller(cols - i * kTileN<E>, kTileN<E>); }
  void clear(int64_t i) { std::memset(strip(i), 0, sizeof(A) * size()); }

  // += s' x in strips [first, last), for rows [begin, end), begin a multiple of the group. `copy`
  // holds them for a strip where they have to be copied.
  void add(int64_t first, int64_t last, int64_t begin, int64_t end, const T* x, int64_t ldx,
           const Packed<T>& s, E* copy) {
    const int64_t rows = end - begin, padded = round_up(rows, Dot<E>::kGroup);
    const E* packed = s.data + begin * s.ld;
    int64_t i = first;
#ifdef LORA_ENGINE_TILES
    if constexpr (kOnUnit<T>) {
      const int64_t whole = rows == padded ? smaller(last, cols / kTileN<E>) : first;
      for (; i < whole; i += kCollectStrips)
        collect_strips(smaller(whole - i, kCollectStrips), rows, ranks,
                       x + begin * ldx + i * kTileN<E>, ldx, packed, s.ld, strip(i), size());
      i = larger(first, whole);
    }
#endif
    for (; i < last; ++i) {
      const Part<E> part = part_of(true, x + begin * ldx + i * kTileN<E>, ldx, rows, width(i),
                                   padded, kTileN<E>, copy, kTileN<E>);
      collect(padded, ranks, part.data, part.ld, packed, s.ld, strip(i));
    }
  }
};

// A thread's part of `count` strips, which are its own in every block of rows.
struct Strips {
  int64_t begin, end;

  explicit Strips(int64_t count)
      : begin(count * omp_get_thread_num() / omp_get_num_threads()),
        end(count * (omp_get_thread_num() + 1) / omp_get_num_threads()) {}
};

}  // namespace
}  // namespace lora_engine
