// Elements of tensors: float32, bfloat16 and float16, a few of them side by side in one access.
#pragma once

#include <cstdint>
#include <cstring>

#include "launch.cuh"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#else
#include "../common/bf16.hpp"
#endif

namespace lora_engine {
namespace cuda {
namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

__device__ inline float widened(float x) { return x; }
__device__ inline float widened(BFloat16 x) {
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}

#ifdef __CUDACC__

__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ inline float widened(Float16 x) {
  __half half;
  memcpy(&half, &x, sizeof half);
  return __half2float(half);
}
// Both rounded to nearest even, a in the lower half.
__device__ inline uint32_t rounded_pair(BFloat16, float a, float b) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(a, b);
  uint32_t bits;
  memcpy(&bits, &both, sizeof bits);
  return bits;
}
__device__ inline uint32_t rounded_pair(Float16, float a, float b) {
  const __half2 both = __floats2half2_rn(a, b);
  uint32_t bits;
  memcpy(&bits, &both, sizeof bits);
  return bits;
}

#else

inline float widened(Float16 x) {
  const int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  float size = exponent ? std::ldexp(1024.0f + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
  if (exponent == 31) size = mantissa ? NAN : INFINITY;
  return x.bits & 0x8000 ? -size : size;
}
inline uint32_t rounded_bits_of(Float16, float x) {
  const uint32_t sign = __float_as_uint(x) >> 16 & 0x8000;
  if (std::isnan(x)) return sign | 0x7e00;
  const float size = std::fabs(x);
  if (size >= 65520.0f) return sign | 0x7c00;
  // Below 2^-14 the spacing stays; a mantissa that is rounded up runs over into the exponent.
  const int exponent = size == 0 ? -14 : std::max(std::ilogb(size), -14);
  const float mantissa = std::nearbyint(std::ldexp(size, 10 - exponent));
  return sign | ((static_cast<uint32_t>(exponent + 14) << 10) + static_cast<uint32_t>(mantissa));
}
inline uint32_t rounded_bits_of(BFloat16, float x) { return to_bf16(x).bits; }
template <class T>
inline uint32_t rounded_pair(T type, float a, float b) {
  return rounded_bits_of(type, a) | rounded_bits_of(type, b) << 16;
}

#endif

__device__ inline float rounded(float, float x) { return x; }
template <class T>
__device__ inline T rounded(T type, float x) {
  return T{static_cast<uint16_t>(rounded_pair(type, x, x))};
}

// How many elements 16 bytes hold.
template <class T>
constexpr int kVector = 16 / sizeof(T);

// Writes 16 bytes to global memory that the kernel does not read. By name: where stores follow
// shuffles, the compiler takes a vector's apart.
__device__ inline void store_bytes(void* to, uint4 x) {
#ifdef __CUDACC__
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(__cvta_generic_to_global(to)), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w));
#else
  memcpy(to, &x, sizeof x);
#endif
}

// Writes kVector values to an address that is a multiple of 16.
__device__ inline void store_vector(float* to, const float (&x)[4]) {
  store_bytes(to, make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]),
                             __float_as_uint(x[3])));
}
template <class T>
__device__ inline void store_vector(T* to, const float (&x)[8]) {
  const T type{};
  store_bytes(to, make_uint4(rounded_pair(type, x[0], x[1]), rounded_pair(type, x[2], x[3]),
                             rounded_pair(type, x[4], x[5]), rounded_pair(type, x[6], x[7])));
}

// Reads eight values from an address that is a multiple of 16.
__device__ inline void load_eight(const float* from, float (&x)[8]) {
  const float4 low = reinterpret_cast<const float4*>(from)[0];
  const float4 high = reinterpret_cast<const float4*>(from)[1];
  x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
  x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
}
template <class T>
__device__ inline void load_eight(const T* from, float (&x)[8]) {
  const uint4 bits = *reinterpret_cast<const uint4*>(from);
  const uint32_t pairs[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = widened(T{static_cast<uint16_t>(pairs[i])});
    x[2 * i + 1] = widened(T{static_cast<uint16_t>(pairs[i] >> 16)});
  }
}

}  // namespace
}  // namespace cuda
}  // namespace lora_engine
