// Transposition of small matrices in cache, for 4-byte elements in tiles of 8 x 8, or 16 x 16,
// in registers.
#pragma once

#include <cstdint>
#include <cstring>

namespace lora_engine {
namespace {

typedef uint32_t eight_words __attribute__((vector_size(32)));

inline eight_words interleave_low(eight_words a, eight_words b) {
  return __builtin_shuffle(a, b, (eight_words){0, 8, 1, 9, 4, 12, 5, 13});
}
inline eight_words interleave_high(eight_words a, eight_words b) {
  return __builtin_shuffle(a, b, (eight_words){2, 10, 3, 11, 6, 14, 7, 15});
}
inline eight_words low_pairs(eight_words a, eight_words b) {
  return __builtin_shuffle(a, b, (eight_words){0, 1, 8, 9, 4, 5, 12, 13});
}
inline eight_words high_pairs(eight_words a, eight_words b) {
  return __builtin_shuffle(a, b, (eight_words){2, 3, 10, 11, 6, 7, 14, 15});
}
inline eight_words low_halves(eight_words a, eight_words b) {
  return __builtin_shuffle(a, b, (eight_words){0, 1, 2, 3, 8, 9, 10, 11});
}
inline eight_words high_halves(eight_words a, eight_words b) {
  return __builtin_shuffle(a, b, (eight_words){4, 5, 6, 7, 12, 13, 14, 15});
}

// dst[j][i] = src[i][j] for 8 x 8 words, rows src_ld and dst_ld words apart.
inline void transpose_tile(const uint32_t* src, int64_t src_ld, uint32_t* dst, int64_t dst_ld) {
  eight_words r[8], s[8];
  for (int i = 0; i < 8; ++i) std::memcpy(&r[i], src + i * src_ld, sizeof r[i]);
  for (int i = 0; i < 8; i += 2) {
    s[i] = interleave_low(r[i], r[i + 1]);
    s[i + 1] = interleave_high(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = low_pairs(s[i], s[i + 2]);
    r[i + 1] = high_pairs(s[i], s[i + 2]);
    r[i + 2] = low_pairs(s[i + 1], s[i + 3]);
    r[i + 3] = high_pairs(s[i + 1], s[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    const eight_words low = low_halves(r[i], r[i + 4]);
    const eight_words high = high_halves(r[i], r[i + 4]);
    std::memcpy(dst + i * dst_ld, &low, sizeof low);
    std::memcpy(dst + (i + 4) * dst_ld, &high, sizeof high);
  }
}

#ifdef __AVX512F__
typedef uint32_t sixteen_words __attribute__((vector_size(64)));

// dst[j][i] = src[i][j] for 16 x 16 words: within 128-bit lanes as 4 x 4, then lane by lane.
inline void transpose_large_tile(const uint32_t* src, int64_t src_ld, uint32_t* dst,
                                 int64_t dst_ld) {
  sixteen_words r[16], s[16];
  for (int i = 0; i < 16; ++i) std::memcpy(&r[i], src + i * src_ld, sizeof r[i]);
  const sixteen_words low = {0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29};
  const sixteen_words low_pairs = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29};
  for (int i = 0; i < 16; i += 2) {
    s[i] = __builtin_shuffle(r[i], r[i + 1], low);
    s[i + 1] = __builtin_shuffle(r[i], r[i + 1], low + 2);
  }
  // Row 4 i + j: column j of each lane, of rows 4 i to 4 i + 3.
  for (int i = 0; i < 16; i += 4) {
    r[i] = __builtin_shuffle(s[i], s[i + 2], low_pairs);
    r[i + 1] = __builtin_shuffle(s[i], s[i + 2], low_pairs + 2);
    r[i + 2] = __builtin_shuffle(s[i + 1], s[i + 3], low_pairs);
    r[i + 3] = __builtin_shuffle(s[i + 1], s[i + 3], low_pairs + 2);
  }
  const sixteen_words even_lanes = {0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27};
  for (int j = 0; j < 4; ++j) {
    const sixteen_words upper_even = __builtin_shuffle(r[j], r[4 + j], even_lanes);
    const sixteen_words upper_odd = __builtin_shuffle(r[j], r[4 + j], even_lanes + 4);
    const sixteen_words lower_even = __builtin_shuffle(r[8 + j], r[12 + j], even_lanes);
    const sixteen_words lower_odd = __builtin_shuffle(r[8 + j], r[12 + j], even_lanes + 4);
    const sixteen_words columns[4] = {
        __builtin_shuffle(upper_even, lower_even, even_lanes),
        __builtin_shuffle(upper_odd, lower_odd, even_lanes),
        __builtin_shuffle(upper_even, lower_even, even_lanes + 4),
        __builtin_shuffle(upper_odd, lower_odd, even_lanes + 4),
    };
    for (int lane = 0; lane < 4; ++lane)
      std::memcpy(dst + (4 * lane + j) * dst_ld, &columns[lane], sizeof columns[lane]);
  }
}
#endif

// dst [cols, rows] = transpose of src [rows, cols], of any element that is copied bit by bit.
template <class X>
inline void transpose(int64_t rows, int64_t cols, const X* src, int64_t src_ld, X* dst,
                      int64_t dst_ld) {
  constexpr bool kWords = sizeof(X) == sizeof(uint32_t);
  const int64_t whole_rows = kWords ? rows / 8 * 8 : 0, whole_cols = kWords ? cols / 8 * 8 : 0;
  if constexpr (kWords) {
    int64_t i = 0;
#ifdef __AVX512F__
    for (; i + 16 <= rows; i += 16) {
      int64_t j = 0;
      for (; j + 16 <= cols; j += 16)
        transpose_large_tile(reinterpret_cast<const uint32_t*>(src + i * src_ld + j), src_ld,
                             reinterpret_cast<uint32_t*>(dst + j * dst_ld + i), dst_ld);
      if (j < whole_cols) {
        for (int64_t half = i; half < i + 16; half += 8)
          transpose_tile(reinterpret_cast<const uint32_t*>(src + half * src_ld + j), src_ld,
                         reinterpret_cast<uint32_t*>(dst + j * dst_ld + half), dst_ld);
      }
    }
#endif
    for (; i < whole_rows; i += 8)
      for (int64_t j = 0; j < whole_cols; j += 8)
        transpose_tile(reinterpret_cast<const uint32_t*>(src + i * src_ld + j), src_ld,
                       reinterpret_cast<uint32_t*>(dst + j * dst_ld + i), dst_ld);
  }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = i < whole_rows ? whole_cols : 0; j < cols; ++j)
      dst[j * dst_ld + i] = src[i * src_ld + j];
}

}  // namespace
}  // namespace lora_engine
