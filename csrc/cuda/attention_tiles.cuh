// What all of attention's kernels share: how packed sequences are cut into tiles, and exponentials.
#pragma once

#include "launch.cuh"

namespace lora_engine {
namespace cuda {
namespace {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr int kNoWindow = 1 << 30;

__device__ inline float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Sequence i of a packed row owns the tiles from cu_seqlens[i] / size + i on: as many as it needs
// or one more, which is empty.
struct Tile {
  int sequence, begin, length, first;  // first: of the tile, counted from the sequence's begin

  __device__ Tile(const int* cu_seqlens, int sequences, int tile, int size) {
    int low = 0, high = sequences;  // the sequence lies in [low, high)
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (first_of(cu_seqlens, middle, size) <= tile)
        low = middle;
      else
        high = middle;
    }
    sequence = low;
    begin = cu_seqlens[low];
    length = cu_seqlens[low + 1] - begin;
    first = (tile - first_of(cu_seqlens, low, size)) * size;
  }
  __device__ static int first_of(const int* cu_seqlens, int sequence, int size) {
    return cu_seqlens[sequence] / size + sequence;
  }
};

}  // namespace
}  // namespace cuda
}  // namespace lora_engine
