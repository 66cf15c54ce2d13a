// Attention of one new token of each sequence over the keys and values that a cache holds:
//
//   o = softmax(scale q K') V
//
// where K and V are the cache's rows in a sequence's spans, the token's own among them. The token's
// query and key are rotated, and its key and value stored in the cache, on the way. Each key is
// read once for all query heads that read it. The terms of a sum are added in an order that the
// number of keys alone decides: other sequences, and how keys are spread over spans, change no bit.
#include "isa.hpp"
#include "rotate.hpp"
#include "scratch.hpp"
#include "simd/numeric.hpp"

namespace lora_engine {
namespace {

constexpr int64_t kTile = 64;  // keys scored before the values are added

// The rows of the cache that one sequence sees, one after the other.
class CacheRows {
 public:
  CacheRows(const DecodeSpan* span, int64_t skipped) : span_(span), at_(0) {
    while (skipped >= span_->rows) skipped -= span_++->rows;
    at_ = skipped;
  }
  int64_t next() {
    while (at_ == span_->rows) ++span_, at_ = 0;
    return span_->first + at_++;
  }

 private:
  const DecodeSpan* span_;
  int64_t at_;
};

template <class T>
inline void store_key_value(const AttentionDecodeArgs& a, int64_t sequence, int64_t head) {
  using A = acc_t<T>;
  const int64_t D = a.head_dim, slot = a.slots[sequence] * a.cache_stride + head * D;
  const T* k = static_cast<const T*>(a.k) + sequence * a.k_stride + head * D;
  const T* v = static_cast<const T*>(a.v) + sequence * a.v_stride + head * D;
  T* key = static_cast<T*>(a.keys) + slot;
  if (a.cos) {
    rotate(k, key, static_cast<const A*>(a.cos) + sequence * D,
           static_cast<const A*>(a.sin) + sequence * D, D, false,
           [](A value) { return store<T>(value); });
  } else {
    std::memcpy(key, k, sizeof(T) * D);
  }
  std::memcpy(static_cast<T*>(a.values) + slot, v, sizeof(T) * D);
}

// One sequence's key/value head, and the `count` query heads that read it.
template <class T>
void decode_head(const AttentionDecodeArgs& a, int64_t sequence, int64_t head, int64_t count,
                 Scratch& scratch) {
  using A = acc_t<T>;
  const int64_t D = a.head_dim;
  A* q = scratch.allocate<A>(count * D);
  A* out = scratch.allocate<A>(count * D);
  A* row = scratch.allocate<A>(D);
  A* scores = scratch.allocate<A>(count * kTile);
  A* largest = scratch.allocate<A>(count);
  A* sum = scratch.allocate<A>(count);
  const T* from = static_cast<const T*>(a.q) + sequence * a.q_stride + head * count * D;
  for (int64_t i = 0; i < count; ++i) {
    if (a.cos) {  // rounded as a rotated query is that stands in memory
      rotate(from + i * D, q + i * D, static_cast<const A*>(a.cos) + sequence * D,
             static_cast<const A*>(a.sin) + sequence * D, D, false,
             [](A value) { return load(store<T>(value)); });
    } else {
      for (int64_t d = 0; d < D; ++d) q[i * D + d] = load(from[i * D + d]);
    }
    largest[i] = -INFINITY, sum[i] = 0;
  }
  for (int64_t i = 0; i < count * D; ++i) out[i] = 0;

  const DecodeSpan* spans = a.spans + a.cu_spans[sequence];
  int64_t length = 0;
  for (int64_t s = a.cu_spans[sequence]; s < a.cu_spans[sequence + 1]; ++s)
    length += a.spans[s].rows;
  const int64_t first = a.window > 0 && length > a.window ? length - a.window : 0;
  CacheRows key_rows(spans, first), value_rows(spans, first);
  for (int64_t begin = first; begin < length; begin += kTile) {
    const int64_t keys = length - begin < kTile ? length - begin : kTile;
    for (int64_t j = 0; j < keys; ++j) {
      const T* key = static_cast<const T*>(a.keys) + key_rows.next() * a.cache_stride + head * D;
#pragma omp simd
      for (int64_t d = 0; d < D; ++d) row[d] = load(key[d]);
      for (int64_t i = 0; i < count; ++i) {
        A dot = 0;
        const A* query = q + i * D;
#pragma omp simd reduction(+ : dot)
        for (int64_t d = 0; d < D; ++d) dot += query[d] * row[d];
        scores[i * kTile + j] = dot * A(a.softmax_scale);
      }
    }
    for (int64_t i = 0; i < count; ++i) {  // online softmax: m in `largest`, l in `sum`
      A* score = scores + i * kTile;
      A m = largest[i];
      for (int64_t j = 0; j < keys; ++j) m = score[j] > m ? score[j] : m;
      const A correction = exp_acc(largest[i] - m);
      A l = sum[i] * correction;
#pragma omp simd
      for (int64_t j = 0; j < keys; ++j) score[j] = exp_acc(score[j] - m);
      for (int64_t j = 0; j < keys; ++j) l += score[j];
#pragma omp simd
      for (int64_t d = 0; d < D; ++d) out[i * D + d] *= correction;
      largest[i] = m, sum[i] = l;
    }
    for (int64_t j = 0; j < keys; ++j) {
      const T* value =
          static_cast<const T*>(a.values) + value_rows.next() * a.cache_stride + head * D;
#pragma omp simd
      for (int64_t d = 0; d < D; ++d) row[d] = load(value[d]);
      for (int64_t i = 0; i < count; ++i) {
        const A p = scores[i * kTile + j];
        A* o = out + i * D;
#pragma omp simd
        for (int64_t d = 0; d < D; ++d) o[d] += p * row[d];
      }
    }
  }
  T* to = static_cast<T*>(a.o) + sequence * a.o_stride + head * count * D;
  for (int64_t i = 0; i < count; ++i) {
    const A inverse = A(1) / sum[i];
    for (int64_t d = 0; d < D; ++d) to[i * D + d] = store<T>(out[i * D + d] * inverse);
  }
}

template <class T>
void decode(const AttentionDecodeArgs& a) {
  const int64_t tasks = a.sequences * a.kv_heads, count = a.q_heads / a.kv_heads;
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (int64_t index = 0; index < tasks; ++index)
      store_key_value<T>(a, index / a.kv_heads, index % a.kv_heads);
    // All keys are there: a token may be one of those that another token sees.
#pragma omp for schedule(dynamic)
    for (int64_t index = 0; index < tasks; ++index) {
      Scratch scratch;
      decode_head<T>(a, index / a.kv_heads, index % a.kv_heads, count, scratch);
    }
  }
}

}  // namespace

namespace LORA_ENGINE_ISA {

void attention_decode(DType dtype, const AttentionDecodeArgs& args) {
  dispatch(dtype, [&](auto t) { decode<decltype(t)>(args); });
}

}  // namespace LORA_ENGINE_ISA
}  // namespace lora_engine
