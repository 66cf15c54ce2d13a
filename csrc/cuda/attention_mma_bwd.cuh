// Attention's backward kernels of mma.sync: one has tiles of queries and writes dQ, the other tiles
// of keys and writes dK and dV. Every sum is made by one warp in a fixed order: two runs give the
// same bits. The probabilities are made again from lse, in units of log 2:
//
//   P = exp2(scale S - lse)    dS = P (dO V^T - delta)    delta = the row's sum of O dO
//   dQ = scale dS K            dK = scale dS^T Q          dV = P^T dO
//
// The second holds scores transposed, keys down. Either way a warp has 16 rows, whose P and dS are
// left operands out of its registers.
#pragma once

#include "attention_mma.cuh"

namespace lora_engine {
namespace cuda {
namespace {

struct MmaBwd {
  const void *d_o, *q, *o;  // [tokens, heads, columns]
  const void *k, *v;        // [tokens, heads / group, columns]
  void *dq, *dk, *dv;       // as q, k and v
  const float* lse;         // [heads, tokens]
  float* delta;             // [heads, tokens], which the first kernel writes for the second
  const int* last;          // [sequences], the last that continues each, or 0; null: none does
  Packed packed;
  int64_t stride_do, stride_q, stride_o, stride_k, stride_v, stride_dq, stride_dk, stride_dv;
  int64_t tokens;
  int heads, group, columns;
  float scale;
};

// A thread block owns kRows of queries or keys and goes through tiles of kOthers of the other.
template <int kD>
struct MmaBwdShape {
  static constexpr int kWarps = 8, kThreads = 32 * kWarps, kRows = 16 * kWarps;
  static constexpr int kOthers = kD == 128 ? 32 : 64;
  static constexpr uint32_t kRowBytes = kD * 2, kWarpBytes = 16 * kRowBytes;
  static constexpr uint32_t kOwnBytes = kRows * kRowBytes, kOtherBytes = kOthers * kRowBytes;
  // Offsets in shared memory: of the two own tiles, and of the two others in two stages.
  static constexpr uint32_t kOwn = 0, kOther = 2 * kOwnBytes, kStage = 2 * kOtherBytes;
  static constexpr uint32_t kStats = kOther + 2 * kStage;  // of queries: [2] stages of lse, delta
  static constexpr uint32_t kStatBytes = 2 * kOthers * 4, kBytes = kStats + 2 * kStatBytes;
  static_assert(kBytes <= kMostShared, "fits every GPU");
  static_assert(kRows * 4 <= 2 * kStatBytes, "the own queries' delta lies in place of stats");
};

template <class T, int kD>
struct MmaDqKernel {
  using Shape = MmaBwdShape<kD>;
  static constexpr int kKeys = Shape::kOthers;
  using Walk = KeyWalk<Shape::kRows, kKeys>;

  const MmaBwd& a;
  const uint32_t shared;
  const Tile& tile;
  const int head;

  // At the first row of the sequence.
  __device__ const T* head_of(const void* x, int64_t stride) const {
    return static_cast<const T*>(x) + tile.begin * stride + head * a.columns;
  }

  __device__ void copy_keys(const Walk& walk, int stage) const {
    const uint32_t to = shared + Shape::kOther + stage * Shape::kStage;
    const int64_t token = walk.begin, column = head / a.group * a.columns;
    const T* k = static_cast<const T*>(a.k) + token * a.stride_k + column;
    const T* v = static_cast<const T*>(a.v) + token * a.stride_v + column;
    copy_rows<kD, kKeys, Shape::kThreads>(to, k, a.stride_k, walk.first, walk.length, a.columns);
    copy_rows<kD, kKeys, Shape::kThreads>(to + Shape::kOtherBytes, v, a.stride_v, walk.first,
                                          walk.length, a.columns);
  }

  // delta of all rows of the tile: into shared memory, and for the other kernel.
  __device__ void make_delta() const {
    constexpr int kLanes = kD / 8;
    const T *o = head_of(a.o, a.stride_o), *d_o = head_of(a.d_o, a.stride_do);
    const int chunk = threadIdx.x % kLanes;
#pragma unroll
    for (int i = 0; i < Shape::kRows * kLanes / Shape::kThreads; ++i) {
      const int row = i * (Shape::kThreads / kLanes) + threadIdx.x / kLanes;
      const int64_t query = tile.first + row;
      float delta = 0;
      if (query < tile.length && chunk * 8 < a.columns) {
        float x[8], y[8];
        load_eight(o + query * a.stride_o + chunk * 8, x);
        load_eight(d_o + query * a.stride_do + chunk * 8, y);
#pragma unroll
        for (int j = 0; j < 8; ++j) delta += x[j] * y[j];
      }
#pragma unroll
      for (int lanes = kLanes / 2; lanes; lanes /= 2)
        delta += __shfl_xor_sync(kFullWarp, delta, lanes);
      if (chunk) continue;
      store_float(shared + Shape::kStats + row * 4, delta);
      if (query < tile.length) a.delta[head * a.tokens + tile.begin + query] = delta;
    }
  }

  __device__ void run() const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int row = warp * 16 + lane / 4, column = lane % 4 * 2;  // of the thread's first score
    const uint32_t own = shared + Shape::kOwn + warp * Shape::kWarpBytes;
    const uint32_t own_do = own + Shape::kOwnBytes;
    copy_rows<kD, Shape::kRows, Shape::kThreads>(shared + Shape::kOwn, head_of(a.q, a.stride_q),
                                                 a.stride_q, tile.first, tile.length, a.columns);
    copy_rows<kD, Shape::kRows, Shape::kThreads>(shared + Shape::kOwn + Shape::kOwnBytes,
                                                 head_of(a.d_o, a.stride_do), a.stride_do,
                                                 tile.first, tile.length, a.columns);
    Walk walk(a.packed, tile);
    copy_keys(walk, 0);
    make_delta();
    __syncthreads();
    float lse[2], delta[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int query = tile.first + row + 8 * h;
      const bool exists = query < tile.length;
      lse[h] = exists ? a.lse[head * a.tokens + tile.begin + query] * kLog2E : 0;
      delta[h] = load_float(shared + Shape::kStats + (row + 8 * h) * 4);
    }
    const float scale = a.scale * kLog2E;
    Sums<1, kD> dq;
    clear<1, kD>(dq);
    int stage = 0;
    for (bool more = true; more; stage ^= 1) {
      const Sight<16, kKeys> sight{a.packed, walk.row + warp * 16,
                                   walk.row + tile.length - tile.first, walk.first, walk.length};
      const uint32_t k = shared + Shape::kOther + stage * Shape::kStage;
      await_copies();
      __syncthreads();
      more = walk.next();
      if (more) copy_keys(walk, stage ^ 1);
      if (!sight.any()) continue;
      Sums<1, kKeys> p, ds;
      multiply_rows<T, kD, 1, kKeys>(p, own, k);
      multiply_rows<T, kD, 1, kKeys>(ds, own_do, k + Shape::kOtherBytes);
      const bool whole = sight.all();
#pragma unroll
      for (int i = 0; i < kKeys / 8; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const bool counts = whole || sight.sees(lane / 4 + j / 2 * 8, column + 8 * i + j % 2);
          const float x = counts ? exp2_of(p[0][i][j] * scale - lse[j / 2]) : 0.0f;
          ds[0][i][j] = x * (ds[0][i][j] - delta[j / 2]);
        }
      add_product<T, kD, 1, kKeys>(dq, ds, k);
    }
    T* out = static_cast<T*>(a.dq) + tile.begin * a.stride_dq + head * a.columns;
    store_rows<T, kD>(dq[0], {a.scale, a.scale}, own, out, a.stride_dq, tile.first + warp * 16,
                      tile.length, a.columns);
  }
};

template <class T, int kD>
struct MmaDkvKernel {
  using Shape = MmaBwdShape<kD>;
  static constexpr int kQueries = Shape::kOthers, kKeys = Shape::kRows;
  using Walk = QueryWalk<kQueries, kKeys>;

  const MmaBwd& a;
  const uint32_t shared;
  const Tile& tile;
  const int kv_head;

  // Queries that do not exist are rows of zeros, as their statistics are: they add nothing.
  __device__ void copy_queries(const Walk& walk, int stage) const {
    const uint32_t to = shared + Shape::kOther + stage * Shape::kStage;
    const int64_t token = walk.begin, head = kv_head * a.group + walk.member;
    const T* q = static_cast<const T*>(a.q) + token * a.stride_q + head * a.columns;
    const T* d_o = static_cast<const T*>(a.d_o) + token * a.stride_do + head * a.columns;
    copy_rows<kD, kQueries, Shape::kThreads>(to, q, a.stride_q, walk.first, walk.length, a.columns);
    copy_rows<kD, kQueries, Shape::kThreads>(to + Shape::kOtherBytes, d_o, a.stride_do, walk.first,
                                             walk.length, a.columns);
    if (threadIdx.x < 2 * kQueries) {
      const int query = walk.first + threadIdx.x % kQueries;
      const float* from = (threadIdx.x < kQueries ? a.lse : a.delta) + head * a.tokens + token;
      const bool exists = query < walk.length;
      copy_async<4>(shared + Shape::kStats + stage * Shape::kStatBytes + threadIdx.x * 4,
                    exists ? from + query : from, exists);
    }
  }

  __device__ void run() const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int row = lane / 4, column = lane % 4 * 2;  // of the thread's first score
    const int64_t token = tile.begin, first_column = kv_head * a.columns;
    const uint32_t own_k = shared + Shape::kOwn + warp * Shape::kWarpBytes;
    const uint32_t own_v = own_k + Shape::kOwnBytes;
    copy_rows<kD, kKeys, Shape::kThreads>(
        shared + Shape::kOwn, static_cast<const T*>(a.k) + token * a.stride_k + first_column,
        a.stride_k, tile.first, tile.length, a.columns);
    copy_rows<kD, kKeys, Shape::kThreads>(
        shared + Shape::kOwn + Shape::kOwnBytes,
        static_cast<const T*>(a.v) + token * a.stride_v + first_column, a.stride_v, tile.first,
        tile.length, a.columns);
    Walk walk(a.packed, tile, a.group, a.last ? a.last[tile.sequence] : 0);
    copy_queries(walk, 0);
    const float scale = a.scale * kLog2E;
    Sums<1, kD> dk, dv;
    clear<1, kD>(dk);
    clear<1, kD>(dv);
    int stage = 0;
    for (bool more = true; more; stage ^= 1) {
      const Sight<kQueries, 16> sight{a.packed, walk.first, walk.length, walk.key + warp * 16,
                                      walk.key + tile.length - tile.first};
      const uint32_t q = shared + Shape::kOther + stage * Shape::kStage;
      const uint32_t d_o = q + Shape::kOtherBytes;
      const uint32_t stats = shared + Shape::kStats + stage * Shape::kStatBytes + column * 4;
      await_copies();
      __syncthreads();
      more = walk.next();
      if (more) copy_queries(walk, stage ^ 1);
      if (!sight.any()) continue;
      Sums<1, kQueries> p, ds;
      multiply_rows<T, kD, 1, kQueries>(p, own_k, q);
      const bool whole = sight.all();
#pragma unroll
      for (int i = 0; i < kQueries / 8; ++i) {
        float lse[2];
        load_floats(lse, stats + i * 32);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const bool counts = whole || sight.sees(column + 8 * i + j % 2, row + j / 2 * 8);
          p[0][i][j] = counts ? exp2_of(p[0][i][j] * scale - lse[j % 2] * kLog2E) : 0.0f;
        }
      }
      add_product<T, kD, 1, kQueries>(dv, p, d_o);
      multiply_rows<T, kD, 1, kQueries>(ds, own_v, d_o);
#pragma unroll
      for (int i = 0; i < kQueries / 8; ++i) {
        float delta[2];
        load_floats(delta, stats + kQueries * 4 + i * 32);
#pragma unroll
        for (int j = 0; j < 4; ++j) ds[0][i][j] = p[0][i][j] * (ds[0][i][j] - delta[j % 2]);
      }
      add_product<T, kD, 1, kQueries>(dk, ds, q);
    }
    const int first = tile.first + warp * 16;
    store_rows<T, kD>(dk[0], {a.scale, a.scale}, own_k,
                      static_cast<T*>(a.dk) + token * a.stride_dk + first_column, a.stride_dk,
                      first, tile.length, a.columns);
    store_rows<T, kD>(dv[0], {1.0f, 1.0f}, own_v,
                      static_cast<T*>(a.dv) + token * a.stride_dv + first_column, a.stride_dv,
                      first, tile.length, a.columns);
  }
};

// Under a causal mask the last tile of a sequence has most keys, and the first of keys most
// queries: those come first.
template <class T, int kD>
__global__ void __launch_bounds__(MmaBwdShape<kD>::kThreads)
    attention_mma_dq_kernel(const __grid_constant__ MmaBwd a) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const int tiles = gridDim.x / a.heads;
  const Tile tile(a.packed.cu_seqlens, a.packed.sequences, tiles - 1 - blockIdx.x / a.heads,
                  MmaBwdShape<kD>::kRows);
  if (tile.first >= tile.length) return;
  const MmaDqKernel<T, kD> kernel{a, shared_address(memory), tile,
                                  static_cast<int>(blockIdx.x) % a.heads};
  kernel.run();
}

template <class T, int kD>
__global__ void __launch_bounds__(MmaBwdShape<kD>::kThreads)
    attention_mma_dkv_kernel(const __grid_constant__ MmaBwd a) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const int kv_heads = a.heads / a.group;
  const Tile tile(a.packed.cu_seqlens, a.packed.sequences, blockIdx.x / kv_heads,
                  MmaBwdShape<kD>::kRows);
  if (tile.first >= tile.length) return;
  const MmaDkvKernel<T, kD> kernel{a, shared_address(memory), tile,
                                   static_cast<int>(blockIdx.x) % kv_heads};
  kernel.run();
}

// last = the last sequence that continues each, directly or not; it holds zeros.
__global__ void attention_mma_last_kernel(const int* parents, int* last, int sequences) {
  const int sequence = blockIdx.x * blockDim.x + threadIdx.x;
  if (sequence >= sequences) return;
  for (int a = parents[sequence]; a >= 0; a = parents[a]) atomicMax(last + a, sequence);
}

}  // namespace
}  // namespace cuda
}  // namespace lora_engine
