// The 8-bit dynamic codes of block-wise quantisation (arXiv:2110.02861): seven decades, each cut
// into twice as many equal parts as the decade below. Codes are computed by arithmetic, which
// vectorises; GPU kernels keep tables of the values that codes stand for. The same codes as a
// table: lora_engine/quantization/dynamic_code.py.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define LORA_ENGINE_HOST_DEVICE __host__ __device__
#else
#define LORA_ENGINE_HOST_DEVICE
#endif

namespace lora_engine {

constexpr int kQuantBlock = 256;  // values that share an absmax

// What a block's values are multiplied by before they are coded. The inverse of a denormal absmax
// would be infinite: a block whose absmax is 1e-37 or less is coded as zeros.
static inline LORA_ENGINE_HOST_DEVICE float block_inverse(float absmax) {
  return absmax > 1e-37f ? 1.0f / absmax : 0.0f;
}

// A magnitude in [0, 1] as a count, where the top decade, [0.1, 1], has kParts parts: those of a
// decade of n parts are counted n to 2 n - 1, so that counts run on from one decade to the next,
// and 2 kParts is the magnitude 1. Returns the count nearest to x.
template <int kParts>
static inline LORA_ENGINE_HOST_DEVICE int32_t dynamic_count(float x) {
  float y = x, n = kParts;
  const bool four = y < 1e-4f;
  y = four ? y * 1e4f : y;
  n = four ? n * 0.0625f : n;
  const bool two = y < 1e-2f;
  y = two ? y * 1e2f : y;
  n = two ? n * 0.25f : n;
  const bool one = y < 1e-1f;
  y = one ? y * 10.0f : y;
  n = one ? n * 0.5f : n;
  const float w = (y * (1.0f / 0.9f) + 0.8f / 0.9f) * n;
  // A part begins halfway between its own value and the one below: w's integer part changes there.
  // Two do not: a decade's first part, since the parts below it are smaller, and the magnitude 1.
  const float lower = n + (n == 1.0f ? 7.0f / 36 : 0.2f);
  const float count = w < lower ? n - 1.0f : w;
  return w >= 2 * kParts - 0.25f ? 2 * kParts : static_cast<int32_t>(count);
}

// The magnitude in the middle of the part that `count` > 0 names.
template <int kParts>
static inline LORA_ENGINE_HOST_DEVICE float dynamic_magnitude(int32_t count) {
  const float c = static_cast<float>(count);
  uint32_t bits;
  std::memcpy(&bits, &c, sizeof bits);
  const uint32_t n_bits = bits & 0x7f800000u, inverse_bits = 0x7f000000u - n_bits;
  float n, inverse;  // the power of two at or below count, and 1 over it
  std::memcpy(&n, &n_bits, sizeof n);
  std::memcpy(&inverse, &inverse_bits, sizeof inverse);
  const uint32_t decade = (n_bits >> 23) - 127;  // it has 2^decade parts
  const float lowest = kParts == 64 ? 1e-6f : 1e-7f;
  const float scale = ((decade & 1 ? 10.0f : 1.0f) * (decade & 2 ? 100.0f : 1.0f)) *
                      ((decade & 4 ? 10000.0f : 1.0f) * lowest);
  const float y = 0.1f + 0.9f * ((c + 0.5f - n) * inverse);
  return count == 2 * kParts ? 1.0f : y * scale;
}

// The values that a signed and an unsigned code stand for.
static inline LORA_ENGINE_HOST_DEVICE float signed_value(uint8_t code) {
  const int32_t from_zero = static_cast<int32_t>(code) - 127;
  const float magnitude = dynamic_magnitude<64>(from_zero < 0 ? -from_zero : from_zero);
  return from_zero == 0 ? 0.0f : (from_zero < 0 ? -magnitude : magnitude);
}

static inline LORA_ENGINE_HOST_DEVICE float unsigned_value(uint8_t code) {
  return code == 0 ? 0.0f : dynamic_magnitude<128>(static_cast<int32_t>(code) + 1);
}

// The code nearest to x in [-1, 1].
static inline LORA_ENGINE_HOST_DEVICE uint8_t signed_code(float x) {
  const int32_t count = dynamic_count<64>(x < 0 ? -x : x);
  const int32_t least = count < 127 ? count : 127;  // there is a 1 but no -1
  return static_cast<uint8_t>(127 + (x < 0 ? -least : count));
}

// The code nearest to x in [0, 1], but not 0 for a positive x.
static inline LORA_ENGINE_HOST_DEVICE uint8_t unsigned_code(float x) {
  const int32_t code = dynamic_count<128>(x) - 1;
  return static_cast<uint8_t>(code > 0 ? code : (x > 0 ? 1 : 0));
}

}  // namespace lora_engine
