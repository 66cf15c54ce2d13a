// Elements of matrix operands as floats.
#pragma once

#include <string>

#include "decode.hpp"

namespace ptx {

// How an operand's type lies in 32-bit registers and in memory.
struct Element {
  int bits = 0;  // 0: unknown
  float (*value)(uint32_t code) = nullptr;
  int per_register() const { return 32 / bits; }
  int bytes() const { return bits / 8; }
};

inline float value_of_float16(uint32_t code) { return widen(Float16{uint16_t(code)}); }
inline float value_of_bfloat16(uint32_t code) { return bits_as<float>(code << 16); }
// Matrix units read the upper 19 bits.
inline float value_of_tf32(uint32_t code) { return bits_as<float>(code & 0xffffe000u); }

struct Float8Table {
  float value[2][256];
  Float8Table() {
    for (uint32_t code = 0; code < 256; ++code) {
      value[0][code] = static_cast<float>(decode(code, kE4m3));
      value[1][code] = static_cast<float>(decode(code, kE5m2));
    }
  }
};
inline float value_of_float8(int kind, uint32_t code) {
  static const Float8Table table;
  return table.value[kind][code & 255];
}

inline Element element_of(const std::string& type) {
  if (type == "f16") return {16, value_of_float16};
  if (type == "bf16") return {16, value_of_bfloat16};
  if (type == "tf32") return {32, value_of_tf32};
  if (type == "e4m3") return {8, [](uint32_t code) { return value_of_float8(0, code); }};
  if (type == "e5m2") return {8, [](uint32_t code) { return value_of_float8(1, code); }};
  return {};
}

inline float element_at(const Element& element, uint32_t word, int i) {
  const uint32_t code = word >> (element.bits * i);
  return element.value(element.bits == 32 ? code : code & ((1u << element.bits) - 1));
}

// The rows of A that a warp holds, as mma and wgmma lay them out: [16][k].
inline void read_a(Warp& warp, const std::vector<uint32_t>& registers, const Element& element,
                   int k, float* a) {
  const int per = element.per_register();
  for (size_t i = 0; i < registers.size(); ++i) {
    const uint32_t* words = warp.lanes<uint32_t>(registers[i]);
    for (int lane = 0; lane < kLanes; ++lane) {
      const int row = lane / 4 + 8 * static_cast<int>(i & 1);
      const int first = lane % 4 * per + 4 * per * static_cast<int>(i >> 1);
      for (int e = 0; e < per; ++e) a[row * k + first + e] = element_at(element, words[lane], e);
    }
  }
}

inline std::vector<uint32_t> register_offsets(const Operand& o) {
  if (o.kind != Kind::kVector) throw Fault("operand " + o.text + " is no list of registers");
  std::vector<uint32_t> offsets;
  for (const Operand& part : o.parts) {
    if (part.kind != Kind::kRegister || part.width != 'w')
      throw Fault("operand " + part.text + " is no 32-bit register");
    offsets.push_back(part.offset);
  }
  return offsets;
}

}  // namespace ptx
