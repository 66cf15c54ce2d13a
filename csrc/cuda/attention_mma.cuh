// Which tiles attention's kernels of mma.sync go through, and which scores in them count.
//
// A sequence's queries see the tokens of the sequences that it continues, and its own. Each of
// these stretches is a run; a position counts from a run's first token, so a sequence's queries
// have positions from 0 on in its own run, and from the lengths in between on in the runs before.
// The query at position p of a run sees key j if j <= p (causal) and p - j < window.
#pragma once

#include <algorithm>
#include <type_traits>

#include "attention_tiles.cuh"
#include "launchers.hpp"
#include "mma.cuh"

namespace lora_engine {
namespace cuda {
namespace {

struct Packed {
  const int* cu_seqlens;  // [sequences + 1]
  const int* parents;     // [sequences], the sequence that each continues or -1; null: none does
  int sequences, causal;
  int window;  // kNoWindow: none

  __device__ int length_of(int sequence) const {
    return cu_seqlens[sequence + 1] - cu_seqlens[sequence];
  }
  __device__ int parent_of(int sequence) const { return parents ? parents[sequence] : -1; }
};

// The tiles of keys that a tile of queries sees: of its own sequence, where there is one at least,
// then of those before.
template <int kQueries, int kKeys>
struct KeyWalk {
  const Packed& packed;
  int run, begin, length;  // the run, its first token and how many it has
  int row;                 // the first query's position in it
  int first, end;          // keys of the tile from `first` on; none is seen from `end` on

  __device__ KeyWalk(const Packed& packed, const Tile& queries)
      : packed(packed),
        run(queries.sequence),
        begin(queries.begin),
        length(queries.length),
        row(queries.first) {
    enter();
  }
  __device__ void enter() {
    first = packed.window > row ? 0 : (row - packed.window + 1) / kKeys * kKeys;
    end = packed.causal ? min(length, row + kQueries) : length;
  }
  // To the next tile; false if there is none.
  __device__ bool next() {
    first += kKeys;
    while (first >= end) {
      run = packed.parent_of(run);
      if (run < 0) return false;
      begin = packed.cu_seqlens[run];
      length = packed.length_of(run);
      row += length;
      enter();
    }
    return true;
  }
};

// The tiles of queries that see a tile of keys: of its own sequence, where there is one at least,
// then of those that continue it, up to `last`. In each of them all query heads of the key head
// have their turn.
template <int kQueries, int kKeys>
struct QueryWalk {
  const Packed& packed;
  const int own, group, last;  // group: query heads of a key head
  const int first_key;         // counted from the keys' own sequence
  int other, begin, length;    // the sequence of the queries, its first token and how many it has
  int key;                     // the first key, counted from that sequence's first query
  int member;                  // of the query heads
  int start, first, end;       // of queries that see the keys; the tile's first

  __device__ QueryWalk(const Packed& packed, const Tile& keys, int group, int last)
      : packed(packed),
        own(keys.sequence),
        group(group),
        last(last),
        first_key(keys.first),
        other(keys.sequence),
        begin(keys.begin),
        length(keys.length),
        key(keys.first) {
    enter();
  }
  __device__ void enter() {
    member = 0;
    start = packed.causal ? max(key, 0) / kQueries * kQueries : 0;
    end = min(length, key + kKeys - 1 + packed.window);
    first = start;
  }
  __device__ bool next() {
    first += kQueries;
    if (first < end) return true;
    first = start;
    if (++member < group) return true;
    while (++other <= last) {
      int ancestor = other, behind = 0;
      while (ancestor > own) {
        ancestor = packed.parent_of(ancestor);
        if (ancestor >= own) behind += packed.length_of(ancestor);
      }
      if (ancestor != own) continue;
      begin = packed.cu_seqlens[other];
      length = packed.length_of(other);
      key = first_key - behind;
      enter();
      if (first < end) return true;
    }
    return false;
  }
};

// Scores of a warp: of kQueries from position `query` on, and kKeys from `key` on. Behind `queries`
// and `keys` there are none.
template <int kQueries, int kKeys>
struct Sight {
  const Packed& packed;
  const int query, queries, key, keys;

  __device__ bool any() const {
    const bool exist = query < queries && key < keys;
    const bool before = !packed.causal || key < query + kQueries;
    return exist && before && query - (key + kKeys - 1) < packed.window;
  }
  __device__ bool all() const {
    const bool before = !packed.causal || key + kKeys - 1 <= query;
    return before && key + kKeys <= keys && query + kQueries - 1 - key < packed.window;
  }
  // Of queries that do not exist too.
  __device__ bool sees(int row, int column) const {
    const int q = query + row, k = key + column;
    return (!packed.causal || k <= q) && k < keys && q - k < packed.window;
  }
};

// What a thread block of any supported GPU can have of shared memory, in bytes.
constexpr uint32_t kMostShared = 101376;

template <class Args>
Packed packed_of(const Args& a) {
  const int64_t window = a.window > 0 ? std::min<int64_t>(a.window, kNoWindow) : kNoWindow;
  return {a.cu_seqlens, a.parents, static_cast<int>(a.sequences), a.causal != 0,
          static_cast<int>(window)};
}

// Calls run(T{}, kD) with the elements' type, and the columns of a tile that hold a head.
template <class Args, class Run>
void by_type_and_size(const char* name, const Args& a, const Run& run) {
  const auto of_type = [&](auto type) {
    if (a.head_dim <= 64)
      run(type, std::integral_constant<int, 64>());
    else
      run(type, std::integral_constant<int, 128>());
  };
  if (a.head_dim % 8 || a.head_dim <= 0 || a.head_dim > 128)
    throw std::invalid_argument(std::string(name) + ": heads of 8, 16, ... 128");
  if (a.dtype == kBFloat16)
    of_type(BFloat16{});
  else if (a.dtype == kFloat16)
    of_type(Float16{});
  else
    throw std::invalid_argument(std::string(name) + ": bfloat16 or float16");
}

}  // namespace
}  // namespace cuda
}  // namespace lora_engine
