// One element's AdamW step (Loshchilov and Hutter, 2019), as torch.optim.AdamW computes it.
#pragma once

#include "simd/numeric.hpp"

namespace lora_engine {
namespace {

template <class A>
struct AdamWStep {
  // 1 - beta is taken in float64: float32's beta is off by 2e-9, a millionth of 1 - 0.98.
  A from_grad1, beta2, from_grad2, eps, decay, step_size, root_correction;
  A scale = 1;  // of gradients: less than 1 where their norm is above the maximum

  explicit AdamWStep(const AdamWArgs& a)
      : from_grad1(A(1 - a.beta1)),
        beta2(A(a.beta2)),
        from_grad2(A(1 - a.beta2)),
        eps(A(a.eps)),
        decay(A(1 - a.lr * a.weight_decay)),
        step_size(A(a.lr / a.bias_correction1)),
        root_correction(A(1 / std::sqrt(a.bias_correction2))) {
    if (!a.grad_norm) return;
    const double norm = static_cast<double>(*static_cast<const A*>(a.grad_norm));
    const double factor = a.max_grad_norm / norm;
    scale = factor >= 1 ? A(1) : A(factor);  // a NaN stays
  }

  void operator()(A grad, A& param, A& m, A& v) const {
    const A g = grad * scale;
    m += from_grad1 * (g - m);
    v = beta2 * v + from_grad2 * g * g;
    param = param * decay - step_size * m / (std::sqrt(v) * root_correction + eps);
  }
};

}  // namespace
}  // namespace lora_engine
