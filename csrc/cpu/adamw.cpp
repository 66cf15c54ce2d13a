// AdamW over one flat buffer, and the norm of the gradients.
#include "adamw_step.hpp"
#include "isa.hpp"
#include "scratch.hpp"
#include "simd/numeric.hpp"

namespace lora_engine {
namespace {

template <class A>
void step(const AdamWArgs& a) {
  A* params = static_cast<A*>(a.params);
  const A* grads = static_cast<const A*>(a.grads);
  A* exp_avg = static_cast<A*>(a.exp_avg);
  A* exp_avg_sq = static_cast<A*>(a.exp_avg_sq);
  const AdamWStep<A> update(a);
#pragma omp parallel for simd schedule(static)
  for (int64_t i = 0; i < a.size; ++i) update(grads[i], params[i], exp_avg[i], exp_avg_sq[i]);
}

// Chunks of a fixed size, their sums added in order: the same bits for any number of threads.
template <class A>
void norm(const GradNormArgs& a) {
  constexpr int64_t kChunk = 16384;
  const A* grads = static_cast<const A*>(a.grads);
  const int64_t chunks = (a.size + kChunk - 1) / kChunk;
  Scratch scratch;
  A* sums = scratch.allocate<A>(chunks);
#pragma omp parallel for schedule(static)
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t begin = chunk * kChunk;
    const int64_t end = begin + kChunk < a.size ? begin + kChunk : a.size;
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = begin; i < end; ++i) sum += grads[i] * grads[i];
    sums[chunk] = sum;
  }
  double total = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) total += sums[chunk];
  *static_cast<A*>(a.norm) = static_cast<A>(std::sqrt(total));
}

}  // namespace

namespace LORA_ENGINE_ISA {

void adamw(DType dtype, const AdamWArgs& args) {
  if (dtype == DType::kFloat64)
    step<double>(args);
  else
    step<float>(args);
}

void grad_norm(DType dtype, const GradNormArgs& args) {
  if (dtype == DType::kFloat64)
    norm<double>(args);
  else
    norm<float>(args);
}

}  // namespace LORA_ENGINE_ISA
}  // namespace lora_engine
