// Attention's forward pass over a tile of queries, on tensor cores of sm_90a.
//
// A thread block goes through tiles of queries of one head each. One warp brings Q, and K and V
// tile after tile, the last keys first; the other warpgroups have 64 queries each:
//
//   S = Q K^T    P = exp2(scale S - max)    O = O * correction + P V
//
// A warpgroup gives the next tile's S and this tile's P V to the tensor cores together, and makes
// the next P while P V is at work. Warpgroups go at their own pace, so that products of one and
// exponentials of another meet.
#pragma once

#include "attention_fwd_queue.cuh"

namespace lora_engine {
namespace cuda {
namespace {

template <class T, int kD, int kGroups, int kKeys, int kStages>
struct FwdShape {
  static constexpr int kQueries = 64 * kGroups;
  static constexpr int kConsumers = 128 * kGroups, kThreads = kConsumers + 128;
  static constexpr int kHalves = kD / 64;  // of 64 columns, which a swizzled row of 128 bytes holds
  static constexpr uint32_t kQueryBytes = kQueries * kD * 2, kKeyBytes = kKeys * kD * 2;
  static constexpr uint32_t kQueryHalf = kQueries * 128, kKeyHalf = kKeys * 128;
  // Offsets in shared memory.
  static constexpr uint32_t kQ = 0, kK = kQueryBytes, kV = kK + kStages * kKeyBytes;
  static constexpr uint32_t kBarriers = kV + kStages * kKeyBytes;
  static constexpr uint32_t kQueue = kBarriers + 2 * 8;
  static constexpr uint32_t kStageBarriers = kQueue + FwdQueue<kQueries, kKeys>::kBarrierBytes;
  static constexpr uint32_t kTiles = kStageBarriers + 4 * kStages * 8;
  static constexpr uint32_t kBytes = kTiles + 2 * sizeof(FwdTile);
};

// Between the four threads of a row: thread i gets the i-th value of each.
__device__ inline void transpose_four(uint32_t (&x)[4], int lane) {
#pragma unroll
  for (int step = 1; step <= 2; step *= 2) {
    const bool upper = lane & step;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int low = step == 1 ? 2 * i : i, high = low + step;
      const uint32_t got = __shfl_xor_sync(kFullWarp, upper ? x[low] : x[high], step);
      (upper ? x[low] : x[high]) = got;
    }
  }
}

template <class T, int kD, int kGroups, int kKeys, int kStages>
struct FwdKernel {
  using Shape = FwdShape<T, kD, kGroups, kKeys, kStages>;
  static constexpr int kScores = kKeys / 2, kSums = kD / 2;  // registers of a thread
  static constexpr int kClearBarrier = 1;                    // of the named barriers

  const AttentionFwd& a;
  const uint32_t shared;
  const FwdQueue<Shape::kQueries, kKeys> queue;

  // Barriers. Of K and V the bytes are awaited apart: K is needed first and free again first.
  __device__ uint32_t q_full() const { return shared + Shape::kBarriers; }
  __device__ uint32_t q_empty() const { return shared + Shape::kBarriers + 8; }
  __device__ uint32_t k_full(int stage) const {
    return shared + Shape::kStageBarriers + 32 * stage;
  }
  __device__ uint32_t k_empty(int stage) const { return k_full(stage) + 8; }
  __device__ uint32_t v_full(int stage) const { return k_full(stage) + 16; }
  __device__ uint32_t v_empty(int stage) const { return k_full(stage) + 24; }

  __device__ void init() const {
    constexpr int kWarps = Shape::kConsumers / 32;
    init_barrier(q_full(), 1);
    init_barrier(q_empty(), kWarps);
    queue.init(kWarps + 1);
    for (int stage = 0; stage < kStages; ++stage) {
      init_barrier(k_full(stage), 1);
      init_barrier(k_empty(stage), kWarps);
      init_barrier(v_full(stage), 1);
      init_barrier(v_empty(stage), kWarps);
    }
    show_barriers();
  }

  // ---- one thread brings their queries and keys

  __device__ void produce(const TensorMap* q, const TensorMap* k, const TensorMap* v) const {
    int stage = 0;
    uint32_t parity = 1;
    for (int count = 0;; ++count) {
      const FwdTile tile = queue.take(count);
      if (tile.first < 0) break;
      wait_for(q_empty(), ~count & 1);
      arrive_expecting(q_full(), Shape::kQueryBytes);
      load_box(shared + Shape::kQ, q, q_full(), 0, tile.begin + tile.first,
               tile.head * Shape::kHalves);
      const int column = tile.head / a.group * Shape::kHalves;
      for (int n = tile.end - 1; n >= tile.start; --n) {
        const int row = tile.begin + n * kKeys;
        wait_for(k_empty(stage), parity);
        arrive_expecting(k_full(stage), Shape::kKeyBytes);
        load_box(shared + Shape::kK + stage * Shape::kKeyBytes, k, k_full(stage), 0, row, column);
        wait_for(v_empty(stage), parity);
        arrive_expecting(v_full(stage), Shape::kKeyBytes);
        load_box(shared + Shape::kV + stage * Shape::kKeyBytes, v, v_full(stage), 0, row, column);
        if (++stage == kStages) stage = 0, parity ^= 1;
      }
    }
  }

  // ---- the others multiply

  __device__ void begin_scores(float (&s)[kScores], uint32_t queries, int stage) const {
    const uint64_t left = tile_descriptor(queries);
    const uint64_t right = tile_descriptor(shared + Shape::kK + stage * Shape::kKeyBytes);
#pragma unroll
    for (int i = 0; i < kD / 16; ++i) {
      const uint64_t l = left + ((i / 4 * Shape::kQueryHalf + i % 4 * 32) >> 4);
      const uint64_t r = right + ((i / 4 * Shape::kKeyHalf + i % 4 * 32) >> 4);
      multiply<0, 0>(T{}, s, l, r, i > 0);
    }
    end_products();
  }
  __device__ void begin_sums(float (&o)[kSums], const uint32_t (&p)[kKeys / 16][4],
                             int stage) const {
    const uint64_t right =
        tile_descriptor(shared + Shape::kV + stage * Shape::kKeyBytes, Shape::kKeyHalf);
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) multiply<1>(T{}, o, p[i], right + (i * 2048 >> 4), 1);
    end_products();
  }

  // Scores of keys that a query does not see become -inf. row: the thread's first, the other is
  // eight below.
  __device__ void mask(float (&s)[kScores], const FwdTile& tile, int n, int row) const {
    const int key = n * kKeys + threadIdx.x % 4 * 2;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int query = row + 8 * h;
      const int high = (a.causal ? min(tile.length, query + 1) : tile.length) - key;
      const int low = query - a.window - key;
#pragma unroll
      for (int i = 0; i < kScores / 4; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j)
          if (8 * i + j >= high || 8 * i + j <= low) s[4 * i + 2 * h + j] = -INFINITY;
    }
  }

  // Makes scores exponentials; correction: of what was summed with the old maximum.
  __device__ void exponentials(float (&s)[kScores], float (&m)[2], float (&total)[2],
                               float (&correction)[2]) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float most = m[h];
#pragma unroll
      for (int i = 0; i < kScores / 4; ++i)
        most = fmaxf(most, fmaxf(s[4 * i + 2 * h], s[4 * i + 2 * h + 1]));
      most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, 1));
      most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, 2));
      // A query that has seen no key yet: -inf - -inf would be NaN.
      const float base = most == -INFINITY ? 0.0f : most * a.scale;
      correction[h] = exp2_of(m[h] * a.scale - base);
      m[h] = most;
      float sum = 0;
#pragma unroll
      for (int i = 0; i < kScores / 4; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& x = s[4 * i + 2 * h + j];
          x = exp2_of(x * a.scale - base);
          sum += x;
        }
      total[h] = total[h] * correction[h] + sum;
    }
  }
  __device__ static void round(uint32_t (&p)[kKeys / 16][4], const float (&s)[kScores]) {
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        p[i][j] = rounded_pair(T{}, s[8 * i + 2 * j], s[8 * i + 2 * j + 1]);
  }

  // Sets V's rows behind the sequence's last to zero: P is zero there, but 0 * NaN is not.
  __device__ void clear(int stage, int rows) const {
    const uint32_t tile = shared + Shape::kV + stage * Shape::kKeyBytes;
#pragma unroll 1
    for (int half = 0; half < Shape::kHalves; ++half)
#pragma unroll 1
      for (int i = rows * 128 + threadIdx.x * 16; i < kKeys * 128; i += Shape::kConsumers * 16)
        asm volatile(
            "st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(tile + half * Shape::kKeyHalf + i),
            "r"(0)
            : "memory");
    fence_async();
    sync_threads<kClearBarrier, Shape::kConsumers>();
  }

  __device__ void store(const FwdTile& tile, int row, float (&o)[kSums], const float (&m)[2],
                        float (&total)[2]) const {
    const int lane = threadIdx.x % 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      total[h] += __shfl_xor_sync(kFullWarp, total[h], 1);
      total[h] += __shfl_xor_sync(kFullWarp, total[h], 2);
      const bool exists = row + 8 * h < tile.length;
      const int64_t token = tile.begin + row + 8 * h;
      const float inverse = 1.0f / total[h];
      T* to = static_cast<T*>(a.o) + token * a.stride_o + tile.head * kD + 8 * lane;
#pragma unroll
      for (int i = 0; i < kSums / 16; ++i) {
        uint32_t x[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int at = 16 * i + 4 * j + 2 * h;
          x[j] = rounded_pair(T{}, o[at] * inverse, o[at + 1] * inverse);
        }
        transpose_four(x, lane);
        if (exists) store_bytes(to + 32 * i, make_uint4(x[0], x[1], x[2], x[3]));
      }
      if (exists && lane == 0)
        a.lse[tile.head * a.tokens + token] = (m[h] * a.scale + __log2f(total[h])) * kLn2;
    }
  }

  __device__ void consume(int group) const {
    const uint32_t queries = shared + Shape::kQ + group * (64 * 128);
    const int own_row = group * 64 + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
    // The stages of K and of V that come next.
    int k_stage = 0, v_stage = 0;
    uint32_t k_parity = 0, v_parity = 0;
    for (int count = 0;; ++count) {
      const FwdTile tile = queue.take(count);
      if (tile.first < 0) break;
      const int row = tile.first + own_row, group_row = tile.first + group * 64;
      // Tiles [full_start, full_end) of keys are seen whole by all of the warpgroup.
      const int full_end = (a.causal ? min(tile.length, group_row + 1) : tile.length) / kKeys;
      const int full_start =
          a.window > group_row + 63 ? 0 : (group_row + 63 - a.window + kKeys) / kKeys;

      float s[kScores], o[kSums], m[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0};
      float correction[2];
      uint32_t p[kKeys / 16][4];
#pragma unroll
      for (int i = 0; i < kSums; ++i) o[i] = 0;

      int n = tile.end - 1;
      wait_for(q_full(), count & 1);
      wait_for(k_full(k_stage), k_parity);
      begin_products();
      begin_scores(s, queries, k_stage);
      wait_products<0>();
      pin(s);
      release(k_empty(k_stage));
      if (++k_stage == kStages) k_stage = 0, k_parity ^= 1;
      if (n >= full_end || n < full_start) mask(s, tile, n, row);
      exponentials(s, m, total, correction);
      round(p, s);
      if (tile.end * kKeys > tile.length) {
        wait_for(v_full(v_stage), v_parity);
        clear(v_stage, tile.length - n * kKeys);
      }
#pragma unroll 1
      for (--n; n >= tile.start; --n) {
        wait_for(k_full(k_stage), k_parity);
        begin_products();
        begin_scores(s, queries, k_stage);
        wait_for(v_full(v_stage), v_parity);
        begin_products();
        begin_sums(o, p, v_stage);
        wait_products<1>();
        pin(s);
        const int used = k_stage;
        if (++k_stage == kStages) k_stage = 0, k_parity ^= 1;
        if (n >= full_end || n < full_start) mask(s, tile, n, row);
        exponentials(s, m, total, correction);
        // Never negative, but the sum has to be there: ptxas moves arithmetic behind a wait for
        // products where nothing holds it, and exponentials no longer overlap with P V.
        if (!(total[0] + total[1] < 0)) release(k_empty(used));
        wait_products<0>();
        pin(o);
        release(v_empty(v_stage));
        if (++v_stage == kStages) v_stage = 0, v_parity ^= 1;
        round(p, s);
#pragma unroll
        for (int i = 0; i < kSums; ++i) o[i] *= correction[i / 2 % 2];
      }
      release(q_empty());
      wait_for(v_full(v_stage), v_parity);
      begin_products();
      begin_sums(o, p, v_stage);
      wait_products<0>();
      pin(o);
      release(v_empty(v_stage));
      if (++v_stage == kStages) v_stage = 0, v_parity ^= 1;
      store(tile, row, o, m, total);
    }
  }
};

// `shared` needs FwdShape::kBytes + 1024 bytes.
template <class T, int kD, int kGroups, int kKeys, int kStages>
__global__ void __launch_bounds__(kGroups * 128 + 128, 1)
    attention_fwd_kernel(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,
                         const __grid_constant__ TensorMap v,
                         const __grid_constant__ AttentionFwd a) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Shape = FwdShape<T, kD, kGroups, kKeys, kStages>;
  extern __shared__ __align__(1024) unsigned char memory[];
  unsigned char* base = memory + (1024 - (shared_address(memory) & 1023)) % 1024;
  const FwdKernel<T, kD, kGroups, kKeys, kStages> kernel{
      a,
      shared_address(base),
      {a, reinterpret_cast<FwdTile*>(base + Shape::kTiles), shared_address(base) + Shape::kQueue}};
  // Equal in a warp, and the compiler knows it by the shuffle.
  const int group = __shfl_sync(kFullWarp, threadIdx.x / 128, 0);
  if (threadIdx.x == 0) kernel.init();
  __syncthreads();
  if (group == kGroups) {
    give_registers<kGroups == 3 ? 32 : 24>();
    const int warp = __shfl_sync(kFullWarp, threadIdx.x / 32 % 4, 0);
    if (warp == 0) kernel.queue.look();
    if (warp == 1 && threadIdx.x % 32 == 0) kernel.produce(&q, &k, &v);
  } else {
    take_registers<kGroups == 3 ? 160 : 240>();
    kernel.consume(group);
  }
#endif
}

}  // namespace
}  // namespace cuda
}  // namespace lora_engine
