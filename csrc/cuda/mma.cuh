// Instructions of sm_80 on: asynchronous copies into tiles of shared memory, and products of warps.
//
// A tile is rows of kD 16-bit elements. The 16 bytes `chunk` of a row are at place(row, chunk):
// eight rows' chunks of one column lie in different banks. Products read tiles by matrices of 8 by
// 8; a warp's sum of 16 rows is [kD / 8][4], registers as mma.m16n8k16 has them.
#pragma once

#include <cstdint>

#include "elements.cuh"

namespace lora_engine {
namespace cuda {
namespace {

template <int kD>
__device__ inline uint32_t place(int row, int chunk) {
  return row * (kD * 2) + ((chunk ^ (row & 7)) << 4);
}

// ---- copies

// Of kBytes, or as many zeros where there is nothing to copy.
template <int kBytes>
__device__ inline void copy_async(uint32_t to, const void* from, bool exists) {
  const uint32_t size = exists ? kBytes : 0;
  const uint64_t source = __cvta_generic_to_global(from);
  if (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(source), "r"(size)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(source),
                 "n"(kBytes), "r"(size)
                 : "memory");
}
// Waits for this thread's copies; a barrier shows it those of others.
__device__ inline void await_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Rows [first, first + kRows) of a head [length, columns]: zero from `length` and `columns` on.
template <int kD, int kRows, int kThreads, class T>
__device__ inline void copy_rows(uint32_t tile, const T* head, int64_t stride, int first,
                                 int length, int columns) {
  constexpr int kChunks = kD / 8;
#pragma unroll
  for (int i = 0; i < kRows * kChunks / kThreads; ++i) {
    const int at = i * kThreads + threadIdx.x, row = at / kChunks, chunk = at % kChunks;
    const bool exists = first + row < length && chunk * 8 < columns;
    copy_async<16>(tile + place<kD>(row, chunk),
                   exists ? head + (first + row) * stride + chunk * 8 : head, exists);
  }
}

__device__ inline void store_float(uint32_t to, float x) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(x) : "memory");
}
__device__ inline float load_float(uint32_t from) {
  float x;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(from) : "memory");
  return x;
}
__device__ inline void load_floats(float (&x)[2], uint32_t from) {
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x[0]), "=f"(x[1]) : "r"(from) : "memory");
}

// ---- products

// Four matrices; lanes 8 i to 8 i + 7 give the addresses of the rows of matrix i.
__device__ inline void load_matrices(uint32_t (&x)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address));
}
__device__ inline void load_transposed(uint32_t (&x)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address));
}

// c += a b with a [16, 16] and b [16, 8].
__device__ inline void multiply(BFloat16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline void multiply(Float16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <int kRowTiles, int kColumns>
using Sums = float[kRowTiles][kColumns / 8][4];

template <int kRowTiles, int kColumns>
__device__ inline void clear(Sums<kRowTiles, kColumns>& c) {
#pragma unroll
  for (int t = 0; t < kRowTiles; ++t)
#pragma unroll
    for (int i = 0; i < kColumns / 8; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) c[t][i][j] = 0;
}

// c = left right^T over kD columns: the warp's rows of the tile `left`, all kRows of `right`.
template <class T, int kD, int kRowTiles, int kRows>
__device__ inline void multiply_rows(Sums<kRowTiles, kRows>& c, uint32_t left, uint32_t right) {
  constexpr uint32_t kTileBytes = 16 * kD * 2;
  const int lane = threadIdx.x % 32;
  const uint32_t own = left + place<kD>(lane % 16, lane / 16);
  const uint32_t other = right + place<kD>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  clear<kRowTiles, kRows>(c);
#pragma unroll
  for (int k = 0; k < kD / 16; ++k) {
    uint32_t a[kRowTiles][4];
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t) load_matrices(a[t], (own ^ k * 32) + t * kTileBytes);
#pragma unroll
    for (int n = 0; n < kRows / 16; ++n) {
      uint32_t b[4];
      load_matrices(b, (other ^ k * 32) + n * kTileBytes);
#pragma unroll
      for (int t = 0; t < kRowTiles; ++t) {
        multiply(T{}, c[t][2 * n], a[t], b[0], b[1]);
        multiply(T{}, c[t][2 * n + 1], a[t], b[2], b[3]);
      }
    }
  }
}

// c += left right over kRows columns of `left`, which are rows of the tile `right`.
template <class T, int kD, int kRowTiles, int kRows>
__device__ inline void add_product(Sums<kRowTiles, kD>& c, const Sums<kRowTiles, kRows>& left,
                                   uint32_t right) {
  const int lane = threadIdx.x % 32;
  const uint32_t other = right + place<kD>(lane % 16, lane / 16);
#pragma unroll
  for (int k = 0; k < kRows / 16; ++k) {
    uint32_t a[kRowTiles][4];
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float* x = left[t][2 * k + j / 2] + j % 2 * 2;
        a[t][j] = rounded_pair(T{}, x[0], x[1]);
      }
#pragma unroll
    for (int n = 0; n < kD / 16; ++n) {
      uint32_t b[4];
      load_transposed(b, (other ^ n * 32) + k * (16 * kD * 2));
#pragma unroll
      for (int t = 0; t < kRowTiles; ++t) {
        multiply(T{}, c[t][2 * n], a[t], b[0], b[1]);
        multiply(T{}, c[t][2 * n + 1], a[t], b[2], b[3]);
      }
    }
  }
}

// Writes 16 rows of a warp's sum to rows [first, length) of a head, by way of the warp's own 16
// rows in shared memory. factor: of the rows of a lane, lane / 4 and eight more.
template <class T, int kD>
__device__ inline void store_rows(const float (&c)[kD / 8][4], const float (&factor)[2],
                                  uint32_t rows, T* head, int64_t stride, int first, int length,
                                  int columns) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const uint32_t to = rows + lane % 4 * 4;
#pragma unroll
    for (int i = 0; i < kD / 8; ++i)
      asm volatile("st.shared.b32 [%0], %1;" ::"r"(to + place<kD>(lane / 4 + 8 * h, i)),
                   "r"(rounded_pair(T{}, c[i][2 * h] * factor[h], c[i][2 * h + 1] * factor[h]))
                   : "memory");
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 16 * (kD / 8) / 32; ++i) {
    const int at = i * 32 + lane, row = at / (kD / 8), chunk = at % (kD / 8);
    uint4 x;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(rows + place<kD>(row, chunk))
                 : "memory");
    if (first + row < length && chunk * 8 < columns)
      store_bytes(head + (first + row) * stride + chunk * 8, x);
  }
}

}  // namespace
}  // namespace cuda
}  // namespace lora_engine
