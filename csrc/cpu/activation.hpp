// The activations of gated linear units, with their slopes, written so that loops vectorise.
//
// Each has value(g), and value_and_slope(g, value, slope). Finite gates of any size give finite
// results; -inf gives NaN (0 * inf), both infinities have NaN slopes, and NaN stays NaN.
#pragma once

#include "numeric.hpp"

namespace lora_engine {
namespace {

// Bounds by integer comparison of the bits: one instruction each. From a comparison of floats,
// which must mind NaN, compilers make branches and then every branch's division. NaN becomes the
// bound; in the activations it survives in the factor g.
inline float at_most(float x, float bound) {  // bound > 0
  const int32_t a = static_cast<int32_t>(bits_of(x)), b = static_cast<int32_t>(bits_of(bound));
  return float_of(static_cast<uint32_t>(a < b ? a : b));
}
inline float at_least(float x, float bound) {  // bound < 0
  const uint32_t a = bits_of(x), b = bits_of(bound);
  return float_of(a < b ? a : b);
}
inline double at_most(double x, double bound) { return x < bound ? x : bound; }

// 2^z within 2 ulp, in fewer instructions than exp_acc: 0 under 2^-127 and infinite from 2^127.5.
// Adding kRound rounds z to an integer and leaves that integer's biased exponent in the lowest
// bits; the polynomial (degree 5, by Remez exchange, relative error 7.5e-8) is for the rest in
// [-0.5, 0.5].
inline float exp2_clamped(float z) {
  constexpr float kRound = 12582912.0f + 127.0f;  // 1.5 * 2^23 + the bias
  const float c = at_least(at_most(z, 128.0f), -127.0f);
  const float shifted = c + kRound;
  const float r = c - (shifted - kRound);
  float p = 0.0013276471f;
  p = p * r + 0.009675541f;
  p = p * r + 0.05550713f;
  p = p * r + 0.2402212f;
  p = p * r + 0.69314694f;
  p = p * r + 1.0000001f;
  return p * float_of(bits_of(shifted) << 23);
}

// exp(-x), infinite where that leaves float32.
inline float exp_minus(float x) { return exp2_clamped(-1.44269504f * x); }
inline double exp_minus(double x) { return std::exp(-x); }

// g * logistic(g), logistic(x) = 1 / (1 + exp(-x))
struct Silu {
  template <class A>
  static inline A value(A g) {
    return g / (A(1) + exp_minus(g));
  }
  template <class A>
  static inline void value_and_slope(A g, A& value, A& slope) {
    const A s = A(1) / (A(1) + exp_minus(g));
    value = g * s;
    slope = s + value * (A(1) - s);
  }
};

// g / 2 * (1 + tanh(sqrt(2 / pi) * (g + 0.044715 g^3))). As (1 + tanh(x)) / 2 = logistic(2 x) it
// needs no tanh, and nothing cancels for negative gates.
struct GeluTanh {
  static constexpr double kLinear = 1.5957691216057308;  // 2 sqrt(2 / pi)
  static constexpr double kCubic = 0.0713548162726009;   // 0.044715 kLinear
  template <class A>
  static inline A value(A g) {
    return g / (A(1) + exp_minus(g * (A(kLinear) + A(kCubic) * g * g)));
  }
  template <class A>
  static inline void value_and_slope(A g, A& value, A& slope) {
    // At 40 the logistic has long been 0 or 1: a bound on the square keeps 0 * inf away.
    const A square = at_most(g * g, A(1600));
    const A s = A(1) / (A(1) + exp_minus(g * (A(kLinear) + A(kCubic) * square)));
    value = g * s;
    slope = s + value * (A(1) - s) * (A(kLinear) + A(3 * kCubic) * square);
  }
};

// The normal distribution's upper tail, 1 - Phi(|g|), and its density at g. The tail is the
// density times a smooth function of |g|, a polynomial in 1 / (1 + 0.21 |g|) (form of Abramowitz
// and Stegun 7.1.26, coefficients of our own by Remez exchange): relative error 1.4e-8 for |g| up
// to 13.5, where the density leaves float32.
inline void normal_tail(float g, float& tail, float& density) {
  const float bell = exp2_clamped(-0.72134752f * g * g);
  const float t = 1.0f / (1.0f + 0.21f * std::fabs(g));
  float p = -0.071974985f;
  p = p * t + 0.28516203f;
  p = p * t - 0.33357424f;
  p = p * t + 0.35330862f;
  p = p * t - 0.09672528f;
  p = p * t + 0.12612234f;
  p = p * t + 0.06885335f;
  p = p * t + 0.08511984f;
  p = p * t + 0.083708316f;
  tail = bell * t * p;
  density = 0.3989422804f * bell;
}
inline void normal_tail(double g, double& tail, double& density) {
  tail = 0.5 * std::erfc(std::fabs(g) * 0.70710678118654752);
  density = 0.39894228040143268 * std::exp(-0.5 * g * g);
}

// g * Phi(g), the exact GELU.
struct Gelu {
  template <class A>
  static inline A value(A g) {
    A tail, density;
    normal_tail(g, tail, density);
    return g * (g < A(0) ? tail : A(1) - tail);
  }
  template <class A>
  static inline void value_and_slope(A g, A& value, A& slope) {
    A tail, density;
    normal_tail(g, tail, density);
    const A phi = g < A(0) ? tail : A(1) - tail;
    value = g * phi;
    slope = phi + g * density;
  }
};

// Calls body(Silu{}) or another, as `activation` says.
template <class Body>
inline void dispatch_activation(Activation activation, Body&& body) {
  switch (activation) {
    case Activation::kSilu:
      body(Silu{});
      break;
    case Activation::kGelu:
      body(Gelu{});
      break;
    case Activation::kGeluTanh:
      body(GeluTanh{});
      break;
  }
}

}  // namespace
}  // namespace lora_engine
