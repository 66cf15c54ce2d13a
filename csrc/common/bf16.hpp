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

// The bits of a float32 rounded to bfloat16 in the upper half: to nearest even; a NaN stays a NaN
// whatever its payload. The lower half is what is left over. W: uint32_t, or a vector of them.
template <class W>
static inline W rounded_bits(W bits) {
  const W rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return (bits & 0x7fffffffu) > 0x7f800000u ? bits | 0x400000u : rounded;
}

static inline bf16 to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bf16{static_cast<uint16_t>(rounded_bits(bits) >> 16)};
}

}  // namespace lora_engine
