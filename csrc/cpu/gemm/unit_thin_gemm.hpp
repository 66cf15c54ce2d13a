// The products of thin_gemm.hpp for bfloat16 on a matrix unit: what is packed otherwise, and
// `project` and `collect`. The caller has a MatrixUnit in scope.
#pragma once

#include "../simd/interleave.hpp"
#include "unit_gemm.hpp"

#ifdef LORA_ENGINE_TILES

namespace lora_engine {
namespace {

constexpr int64_t kCollectRows = 128;  // of X in pairs at a time
constexpr int64_t kCollectStrips = 4;  // of 32 columns: a row's lines follow each other in memory

// The pairs of 32 elements of two rows, as two rows of right operands.
inline void interleave(const bf16* even, const bf16* odd, bf16* first, bf16* last) {
#ifdef __AVX512BF16__
  __m512i pairs[2];
  interleave(_mm512_loadu_si512(even), _mm512_loadu_si512(odd), pairs);
  _mm512_store_si512(first, pairs[0]);
  _mm512_store_si512(last, pairs[1]);
#else
  for (int64_t i = 0; i < kUnitRows; ++i) {
    first[2 * i] = even[i];
    first[2 * i + 1] = odd[i];
    last[2 * i] = even[kUnitRows + i];
    last[2 * i + 1] = odd[kUnitRows + i];
  }
#endif
}

// Sums [rows, 16 kAcross] of one tile of X's rows; the next tile's are fetched meanwhile.
template <int kDown, int kAcross>
inline void project_block(int64_t rows, int64_t k, const bf16* x, int64_t ldx, const bf16* p,
                          int64_t ldp, float* sums) {
  zero_sums();
  for (int64_t j = 0; j < k; j += kUnitDepth) {
    for (int64_t i = 0; i < kDown * kUnitRows; ++i)
      __builtin_prefetch(x + (i + kUnitBlock) * ldx + j, 0, 2);
    multiply_step<kDown, kAcross>(x + j, ldx, p + j * ldp, ldp, rows, k - j);
  }
  store_sums<kDown, kAcross>(sums, kUnitBlock);
}

// out [rows, ranks] = x [rows, k] p, for up to 32 rows; p is packed in pairs with ldp ranks.
template <class T>
inline void project(int64_t rows, int64_t k, int64_t ranks, const bf16* x, int64_t ldx,
                    const bf16* p, int64_t ldp, T* out, int64_t ldo) {
  alignas(64) float sums[kUnitBlock * kUnitBlock];
  for (int64_t rank = 0; rank < ranks; rank += kUnitBlock) {
    const bf16* columns = p + 2 * rank;
    const bool two_down = rows > kUnitRows, two_across = ranks - rank > kUnitRows;
    if (two_down && two_across)
      project_block<2, 2>(rows, k, x, ldx, columns, ldp, sums);
    else if (two_down)
      project_block<2, 1>(rows, k, x, ldx, columns, ldp, sums);
    else if (two_across)
      project_block<1, 2>(rows, k, x, ldx, columns, ldp, sums);
    else
      project_block<1, 1>(rows, k, x, ldx, columns, ldp, sums);
    const int64_t stored = ranks - rank < kUnitBlock ? ranks - rank : kUnitBlock;
    for (int64_t i = 0; i < rows; ++i)
      convert_row(stored, sums + i * kUnitBlock, out + i * ldo + rank);
  }
}

// out [16 kDown, 32] += s' x, for `steps` times 32 rows in pairs. A tile of s' follows the one of
// 16 ranks before it; those of the next 32 rows are `ld` elements further.
template <int kDown>
inline void collect_block(int64_t steps, const bf16* pairs, const bf16* s, int64_t ld, float* out) {
  constexpr int64_t kTile = kUnitRows * kUnitDepth;
  load_sums<kDown, 2>(out, kUnitBlock);
  for (int64_t i = 0; i < steps; ++i) {
    tile_load<6>(pairs + 2 * i * kTile, kUnitBytes);
    tile_load<7>(pairs + (2 * i + 1) * kTile, kUnitBytes);
    tile_load<4>(s + i * ld, kUnitBytes);
    tile_multiply_add<0, 4, 6>();
    tile_multiply_add<1, 4, 7>();
    if constexpr (kDown > 1) {
      tile_load<5>(s + i * ld + kTile, kUnitBytes);
      tile_multiply_add<2, 5, 6>();
      tile_multiply_add<3, 5, 7>();
    }
  }
  store_sums<kDown, 2>(out, kUnitBlock);
}

// out [ranks, 32] += s' x over an even number of rows, for up to kCollectStrips strips of 32
// columns: their sums are `next` elements apart. s is packed by `pack_columns`; out has room for
// ranks in whole tiles.
inline void collect_strips(int64_t strips, int64_t rows, int64_t ranks, const bf16* x, int64_t ldx,
                           const bf16* s, int64_t lds, float* out, int64_t next) {
  constexpr int64_t kTile = kUnitRows * kUnitDepth;
  alignas(64) bf16 pairs[kCollectStrips][2 * kCollectRows * kUnitRows];
  const auto place = [&](int64_t strip, int64_t m) {  // of row m's pair: of its first 16 columns
    return pairs[strip] + m / kUnitDepth * 2 * kTile + m % kUnitDepth / 2 * kUnitDepth;
  };
  for (int64_t first = 0; first < rows; first += kCollectRows) {
    const int64_t count = rows - first < kCollectRows ? rows - first : kCollectRows;
    const int64_t steps = (count + kUnitDepth - 1) / kUnitDepth;
    for (int64_t strip = 0; strip < strips && count % kUnitDepth; ++strip)
      std::memset(place(strip, (steps - 1) * kUnitDepth), 0, 2 * sizeof(bf16) * kTile);
    for (int64_t m = 0; m < count; m += 2) {
      const bf16* row = x + (first + m) * ldx;
      for (int64_t strip = 0; strip < strips; ++strip, row += 2 * kUnitRows)
        interleave(row, row + ldx, place(strip, m), place(strip, m) + kTile);
    }
    for (int64_t strip = 0; strip < strips; ++strip)
      for (int64_t rank = 0; rank < ranks; rank += kUnitBlock) {
        const bf16* tiles = s + first * lds + rank * kUnitDepth;
        float* sums = out + strip * next + rank * kUnitBlock;
        if (ranks - rank > kUnitRows)
          collect_block<2>(steps, pairs[strip], tiles, kUnitDepth * lds, sums);
        else
          collect_block<1>(steps, pairs[strip], tiles, kUnitDepth * lds, sums);
      }
  }
}

// The same for one strip.
inline void collect(int64_t rows, int64_t ranks, const bf16* x, int64_t ldx, const bf16* s,
                    int64_t lds, float* out) {
  collect_strips(1, rows, ranks, x, ldx, s, lds, out, 0);
}

}  // namespace
}  // namespace lora_engine
#endif
