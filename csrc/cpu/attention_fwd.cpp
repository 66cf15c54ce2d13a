// Attention within each packed sequence, forward: online softmax over tiles of keys (Milakov and
// Gimelshein, 2018; Dao, 2023), nothing of size length x length in memory.
#include "attention.hpp"
#include "isa.hpp"

namespace lora_engine {
namespace {

template <class T>
struct Workspace {
  using A = acc_t<T>;
  using E = typename Element<T>::type;
  int64_t padded_length;        // a whole number of groups
  E *keys, *values, *values_t;  // [length, D], [length, D], [D, padded_length]
  E *query, *query_packed;      // [kQueries, D], packed [D, kQueries]
  A* scores;                    // [kKeys, kQueries]
  E* probs;                     // packed [kKeys, kQueries]
  A *out_t, *out;               // [D, kQueries], [kQueries, D]
  A largest[kQueries], sum[kQueries];

  Workspace(Scratch& scratch, int64_t length, int64_t head_dim) {
    padded_length = round_up(length, Dot<E>::kGroup);
    keys = scratch.allocate<E>(padded_length * head_dim);
    values = scratch.allocate<E>(padded_length * head_dim);
    values_t = scratch.allocate<E>(padded_length * head_dim);
    query = scratch.allocate<E>(kQueries * head_dim);
    query_packed = scratch.allocate<E>(kQueries * head_dim);
    scores = scratch.allocate<A>(kKeys * kQueries);
    probs = scratch.allocate<E>(kKeys * kQueries);
    out_t = scratch.allocate<A>(head_dim * kQueries);
    out = scratch.allocate<A>(head_dim * kQueries);
  }
};

// Online softmax: folds one tile of scores into each query's running maximum m (`largest`) and sum
// l (`sum`). The scores become exp(score - m), and `out` is rescaled to the new m.
// Called, not inlined: its callers keep so many pointers alive that the loops spill.
template <class A>
__attribute__((noinline)) void online_softmax(A* scores, int64_t keys, A scale, A* largest, A* sum,
                                              A* out, int64_t head_dim) {
  A new_largest[kQueries], correction[kQueries], new_sum[kQueries];
  std::memcpy(new_largest, largest, sizeof new_largest);
  for (int64_t j = 0; j < keys; ++j) {
    A* row = scores + j * kQueries;
#pragma omp simd
    for (int64_t i = 0; i < kQueries; ++i) {
      row[i] *= scale;
      new_largest[i] = row[i] > new_largest[i] ? row[i] : new_largest[i];
    }
  }
#pragma omp simd
  for (int64_t i = 0; i < kQueries; ++i) {
    correction[i] = exp_acc(largest[i] - new_largest[i]);
    largest[i] = new_largest[i];
    new_sum[i] = sum[i] * correction[i];
  }
  for (int64_t d = 0; d < head_dim; ++d) {
#pragma omp simd
    for (int64_t i = 0; i < kQueries; ++i) out[d * kQueries + i] *= correction[i];
  }
  for (int64_t j = 0; j < keys; ++j) {
    A* row = scores + j * kQueries;
#pragma omp simd
    for (int64_t i = 0; i < kQueries; ++i) {
      row[i] = exp_acc(row[i] - new_largest[i]);
      new_sum[i] += row[i];
    }
  }
  std::memcpy(sum, new_sum, sizeof new_sum);
}

template <class T>
void query_tile(const AttentionArgs& a, const HeadTask& task, int64_t head, int64_t first,
                Workspace<T>& w) {
  using A = acc_t<T>;
  using E = typename Element<T>::type;
  const int64_t D = a.head_dim;
  const int64_t count = task.length - first < kQueries ? task.length - first : kQueries;
  const int64_t token = task.token(first);
  load_head(static_cast<const T*>(a.q) + token * a.q_stride + head * D, a.q_stride,
            offset_or_null<A>(a.cos, token * D), offset_or_null<A>(a.sin, token * D), count, D,
            w.query);
  // Queries past the sequence's end are zeros; their results are not stored.
  std::memset(w.query + count * D, 0, sizeof(E) * (kQueries - count) * D);
  pack_transposed(D, kQueries, w.query, D, w.query_packed, kQueries);
  std::memset(w.out_t, 0, sizeof(A) * D * kQueries);
  for (int64_t i = 0; i < kQueries; ++i) {
    w.largest[i] = -INFINITY;
    w.sum[i] = 0;
  }
  const KeyRange range = visible_keys(a, task.length, first, first + count);
  for (int64_t key = range.begin; key < range.end; key += kKeys) {
    const int64_t keys = range.end - key < kKeys ? range.end - key : kKeys;
    tile_gemm<E>(keys, kQueries, D, w.keys + key * D, D, w.query_packed, kQueries, w.scores,
                 kQueries, false);
    mask_scores(a, first, key, keys, w.scores, -A(INFINITY));
    online_softmax(w.scores, keys, A(a.softmax_scale), w.largest, w.sum, w.out_t, D);
    pack_rows(keys, kQueries, w.scores, kQueries, w.probs, kQueries);
    tile_gemm<E>(D, kQueries, round_up(keys, Dot<E>::kGroup), w.values_t + key, w.padded_length,
                 w.probs, kQueries, w.out_t, kQueries, true);
  }
  transpose(D, kQueries, w.out_t, kQueries, w.out, D);
  A* lse = static_cast<A*>(a.lse) + head * a.tokens + token;
  for (int64_t i = 0; i < count; ++i) {
    T* o = static_cast<T*>(a.o) + (token + i) * a.o_stride + head * D;
    const A* row = w.out + i * D;
    const A inverse = A(1) / w.sum[i];
    lse[i] = w.largest[i] + std::log(w.sum[i]);
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) o[d] = store<T>(row[d] * inverse);
  }
}

template <class T>
void forward(const AttentionArgs& a) {
  const int64_t D = a.head_dim, heads_per_kv = a.q_heads / a.kv_heads;
  const int64_t tasks = a.sequences * a.kv_heads;
#pragma omp parallel for schedule(dynamic)
  for (int64_t index = 0; index < tasks; ++index) {
    const HeadTask task = head_task(a, index);
    [[maybe_unused]] const MatrixUnit unit;
    Scratch scratch;
    Workspace<T> w(scratch, task.length, D);
    load_seen<T>(a, task, a.v, a.v_stride, false, w.values);
    transpose_head(w.values, task.length, D, w.values_t, w.padded_length, w.keys);
    load_seen<T>(a, task, a.k, a.k_stride, true, w.keys);
    for (int64_t h = 0; h < heads_per_kv; ++h)
      for (int64_t first = task.prefix; first < task.length; first += kQueries)
        query_tile(a, task, task.kv_head * heads_per_kv + h, first, w);
  }
}

}  // namespace

namespace LORA_ENGINE_ISA {

void attention_fwd(DType dtype, const AttentionArgs& args) {
  dispatch(dtype, [&](auto t) { forward<decltype(t)>(args); });
}

}  // namespace LORA_ENGINE_ISA
}  // namespace lora_engine
