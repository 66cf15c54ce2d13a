// The products of tile_gemm.hpp and thin_gemm.hpp for bfloat16 on a matrix unit (simd/tiles.hpp).
//
// Tiles 0 to 3 hold sums, 4 and 5 the left operand, 6 and 7 the right one. Where an operand ends
// within a tile, its rest is copied to a whole one with zeros: NaN beyond an operand stays out.
#pragma once

#include "../simd/tiles.hpp"
#ifdef __AVX512BW__
#include <immintrin.h>
#endif

#ifdef LORA_ENGINE_TILES

namespace lora_engine {
namespace {

constexpr int64_t kUnitBlock = 2 * kUnitRows;  // rows and columns of a block of four sums

// A tile of a left operand that has `rows` rows of `depth` elements at `a`.
template <int kTile>
inline void load_left(const bf16* a, int64_t lda, int64_t rows, int64_t depth) {
  if (rows >= kUnitRows && depth >= kUnitDepth) {
    tile_load<kTile>(a, lda * static_cast<int64_t>(sizeof(bf16)));
    return;
  }
  alignas(64) bf16 whole[kUnitRows][kUnitDepth];
  for (int64_t i = 0; i < kUnitRows; ++i) {
    const int64_t filled = i >= rows ? 0 : depth < kUnitDepth ? depth : kUnitDepth;
#ifdef __AVX512BW__
    const __mmask32 mask = static_cast<__mmask32>((uint64_t{1} << filled) - 1);
    _mm512_store_si512(whole[i], _mm512_maskz_loadu_epi16(mask, a + i * lda));
#else
    std::memset(whole[i], 0, sizeof whole[i]);
    std::memcpy(whole[i], a + i * lda, sizeof(bf16) * filled);
#endif
  }
  tile_load<kTile>(whole, kUnitBytes);
}

// A tile of a right operand that has `depth` rows, packed in pairs, at `b`.
template <int kTile>
inline void load_right(const bf16* b, int64_t ldb, int64_t depth) {
  if (depth >= kUnitDepth) {
    tile_load<kTile>(b, 2 * ldb * static_cast<int64_t>(sizeof(bf16)));
    return;
  }
  alignas(64) bf16 whole[kUnitRows][kUnitDepth];
  for (int64_t pair = 0; pair < kUnitRows; ++pair) {
    if (2 * pair < depth)
      std::memcpy(whole[pair], b + 2 * pair * ldb, kUnitBytes);
    else
      std::memset(whole[pair], 0, kUnitBytes);
  }
  tile_load<kTile>(whole, kUnitBytes);
}

// One step of the inner size: kDown x kAcross tiles of sums.
template <int kDown, int kAcross>
inline void multiply_step(const bf16* a, int64_t lda, const bf16* b, int64_t ldb, int64_t rows,
                          int64_t depth) {
  load_left<4>(a, lda, rows, depth);
  load_right<6>(b, ldb, depth);
  tile_multiply_add<0, 4, 6>();
  if constexpr (kAcross > 1) {
    load_right<7>(b + kUnitDepth, ldb, depth);
    tile_multiply_add<1, 4, 7>();
  }
  if constexpr (kDown > 1) {
    load_left<5>(a + kUnitRows * lda, lda, rows - kUnitRows, depth);
    tile_multiply_add<2, 5, 6>();
    if constexpr (kAcross > 1) tile_multiply_add<3, 5, 7>();
  }
}

template <int kDown, int kAcross>
inline void load_sums(const float* c, int64_t ldc) {
  const int64_t stride = ldc * static_cast<int64_t>(sizeof(float));
  tile_load<0>(c, stride);
  if constexpr (kAcross > 1) tile_load<1>(c + kUnitRows, stride);
  if constexpr (kDown > 1) tile_load<2>(c + kUnitRows * ldc, stride);
  if constexpr (kDown > 1 && kAcross > 1) tile_load<3>(c + kUnitRows * (ldc + 1), stride);
}

template <int kDown, int kAcross>
inline void store_sums(float* c, int64_t ldc) {
  const int64_t stride = ldc * static_cast<int64_t>(sizeof(float));
  tile_store<0>(c, stride);
  if constexpr (kAcross > 1) tile_store<1>(c + kUnitRows, stride);
  if constexpr (kDown > 1) tile_store<2>(c + kUnitRows * ldc, stride);
  if constexpr (kDown > 1 && kAcross > 1) tile_store<3>(c + kUnitRows * (ldc + 1), stride);
}

inline void zero_sums() {
  tile_zero<0>();
  tile_zero<1>();
  tile_zero<2>();
  tile_zero<3>();
}

// The sums += a [rows, k] b [k, 16 kAcross], for more than 16 (kDown - 1) rows.
template <int kDown, int kAcross>
inline void multiply_block(int64_t rows, int64_t k, const bf16* a, int64_t lda, const bf16* b,
                           int64_t ldb) {
  int64_t p = 0;
  if (rows >= kDown * kUnitRows)
    for (; p + kUnitDepth <= k; p += kUnitDepth)
      multiply_step<kDown, kAcross>(a + p, lda, b + p * ldb, ldb, kUnitBlock, kUnitDepth);
  for (; p < k; p += kUnitDepth)
    multiply_step<kDown, kAcross>(a + p, lda, b + p * ldb, ldb, rows, k - p);
}

// c [rows, 32] (+)= a b, as tile_gemm.
template <int kDown>
inline void unit_block(int64_t rows, int64_t k, const bf16* a, int64_t lda, const bf16* b,
                       int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  alignas(64) float whole[kDown * kUnitRows][kUnitBlock];
  const bool in_place = rows == kDown * kUnitRows;
  float* sums = in_place ? c : whole[0];
  const int64_t ld = in_place ? ldc : kUnitBlock;
  if (accumulate) {
    for (int64_t i = 0; i < rows && !in_place; ++i)
      std::memcpy(whole[i], c + i * ldc, sizeof whole[i]);
    load_sums<kDown, 2>(sums, ld);
  } else {
    zero_sums();
  }
  multiply_block<kDown, 2>(rows, k, a, lda, b, ldb);
  store_sums<kDown, 2>(sums, ld);
  for (int64_t i = 0; i < rows && !in_place; ++i)
    std::memcpy(c + i * ldc, whole[i], sizeof whole[i]);
}

// sums [rows, 32] (+)= a [rows, whole] b, and a tail [32, 32] of a's further columns or null, for
// up to 32 rows; `sums` has room for 32. b is packed with 32 columns, whole tiles.
inline void unit_strip(int64_t rows, int64_t whole, const bf16* a, int64_t lda, const bf16* tail,
                       const bf16* b, float* sums, bool accumulate) {
  if (accumulate)
    load_sums<2, 2>(sums, kUnitBlock);
  else
    zero_sums();
  const bf16* last = b + whole * kUnitBlock;
  if (rows > kUnitRows) {
    multiply_block<2, 2>(rows, whole, a, lda, b, kUnitBlock);
    if (tail) multiply_step<2, 2>(tail, kUnitDepth, last, kUnitBlock, kUnitBlock, kUnitDepth);
  } else {
    multiply_block<1, 2>(rows, whole, a, lda, b, kUnitBlock);
    if (tail) multiply_step<1, 2>(tail, kUnitDepth, last, kUnitBlock, kUnitBlock, kUnitDepth);
  }
  store_sums<2, 2>(sums, kUnitBlock);
}

// C [m, n] (+)= A [m, k] B [k, n]; see tile_gemm.hpp. n is a multiple of 32, k is even.
inline void unit_gemm(int64_t m, int64_t n, int64_t k, const bf16* a, int64_t lda, const bf16* b,
                      int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  for (int64_t j = 0; j < n; j += kUnitBlock) {
    const bf16* columns = b + 2 * j;
    int64_t i = 0;
    for (; i + kUnitRows < m; i += kUnitBlock)
      unit_block<2>(m - i < kUnitBlock ? m - i : kUnitBlock, k, a + i * lda, lda, columns, ldb,
                    c + i * ldc + j, ldc, accumulate);
    if (i < m)
      unit_block<1>(m - i, k, a + i * lda, lda, columns, ldb, c + i * ldc + j, ldc, accumulate);
  }
}

}  // namespace
}  // namespace lora_engine
#endif
