// The bfloat16 storage type: the upper half of a float32. Functions are static: each file that
// includes this is compiled for several instruction sets, and the linker must not merge them.
#pragma once

#include <cstdint>
#include <cstring>

namespace lora_engine {

struct bf16 {
  uint16_t bits;
};

static inline float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Round to nearest even; a NaN stays a NaN whatever its payload.
static inline bf16 to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet_nan = (bits >> 16) | 0x40u;
  return bf16{static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded)};
}

}  // namespace lora_engine
