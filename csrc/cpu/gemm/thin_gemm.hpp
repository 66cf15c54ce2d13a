// Products of a large matrix X [M, K] with a thin one of few ranks:
//
//   project   out [M, R] = X P            P [K, R], along the rows of X
//   collect   out [R, K] += S' X          S [M, R], down its columns
//
// X is read where it stands. Elements are multiplied in groups, as tile_gemm.hpp says: `project`
// broadcasts groups of X to vectors of P, `collect` broadcasts groups of S to vectors of X, which
// are made of neighbouring rows as they are loaded. A tile's sums stay in registers, and each adds
// its terms in the order of the matrices: how threads divide rows and columns changes no bit.
#pragma once

#include "tile_gemm.hpp"
#include "unit_thin_gemm.hpp"

namespace lora_engine {
namespace {

template <class E>
constexpr int64_t kLanes = kTileN<E> / 2;  // ranks or columns in a vector
template <class E>
constexpr int64_t kLine = 64 / sizeof(E);  // elements of a cache line

// Rows of X in a tile with one vector of ranks.
template <class E>
constexpr int64_t kProjectRows = 2 * kTileRows;
// `collect` sums for ranks in multiples of this.
template <class E>
constexpr int64_t kCollectRanks = 1;
#ifdef LORA_ENGINE_TILES
template <>
constexpr int64_t kProjectRows<bf16> = kUnitBlock;
template <>
constexpr int64_t kCollectRanks<bf16> = kUnitRows;
#endif

// A number of vectors as a type.
template <int N>
struct Vectors {
  static constexpr int value = N;
};

// Multiply-adds whose vector operand is in a register.
template <class E>
struct Thin {
  using Vector = typename Dot<E>::Vector;
  using Operand = Vector;
  static inline Operand load(const E* p) {
    Operand v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static inline Vector multiply_add(Vector acc, const E* group, Operand b) {
    return acc + b * *group;
  }
  // kTileN columns of one group of rows.
  static inline void load_rows(const E* x, int64_t, Operand out[2]) {
    out[0] = load(x);
    out[1] = load(x + kLanes<E>);
  }
};

#if defined(__AVX512BF16__) && !defined(LORA_ENGINE_TILES)
template <>
struct Thin<bf16> {
  using Vector = float_vector;
  using Operand = __m512i;
  static inline Operand load(const bf16* p) { return _mm512_loadu_si512(p); }
  static inline Vector multiply_add(Vector acc, const bf16* group, Operand b) {
    int32_t pair;
    std::memcpy(&pair, group, sizeof pair);
    return (Vector)_mm512_dpbf16_ps((__m512)acc, (__m512bh)b, (__m512bh)_mm512_set1_epi32(pair));
  }
  static inline void load_rows(const bf16* x, int64_t ld, Operand out[2]) {
    interleave(load(x), load(x + ld), out);
  }
};
#endif

// out [Rows, kVectors * kLanes] = x [Rows, k] p, packed with ldp ranks.
template <class E, int Rows, int kVectors>
inline void project_tile(int64_t k, const E* x, int64_t ldx, const E* p, int64_t ldp,
                         typename Dot<E>::Acc* out) {
  constexpr int kGroup = Dot<E>::kGroup;
  typename Dot<E>::Vector acc[Rows][kVectors] = {};
  for (int64_t line = 0; line < k; line += kLine<E>) {
    // Prefetches the next tile's rows while these are multiplied.
#pragma GCC unroll 24
    for (int i = 0; i < Rows; ++i) __builtin_prefetch(x + (i + Rows) * ldx + line);
    const int64_t end = line + kLine<E> < k ? line + kLine<E> : k;
    for (int64_t j = line; j < end; j += kGroup) {
      typename Thin<E>::Operand v[kVectors];
#pragma GCC unroll 2
      for (int n = 0; n < kVectors; ++n) v[n] = Thin<E>::load(p + j * ldp + n * kLanes<E> * kGroup);
#pragma GCC unroll 24
      for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
        for (int n = 0; n < kVectors; ++n)
          acc[i][n] = Thin<E>::multiply_add(acc[i][n], x + i * ldx + j, v[n]);
      }
    }
  }
  std::memcpy(out, acc, sizeof acc);
}

// project_tile for `rows` <= Rows.
template <class E, int Rows, int kVectors>
inline void project_rows(int64_t rows, int64_t k, const E* x, int64_t ldx, const E* p, int64_t ldp,
                         typename Dot<E>::Acc* out) {
  if constexpr (Rows > 0) {
    if (rows == Rows)
      project_tile<E, Rows, kVectors>(k, x, ldx, p, ldp, out);
    else
      project_rows<E, Rows - 1, kVectors>(rows, k, x, ldx, p, ldp, out);
  }
}

// out [rows, ranks] = x [rows, k] p, for up to kProjectRows<E> rows. k is in whole groups; p is
// packed with ldp ranks, whole vectors.
template <class E, class T>
inline void project(int64_t rows, int64_t k, int64_t ranks, const E* x, int64_t ldx, const E* p,
                    int64_t ldp, T* out, int64_t ldo) {
  typename Dot<E>::Acc sums[kProjectRows<E> * kLanes<E>];
  int64_t rank = 0;
  const auto tile = [&](int64_t row, int64_t count, auto vectors) {
    constexpr int kVectors = decltype(vectors)::value;
    constexpr int64_t kWidth = kVectors * kLanes<E>;
    project_rows<E, kProjectRows<E> / kVectors, kVectors>(count, k, x + row * ldx, ldx,
                                                          p + rank * Dot<E>::kGroup, ldp, sums);
    const int64_t stored = ranks - rank < kWidth ? ranks - rank : kWidth;
    for (int64_t i = 0; i < count; ++i)
      convert_row(stored, sums + i * kWidth, out + (row + i) * ldo + rank);
  };
  for (; rank + kLanes<E> < ranks; rank += kTileN<E>)
    for (int64_t row = 0; row < rows; row += kTileRows)
      tile(row, rows - row < kTileRows ? rows - row : kTileRows, Vectors<2>{});
  if (rank < ranks) tile(0, rows, Vectors<1>{});
}

// out [Ranks, kTileN] += s' x over `rows` rows.
template <class E, int Ranks>
inline void collect_tile(int64_t rows, const E* x, int64_t ldx, const E* s, int64_t lds,
                         typename Dot<E>::Acc* out) {
  constexpr int kGroup = Dot<E>::kGroup;
  typename Dot<E>::Vector acc[Ranks][2];
  std::memcpy(acc, out, sizeof acc);
  for (int64_t m = 0; m < rows; m += kGroup) {
    typename Thin<E>::Operand v[2];
    Thin<E>::load_rows(x + m * ldx, ldx, v);
    // Prefetches the same columns of the row block that comes next.
#pragma GCC unroll 2
    for (int i = 0; i < kGroup; ++i) {
      const E* next = x + (m + i + rows) * ldx;
      __builtin_prefetch(next);
      if (kTileN<E> > kLine<E>) __builtin_prefetch(next + kLine<E>);
    }
#pragma GCC unroll 12
    for (int r = 0; r < Ranks; ++r) {
      const E* group = s + m * lds + r * kGroup;
      acc[r][0] = Thin<E>::multiply_add(acc[r][0], group, v[0]);
      acc[r][1] = Thin<E>::multiply_add(acc[r][1], group, v[1]);
    }
  }
  std::memcpy(out, acc, sizeof acc);
}

// collect_tile for `ranks` <= Ranks.
template <class E, int Ranks>
inline void collect_ranks(int64_t ranks, int64_t rows, const E* x, int64_t ldx, const E* s,
                          int64_t lds, typename Dot<E>::Acc* out) {
  if constexpr (Ranks > 0) {
    if (ranks == Ranks)
      collect_tile<E, Ranks>(rows, x, ldx, s, lds, out);
    else
      collect_ranks<E, Ranks - 1>(ranks, rows, x, ldx, s, lds, out);
  }
}

// out [ranks, kTileN] += s' x over `rows` rows, in whole groups; s is packed with lds ranks.
template <class E>
inline void collect(int64_t rows, int64_t ranks, const E* x, int64_t ldx, const E* s, int64_t lds,
                    typename Dot<E>::Acc* out) {
  const int64_t tiles = (ranks + kTileRows - 1) / kTileRows;
  // Tiles of even size: in a tile of one rank each multiply-add would wait for the one before.
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t rank = ranks * t / tiles, end = ranks * (t + 1) / tiles;
    collect_ranks<E, kTileRows>(end - rank, rows, x, ldx, s + rank * Dot<E>::kGroup, lds,
                                out + rank * kTileN<E>);
  }
}

}  // namespace
}  // namespace lora_engine
