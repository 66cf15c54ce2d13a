// AdamW (Loshchilov and Hutter, 2019) over one flat buffer, as torch.optim.AdamW computes it.
#include "isa.hpp"
#include "numeric.hpp"

namespace lora_engine {
namespace {

template <class A>
void step(const AdamWArgs& a) {
  A* params = static_cast<A*>(a.params);
  const A* grads = static_cast<const A*>(a.grads);
  A* exp_avg = static_cast<A*>(a.exp_avg);
  A* exp_avg_sq = static_cast<A*>(a.exp_avg_sq);
  const A beta1 = A(a.beta1), beta2 = A(a.beta2), eps = A(a.eps), grad_scale = A(a.grad_scale);
  const A decay = A(1 - a.lr * a.weight_decay);
  const A step_size = A(a.lr / a.bias_correction1);
  const A root_correction = A(1 / std::sqrt(a.bias_correction2));
#pragma omp parallel for simd schedule(static)
  for (int64_t i = 0; i < a.count; ++i) {
    const A g = grads[i] * grad_scale;
    const A m = exp_avg[i] + (A(1) - beta1) * (g - exp_avg[i]);
    const A v = beta2 * exp_avg_sq[i] + (A(1) - beta2) * g * g;
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    params[i] = params[i] * decay - step_size * m / (std::sqrt(v) * root_correction + eps);
  }
}

}  // namespace

namespace LORA_ENGINE_ISA {

void adamw(DType dtype, const AdamWArgs& args) {
  if (dtype == DType::kFloat64)
    step<double>(args);
  else
    step<float>(args);
}

}  // namespace LORA_ENGINE_ISA
}  // namespace lora_engine
