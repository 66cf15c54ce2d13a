// Stores past the caches, for results larger than they are.
//
// An ordinary store reads the line first that it will overwrite. A result that is out of the cache
// before anybody reads it need not have been there: storing past the cache saves that read.
#pragma once

#include <cstdint>
#include <cstring>
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace lora_engine {
namespace {

constexpr int64_t kLine = 64;  // bytes

// Whether `rows` rows of `row_bytes` at y, `stride_bytes` apart, are to be stored past the caches:
// whole lines at aligned places, and as much as a last-level cache holds.
inline bool worth_streaming(const void* y, int64_t rows, int64_t row_bytes, int64_t stride_bytes) {
#ifdef __AVX2__
  constexpr int64_t kLeastBytes = int64_t{32} << 20;
  const bool aligned = reinterpret_cast<uintptr_t>(y) % kLine == 0 && stride_bytes % kLine == 0;
  return aligned && rows * row_bytes >= kLeastBytes;
#else
  return (void)y, (void)rows, (void)row_bytes, (void)stride_bytes, false;
#endif
}

#ifdef __AVX512F__
constexpr int64_t kRegisterBytes = 64;
#else
constexpr int64_t kRegisterBytes = 32;
#endif

// A register's worth of anything, anywhere.
typedef char Register __attribute__((vector_size(kRegisterBytes), aligned(1), may_alias));

// Copies whole registers; with `stream` past the caches, and dst is then aligned to a line. Not by
// memcpy, which compilers make two copies of half the size or a call.
template <int64_t kBytes>
inline void copy_registers(void* dst, const void* src, bool stream) {
  static_assert(kBytes % kRegisterBytes == 0, "whole registers");
  for (int64_t i = 0; i < kBytes / kRegisterBytes; ++i) {
    Register* to = static_cast<Register*>(dst) + i;
    const Register* from = static_cast<const Register*>(src) + i;
#if defined(__AVX512F__)
    if (stream)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)*from);
    else
#elif defined(__AVX2__)
    if (stream)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)*from);
    else
#else
    (void)stream;
#endif
      *to = *from;
  }
}

// What was stored past the caches is in memory before anything that this thread stores afterwards.
inline void finish_streaming(bool stream) {
#ifdef __AVX2__
  if (stream) _mm_sfence();
#endif
  (void)stream;
}

}  // namespace
}  // namespace lora_engine
