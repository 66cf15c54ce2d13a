// AdamW over one flat buffer, and the norm of the gradients.
#include "adamw_step.cuh"

namespace lora_engine {
namespace cuda {
namespace {

constexpr int kThreads = 256;

__device__ void step4(const AdamWStep& step, float scale, const float4& g, float4& p, float4& m,
                      float4& v) {
  step(g.x * scale, p.x, m.x, v.x);
  step(g.y * scale, p.y, m.y, v.y);
  step(g.z * scale, p.z, m.z, v.z);
  step(g.w * scale, p.w, m.w, v.w);
}

// With c the gradient's scale after clipping:
//
//   g = c grad    m = m + (1 - beta1) (g - m)    v = beta2 v + (1 - beta2) g^2
//   p = (1 - lr weight_decay) p - lr / bias1 * m / (sqrt(v / bias2) + eps)
//
// Four elements a thread, 64 bytes in flight; kVector: the buffers are 16-byte aligned. The launch
// bounds ask for six thread blocks a multiprocessor: without, ptxas takes 32 registers on sm_100
// and spills.
template <bool kVector>
__global__ void __launch_bounds__(kThreads, 6)
    adamw_kernel(float* __restrict__ params,       // [count]
                 const float* __restrict__ grads,  // [count]
                 float* __restrict__ exp_avg,      // [count]
                 float* __restrict__ exp_avg_sq,   // [count]
                 int64_t count, AdamWStep step) {
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * 4;
  const float scale = step.scale();
  if (kVector && first + 4 <= count) {
    const float4 g = *reinterpret_cast<const float4*>(grads + first);
    float4 p = *reinterpret_cast<const float4*>(params + first);
    float4 m = *reinterpret_cast<const float4*>(exp_avg + first);
    float4 v = *reinterpret_cast<const float4*>(exp_avg_sq + first);
    step4(step, scale, g, p, m, v);
    *reinterpret_cast<float4*>(params + first) = p;
    *reinterpret_cast<float4*>(exp_avg + first) = m;
    *reinterpret_cast<float4*>(exp_avg_sq + first) = v;
    return;
  }
  for (int64_t i = first; i < first + 4 && i < count; ++i)
    step(grads[i] * scale, params[i], exp_avg[i], exp_avg_sq[i]);
}

// The sum over a thread block of kThreads, in a fixed order; thread 0 has it.
__device__ float block_sum(float x) {
  __shared__ float warps[kThreads / 32];
  for (int lanes = 16; lanes; lanes /= 2) x += __shfl_xor_sync(kFullWarp, x, lanes);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0;
  if (threadIdx.x == 0)
    for (int warp = 0; warp < kThreads / 32; ++warp) sum += warps[warp];
  return sum;
}

// The number of thread blocks does not depend on the GPU, so that the order of the sum does not
// either.
constexpr int kPartials = 1024;

// partials[block] = the sum of grads^2 over every gridDim.x-th chunk of elements.
template <bool kVector>
__global__ void __launch_bounds__(kThreads)
    square_sum_kernel(const float* __restrict__ grads,  // [count]
                      float* __restrict__ partials,     // [gridDim.x]
                      int64_t count) {
  constexpr int kUnroll = 4;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  float sum[kUnroll] = {0, 0, 0, 0};
  int64_t done = 0;
  if (kVector) {
    const float4* quads = reinterpret_cast<const float4*>(grads);
    const int64_t whole = count / 4;
    for (int64_t i = thread; i < whole; i += kUnroll * stride) {
      float4 g[kUnroll];
#pragma unroll
      for (int k = 0; k < kUnroll; ++k)
        g[k] = i + k * stride < whole ? quads[i + k * stride] : make_float4(0, 0, 0, 0);
#pragma unroll
      for (int k = 0; k < kUnroll; ++k)
        sum[k] += (g[k].x * g[k].x + g[k].y * g[k].y) + (g[k].z * g[k].z + g[k].w * g[k].w);
    }
    done = whole * 4;
  }
  for (int64_t i = done + thread; i < count; i += stride) sum[0] += grads[i] * grads[i];
  const float total = block_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
  if (threadIdx.x == 0) partials[blockIdx.x] = total;
}

// norm = sqrt(sum of partials), by one thread block.
__global__ void __launch_bounds__(kThreads)
    norm_kernel(const float* __restrict__ partials,  // [count]
                float* __restrict__ norm,            // []
                int count) {
  float sum = 0;
  for (int i = threadIdx.x; i < count; i += kThreads) sum += partials[i];
  const float total = block_sum(sum);
  if (threadIdx.x == 0) *norm = sqrtf(total);
}

}  // namespace

void adamw(const AdamWArgs& a, void* stream) {
  if (!a.size) return;
  const bool vector = aligned(a.params, 16) && aligned(a.grads, 16) && aligned(a.exp_avg, 16) &&
                      aligned(a.exp_avg_sq, 16);
  launch("adamw", vector ? adamw_kernel<true> : adamw_kernel<false>,
         static_cast<unsigned>(ceil_div(a.size, 4 * kThreads)), kThreads, 0, stream, a.params,
         a.grads, a.exp_avg, a.exp_avg_sq, a.size, AdamWStep(a.hyper));
}

void grad_norm(const GradNormArgs& a, void* stream) {
  const int64_t wanted = ceil_div(a.size, 16 * kThreads);
  const int partials = static_cast<int>(wanted < kPartials ? wanted : kPartials);
  if (partials)
    launch("grad_norm", aligned(a.grads, 16) ? square_sum_kernel<true> : square_sum_kernel<false>,
           static_cast<unsigned>(partials), kThreads, 0, stream, a.grads, a.partials, a.size);
  launch("grad_norm", norm_kernel, 1, kThreads, 0, stream, a.partials, a.norm, partials);
}

}  // namespace cuda
}  // namespace lora_engine
