// Element types and elementary functions of the CPU kernels.
//
// Every kernel file is compiled once for each instruction set (see dispatch.cpp), so all that
// stands in a header here has internal linkage, and the kernels use no templates of the standard
// library: otherwise the linker keeps one copy, perhaps the AVX-512 one, for every processor.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../../common/bf16.hpp"
#include "../kernels.hpp"

#ifndef LORA_ENGINE_ISA
#error "compile with -DLORA_ENGINE_ISA=<name>"
#endif

namespace lora_engine {
namespace {

// The type arithmetic is done in: float32, except for float64 data.
template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <class T>
using acc_t = typename Accumulate<T>::type;

inline float load(float x) { return x; }
inline float load(bf16 x) { return to_float(x); }
inline double load(double x) { return x; }

template <class T>
inline T store(acc_t<T> x);
template <>
inline float store<float>(float x) {
  return x;
}
template <>
inline bf16 store<bf16>(float x) {
  return to_bf16(x);
}
template <>
inline double store<double>(double x) {
  return x;
}

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// exp for float32 within 2 ulp, written so that loops over it vectorise: x = n ln 2 + r with
// |r| <= ln 2 / 2 (Cody and Waite's split of ln 2), a degree-6 polynomial for exp(r), and n put
// into the exponent. Results under 2^-126 are 0 and those over 2^127.5 infinite: a denormal costs
// the processor a hundred cycles, and masked scores would all be denormals.
inline float exp_acc(float x) {
  constexpr float kLowest = -87.336544f, kHighest = 88.8f;
  const float clamped = x < kLowest ? kLowest : (x > kHighest ? kHighest : x);
  const float n = std::nearbyint(clamped * 1.44269504088896341f);
  float r = clamped - n * 0.693359375f;
  r -= n * -2.12194440e-4f;
  float p = 1.3888889e-3f;
  p = p * r + 8.3333333e-3f;
  p = p * r + 4.1666667e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return x < kLowest ? 0.0f : p * power;
}
inline double exp_acc(double x) { return std::exp(x); }

// Calls body(T{}) with the element type that `dtype` names.
template <class Body>
inline void dispatch(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::kFloat32:
      body(float{});
      break;
    case DType::kBFloat16:
      body(bf16{});
      break;
    case DType::kFloat64:
      body(double{});
      break;
  }
}

}  // namespace
}  // namespace lora_engine
