// The activations of gated linear units, with their slopes, written so that loops vectorise.
//
// Each has value(g), and value_and_slope(g, value, slope). Finite gates of any size give finite
// results; an infinite gate gives NaN where PyTorch does (0 * inf), and NaN stays NaN.
#pragma once

#include "numeric.hpp"

namespace lora_engine {
namespace {

template <class A>
inline A logistic(A x) {
  return A(1) / (A(1) + exp_acc(-x));
}

// g * logistic(g)
struct Silu {
  template <class A>
  static inline A value(A g) {
    return g * logistic(g);
  }
  template <class A>
  static inline void value_and_slope(A g, A& value, A& slope) {
    const A s = logistic(g);
    value = g * s;
    slope = s * (A(1) + g * (A(1) - s));
  }
};

// g / 2 * (1 + tanh(sqrt(2 / pi) * (g + 0.044715 g^3))). As (1 + tanh(x)) / 2 = logistic(2 x) it
// needs no tanh, and nothing cancels for negative gates.
struct GeluTanh {
  static constexpr double kLinear = 1.5957691216057308;  // 2 sqrt(2 / pi)
  static constexpr double kCubic = 0.0713548162726009;   // 0.044715 kLinear
  // The logistic is 0 or 1 long before; further out the square of the gate would overflow.
  template <class A>
  static inline A clamped(A g) {
    return g < A(-40) ? A(-40) : (g > A(40) ? A(40) : g);
  }
  template <class A>
  static inline A value(A g) {
    const A c = clamped(g);
    return g * logistic(c * (A(kLinear) + A(kCubic) * c * c));
  }
  template <class A>
  static inline void value_and_slope(A g, A& value, A& slope) {
    const A c = clamped(g);
    const A s = logistic(c * (A(kLinear) + A(kCubic) * c * c));
    value = g * s;
    slope = s + g * (s * (A(1) - s)) * (A(kLinear) + A(3 * kCubic) * c * c);
  }
};

// The normal distribution's upper tail, 1 - Phi(|g|), and its density at g. The tail is the
// density times a smooth function of |g|, a polynomial in 1 / (1 + 0.21 |g|) (form of Abramowitz
// and Stegun 7.1.26, coefficients of our own by Remez exchange): relative error 1.4e-8 for |g| up
// to 13.5, where the density leaves float32.
inline void normal_tail(float g, float& tail, float& density) {
  const float bell = exp_acc(-0.5f * g * g);
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
