// More live values than registers: compiled with -maxrregcount=16 it must spill.
__global__ void spilling_kernel(const float* x, float* y) {
  float values[40];
#pragma unroll
  for (int i = 0; i < 40; ++i) values[i] = x[threadIdx.x * 40 + i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 40; ++i) y[threadIdx.x * 40 + 39 - i] = values[i] * values[(i + 7) % 40];
}

__global__ void crowded_kernel(float* y) {
  __shared__ float values[11000];
  values[threadIdx.x] = y[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = values[threadIdx.x + 1];
}
