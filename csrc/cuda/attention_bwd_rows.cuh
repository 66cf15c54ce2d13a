// The passes over rows before and after attention's backward pass over tiles of keys.
#pragma once

#include "attention_bwd_tiles.cuh"

namespace lora_engine {
namespace cuda {
namespace {

constexpr int kRowThreads = 256;

struct AttentionBwdRows {
  const void* o;          // [tokens, heads, D], tokens `stride_o` elements apart
  const void* d_o;        // [tokens, heads, D]
  const float* lse;       // [heads, tokens]
  float* stats;           // [heads, query_tiles, 2, kQueries]
  float* dq_sum;          // [heads, query_tiles, kQueries * D]
  void* dq;               // [tokens, heads, D]
  const int* cu_seqlens;  // [sequences + 1]
  int* order;             // [key_tiles]
  int64_t stride_o, stride_do, stride_dq;
  int tokens, sequences, heads, query_tiles, key_tiles;
  float scale;
};

// A class is half an octave of work: up to 1.5 times a power of two, or from there on. In a class
// the tiles keep their order: neighbours go through the same queries, and find them in the L2
// cache.
constexpr int kClasses = 64;
__device__ inline int class_of(int count) {
  if (!count) return 0;
  const int octave = 31 - __clz(count);
  return 1 + 2 * octave + (octave ? count >> (octave - 1) & 1 : 0);
}

// order = the tiles of keys, those of the highest class first; by one thread block.
template <int kD, bool kCausal>
__device__ void order_tiles(const AttentionBwdRows& a) {
  using Shape = BwdShape<kD, kCausal>;
  __shared__ int8_t classes[kRowThreads];
  __shared__ int sizes[kClasses];
  int place = 0;  // where thread i puts the next tile of class i
  for (int pass = 0; pass < 2; ++pass) {
    for (int begin = 0; begin < a.key_tiles; begin += kRowThreads) {
      const int tile = begin + threadIdx.x;
      if (tile < a.key_tiles)
        classes[threadIdx.x] = static_cast<int8_t>(class_of(
            Shape::count_query_tiles(Tile(a.cu_seqlens, a.sequences, tile, Shape::kKeys))));
      __syncthreads();
      const int count = min(kRowThreads, a.key_tiles - begin);
      if (threadIdx.x < kClasses)
        for (int i = 0; i < count; ++i)
          if (classes[i] == static_cast<int>(threadIdx.x)) {
            if (pass) a.order[place] = begin + i;
            ++place;
          }
      __syncthreads();
    }
    if (threadIdx.x < kClasses) sizes[threadIdx.x] = place;
    __syncthreads();
    place = 0;
    for (int i = threadIdx.x + 1; i < kClasses; ++i) place += sizes[i];
  }
}

// stats = lse log2 e, and delta = the row's sum of o d_o; dq_sum = 0. A thread block has the tile
// of queries of one head. The first one orders the tiles of keys for the next kernel instead.
template <class T, int kD, bool kCausal>
__global__ void __launch_bounds__(kRowThreads)
    attention_bwd_delta_kernel(const AttentionBwdRows a) {
  constexpr int kQueries = BwdShape<kD, kCausal>::kQueries, kLanes = kD / 8;
  if (blockIdx.x == 0) {
    order_tiles<kD, kCausal>(a);
    return;
  }
  const int block = blockIdx.x - 1, head = block % a.heads, query_tile = block / a.heads;
  const Tile tile(a.cu_seqlens, a.sequences, query_tile, kQueries);
  const int rows = tile.length - tile.first;
  if (rows <= 0) return;
  const int64_t place = static_cast<int64_t>(head) * a.query_tiles + query_tile;
  float* stats = a.stats + place * (2 * kQueries);
  float* sum = a.dq_sum + place * (kQueries * kD);
  for (int i = threadIdx.x * 4; i < kQueries * kD; i += kRowThreads * 4)
    *reinterpret_cast<float4*>(sum + i) = make_float4(0, 0, 0, 0);
  const int lane = threadIdx.x % kLanes;
#pragma unroll
  for (int i = 0; i < kQueries * kLanes / kRowThreads; ++i) {
    const int row = i * (kRowThreads / kLanes) + threadIdx.x / kLanes;
    float delta = 0, lse = __int_as_float(0x7f800000);
    if (row < rows) {
      const int64_t token = tile.begin + tile.first + row;
      float x[8], y[8];
      load_eight(static_cast<const T*>(a.o) + token * a.stride_o + head * kD + lane * 8, x);
      load_eight(static_cast<const T*>(a.d_o) + token * a.stride_do + head * kD + lane * 8, y);
#pragma unroll
      for (int j = 0; j < 8; ++j) delta += x[j] * y[j];
      lse = a.lse[static_cast<int64_t>(head) * a.tokens + token] * kLog2E;
    }
    for (int lanes = kLanes / 2; lanes; lanes /= 2)
      delta += __shfl_xor_sync(kFullWarp, delta, lanes);
    if (lane == 0) {
      stats[row] = lse;
      stats[kQueries + row] = delta;
    }
  }
}

// dq = scale dq_sum. A thread takes eight columns of a row: pairs that four lanes of a product had.
template <class T, int kD>
__global__ void __launch_bounds__(kRowThreads) attention_bwd_dq_kernel(const AttentionBwdRows a) {
  constexpr int kQueries = BwdShape<kD, true>::kQueries;
  const int head = blockIdx.x % a.heads, query_tile = blockIdx.x / a.heads;
  const Tile tile(a.cu_seqlens, a.sequences, query_tile, kQueries);
  const int rows = tile.length - tile.first;
  if (rows <= 0) return;
  const int64_t place = static_cast<int64_t>(head) * a.query_tiles + query_tile;
  const float* sum = a.dq_sum + place * (kQueries * kD);
  T* dq = static_cast<T*>(a.dq) + (tile.begin + tile.first) * a.stride_dq + head * kD;
#pragma unroll
  for (int i = threadIdx.x; i < kQueries * kD / 8; i += kRowThreads) {
    const int columns = i % 8, half = i / 8 % 2, quad = i / 16 % 32, group = i / 512;
    const int row = quad / 8 * 16 + half * 8 + quad % 8 + (kD == 64 ? group * 64 : 0);
    if (row >= rows) continue;
    const float* from =
        sum + group * 4096 + quad / 8 * 1024 + columns * 128 + quad % 8 * 16 + half * 2;
    float x[8];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 pair = *reinterpret_cast<const float2*>(from + 4 * j);
      x[2 * j] = pair.x * a.scale;
      x[2 * j + 1] = pair.y * a.scale;
    }
    store_vector(dq + row * a.stride_dq + columns * 8 + (kD == 64 ? 0 : group * 64), x);
  }
}

}  // namespace
}  // namespace cuda
}  // namespace lora_engine
