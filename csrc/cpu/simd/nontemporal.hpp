// Non-temporal stores, which bypass the caches, for results larger than these.
//
// An ordinary store first reads the cache line that it overwrites. A result larger than the last
// cache is evicted before it is read again, so nothing is lost by bypassing it, and that read is
// saved.
#pragma once

#include <cstdint>
#include <cstring>
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace lora_engine {
namespace {

constexpr int64_t kLine = 64;  // bytes

// Whether `rows` rows of `row_bytes` at y, `stride_bytes` apart, are to be stored so: their lines
// are aligned, and they are as large as a last-level cache.
inline bool worth_nontemporal(const void* y, int64_t rows, int64_t row_bytes,
                              int64_t stride_bytes) {
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

// Copies whole registers; with `nontemporal` past the caches, and dst is then aligned to a line.
// Not by memcpy, which compilers turn into two copies of half the size, or into a call.
template <int64_t kBytes>
inline void copy_registers(void* dst, const void* src, bool nontemporal) {
  static_assert(kBytes % kRegisterBytes == 0, "whole registers");
  for (int64_t i = 0; i < kBytes / kRegisterBytes; ++i) {
    Register* to = static_cast<Register*>(dst) + i;
    const Register* from = static_cast<const Register*>(src) + i;
#if defined(__AVX512F__)
    if (nontemporal)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)*from);
    else
#elif defined(__AVX2__)
    if (nontemporal)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)*from);
    else
#else
    (void)nontemporal;
#endif
      *to = *from;
  }
}

// Orders this thread's non-temporal stores before its later stores.
inline void finish_nontemporal(bool nontemporal) {
#ifdef __AVX2__
  if (nontemporal) _mm_sfence();
#endif
  (void)nontemporal;
}

}  // namespace
}  // namespace lora_engine
