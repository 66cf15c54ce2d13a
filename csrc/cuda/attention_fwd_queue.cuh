// Which tiles of queries a thread block of attention's forward pass works on.
//
// One warp finds them and all others take them, two at most ahead. After its first tile a thread
// block takes the next one that no other has taken.
#pragma once

#include "attention_tiles.cuh"
#include "hopper.cuh"

namespace lora_engine {
namespace cuda {
namespace {

struct AttentionFwd {
  void* o;                // [tokens, heads, D], tokens `stride_o` elements apart
  float* lse;             // [heads, tokens]
  const int* cu_seqlens;  // [sequences + 1]
  int* taken;             // [], zero: tiles that thread blocks took after their first
  int64_t tokens, stride_o;
  int sequences, heads, group;  // group: query heads of a key head
  int tiles;                    // of queries, of one head: tokens / kQueries + sequences
  int causal;
  int window;   // kNoWindow: none
  float scale;  // of scores, positive, in units of log 2
};

// A tile of queries. Positions count from the sequence's first token.
struct FwdTile {
  int head, begin, length;
  int first;       // query; below 0: there are no more tiles
  int start, end;  // tiles of keys that the queries see
};

// Of sequence i the tiles from cu_seqlens[i] / size + i on: as many as it needs or one more, which
// starts behind its last row. All of a warp look together.
__device__ inline void find_tile(const AttentionFwd& a, int tile, int size, FwdTile& found) {
  const int lane = threadIdx.x % 32;
  int low = 0, count = a.sequences;  // the sequence is one of `count` from `low` on
  while (count > 1) {
    const int step = (count + 31) / 32, middle = low + lane * step;
    const bool starts = lane * step < count && a.cu_seqlens[middle] / size + middle <= tile;
    const int passed = (__popc(__ballot_sync(kFullWarp, starts)) - 1) * step;
    low += passed;
    count = min(step, count - passed);
  }
  found.begin = a.cu_seqlens[low];
  found.length = a.cu_seqlens[low + 1] - found.begin;
  found.first = (tile - found.begin / size - low) * size;
}

// Two slots in shared memory, each with a barrier that tells that it is full and one that it is
// empty.
template <int kQueries, int kKeys>
struct FwdQueue {
  static constexpr uint32_t kBarrierBytes = 4 * 8;

  const AttentionFwd& a;
  FwdTile* const slots;  // [2]: the tile that is worked on, and the next
  const uint32_t barriers;

  __device__ uint32_t full(int slot) const { return barriers + 16 * slot; }
  __device__ uint32_t empty(int slot) const { return full(slot) + 8; }

  // takers: the warps that take each tile.
  __device__ void init(int takers) const {
    for (int slot = 0; slot < 2; ++slot) {
      init_barrier(full(slot), 1);
      init_barrier(empty(slot), takers);
    }
  }

  // Under a causal mask the last tile of a sequence has most keys and is taken first.
  __device__ FwdTile tile_of(int place) const {
    FwdTile tile;
    tile.head = place % a.heads;
    find_tile(a, a.tiles - 1 - place / a.heads, kQueries, tile);
    int end = tile.length;
    if (a.causal) end = min(end, tile.first + kQueries);
    tile.end = (end + kKeys - 1) / kKeys;
    tile.start = a.window > tile.first ? 0 : (tile.first - a.window + 1) / kKeys;
    return tile;
  }

  __device__ void look() const {
    const int lane = threadIdx.x % 32, places = a.tiles * a.heads;
    int count = 0;
    const auto give = [&](const FwdTile& tile) {
      wait_for(empty(count & 1), ~(count >> 1) & 1);
      if (lane == 0) {
        slots[count & 1] = tile;
        arrive(full(count & 1));
      }
      ++count;
    };
    for (int place = blockIdx.x; place < places;) {
      int next = 0;
      if (lane == 0) next = static_cast<int>(gridDim.x) + atomicAdd(a.taken, 1);
      const FwdTile tile = tile_of(place);
      if (tile.first < tile.length) give(tile);
      place = __shfl_sync(kFullWarp, next, 0);
    }
    FwdTile none{};
    none.first = -1;
    give(none);
  }

  // The thread block's tile number `count`; its slot is free again when all who need it have read
  // it.
  __device__ FwdTile take(int count) const {
    wait_for(full(count & 1), count >> 1 & 1);
    const FwdTile tile = slots[count & 1];
    __syncwarp(__activemask());
    release(empty(count & 1));
    return tile;
  }
};

}  // namespace
}  // namespace cuda
}  // namespace lora_engine
