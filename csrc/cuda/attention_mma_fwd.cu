// Attention's forward pass with mma.sync and cp.async, for GPUs of capability 8.0 and later.
//
// A thread block has a tile of queries of one head, a warp 32 of them. Tiles of K and V come one
// ahead of the one that is worked on:
//
//   S = Q K^T    P = exp2(scale S - max)    O = O * correction + P V
#include "launchers.hpp"

#ifdef __CUDACC__

#include "attention_mma.cuh"

namespace lora_engine {
namespace cuda {
namespace {

constexpr const char* kName = "attention_mma_fwd";

struct MmaFwd {
  const void *q, *k, *v;  // [tokens, heads, columns], of k and v [tokens, heads / group, columns]
  void* o;                // as q
  float* lse;             // [heads, tokens]
  Packed packed;
  int64_t stride_q, stride_k, stride_v, stride_o;  // of tokens
  int64_t tokens;
  int heads, group, columns;
  float scale;  // of scores, positive, in units of log 2
};

template <int kD>
struct MmaFwdShape {
  static constexpr int kWarps = 4, kRowTiles = 2, kThreads = 32 * kWarps;
  static constexpr int kWarpRows = 16 * kRowTiles, kQueries = kWarps * kWarpRows;
  static constexpr int kKeys = kD == 128 ? 32 : 64;
  static constexpr uint32_t kRowBytes = kD * 2, kKeyBytes = kKeys * kRowBytes;
  // Offsets in shared memory; K and V have two stages.
  static constexpr uint32_t kQ = 0, kK = kQueries * kRowBytes, kV = kK + 2 * kKeyBytes;
  static constexpr uint32_t kBytes = kV + 2 * kKeyBytes;
  static_assert(kBytes <= kMostShared, "fits every GPU");
};

template <class T, int kD>
struct MmaFwdKernel {
  using Shape = MmaFwdShape<kD>;
  using Walk = KeyWalk<Shape::kQueries, Shape::kKeys>;
  static constexpr int kKeys = Shape::kKeys, kRowTiles = Shape::kRowTiles;

  const MmaFwd& a;
  const uint32_t shared;
  const Tile& tile;
  const int head;

  __device__ uint32_t k_of(int stage) const {
    return shared + Shape::kK + stage * Shape::kKeyBytes;
  }
  __device__ uint32_t v_of(int stage) const {
    return shared + Shape::kV + stage * Shape::kKeyBytes;
  }

  __device__ void copy_keys(const Walk& walk, int stage) const {
    const int64_t token = walk.begin, column = head / a.group * a.columns;
    const T* k = static_cast<const T*>(a.k) + token * a.stride_k + column;
    const T* v = static_cast<const T*>(a.v) + token * a.stride_v + column;
    copy_rows<kD, kKeys, Shape::kThreads>(k_of(stage), k, a.stride_k, walk.first, walk.length,
                                          a.columns);
    copy_rows<kD, kKeys, Shape::kThreads>(v_of(stage), v, a.stride_v, walk.first, walk.length,
                                          a.columns);
  }

  // Scores that do not count become -inf. row, column: the thread's first.
  __device__ static void mask(Sums<kRowTiles, kKeys>& s,
                              const Sight<Shape::kWarpRows, kKeys>& sight, int row, int column) {
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t)
#pragma unroll
      for (int i = 0; i < kKeys / 8; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j)
          if (!sight.sees(row + 16 * t + j / 2 * 8, column + 8 * i + j % 2)) s[t][i][j] = -INFINITY;
  }

  // Makes scores exponentials of two rows of a thread, and puts right what was summed with the old
  // maximum.
  __device__ void exponentials(float (&s)[kKeys / 8][4], float (&o)[kD / 8][4], float (&m)[2],
                               float (&total)[2]) const {
    float correction[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float most = m[h];
#pragma unroll
      for (int i = 0; i < kKeys / 8; ++i) most = fmaxf(most, fmaxf(s[i][2 * h], s[i][2 * h + 1]));
      most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, 1));
      most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, 2));
      // A query that has seen no key yet: -inf - -inf would be NaN.
      const float base = most == -INFINITY ? 0.0f : most * a.scale;
      correction[h] = exp2_of(m[h] * a.scale - base);
      m[h] = most;
      float sum = 0;
#pragma unroll
      for (int i = 0; i < kKeys / 8; ++i)
#pragma unroll
        for (int j = 2 * h; j < 2 * h + 2; ++j) {
          s[i][j] = exp2_of(s[i][j] * a.scale - base);
          sum += s[i][j];
        }
      total[h] = total[h] * correction[h] + sum;
    }
    // The maximum of most rows is among the first keys.
    if (!__any_sync(kFullWarp, correction[0] != 1 || correction[1] != 1)) return;
#pragma unroll
    for (int i = 0; i < kD / 8; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) o[i][j] *= correction[j / 2];
  }

  __device__ void run() const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int row = lane / 4, column = lane % 4 * 2;
    const int64_t token = tile.begin;
    const T* q = static_cast<const T*>(a.q) + token * a.stride_q + head * a.columns;
    copy_rows<kD, Shape::kQueries, Shape::kThreads>(shared + Shape::kQ, q, a.stride_q, tile.first,
                                                    tile.length, a.columns);
    Walk walk(a.packed, tile);
    copy_keys(walk, 0);
    const uint32_t queries = shared + Shape::kQ + warp * Shape::kWarpRows * Shape::kRowBytes;
    Sums<kRowTiles, kD> o;
    clear<kRowTiles, kD>(o);
    float m[kRowTiles][2], total[kRowTiles][2];
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t)
#pragma unroll
      for (int h = 0; h < 2; ++h) m[t][h] = -INFINITY, total[t][h] = 0;
    int stage = 0;
    for (bool more = true; more; stage ^= 1) {
      const Sight<Shape::kWarpRows, kKeys> sight{a.packed, walk.row + warp * Shape::kWarpRows,
                                                 walk.row + tile.length - tile.first, walk.first,
                                                 walk.length};
      await_copies();
      __syncthreads();
      more = walk.next();
      if (more) copy_keys(walk, stage ^ 1);
      if (!sight.any()) continue;
      Sums<kRowTiles, kKeys> s;
      multiply_rows<T, kD, kRowTiles, kKeys>(s, queries, k_of(stage));
      if (!sight.all()) mask(s, sight, row, column);
#pragma unroll
      for (int t = 0; t < kRowTiles; ++t) exponentials(s[t], o[t], m[t], total[t]);
      add_product<T, kD, kRowTiles, kKeys>(o, s, v_of(stage));
    }
    T* out = static_cast<T*>(a.o) + token * a.stride_o + head * a.columns;
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t) {
      const int first = tile.first + warp * Shape::kWarpRows + 16 * t;
      float inverse[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float& sum = total[t][h];
        sum += __shfl_xor_sync(kFullWarp, sum, 1);
        sum += __shfl_xor_sync(kFullWarp, sum, 2);
        inverse[h] = 1.0f / sum;
        const int query = first + row + 8 * h;
        if (lane % 4 == 0 && query < tile.length)
          a.lse[head * a.tokens + token + query] = (m[t][h] * a.scale + __log2f(sum)) * kLn2;
      }
      store_rows<T, kD>(o[t], inverse, queries + t * 16 * Shape::kRowBytes, out, a.stride_o, first,
                        tile.length, a.columns);
    }
  }
};

// o = softmax(scale q k^T) v and lse, row by row. Under a causal mask the last tile of a sequence
// has most keys and comes first.
template <class T, int kD>
__global__ void __launch_bounds__(MmaFwdShape<kD>::kThreads)
    attention_mma_fwd_kernel(const __grid_constant__ MmaFwd a) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const int tiles = gridDim.x / a.heads;
  const Tile tile(a.packed.cu_seqlens, a.packed.sequences, tiles - 1 - blockIdx.x / a.heads,
                  MmaFwdShape<kD>::kQueries);
  if (tile.first >= tile.length) return;
  const MmaFwdKernel<T, kD> kernel{a, shared_address(memory), tile,
                                   static_cast<int>(blockIdx.x) % a.heads};
  kernel.run();
}

template <class T, int kD>
void run(const AttentionMmaFwdArgs& a, void* stream) {
  using Shape = MmaFwdShape<kD>;
  MmaFwd call;
  call.q = a.q, call.k = a.k, call.v = a.v, call.o = a.o, call.lse = a.lse;
  call.packed = packed_of(a);
  call.stride_q = a.stride_q, call.stride_k = a.stride_k;
  call.stride_v = a.stride_v, call.stride_o = a.stride_o;
  call.tokens = a.tokens;
  call.heads = static_cast<int>(a.heads);
  call.group = static_cast<int>(a.heads / a.kv_heads);
  call.columns = static_cast<int>(a.head_dim);
  call.scale = static_cast<float>(a.scale) * kLog2E;
  const int64_t tiles = a.tokens / Shape::kQueries + a.sequences;
  launch(kName, attention_mma_fwd_kernel<T, kD>, static_cast<unsigned>(tiles * a.heads),
         Shape::kThreads, Shape::kBytes, stream, call);
}

}  // namespace

void attention_mma_fwd(const AttentionMmaFwdArgs& a, void* stream) {
  by_type_and_size(kName, a, [&](auto type, auto size) {
    run<decltype(type), decltype(size)::value>(a, stream);
  });
}

}  // namespace cuda
}  // namespace lora_engine

#else  // emulated: there are no tensor cores

#include <stdexcept>

void lora_engine::cuda::attention_mma_fwd(const AttentionMmaFwdArgs&, void*) {
  throw std::runtime_error("attention_mma_fwd: needs a GPU of capability 8.0");
}

#endif
