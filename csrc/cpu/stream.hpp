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

// Copies `kBytes`, whole lines; with `stream` past the caches, and dst is then aligned to a line.
template <int64_t kBytes>
inline void copy_lines(void* dst, const void* src, bool stream) {
  static_assert(kBytes % kLine == 0, "whole lines");
#ifdef __AVX2__
  if (stream) {
    for (int64_t i = 0; i < kBytes; i += kLine) {
      char* to = static_cast<char*>(dst) + i;
      const char* from = static_cast<const char*>(src) + i;
#ifdef __AVX512F__
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
#else
      const __m256i* halves = reinterpret_cast<const __m256i*>(from);
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to), _mm256_loadu_si256(halves));
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to) + 1, _mm256_loadu_si256(halves + 1));
#endif
    }
    return;
  }
#endif
  (void)stream;
  std::memcpy(dst, src, kBytes);
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
