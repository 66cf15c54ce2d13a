// The small matrix product that attention is made of: C [m, n] (+)= A [m, k] * B [k, n], all in
// cache, C in the arithmetic type.
//
// A is row-major; its elements are broadcast. B is packed in groups of kGroup rows: element
// (k, n) stands at (k / kGroup) * kGroup * ldb + n * kGroup + k % kGroup, so that one vector holds
// whole groups and one multiply-add takes it with a broadcast group of A. float32 and float64 have
// groups of one; bfloat16 has pairs, which AVX512-BF16's dot product takes. A and B are padded
// with zeros to a whole group in k, and n is a multiple of kTileN. On a matrix unit, which takes
// the same pairs, the caller has a MatrixUnit in scope.
#pragma once

#include "../simd/interleave.hpp"
#include "../simd/numeric.hpp"
#include "../simd/tiles.hpp"
#include "../simd/transpose.hpp"
#include "unit_gemm.hpp"
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif
// bfloat16 is multiplied in pairs, not as float32.
#if defined(__AVX512BF16__) || defined(LORA_ENGINE_TILES)
#define LORA_ENGINE_PAIRS
#endif

namespace lora_engine {
namespace {

#ifdef __AVX512F__
constexpr int kVectorBytes = 64;
constexpr int kTileRows = 12;  // 12 x 2 accumulators of the 32 registers
#else
constexpr int kVectorBytes = 32;
constexpr int kTileRows = 6;  // 6 x 2 of the 16
#endif

typedef float float_vector __attribute__((vector_size(kVectorBytes)));
typedef double double_vector __attribute__((vector_size(kVectorBytes)));

// How a multiply-add is done for element type E.
template <class E>
struct Dot;

template <>
struct Dot<float> {
  using Acc = float;
  using Vector = float_vector;
  static constexpr int kGroup = 1;
  static inline Vector multiply_add(Vector acc, const float* a, const float* b) {
    Vector v;
    std::memcpy(&v, b, sizeof v);
    return acc + v * *a;
  }
};

template <>
struct Dot<double> {
  using Acc = double;
  using Vector = double_vector;
  static constexpr int kGroup = 1;
  static inline Vector multiply_add(Vector acc, const double* a, const double* b) {
    Vector v;
    std::memcpy(&v, b, sizeof v);
    return acc + v * *a;
  }
};

#ifdef LORA_ENGINE_PAIRS
template <>
struct Dot<bf16> {
  using Acc = float;
  using Vector = float_vector;
  static constexpr int kGroup = 2;
#ifdef __AVX512BF16__
  static inline Vector multiply_add(Vector acc, const bf16* a, const bf16* b) {
    int32_t pair;
    std::memcpy(&pair, a, sizeof pair);
    const __m512i v = _mm512_loadu_si512(b);
    return (Vector)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)v);
  }
#endif
};
#endif

// The type elements of T are multiplied as: bfloat16 as float32 where it has no dot product.
template <class T>
struct Element {
  using type = T;
};
#ifndef LORA_ENGINE_PAIRS
template <>
struct Element<bf16> {
  using type = float;
};
#endif

// Whether elements are multiplied on a matrix unit.
template <class E>
constexpr bool kOnUnit = false;
template <class E>
constexpr int64_t kTileN = 2 * kVectorBytes / sizeof(typename Dot<E>::Acc);
#ifdef LORA_ENGINE_TILES
template <>
constexpr bool kOnUnit<bf16> = true;
template <>
constexpr int64_t kTileN<bf16> = kUnitBlock;
#endif

inline int64_t round_up(int64_t x, int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

template <class E, int Rows>
inline void tile(int64_t k, const E* a, int64_t lda, const E* b, int64_t ldb,
                 typename Dot<E>::Acc* c, int64_t ldc, bool accumulate) {
  using D = Dot<E>;
  constexpr int64_t kHalf = kTileN<E> / 2;
  typename D::Vector acc[Rows][2];
#pragma GCC unroll 12
  for (int i = 0; i < Rows; ++i) {
    if (accumulate) {
      std::memcpy(&acc[i][0], c + i * ldc, kVectorBytes);
      std::memcpy(&acc[i][1], c + i * ldc + kHalf, kVectorBytes);
    } else {
      acc[i][0] = acc[i][1] = typename D::Vector{};
    }
  }
  for (int64_t p = 0; p < k; p += D::kGroup) {
    const E* row = b + p * ldb;
#pragma GCC unroll 12
    for (int i = 0; i < Rows; ++i) {
      acc[i][0] = D::multiply_add(acc[i][0], a + i * lda + p, row);
      acc[i][1] = D::multiply_add(acc[i][1], a + i * lda + p, row + kHalf * D::kGroup);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < Rows; ++i) {
    std::memcpy(c + i * ldc, &acc[i][0], kVectorBytes);
    std::memcpy(c + i * ldc + kHalf, &acc[i][1], kVectorBytes);
  }
}

template <class E, int Rows>
inline void last_rows(int64_t rows, int64_t k, const E* a, int64_t lda, const E* b, int64_t ldb,
                      typename Dot<E>::Acc* c, int64_t ldc, bool accumulate) {
  if constexpr (Rows > 0) {
    if (rows == Rows)
      tile<E, Rows>(k, a, lda, b, ldb, c, ldc, accumulate);
    else
      last_rows<E, Rows - 1>(rows, k, a, lda, b, ldb, c, ldc, accumulate);
  }
}

template <class E>
void tile_gemm(int64_t m, int64_t n, int64_t k, const E* a, int64_t lda, const E* b, int64_t ldb,
               typename Dot<E>::Acc* c, int64_t ldc, bool accumulate) {
  if constexpr (kOnUnit<E>) {
    unit_gemm(m, n, k, a, lda, b, ldb, c, ldc, accumulate);
  } else {
    for (int64_t j = 0; j < n; j += kTileN<E>) {
      const E* columns = b + j * Dot<E>::kGroup;
      int64_t i = 0;
      for (; i + kTileRows <= m; i += kTileRows)
        tile<E, kTileRows>(k, a + i * lda, lda, columns, ldb, c + i * ldc + j, ldc, accumulate);
      last_rows<E, kTileRows - 1>(m - i, k, a + i * lda, lda, columns, ldb, c + i * ldc + j, ldc,
                                  accumulate);
    }
  }
}

// dst = src as elements to multiply; nothing but a copy where the types are the same.
template <class S, class E>
inline void convert_row(int64_t n, const S* src, E* dst) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) dst[i] = store<E>(load(src[i]));
}
template <class E>
inline void convert_row(int64_t n, const E* src, E* dst) {
  std::memcpy(dst, src, sizeof(E) * n);
}

// dst = pairs of the two rows' elements.
template <class S, class E>
inline void interleave_rows(int64_t n, const S* even, const S* odd, E* dst) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    dst[2 * i] = store<E>(load(even[i]));
    dst[2 * i + 1] = store<E>(load(odd[i]));
  }
}
template <class E>
inline void interleave_rows(int64_t n, const E* even, const E* odd, E* dst) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    dst[2 * i] = even[i];
    dst[2 * i + 1] = odd[i];
  }
}

#ifdef __AVX512BF16__
inline void interleave_rows(int64_t n, const bf16* even, const bf16* odd, bf16* dst) {
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    __m512i pairs[2];
    interleave(_mm512_loadu_si512(even + i), _mm512_loadu_si512(odd + i), pairs);
    _mm512_storeu_si512(dst + 2 * i, pairs[0]);
    _mm512_storeu_si512(dst + 2 * i + 32, pairs[1]);
  }
  for (; i < n; ++i) {
    dst[2 * i] = even[i];
    dst[2 * i + 1] = odd[i];
  }
}
inline void convert_row(int64_t n, const float* src, bf16* dst) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m256bh half = _mm512_cvtneps_pbh(_mm512_loadu_ps(src + i));
    std::memcpy(dst + i, &half, sizeof half);
  }
  for (; i < n; ++i) dst[i] = to_bf16(src[i]);
}
inline void interleave_rows(int64_t n, const float* even, const float* odd, bf16* dst) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    _mm512_storeu_si512(dst + 2 * i, interleave_rounded(even + i, odd + i));
  for (; i < n; ++i) {
    dst[2 * i] = to_bf16(even[i]);
    dst[2 * i + 1] = to_bf16(odd[i]);
  }
}
#endif

// Packs row-major src [k, n] (rows ld apart) as B; rows from k to the next whole group become 0.
template <class E, class S>
inline void pack_rows(int64_t k, int64_t n, const S* src, int64_t ld, E* packed, int64_t ldb) {
  constexpr int kGroup = Dot<E>::kGroup;
  for (int64_t p = 0; p < k; p += kGroup) {
    E* out = packed + p * ldb;
    if (kGroup == 1) {
      convert_row(n, src + p * ld, out);
    } else if (p + 1 < k) {
      interleave_rows(n, src + p * ld, src + (p + 1) * ld, out);
    } else {
      for (int64_t j = 0; j < n; ++j) {
        out[2 * j] = store<E>(load(src[p * ld + j]));
        out[2 * j + 1] = E{};
      }
    }
  }
}

// A whole group of elements, moved as one.
template <class E>
struct GroupWord {
  E elements[Dot<E>::kGroup];
};

// Packs the transpose of row-major src [n, k] (rows ld apart) as B; k and ld are whole groups.
template <class E>
inline void pack_transposed(int64_t k, int64_t n, const E* src, int64_t ld, E* packed,
                            int64_t ldb) {
  using Word = GroupWord<E>;
  constexpr int kGroup = Dot<E>::kGroup;
  transpose(n, k / kGroup, reinterpret_cast<const Word*>(src), ld / kGroup,
            reinterpret_cast<Word*>(packed), ldb);
}

}  // namespace
}  // namespace lora_engine
