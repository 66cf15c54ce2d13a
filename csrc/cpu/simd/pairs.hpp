// Pairs of neighbouring elements as two registers of float32: the even ones and the odd ones.
#pragma once

#include "chunk.hpp"

namespace lora_engine {
namespace {

constexpr int64_t kLanes = kRegisterBytes / sizeof(float);
typedef float Floats __attribute__((vector_size(kRegisterBytes)));
typedef int32_t Ints __attribute__((vector_size(kRegisterBytes)));
typedef uint8_t LaneBytes __attribute__((vector_size(kLanes)));  // a byte for each lane

// A byte for each lane, widened. By the instruction: GCC 12 converts vectors of bytes one by one.
// Masked, though all lanes are wanted: GCC warns of the unmasked one's undefined operand.
inline Ints widened_bytes(const uint8_t* x) {
#if defined(__AVX512F__)
  return (Ints)_mm512_maskz_cvtepu8_epi32(0xffff,
                                          _mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
#elif defined(__AVX2__)
  return (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x)));
#else
  Ints lanes;
  for (int64_t i = 0; i < kLanes; ++i) lanes[i] = x[i];
  return lanes;
#endif
}

struct Pairs {
  Floats even, odd;
};

inline Ints ascending_lanes(int32_t first, int32_t step) {
  Ints lanes;
  for (int32_t i = 0; i < kLanes; ++i) lanes[i] = first + step * i;
  return lanes;
}

// Elements 0, 2, 4, … and 1, 3, 5, … of 2 kLanes elements at x.
inline Pairs pairs_at(const bf16* x) {
  Words both;
  std::memcpy(&both, x, sizeof both);
  return {(Floats)(both << 16), (Floats)(both & 0xffff0000u)};
}
inline Pairs pairs_at(const float* x) {
  Floats low, high;
  std::memcpy(&low, x, sizeof low);
  std::memcpy(&high, x + kLanes, sizeof high);
  const Ints even = ascending_lanes(0, 2);
  return {__builtin_shuffle(low, high, even), __builtin_shuffle(low, high, even + 1)};
}
inline Pairs pairs_at(const double* x) {
  Pairs pairs;
  for (int64_t i = 0; i < kLanes; ++i) {
    pairs.even[i] = static_cast<float>(x[2 * i]);
    pairs.odd[i] = static_cast<float>(x[2 * i + 1]);
  }
  return pairs;
}

// Stores even and odd elements at x, in the order in memory.
inline void put_pairs(const Pairs& pairs, float* x) {
  // Lane i of the result is lane i / 2 of even or, kLanes further in both together, of odd.
  const Ints lanes = ascending_lanes(0, 1);
  const Ints low = lanes / 2 + lanes % 2 * static_cast<int32_t>(kLanes);
  const Floats first = __builtin_shuffle(pairs.even, pairs.odd, low);
  const Floats second =
      __builtin_shuffle(pairs.even, pairs.odd, low + static_cast<int32_t>(kLanes / 2));
  std::memcpy(x, &first, sizeof first);
  std::memcpy(x + kLanes, &second, sizeof second);
}
// A table of 16 values, looked up by each lane.
class Table16 {
 public:
  explicit Table16(const float* values) {
    for (int64_t part = 0; part < kParts; ++part)
      std::memcpy(&parts_[part], values + part * kLanes, sizeof(Floats));
  }
  // The values at `index`, in [0, 16).
  Floats operator[](Ints index) const {
    if constexpr (kParts == 1) return __builtin_shuffle(parts_[0], index);
    return index > 7 ? __builtin_shuffle(parts_[kParts - 1], index)
                     : __builtin_shuffle(parts_[0], index);
  }

 private:
  static constexpr int64_t kParts = 16 / kLanes;
  Floats parts_[kParts];
};

}  // namespace
}  // namespace lora_engine
