// Rounding to bfloat16 in pairs, by an instruction that the compiler does not know.
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

}  // namespace
}  // namespace lora_engine
#endif
