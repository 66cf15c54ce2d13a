// The products of thin_gemm.hpp for bfloat16 on a matrix unit: what is packed otherwise, and
// `project` and `collect`. The caller has a MatrixUnit in scope.
#pragma once

#include "../simd/interleave.hpp"
#include "unit_gemm.hpp"

#ifdef LORA_ENGINE_TILES

namespace lora_engine {
namespace {

constexpr int64_t kCollectRows = 256;  // of X in pairs at a time: 16 KiB

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
      for (int64_t r = 0; r < stored; ++r)
        out[i * ldo + rank + r] = store<T>(sums[i * kUnitBlock + r]);
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

// out [ranks, 32] += s' x over an even number of rows. s is packed by `pack_columns`; out has room
// for ranks in whole tiles.
inline void collect(int64_t rows, int64_t ranks, const bf16* x, int64_t ldx, const bf16* s,
                    int64_t lds, float* out) {
  alignas(64) bf16 pairs[kCollectRows / 2][2 * kUnitRows * 2];
  const auto place = [&](int64_t m) {  // of row m's pair: of its first 16 columns
    return pairs[0] + m / kUnitDepth * 2 * kUnitRows * kUnitDepth + m % kUnitDepth / 2 * kUnitDepth;
  };
  for (int64_t first = 0; first < rows; first += kCollectRows) {
    const int64_t count = rows - first < kCollectRows ? rows - first : kCollectRows;
    const int64_t steps = (count + kUnitDepth - 1) / kUnitDepth;
    if (count % kUnitDepth)
      std::memset(place((steps - 1) * kUnitDepth), 0, 2 * sizeof(bf16) * kUnitRows * kUnitDepth);
    for (int64_t m = 0; m < count; m += 2) {
      const bf16* row = x + (first + m) * ldx;
      interleave(row, row + ldx, place(m), place(m) + kUnitRows * kUnitDepth);
    }
    for (int64_t rank = 0; rank < ranks; rank += kUnitBlock) {
      const bf16* tiles = s + first * lds + rank * kUnitDepth;
      if (ranks - rank > kUnitRows)
        collect_block<2>(steps, pairs[0], tiles, kUnitDepth * lds, out + rank * kUnitBlock);
      else
        collect_block<1>(steps, pairs[0], tiles, kUnitDepth * lds, out + rank * kUnitBlock);
    }
  }
}

}  // namespace
}  // namespace lora_engine
#endif
