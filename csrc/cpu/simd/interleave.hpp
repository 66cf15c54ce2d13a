// Pairs of bfloat16 of two rows, by instructions that the compiler does not know.
#pragma once

#ifdef __AVX512BF16__
#include <immintrin.h>

#include <cstdint>

namespace lora_engine {
namespace {

// 16 values of each row, rounded: those of `even` as the even elements, those of `odd` as the odd.
inline __m512i interleave_rounded(const float* even, const float* odd) {
  alignas(64) static constexpr uint16_t kOrder[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                      21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                      11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512bh halves = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(odd), _mm512_loadu_ps(even));
  return _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), (__m512i)halves);
}

// The pairs of 32 elements of two rows: of their first 16 elements, then of their last.
inline void interleave(__m512i even, __m512i odd, __m512i out[2]) {
  alignas(64) static constexpr uint16_t kLow[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                    37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                    11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  alignas(64) static constexpr uint16_t kHigh[32] = {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21,
                                                     53, 22, 54, 23, 55, 24, 56, 25, 57, 26, 58,
                                                     27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
  out[0] = _mm512_permutex2var_epi16(even, _mm512_load_si512(kLow), odd);
  out[1] = _mm512_permutex2var_epi16(even, _mm512_load_si512(kHigh), odd);
}

}  // namespace
}  // namespace lora_engine
#endif
