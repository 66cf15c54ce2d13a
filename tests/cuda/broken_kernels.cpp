// Kernels that use everything the emulation offers, and kernels with the mistakes it should find.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "launch.cuh"

namespace {

namespace cuda = lora_engine::cuda;
using Floats = std::vector<float>;

__device__ float block_sum(float x) {
  __shared__ float warps[32];
  for (int lanes = 16; lanes; lanes /= 2) x += __shfl_xor_sync(cuda::kFullWarp, x, lanes);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0;
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) sum += warps[warp];
  return sum;
}

__global__ void sum_kernel(const float* x, float* y) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  y[i] = block_sum(x[i]);
}

// One line of results for each kind of shuffle.
__global__ void shuffle_kernel(float* y) {
  const unsigned lane = threadIdx.x;
  const float x = static_cast<float>(lane);
  y[lane] = __shfl_sync(cuda::kFullWarp, x, 3);
  y[32 + lane] = __shfl_up_sync(cuda::kFullWarp, x, 2);
  y[64 + lane] = __shfl_down_sync(cuda::kFullWarp, x, 2);
  y[96 + lane] = __shfl_xor_sync(cuda::kFullWarp, x, 1);
  y[128 + lane] = static_cast<float>(__ballot_sync(cuda::kFullWarp, lane == 1 || lane == 4));
  if (lane < 16) y[160 + lane] = __shfl_xor_sync(0xffffu, x, 15);
}

// The neighbour's value, with the barrier or without it.
template <bool kBarrier>
__global__ void neighbour_kernel(const float* x, float* y) {
  LORA_ENGINE_DYNAMIC_SHARED(float, values);
  values[threadIdx.x] = x[threadIdx.x];
  if (kBarrier) __syncthreads();
  y[threadIdx.x] = values[(threadIdx.x + 1) % blockDim.x];
}

// What is in shared memory that nobody wrote.
__global__ void unwritten_kernel(const float* x, float* y) {
  __shared__ float value;
  y[blockIdx.x * blockDim.x + threadIdx.x] = value;
  __syncthreads();
  value = x[0];
}

__global__ void early_exit_kernel(float*) {
  if (threadIdx.x == 5) return;
  __syncthreads();
}

__global__ void two_barriers_kernel(float*) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
}

__global__ void exited_lane_kernel(float* y) {
  if (threadIdx.x == 7) return;
  y[threadIdx.x] = __shfl_xor_sync(cuda::kFullWarp, 1.0f, 1);
}

__global__ void outside_mask_kernel(float* y) {
  if (threadIdx.x < 16) y[threadIdx.x] = __shfl_xor_sync(0xffffu, 1.0f, 16);
}

__global__ void not_in_mask_kernel(float* y) { y[threadIdx.x] = __shfl_xor_sync(0xffffu, 1.0f, 1); }

template <class Kernel>
Floats run(Kernel kernel, const Floats& x, unsigned blocks, unsigned threads, unsigned results) {
  Floats y(results, -1.0f);
  cuda::launch("kernel", kernel, blocks, threads, threads * sizeof(float), nullptr, x.data(),
               y.data());
  return y;
}

template <class Kernel>
Floats run(Kernel kernel, unsigned threads, unsigned results) {
  Floats y(results, -1.0f);
  cuda::launch("kernel", kernel, 1, threads, 0, nullptr, y.data());
  return y;
}

}  // namespace

PYBIND11_MODULE(broken_kernels, m) {
  m.def("block_sums", [](Floats x) { return run(sum_kernel, x, 2, 96, 192); });
  m.def("shuffles", [] { return run(shuffle_kernel, 32, 192); });
  m.def("neighbours", [](Floats x, bool barrier) {
    return run(barrier ? neighbour_kernel<true> : neighbour_kernel<false>, x, 1, 64, 64);
  });
  m.def("unwritten", [](Floats x) { return run(unwritten_kernel, x, 3, 32, 96); });
  m.def("early_exit", [] { return run(early_exit_kernel, 64, 1); });
  m.def("two_barriers", [] { return run(two_barriers_kernel, 64, 1); });
  m.def("exited_lane", [] { return run(exited_lane_kernel, 32, 32); });
  m.def("outside_mask", [] { return run(outside_mask_kernel, 32, 32); });
  m.def("not_in_mask", [] { return run(not_in_mask_kernel, 32, 32); });
}
