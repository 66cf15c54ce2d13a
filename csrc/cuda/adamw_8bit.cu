// AdamW with block-wise 8-bit moments (Dettmers and others, 2022, arXiv:2110.02861). A warp takes a
// block of 256 values, so that absmax needs shuffles only.
#include "../common/dynamic_code.hpp"
#include "adamw_step.cuh"

namespace lora_engine {
namespace cuda {
namespace {

constexpr int kThreads = kQuantBlock;
constexpr int kWarps = kThreads / 32;
constexpr int kPerLane = kQuantBlock / 32;

__device__ float warp_max(float x) {
  for (int lanes = 16; lanes; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, lanes));
  return x;
}

// A lane holds two runs of four elements, 128 apart: floats move 16 bytes at a time, codes 4, and a
// warp's loads lie side by side. Where they may not (kVector is false), they move one by one.
template <bool kVector, class Vector, class T>
__device__ void load(const T* from, int64_t rest, int lane, T (&to)[kPerLane]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int first = half * (kQuantBlock / 2) + lane * 4;
    if (kVector) {
      const Vector x = *reinterpret_cast<const Vector*>(from + first);
      to[half * 4 + 0] = x.x;
      to[half * 4 + 1] = x.y;
      to[half * 4 + 2] = x.z;
      to[half * 4 + 3] = x.w;
    } else {
#pragma unroll
      for (int k = 0; k < 4; ++k) to[half * 4 + k] = first + k < rest ? from[first + k] : T(0);
    }
  }
}

template <bool kVector, class Vector, class T>
__device__ void store(T* into, int64_t rest, int lane, const T (&from)[kPerLane]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int first = half * (kQuantBlock / 2) + lane * 4;
    const T* x = from + half * 4;
    if (kVector) {
      *reinterpret_cast<Vector*>(into + first) = Vector{x[0], x[1], x[2], x[3]};
    } else {
#pragma unroll
      for (int k = 0; k < 4; ++k)
        if (first + k < rest) into[first + k] = x[k];
    }
  }
}

// A warp's block, of which `rest` values exist.
template <bool kVector>
__device__ void step_block(float* __restrict__ params, const float* __restrict__ grads,
                           uint8_t* __restrict__ exp_avg, uint8_t* __restrict__ exp_avg_sq,
                           float* __restrict__ exp_avg_absmax,
                           float* __restrict__ exp_avg_sq_absmax, const float* codes, int64_t rest,
                           float scale, const AdamWStep& step) {
  const int lane = threadIdx.x % 32;
  float p[kPerLane], g[kPerLane], m[kPerLane], v[kPerLane];
  uint8_t m_code[kPerLane], v_code[kPerLane];
  load<kVector, float4>(params, rest, lane, p);
  load<kVector, float4>(grads, rest, lane, g);
  load<kVector, uchar4>(exp_avg, rest, lane, m_code);
  load<kVector, uchar4>(exp_avg_sq, rest, lane, v_code);
  const float m_scale = *exp_avg_absmax, v_scale = *exp_avg_sq_absmax;
  float m_max = 0, v_max = 0;
#pragma unroll
  for (int k = 0; k < kPerLane; ++k) {
    m[k] = codes[m_code[k]] * m_scale;
    v[k] = codes[kQuantBlock + v_code[k]] * v_scale;
    step(g[k] * scale, p[k], m[k], v[k]);
    const bool inside = kVector || (k / 4) * (kQuantBlock / 2) + lane * 4 + k % 4 < rest;
    m_max = fmaxf(m_max, inside ? fabsf(m[k]) : 0.0f);
    v_max = fmaxf(v_max, inside ? v[k] : 0.0f);
  }
  m_max = warp_max(m_max);
  v_max = warp_max(v_max);
  const float m_inverse = block_inverse(m_max), v_inverse = block_inverse(v_max);
#pragma unroll
  for (int k = 0; k < kPerLane; ++k) {
    m_code[k] = signed_code(m[k] * m_inverse);
    v_code[k] = unsigned_code(v[k] * v_inverse);
  }
  store<kVector, float4>(params, rest, lane, p);
  store<kVector, uchar4>(exp_avg, rest, lane, m_code);
  store<kVector, uchar4>(exp_avg_sq, rest, lane, v_code);
  if (lane == 0) {
    *exp_avg_absmax = m_max;
    *exp_avg_sq_absmax = v_max;
  }
}

// For each block of 256 values, whose moments are codes with one absmax a block:
//
//   m = value(m_code) * m_absmax                v likewise
//   p, m, v = step(scale * grad, p, m, v)       AdamWStep
//   m_absmax = max |m| over the block           m_code = nearest code to m / m_absmax
__global__ void __launch_bounds__(kThreads)
    adamw_8bit_kernel(float* __restrict__ params,             // [count]
                      const float* __restrict__ grads,        // [count]
                      uint8_t* __restrict__ exp_avg,          // [count]
                      uint8_t* __restrict__ exp_avg_sq,       // [count]
                      float* __restrict__ exp_avg_absmax,     // [blocks]
                      float* __restrict__ exp_avg_sq_absmax,  // [blocks]
                      int64_t count, int64_t blocks, bool is_aligned, AdamWStep step) {
  __shared__ float codes[2 * kQuantBlock];
  codes[threadIdx.x] = signed_value(static_cast<uint8_t>(threadIdx.x));
  codes[kQuantBlock + threadIdx.x] = unsigned_value(static_cast<uint8_t>(threadIdx.x));
  __syncthreads();
  const float scale = step.scale();
  for (int64_t block = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; block < blocks;
       block += static_cast<int64_t>(gridDim.x) * kWarps) {
    const int64_t begin = block * kQuantBlock, rest = count - begin;
    // The branch is the same for the whole warp: its lanes take part in the same shuffles.
    if (is_aligned && rest >= kQuantBlock)
      step_block<true>(params + begin, grads + begin, exp_avg + begin, exp_avg_sq + begin,
                       exp_avg_absmax + block, exp_avg_sq_absmax + block, codes, rest, scale, step);
    else
      step_block<false>(params + begin, grads + begin, exp_avg + begin, exp_avg_sq + begin,
                        exp_avg_absmax + block, exp_avg_sq_absmax + block, codes, rest, scale,
                        step);
  }
}

}  // namespace

void adamw_8bit(const AdamW8bitArgs& a, void* stream) {
  if (!a.size) return;
  const bool is_aligned = aligned(a.params, 16) && aligned(a.grads, 16) && aligned(a.exp_avg, 4) &&
                          aligned(a.exp_avg_sq, 4);
  const int64_t blocks = ceil_div(a.size, kQuantBlock);
  const int64_t wanted = ceil_div(blocks, kWarps);
  const int64_t most = static_cast<int64_t>(multiprocessors("adamw_8bit")) * 16;
  launch("adamw_8bit", adamw_8bit_kernel, static_cast<unsigned>(wanted < most ? wanted : most),
         kThreads, 0, stream, a.params, a.grads, a.exp_avg, a.exp_avg_sq, a.exp_avg_absmax,
         a.exp_avg_sq_absmax, a.size, blocks, is_aligned, AdamWStep(a.hyper));
}

}  // namespace cuda
}  // namespace lora_engine
