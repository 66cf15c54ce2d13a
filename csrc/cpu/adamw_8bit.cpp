// AdamW with block-wise 8-bit moments (Dettmers and others, 2022, arXiv:2110.02861).
#include "../common/dynamic_code.hpp"
#include "adamw_step.hpp"
#include "isa.hpp"
#include "simd/numeric.hpp"

namespace lora_engine {
namespace {

// One block of `count` values, at most kQuantBlock.
void step(const AdamWStep<float>& update, int64_t count, const float* grads, float* params,
          uint8_t* exp_avg, uint8_t* exp_avg_sq, float& exp_avg_absmax, float& exp_avg_sq_absmax) {
  float m[kQuantBlock], v[kQuantBlock];
  const float m_scale = exp_avg_absmax, v_scale = exp_avg_sq_absmax;
  float m_max = 0, v_max = 0;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    m[i] = signed_value(exp_avg[i]) * m_scale;
    v[i] = unsigned_value(exp_avg_sq[i]) * v_scale;
  }
#pragma omp simd reduction(max : m_max, v_max)
  for (int64_t i = 0; i < count; ++i) {
    update(grads[i], params[i], m[i], v[i]);
    const float magnitude = std::fabs(m[i]);
    m_max = magnitude > m_max ? magnitude : m_max;
    v_max = v[i] > v_max ? v[i] : v_max;
  }
  const float m_inverse = block_inverse(m_max), v_inverse = block_inverse(v_max);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    exp_avg[i] = signed_code(m[i] * m_inverse);
    exp_avg_sq[i] = unsigned_code(v[i] * v_inverse);
  }
  exp_avg_absmax = m_max;
  exp_avg_sq_absmax = v_max;
}

}  // namespace

namespace LORA_ENGINE_ISA {

void adamw_8bit(const AdamW8bitArgs& args) {
  const AdamWArgs& a = args.adamw;
  const AdamWStep<float> update(a);
  const int64_t blocks = (a.size + kQuantBlock - 1) / kQuantBlock;
#pragma omp parallel for schedule(static)
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t begin = block * kQuantBlock, rest = a.size - begin;
    step(update, rest < kQuantBlock ? rest : kQuantBlock,
         static_cast<const float*>(a.grads) + begin, static_cast<float*>(a.params) + begin,
         static_cast<uint8_t*>(a.exp_avg) + begin, static_cast<uint8_t*>(a.exp_avg_sq) + begin,
         args.exp_avg_absmax[block], args.exp_avg_sq_absmax[block]);
  }
}

}  // namespace LORA_ENGINE_ISA
}  // namespace lora_engine
