// What csrc/cuda offers: functions that start kernels on a stream and return at once. Pointers are
// device addresses; a launch that fails is a std::runtime_error with CUDA's message.
#pragma once

#include <cstdint>

namespace lora_engine {
namespace cuda {

struct AdamWHyper {
  double lr, beta1, beta2, eps, weight_decay, bias_correction1, bias_correction2;
  const float* grad_norm;  // [] of grads, which are clipped to max_grad_norm; null: no clipping
  double max_grad_norm;
};

struct AdamWArgs {
  float* params;       // [size]
  const float* grads;  // [size]
  float* exp_avg;      // [size]
  float* exp_avg_sq;   // [size]
  int64_t size;
  AdamWHyper hyper;
};

struct AdamW8bitArgs {
  float* params;             // [size]
  const float* grads;        // [size]
  uint8_t* exp_avg;          // [size]
  uint8_t* exp_avg_sq;       // [size]
  float* exp_avg_absmax;     // [ceil(size / 256)]
  float* exp_avg_sq_absmax;  // [ceil(size / 256)]
  int64_t size;
  AdamWHyper hyper;
};

struct GradNormArgs {
  const float* grads;  // [size]
  float* partials;     // [1024], work space
  float* norm;         // []
  int64_t size;
};

void adamw(const AdamWArgs&, void* stream);
void adamw_8bit(const AdamW8bitArgs&, void* stream);
void grad_norm(const GradNormArgs&, void* stream);

}  // namespace cuda
}  // namespace lora_engine
