// Exponentials in fewer instructions than exp_acc, written so that loops vectorise.
#pragma once

#include "numeric.hpp"

namespace lora_engine {
namespace {

// Bounds by integer comparison of the bits: one instruction each. A comparison of floats has to
// treat NaN apart; compilers turn it into branches, with a division in each. Here NaN becomes the
// bound; the activations' factor g brings it back.
inline float at_most(float x, float bound) {  // bound > 0
  const int32_t a = static_cast<int32_t>(bits_of(x)), b = static_cast<int32_t>(bits_of(bound));
  return float_of(static_cast<uint32_t>(a < b ? a : b));
}
inline float at_least(float x, float bound) {  // bound < 0
  const uint32_t a = bits_of(x), b = bits_of(bound);
  return float_of(a < b ? a : b);
}
inline double at_most(double x, double bound) { return x < bound ? x : bound; }

// c = n + r with an integer n and r in [-0.5, 0.5]; -127 <= c <= 128.
struct SplitExponent {
  float power, r;  // 2^n, and r
  explicit SplitExponent(float c) {
    // Adding kRound rounds to an integer and leaves its biased exponent in the lowest bits.
    constexpr float kRound = 12582912.0f + 127.0f;  // 1.5 * 2^23 + the bias
    const float shifted = c + kRound;
    r = c - (shifted - kRound);
    power = float_of(bits_of(shifted) << 23);
  }
};

// 2^z within 2 ulp, in fewer instructions than exp_acc: 0 under 2^-127 and infinite from 2^127.5.
// exp2_within is for -127 <= z <= 128 and keeps a NaN, exp2_clamped takes any other number.
// Polynomial of degree 5 by Remez exchange, relative error 7.5e-8.
inline float exp2_within(float c) {
  const SplitExponent c_is(c);
  const float r = c_is.r;
  float p = 0.0013276471f;
  p = p * r + 0.009675541f;
  p = p * r + 0.05550713f;
  p = p * r + 0.2402212f;
  p = p * r + 0.69314694f;
  p = p * r + 1.0000001f;
  return p * c_is.power;
}
inline float exp2_clamped(float z) { return exp2_within(at_least(at_most(z, 128.0f), -127.0f)); }

// exp(x) with a relative error of 1e-7 + 6e-8 |x|: for probabilities, whose error may grow as they
// become smaller. A NaN stays a NaN.
inline float exp_of_difference(float x) {
  const float z = 1.44269504f * x, low = z < -127.0f ? -127.0f : z;
  return exp2_within(low > 128.0f ? 128.0f : low);
}
inline double exp_of_difference(double x) { return std::exp(x); }

}  // namespace
}  // namespace lora_engine
