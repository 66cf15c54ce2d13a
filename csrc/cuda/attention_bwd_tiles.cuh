// Attention's backward pass over a tile of keys, on tensor cores of sm_90a.
//
// Scores are held transposed, keys down, so that P^T and dS^T are left operands out of registers:
//
//   P^T = exp(scale K Q^T - lse)    dS^T = P^T (V dO^T - delta)
//   dV = P^T dO                     dK = scale dS^T Q              dQ = scale dS K
//
// A thread block owns 128 keys of a key head and goes through the tiles of queries of all its query
// heads that see them. One warp brings Q, dO, lse and delta, a few tiles ahead; two warpgroups have
// 64 keys each. dQ sums over tiles of keys: every thread block adds its share to a float32 sum in
// global memory.
#pragma once

#include "attention_tiles.cuh"
#include "hopper.cuh"

namespace lora_engine {
namespace cuda {
namespace {

// What the passes over rows and the pass over tiles agree on. Queries lie in tiles of kQueries. For
// each head and tile: stats[2][kQueries], lse in units of log 2 and delta, infinity and 0 for
// queries that do not exist; dq_sum[kQueries * D] in the order of a product's registers.
template <int kD, bool kCausal>
struct BwdShape {
  static constexpr int kKeys = 128;
  static constexpr int kQueries = kD == 128 ? 64 : 128;
  static constexpr int kHalves = kD / 64;  // of 64 columns, which a swizzled row of 128 bytes holds

  // The tiles of queries that see a tile of keys, counted from the sequence's first.
  __device__ static int first_query_tile(const Tile& keys) {
    return kCausal ? keys.first / kQueries : 0;
  }
  __device__ static int count_query_tiles(const Tile& keys) {
    if (keys.first >= keys.length) return 0;
    return (keys.length + kQueries - 1) / kQueries - first_query_tile(keys);
  }
};

struct AttentionBwdTiles {
  const float* stats;     // [heads, query_tiles, 2, kQueries]
  float* dq_sum;          // [heads, query_tiles, kQueries * D]
  void* dk;               // [tokens, kv_heads, D], tokens `stride_dk` elements apart
  void* dv;               // the same
  const int* cu_seqlens;  // [sequences + 1]
  const int* order;       // [key_tiles], those with most work first
  int64_t stride_dk, stride_dv;
  int sequences, kv_heads, group, query_tiles;
  float scale;
};

constexpr int kConsumers = 256;
constexpr int kBwdThreads = kConsumers + 128;

// Sets rows [valid, kRows) of a swizzled tile of `halves` to zero, with all consumers.
template <int kRows>
__device__ inline void clear_rows(uint32_t tile, int halves, int valid) {
  const int chunks = (kRows - valid) * 8;
#pragma unroll 1
  for (int half = 0; half < halves; ++half)
#pragma unroll 1
    for (int i = threadIdx.x; i < chunks; i += kConsumers)
      asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(tile + half * kRows * 128 +
                                                                    valid * 128 + i * 16),
                   "r"(0)
                   : "memory");
}

template <class T, int kD, bool kCausal>
struct BwdTileKernel {
  using Shape = BwdShape<kD, kCausal>;
  static constexpr int kKeys = Shape::kKeys, kQueries = Shape::kQueries, kHalves = Shape::kHalves;
  static constexpr uint32_t kKeyBytes = kKeys * kD * 2, kQueryBytes = kQueries * kD * 2;
  static constexpr uint32_t kStatBytes = 2 * kQueries * 4, kScoreBytes = kKeys * kQueries * 2;
  static constexpr uint32_t kStageBytes = 2 * kQueryBytes + kStatBytes;
  static constexpr uint32_t kKeyHalf = kKeys * 128, kQueryHalf = kQueries * 128;
  static constexpr int kScores = kQueries / 2, kSums = kD / 2;  // registers of a thread
  static constexpr int kStages = 2;

  // Offsets in shared memory.
  static constexpr uint32_t kK = 0, kV = kKeyBytes, kQ = 2 * kKeyBytes;
  static constexpr uint32_t kDO = kQ + kStages * kQueryBytes;
  static constexpr uint32_t kDS = kDO + kStages * kQueryBytes;  // [2] for turns
  static constexpr uint32_t kStats = kDS + 2 * kScoreBytes;
  static constexpr uint32_t kBarriers = kStats + kStages * kStatBytes;
  static constexpr uint32_t kBytes = kBarriers + (1 + 2 * kStages) * 8;

  const AttentionBwdTiles& a;
  uint32_t shared;
  int kv_head, begin, length, first;  // of the keys
  int query_tile;                     // the sequence's first
  int start, count;                   // tiles of queries that see the keys, of one head

  __device__ uint32_t key_barrier() const { return shared + kBarriers; }
  __device__ uint32_t full(int stage) const { return shared + kBarriers + 8 + 16 * stage; }
  __device__ uint32_t empty(int stage) const { return shared + kBarriers + 16 + 16 * stage; }

  __device__ void produce(const TensorMap* q, const TensorMap* d_o, const TensorMap* k,
                          const TensorMap* v) const {
    arrive_expecting(key_barrier(), 2 * kKeyBytes);
    load_box(shared + kK, k, key_barrier(), 0, begin + first, kv_head * kHalves);
    load_box(shared + kV, v, key_barrier(), 0, begin + first, kv_head * kHalves);
    int head = kv_head * a.group, tile = start;
    for (int turn = a.group * count, stage = 0, phase = 1; turn > 0; --turn) {
      wait_for(empty(stage), phase);
      arrive_expecting(full(stage), kStageBytes);
      const int row = begin + tile * kQueries;
      load_box(shared + kQ + stage * kQueryBytes, q, full(stage), 0, row, head * kHalves);
      load_box(shared + kDO + stage * kQueryBytes, d_o, full(stage), 0, row, head * kHalves);
      const int64_t place = static_cast<int64_t>(head) * a.query_tiles + query_tile + tile;
      load_bytes(shared + kStats + stage * kStatBytes, a.stats + place * (2 * kQueries), kStatBytes,
                 full(stage));
      if (++tile == start + count) tile = start, ++head;
      if (++stage == kStages) stage = 0, phase ^= 1;
    }
  }

  // c = left tile[64 rows from `left` on] right tile^T over kD columns.
  __device__ static void multiply_rows(float (&c)[kScores], uint32_t left, uint32_t right) {
    const uint64_t x = tile_descriptor(left), y = tile_descriptor(right);
#pragma unroll
    for (int i = 0; i < kD / 16; ++i)
      multiply<0, 0>(T{}, c, x + (i / 4 * kKeyHalf + i % 4 * 32) / 16,
                     y + (i / 4 * kQueryHalf + i % 4 * 32) / 16, i > 0);
  }
  // c += left right tile, left [64, kQueries].
  __device__ static void add_product(float (&c)[kSums], const uint32_t (&left)[kQueries / 16][4],
                                     uint32_t right) {
    const uint64_t y = tile_descriptor(right, kQueryHalf);
#pragma unroll
    for (int i = 0; i < kQueries / 16; ++i) multiply<1>(T{}, c, left[i], y + i * 128, 1);
  }

  // Waits for a tile of queries; rows of the next sequence become zero in it.
  __device__ void await_queries(int stage, int phase, int tile) const {
    wait_for(full(stage), phase);
    const int valid = length - tile * kQueries;
    if (valid < kQueries) {
      clear_rows<kQueries>(shared + kQ + stage * kQueryBytes, kHalves, valid);
      clear_rows<kQueries>(shared + kDO + stage * kQueryBytes, kHalves, valid);
      fence_async();
      sync_threads<2, kConsumers>();
    }
  }

  __device__ void consume() const {
    const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const int row = warp * 16 + lane / 4, column = 2 * (lane % 4);  // of the thread's first score
    const float scale = a.scale * kLog2E;
    const uint32_t k = shared + kK, v = shared + kV;
    wait_for(key_barrier(), 0);
    if (length - first < kKeys) {
      clear_rows<kKeys>(k, kHalves, length - first);
      clear_rows<kKeys>(v, kHalves, length - first);
      fence_async();
      sync_threads<2, kConsumers>();
    }
    const uint32_t own_k = k + group * 64 * 128, own_v = v + group * 64 * 128;
    // dQ [64, 64]: of half the queries, or half the columns.
    const uint32_t ds_part = kD == 64 ? group * kKeys * 128 : 0;
    const uint32_t k_part = k + (kD == 64 ? 0 : group * kKeyHalf);
    // Where a lane writes its row of 16 bytes of dS^T, with the first chunk of a pair.
    const int ds_row = group * 64 + warp * 16 + lane % 16;
    const uint32_t ds_place = ds_row * 128 + ((lane / 16 ^ (ds_row & 7)) << 4);

    float scores[kScores], dp[kScores], dk[kSums], dv[kSums], dq[32];
#pragma unroll
    for (int i = 0; i < kSums; ++i) dk[i] = dv[i] = 0;
    pin(dk);
    pin(dv);
    const int turns = a.group * count;
    int stage = 0, phase = 0, head = kv_head * a.group, tile = start;
    for (int turn = 0; turn < turns; ++turn) {
      const uint32_t q = shared + kQ + stage * kQueryBytes;
      const uint32_t d_o = shared + kDO + stage * kQueryBytes;
      const uint32_t stats = shared + kStats + stage * kStatBytes + column * 4;
      const uint32_t ds = shared + kDS + (turn & 1) * kScoreBytes;
      const int last_stage = stage == 0 ? kStages - 1 : stage - 1;
      await_queries(stage, phase, tile);
      begin_products();
      multiply_rows(scores, own_k, q);
      end_products();
      begin_products();
      multiply_rows(dp, own_v, d_o);
      end_products();
      wait_products<1>();  // scores, and dK of the turn before
      if (turn > 0) release(last_stage, lane);
      pin(scores);
      const int key = first + group * 64 + row, query = tile * kQueries + column;
      const bool masked =
          kCausal ? tile * kQueries < first + group * 64 + 64 : length - first < kKeys;
#pragma unroll
      for (int i = 0; i < kScores; i += 4) {
        const float2 lse = load_pair(stats + i * 8);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float l = j & 1 ? lse.y : lse.x;
          scores[i + j] = exp2_of(scores[i + j] * scale - l);
        }
      }
      if (masked) {
#pragma unroll
        for (int i = 0; i < kScores; ++i) {
          const int own_key = key + (i & 2) * 4, own_query = query + i / 4 * 8 + (i & 1);
          const bool seen = kCausal ? own_key <= own_query : own_key < length;
          scores[i] = seen ? scores[i] : 0.0f;
        }
      }
      wait_products<0>();  // dP
      pin(dp);
      uint32_t p_rows[kQueries / 16][4], ds_rows[kQueries / 16][4];
#pragma unroll
      for (int i = 0; i < kScores; i += 4) {
        const float2 delta = load_pair(stats + kQueries * 4 + i * 8);
#pragma unroll
        for (int j = 0; j < 4; ++j)
          dp[i + j] = scores[i + j] * (dp[i + j] - (j & 1 ? delta.y : delta.x));
        p_rows[i / 8][i / 2 % 4] = rounded_pair(T{}, scores[i], scores[i + 1]);
        p_rows[i / 8][i / 2 % 4 + 1] = rounded_pair(T{}, scores[i + 2], scores[i + 3]);
        ds_rows[i / 8][i / 2 % 4] = rounded_pair(T{}, dp[i], dp[i + 1]);
        ds_rows[i / 8][i / 2 % 4 + 1] = rounded_pair(T{}, dp[i + 2], dp[i + 3]);
      }
#pragma unroll
      for (int i = 0; i < kQueries / 16; ++i)
        store_matrices(ds + i / 4 * kKeys * 128 + (ds_place ^ i % 4 * 32), ds_rows[i]);
      begin_products();
      add_product(dv, p_rows, d_o);
      end_products();
      fence_async();
      sync_threads<1, kConsumers>();
      begin_products();
      multiply_scores(dq, ds + ds_part, k_part);
      end_products();
      begin_products();
      add_product(dk, ds_rows, q);
      end_products();
      wait_products<1>();  // dV and dQ
      pin(dq);
      add_dq(head, tile, dq);
      // With heads of 64 dS^T takes 32 registers until dK is done, and the next scores have 64.
      if (kD == 64) wait_products<0>();
      if (++tile == start + count) tile = start, ++head;
      if (++stage == kStages) stage = 0, phase ^= 1;
    }
    wait_products<0>();
    pin(dk);
    pin(dv);
    sync_threads<1, kConsumers>();
    store_rows(k, dk, a.scale, group, row, a.dk, a.stride_dk);
    store_rows(v, dv, 1.0f, group, row, a.dv, a.stride_dv);
  }

  // dq = dS K.
  __device__ static void multiply_scores(float (&dq)[32], uint32_t ds, uint32_t k) {
    const uint64_t x = tile_descriptor(ds), y = tile_descriptor(k);
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) multiply<1, 1>(T{}, dq, x + i * 128, y + i * 128, i > 0);
  }

  __device__ void release(int stage, int lane) const {
    __syncwarp();
    if (lane == 0) arrive(empty(stage));
  }

  __device__ void add_dq(int head, int tile, const float (&dq)[32]) const {
    const int64_t place = static_cast<int64_t>(head) * a.query_tiles + query_tile + tile;
    float* sum = a.dq_sum + place * (kQueries * kD);
    sum += threadIdx.x / 32 * 1024 + threadIdx.x % 32 * 4;
#pragma unroll
    for (int i = 0; i < 32; i += 4)
      asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(
                       __cvta_generic_to_global(sum + i * 32)),
                   "f"(dq[i]), "f"(dq[i + 1]), "f"(dq[i + 2]), "f"(dq[i + 3])
                   : "memory");
  }

  // Writes a warpgroup's 64 rows by way of a tile in shared memory that nobody reads any more.
  __device__ void store_rows(uint32_t tile, const float (&sums)[kSums], float factor, int group,
                             int row, void* to, int64_t stride) const {
    const int lane = threadIdx.x % 32, top = group * 64 + row / 16 * 16, own = top + lane % 16;
    const uint32_t place = tile + own * 128 + ((lane / 16 ^ (own & 7)) << 4);
#pragma unroll
    for (int i = 0; i < kD / 16; ++i) {
      const float* c = sums + 8 * i;
      const uint32_t rows[4] = {rounded_pair(T{}, c[0] * factor, c[1] * factor),
                                rounded_pair(T{}, c[2] * factor, c[3] * factor),
                                rounded_pair(T{}, c[4] * factor, c[5] * factor),
                                rounded_pair(T{}, c[6] * factor, c[7] * factor)};
      store_matrices(tile + i / 4 * kKeyHalf + ((place - tile) ^ i % 4 * 32), rows);
    }
    __syncwarp();
    T* out = static_cast<T*>(to) + (begin + first) * stride + kv_head * kD;
#pragma unroll
    for (int i = 0; i < 4 * kHalves; ++i) {
      const int r = top + i % 4 * 4 + lane / 8, half = i / 4, chunk = lane % 8;
      if (first + r >= length) continue;
      store_bytes(out + r * stride + half * 64 + chunk * 8,
                  load_chunk(tile + half * kKeyHalf + r * 128 + ((chunk ^ (r & 7)) << 4)));
    }
  }

  __device__ static float2 load_pair(uint32_t from) {
    float2 x;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(from));
    return x;
  }
  __device__ static uint4 load_chunk(uint32_t from) {
    uint4 x;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(from)
                 : "memory");
    return x;
  }
  __device__ static void store_matrices(uint32_t to, const uint32_t (&x)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to),
                 "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
                 : "memory");
  }
};

template <class T, int kD, bool kCausal>
__global__ void __launch_bounds__(kBwdThreads, 1)
    attention_bwd_tiles_kernel(const __grid_constant__ TensorMap q,
                               const __grid_constant__ TensorMap d_o,
                               const __grid_constant__ TensorMap k,
                               const __grid_constant__ TensorMap v, const AttentionBwdTiles a) {
  using Kernel = BwdTileKernel<T, kD, kCausal>;
  extern __shared__ __align__(1024) unsigned char memory[];
  const Tile keys(a.cu_seqlens, a.sequences, a.order[blockIdx.x / a.kv_heads], Kernel::kKeys);
  const int count = Kernel::Shape::count_query_tiles(keys);
  if (!count) return;
  const Kernel kernel{a,
                      shared_address(memory),
                      static_cast<int>(blockIdx.x) % a.kv_heads,
                      keys.begin,
                      keys.length,
                      keys.first,
                      Tile::first_of(a.cu_seqlens, keys.sequence, Kernel::kQueries),
                      Kernel::Shape::first_query_tile(keys),
                      count};
  if (threadIdx.x == 0) {
    init_barrier(kernel.key_barrier(), 1);
    for (int stage = 0; stage < Kernel::kStages; ++stage) {
      init_barrier(kernel.full(stage), 1);
      init_barrier(kernel.empty(stage), kConsumers / 32);
    }
    show_barriers();
  }
  __syncthreads();
  if (threadIdx.x >= kConsumers) {
    give_registers<24>();
    if (threadIdx.x == kConsumers) kernel.produce(&q, &d_o, &k, &v);
  } else {
    take_registers<240>();
    kernel.consume();
  }
}

}  // namespace
}  // namespace cuda
}  // namespace lora_engine
