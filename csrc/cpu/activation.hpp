// The activations of gated linear units, with their slopes, written so that loops vectorise.
//
// Each has value(g), and value_and_slope(g, value, slope). Finite gates of any size give finite
// results; -inf gives NaN (0 * inf), both infinities have NaN slopes, and NaN stays NaN.
#pragma once

#include "simd/exponential.hpp"
#include "simd/numeric.hpp"

namespace lora_engine {
namespace {

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

// The same for results that are rounded to bfloat16, without a division: relative error 2e-4, a
// tenth of the rounding's, up to |g| = 5. Beyond, the tail is less than 3e-7 and at most 2.7 times
// too large. Polynomials of degree 3 for 2^r and 8 for the smooth function, relative minimax.
inline void coarse_normal_tail(float g, float& tail, float& density) {
  const SplitExponent z_is(at_least(-0.72134752f * g * g, -127.0f));
  const float r = z_is.r, x = at_most(std::fabs(g), 5.0f);
  float q = 0.055171658f;
  q = q * r + 0.24261112f;
  q = q * r + 0.69326099f;
  q = q * r + 0.99992807f;
  const float bell = q * z_is.power;
  float p = 5.7904302e-6f;
  p = p * x - 1.4531538e-4f;
  p = p * x + 1.5831057e-3f;
  p = p * x - 9.9215629e-3f;
  p = p * x + 4.0258871e-2f;
  p = p * x - 1.1416839e-1f;
  p = p * x + 2.4129194e-1f;
  p = p * x - 3.9726451e-1f;
  p = p * x + 4.9994163e-1f;
  tail = bell * p;
  density = 0.3989422804f * bell;
}

// g * Phi(g), the exact GELU; kCoarse for results that are rounded to bfloat16.
template <bool kCoarse>
struct Gelu {
  template <class A>
  static inline void tail_and_density(A g, A& tail, A& density) {
    if constexpr (kCoarse)
      coarse_normal_tail(g, tail, density);
    else
      normal_tail(g, tail, density);
  }
  template <class A>
  static inline A value(A g) {
    A tail, density;
    tail_and_density(g, tail, density);
    return g * (g < A(0) ? tail : A(1) - tail);
  }
  template <class A>
  static inline void value_and_slope(A g, A& value, A& slope) {
    A tail, density;
    tail_and_density(g, tail, density);
    const A phi = g < A(0) ? tail : A(1) - tail;
    value = g * phi;
    slope = phi + g * density;
  }
};

// Calls body(Silu{}) or another, as `activation` says, for elements of T.
template <class T, class Body>
inline void dispatch_activation(Activation activation, Body&& body) {
  switch (activation) {
    case Activation::kSilu:
      body(Silu{});
      break;
    case Activation::kGelu:
      body(Gelu<sizeof(T) == sizeof(bf16)>{});
      break;
    case Activation::kGeluTanh:
      body(GeluTanh{});
      break;
  }
}

}  // namespace
}  // namespace lora_engine
