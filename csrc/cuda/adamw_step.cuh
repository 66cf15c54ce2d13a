// One element's AdamW step (Loshchilov and Hutter, 2019), as torch.optim.AdamW computes it.
#pragma once

#include <cmath>

#include "launch.cuh"
#include "launchers.hpp"

namespace lora_engine {
namespace cuda {
namespace {

struct AdamWStep {
  // 1 - beta is taken in float64: float32's beta is off by 2e-9, a millionth of 1 - 0.98.
  float from_grad1, beta2, from_grad2, eps, decay, step_size, root_correction;
  const float* grad_norm;
  float max_grad_norm;

  explicit AdamWStep(const AdamWHyper& h)
      : from_grad1(static_cast<float>(1 - h.beta1)),
        beta2(static_cast<float>(h.beta2)),
        from_grad2(static_cast<float>(1 - h.beta2)),
        eps(static_cast<float>(h.eps)),
        decay(static_cast<float>(1 - h.lr * h.weight_decay)),
        step_size(static_cast<float>(h.lr / h.bias_correction1)),
        root_correction(static_cast<float>(1 / std::sqrt(h.bias_correction2))),
        grad_norm(h.grad_norm),
        max_grad_norm(static_cast<float>(h.max_grad_norm)) {}

  // What gradients are multiplied by: less than 1 where their norm is above the maximum.
  __device__ float scale() const {
    if (!grad_norm) return 1.0f;
    const float factor = max_grad_norm / *grad_norm;
    return factor >= 1.0f ? 1.0f : factor;  // a NaN stays
  }

  __device__ void operator()(float scaled_grad, float& param, float& m, float& v) const {
    m += from_grad1 * (scaled_grad - m);
    v = beta2 * v + from_grad2 * scaled_grad * scaled_grad;
    // Within two units in the last place, of a term that is a small part of the parameter.
    param = param * decay - __fdividef(step_size * m, sqrtf(v) * root_correction + eps);
  }
};

}  // namespace
}  // namespace cuda
}  // namespace lora_engine
