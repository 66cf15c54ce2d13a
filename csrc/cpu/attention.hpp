// What attention's forward and backward share: tiles, loading with rotation, masking.
//
// Scores are held transposed, keys down and queries across, in tiles of kQueries queries. So the
// softmax runs along vectors without horizontal sums, and every operand but one stands as the
// small matrix product wants it: S' = K Q', O' = V' P', dP' = V dO', dV = P' dO, dK = dS' Q,
// dQ' = K' dS'.
#pragma once

#include "gemm/tile_gemm.hpp"
#include "rotate.hpp"
#include "scratch.hpp"
#include "simd/numeric.hpp"

namespace lora_engine {
namespace {

constexpr int64_t kQueries = 32;  // a multiple of every kTileN
constexpr int64_t kKeys = 128;    // keys scored at a time

// A sequence's queries see the tokens of the sequences it continues (its prefix), then its own.
inline int64_t prefix_length(const AttentionArgs& a, int64_t sequence) {
  int64_t length = 0;
  if (a.parents)
    for (int64_t i = a.parents[sequence]; i >= 0; i = a.parents[i])
      length += a.cu_seqlens[i + 1] - a.cu_seqlens[i];
  return length;
}

// One sequence's key/value head, and the query heads that read it. Keys are counted from the
// prefix's first, and so are queries: the sequence's own are those from `prefix` to `length`.
struct HeadTask {
  int64_t sequence, kv_head;
  int64_t begin;  // its own first token
  int64_t prefix, length;

  int64_t token(int64_t query) const { return begin + query - prefix; }
};

inline HeadTask head_task(const AttentionArgs& a, int64_t index) {
  const int64_t sequence = index / a.kv_heads;
  const int64_t begin = a.cu_seqlens[sequence], prefix = prefix_length(a, sequence);
  return {sequence, index % a.kv_heads, begin, prefix, prefix + a.cu_seqlens[sequence + 1] - begin};
}

// Calls visit(token, rows, key) for each run of the tokens a task's queries see, last run first:
// `rows` tokens from `token` on are its keys from `key` on.
template <class Visit>
inline void for_each_run(const AttentionArgs& a, const HeadTask& task, Visit&& visit) {
  int64_t end = task.length;
  for (int64_t i = task.sequence; i >= 0; i = a.parents ? a.parents[i] : -1) {
    const int64_t rows = a.cu_seqlens[i + 1] - a.cu_seqlens[i];
    visit(int64_t{a.cu_seqlens[i]}, rows, end -= rows);
  }
}

// The keys that queries [first, last) may see, from an even one on: keys are multiplied in pairs.
struct KeyRange {
  int64_t begin, end;
};

inline KeyRange visible_keys(const AttentionArgs& a, int64_t length, int64_t first, int64_t last) {
  const int64_t begin = a.window > 0 && first - a.window + 1 > 0 ? first - a.window + 1 : 0;
  return {begin / 2 * 2, a.causal ? last : length};
}

// Puts `masked` where a query of the tile that starts at `first` may not see the key.
template <class A>
inline void mask_scores(const AttentionArgs& a, int64_t first, int64_t key_begin, int64_t keys,
                        A* scores, A masked) {
  for (int64_t j = 0; j < keys; ++j) {
    const int64_t key = key_begin + j;
    const int64_t hidden_before = a.causal ? key - first : 0;  // queries before the key
    for (int64_t i = 0; i < kQueries && i < hidden_before; ++i) scores[j * kQueries + i] = masked;
    if (a.window > 0) {
      const int64_t past = key + a.window - first;  // the first query too far after the key
      for (int64_t i = past > 0 ? past : 0; i < kQueries; ++i) scores[j * kQueries + i] = masked;
    }
  }
}

// Copies `rows` rows of one head, rotated unless cos is null, as elements for multiplication.
template <class T, class E, class A>
inline void load_head(const T* src, int64_t stride, const A* cos, const A* sin, int64_t rows,
                      int64_t head_dim, E* out) {
  for (int64_t row = 0; row < rows; ++row) {
    const T* x = src + row * stride;
    E* y = out + row * head_dim;
    if (cos) {
      rotate(x, y, cos + row * head_dim, sin + row * head_dim, head_dim, false,
             [](A value) { return store<E>(value); });
    } else {
      convert_row(head_dim, x, y);
    }
  }
}

template <class A>
inline const A* offset_or_null(const void* base, int64_t offset) {
  return base ? static_cast<const A*>(base) + offset : nullptr;
}

// Loads the keys or values [task.length, head_dim] that a task's queries see.
template <class T, class E>
inline void load_seen(const AttentionArgs& a, const HeadTask& task, const void* src, int64_t stride,
                      bool rotated, E* out) {
  using A = acc_t<T>;
  const int64_t D = a.head_dim;
  const T* head = static_cast<const T*>(src) + task.kv_head * D;
  for_each_run(a, task, [&](int64_t token, int64_t rows, int64_t key) {
    load_head(head + token * stride, stride,
              rotated ? offset_or_null<A>(a.cos, token * D) : nullptr,
              rotated ? offset_or_null<A>(a.sin, token * D) : nullptr, rows, D, out + key * D);
  });
}

// out [head_dim, ld] = transpose of src [rows, head_dim], ld being rows rounded up to a whole
// group; the padding is zero. `work` holds ld * head_dim elements.
template <class E>
inline void transpose_head(const E* src, int64_t rows, int64_t head_dim, E* out, int64_t ld,
                           E* work) {
  using Word = GroupWord<E>;
  constexpr int kGroup = Dot<E>::kGroup;
  pack_rows(rows, head_dim, src, head_dim, work, head_dim);
  transpose(ld / kGroup, head_dim, reinterpret_cast<const Word*>(work), head_dim,
            reinterpret_cast<Word*>(out), ld / kGroup);
}

}  // namespace
}  // namespace lora_engine
