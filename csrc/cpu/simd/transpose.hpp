// Transposition of small matrices in cache, in tiles of 8 x 8 in registers for 4-byte elements.
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

// dst [cols, rows] = transpose of src [rows, cols], of any element that is copied bit by bit.
template <class X>
inline void transpose(int64_t rows, int64_t cols, const X* src, int64_t src_ld, X* dst,
                      int64_t dst_ld) {
  constexpr bool kWords = sizeof(X) == sizeof(uint32_t);
  const int64_t whole_rows = kWords ? rows / 8 * 8 : 0, whole_cols = kWords ? cols / 8 * 8 : 0;
  if constexpr (kWords) {
    for (int64_t i = 0; i < whole_rows; i += 8)
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
