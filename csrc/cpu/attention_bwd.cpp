// Attention within each packed sequence, backward: the probabilities are recomputed from the saved
// log-sum-exp (Dao, 2023). One task owns a key/value head of one sequence with all its query
// heads, so dk and dv are summed in a fixed order without atomics; those of tokens that several
// sequences share are summed afterwards.
#include "attention.hpp"
#include "isa.hpp"
#include "shared_gradients.hpp"
#include "simd/chunk.hpp"

namespace lora_engine {
namespace {

template <class T>
struct Workspace {
  using A = acc_t<T>;
  using E = typename Element<T>::type;
  int64_t padded_dim;                          // head_dim rounded up to a tile
  int64_t padded_length;                       // length rounded up to a group
  E *keys, *values, *keys_t;                   // [length, D], [length, D], [D, padded_length]
  A *dk, *dv;                                  // [length, padded_dim]
  E *query, *d_out;                            // [kQueries, D]
  E *query_t, *d_out_t;                        // packed [D, kQueries]
  E *query_rows, *d_out_rows;                  // packed [kQueries, padded_dim]
  A *probs, *d_scores;                         // [kKeys, kQueries]
  E *prob_rows, *d_score_rows, *d_score_pack;  // [kKeys, kQueries], and packed for dq
  A *dq_t, *dq;                                // [D, kQueries], [kQueries, D]
  A lse[kQueries], delta[kQueries];

  Workspace(Scratch& scratch, int64_t length, int64_t D) {
    padded_dim = round_up(D, kTileN<E>);
    padded_length = round_up(length, Dot<E>::kGroup);
    keys = scratch.allocate<E>(padded_length * D);
    values = scratch.allocate<E>(padded_length * D);
    keys_t = scratch.allocate<E>(padded_length * D);
    dk = zeros<A>(scratch, length * padded_dim);
    dv = zeros<A>(scratch, length * padded_dim);
    query = scratch.allocate<E>(kQueries * D);
    d_out = scratch.allocate<E>(kQueries * D);
    query_t = scratch.allocate<E>(kQueries * D);
    d_out_t = scratch.allocate<E>(kQueries * D);
    query_rows = zeros<E>(scratch, kQueries * padded_dim);
    d_out_rows = zeros<E>(scratch, kQueries * padded_dim);
    probs = scratch.allocate<A>(kKeys * kQueries);
    d_scores = scratch.allocate<A>(kKeys * kQueries);
    prob_rows = scratch.allocate<E>(kKeys * kQueries);
    d_score_rows = scratch.allocate<E>(kKeys * kQueries);
    d_score_pack = scratch.allocate<E>(kKeys * kQueries);
    dq_t = scratch.allocate<A>(kQueries * D);
    dq = scratch.allocate<A>(kQueries * D);
  }

  template <class X>
  static X* zeros(Scratch& scratch, int64_t count) {
    X* x = scratch.allocate<X>(count);
    std::memset(x, 0, sizeof(X) * count);
    return x;
  }
};

// Loads a tile of queries and of output gradients in each layout that a product reads.
template <class T>
void load_tile(const AttentionBwdArgs& b, int64_t head, int64_t token, int64_t count,
               Workspace<T>& w) {
  using A = acc_t<T>;
  using E = typename Element<T>::type;
  const AttentionArgs& a = b.fwd;
  const int64_t D = a.head_dim;
  const T* q = static_cast<const T*>(a.q) + token * a.q_stride + head * D;
  const T* o = static_cast<const T*>(a.o) + token * a.o_stride + head * D;
  const T* d_o = static_cast<const T*>(b.d_o) + token * b.do_stride + head * D;
  const A* lse = static_cast<const A*>(a.lse) + head * a.tokens + token;
  load_head(q, a.q_stride, offset_or_null<A>(a.cos, token * D), offset_or_null<A>(a.sin, token * D),
            count, D, w.query);
  load_head<T, E, A>(d_o, b.do_stride, nullptr, nullptr, count, D, w.d_out);
  // Queries past the sequence's end: zeros, with an infinite lse so that their probabilities are 0.
  std::memset(w.query + count * D, 0, sizeof(E) * (kQueries - count) * D);
  std::memset(w.d_out + count * D, 0, sizeof(E) * (kQueries - count) * D);
  const auto product = [](A x, A y) { return x * y; };
  for (int64_t i = 0; i < kQueries; ++i) {
    w.lse[i] = i < count ? lse[i] : A(INFINITY);
    w.delta[i] =
        i < count ? row_sum<A>(D, product, o + i * a.o_stride, d_o + i * b.do_stride) : A(0);
  }
  pack_transposed(D, kQueries, w.query, D, w.query_t, kQueries);
  pack_transposed(D, kQueries, w.d_out, D, w.d_out_t, kQueries);
  pack_rows(kQueries, D, w.query, D, w.query_rows, w.padded_dim);
  pack_rows(kQueries, D, w.d_out, D, w.d_out_rows, w.padded_dim);
  std::memset(w.dq_t, 0, sizeof(A) * D * kQueries);
}

// probs <- exp(scale * scores - lse);  d_scores <- scale * probs * (d_probs - delta), and both as
// elements for multiplication. Called, not inlined, as the forward pass's softmax is.
template <class A, class E>
__attribute__((noinline)) void softmax_backward(int64_t keys, A scale, const A* lse, const A* delta,
                                                A* probs, A* d_scores, E* prob_rows,
                                                E* d_score_rows) {
  for (int64_t j = 0; j < keys; ++j) {
    A* prob = probs + j * kQueries;
    A* d_score = d_scores + j * kQueries;
#pragma omp simd
    for (int64_t i = 0; i < kQueries; ++i) {
      prob[i] = exp_acc(prob[i] * scale - lse[i]);
      d_score[i] = scale * prob[i] * (d_score[i] - delta[i]);
    }
    convert_row(kQueries, prob, prob_rows + j * kQueries);
    convert_row(kQueries, d_score, d_score_rows + j * kQueries);
  }
}

// Writes rows of a gradient, rotated back where the forward pass rotated.
template <class T>
void store_gradient(const AttentionArgs& a, int64_t token, int64_t rows, const acc_t<T>* grad,
                    int64_t ld, T* out, int64_t stride, bool rotated) {
  using A = acc_t<T>;
  const int64_t D = a.head_dim;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t offset = (token + i) * D;
    T* row = out + i * stride;
    if (rotated) {
      rotate(grad + i * ld, row, static_cast<const A*>(a.cos) + offset,
             static_cast<const A*>(a.sin) + offset, D, true,
             [](A value) { return store<T>(value); });
    } else {
#pragma omp simd
      for (int64_t d = 0; d < D; ++d) row[d] = store<T>(grad[i * ld + d]);
    }
  }
}

template <class T>
void query_tile(const AttentionBwdArgs& b, const HeadTask& task, int64_t head, int64_t first,
                Workspace<T>& w) {
  using A = acc_t<T>;
  using E = typename Element<T>::type;
  const AttentionArgs& a = b.fwd;
  const int64_t D = a.head_dim;
  const int64_t count = task.length - first < kQueries ? task.length - first : kQueries;
  const int64_t token = task.token(first);
  load_tile(b, head, token, count, w);
  const KeyRange range = visible_keys(a, task.length, first, first + count);
  for (int64_t key = range.begin; key < range.end; key += kKeys) {
    const int64_t keys = range.end - key < kKeys ? range.end - key : kKeys;
    tile_gemm<E>(keys, kQueries, D, w.keys + key * D, D, w.query_t, kQueries, w.probs, kQueries,
                 false);
    mask_scores(a, first, key, keys, w.probs, -A(INFINITY));
    tile_gemm<E>(keys, kQueries, D, w.values + key * D, D, w.d_out_t, kQueries, w.d_scores,
                 kQueries, false);
    softmax_backward(keys, A(a.softmax_scale), w.lse, w.delta, w.probs, w.d_scores, w.prob_rows,
                     w.d_score_rows);
    pack_rows(keys, kQueries, w.d_scores, kQueries, w.d_score_pack, kQueries);
    tile_gemm<E>(keys, w.padded_dim, kQueries, w.prob_rows, kQueries, w.d_out_rows, w.padded_dim,
                 w.dv + key * w.padded_dim, w.padded_dim, true);
    tile_gemm<E>(keys, w.padded_dim, kQueries, w.d_score_rows, kQueries, w.query_rows, w.padded_dim,
                 w.dk + key * w.padded_dim, w.padded_dim, true);
    tile_gemm<E>(D, kQueries, round_up(keys, Dot<E>::kGroup), w.keys_t + key, w.padded_length,
                 w.d_score_pack, kQueries, w.dq_t, kQueries, true);
  }
  transpose(D, kQueries, w.dq_t, kQueries, w.dq, D);
  store_gradient(a, token, count, w.dq, D, static_cast<T*>(b.dq) + token * b.dq_stride + head * D,
                 b.dq_stride, a.cos != nullptr);
}

// Writes dk and dv of a task's own tokens.
template <class T>
void store_own(const AttentionBwdArgs& b, const HeadTask& task, const acc_t<T>* dk,
               const acc_t<T>* dv, int64_t ld) {
  const AttentionArgs& a = b.fwd;
  const int64_t column = task.kv_head * a.head_dim, rows = task.length - task.prefix;
  store_gradient(a, task.begin, rows, dk, ld,
                 static_cast<T*>(b.dk) + task.begin * b.dk_stride + column, b.dk_stride,
                 a.cos != nullptr);
  store_gradient(a, task.begin, rows, dv, ld,
                 static_cast<T*>(b.dv) + task.begin * b.dv_stride + column, b.dv_stride, false);
}

template <class T>
void backward(const AttentionBwdArgs& b) {
  using A = acc_t<T>;
  const AttentionArgs& a = b.fwd;
  const int64_t D = a.head_dim, heads_per_kv = a.q_heads / a.kv_heads;
  const int64_t tasks = a.sequences * a.kv_heads;
  SharedGradients<T> shared(a);
#pragma omp parallel for schedule(dynamic)
  for (int64_t index = 0; index < tasks; ++index) {
    const HeadTask task = head_task(a, index);
    [[maybe_unused]] const MatrixUnit unit;
    Scratch scratch;
    Workspace<T> w(scratch, task.length, D);
    load_seen<T>(a, task, a.k, a.k_stride, true, w.keys);
    transpose_head(w.keys, task.length, D, w.keys_t, w.padded_length, w.values);
    load_seen<T>(a, task, a.v, a.v_stride, false, w.values);
    for (int64_t h = 0; h < heads_per_kv; ++h)
      for (int64_t first = task.prefix; first < task.length; first += kQueries)
        query_tile(b, task, task.kv_head * heads_per_kv + h, first, w);
    shared.keep(task, w.dk, w.dv, w.padded_dim);
    if (!shared.continued(task)) {
      const int64_t own = task.prefix * w.padded_dim;
      store_own<T>(b, task, w.dk + own, w.dv + own, w.padded_dim);
    }
  }
  if (!a.parents) return;
#pragma omp parallel for schedule(dynamic)
  for (int64_t index = 0; index < tasks; ++index) {
    const HeadTask task = head_task(a, index);
    if (!shared.continued(task)) continue;
    A *dk, *dv;
    shared.sum(task, &dk, &dv);
    store_own<T>(b, task, dk, dv, D);
  }
}

}  // namespace

namespace LORA_ENGINE_ISA {

void attention_bwd(DType dtype, const AttentionBwdArgs& args) {
  dispatch(dtype, [&](auto t) { backward<decltype(t)>(args); });
}

}  // namespace LORA_ENGINE_ISA
}  // namespace lora_engine
