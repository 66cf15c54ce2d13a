// Rows of elements worked through in chunks of two registers' worth of arithmetic values.
//
// Between memory and registers bfloat16 costs most where neighbours stay neighbours: widening takes
// shuffles, of which processors do one where they do two or four other operations. So a chunk of
// bfloat16 is split into its even and its odd elements, a shift and a mask of 32-bit words, and put
// together again when it is stored. That order of a chunk's values is called lane order here; for
// the other types it is the order in memory.
#pragma once

#include "numeric.hpp"
#include "scratch.hpp"
#include "stream.hpp"
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace lora_engine {
namespace {

template <class A>
constexpr int64_t kChunk = 128 / sizeof(A);

// The values of one chunk; the compiler keeps them in registers.
template <class A>
struct Values {
  alignas(64) A at[kChunk<A>];
  A& operator[](int64_t j) { return at[j]; }
};

// A row in the arithmetic type, of a whole number of chunks in T's lane order.
template <class T, class A>
struct LaneRow {
  A* data;
};

// Where element i of a row stands in lane order.
template <class T>
inline int64_t lane_of(int64_t i) {
  if constexpr (sizeof(T) == sizeof(bf16)) {
    constexpr int64_t kHalf = kChunk<float> / 2;
    const int64_t inside = i % kChunk<float>;
    return i - inside + inside / 2 + inside % 2 * kHalf;
  }
  return i;
}
template <class A>
constexpr int64_t whole_chunks(int64_t count) {
  return (count + kChunk<A> - 1) / kChunk<A> * kChunk<A>;
}

// The chunk that begins at element i.
inline Values<float> chunk_at(const bf16* row, int64_t i) {
  constexpr int64_t kHalf = kChunk<float> / 2;
  alignas(64) uint32_t words[kHalf];
  std::memcpy(words, row + i, sizeof words);
  Values<float> values;
#pragma omp simd
  for (int64_t j = 0; j < kHalf; ++j) values.at[j] = float_of(words[j] << 16);
#pragma omp simd
  for (int64_t j = 0; j < kHalf; ++j) values.at[kHalf + j] = float_of(words[j] & 0xffff0000u);
  return values;
}
template <class A>
inline Values<A> chunk_at(const A* row, int64_t i) {
  Values<A> values;
  std::memcpy(values.at, row + i, sizeof values.at);
  return values;
}
template <class T, class A>
inline A* chunk_at(LaneRow<T, A> row, int64_t i) {
  return row.data + i;
}

// Element i alone.
template <class T>
inline acc_t<T> element_at(const T* row, int64_t i) {
  return load(row[i]);
}
template <class T, class A>
inline A& element_at(LaneRow<T, A> row, int64_t i) {
  return row.data[lane_of<T>(i)];
}

// Stores a chunk at `row`; `stream` is as in stream.hpp.
inline void put_chunk(Values<float>& values, bf16* row, bool stream) {
  constexpr int64_t kHalf = kChunk<float> / 2;
  alignas(64) uint32_t words[kHalf];
#ifdef __AVX512BF16__
  // The compiler does not know the instruction that rounds to bfloat16.
  alignas(64) static constexpr uint16_t kOrder[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                      21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                      11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512bh halves =
      _mm512_cvtne2ps_pbh(_mm512_load_ps(values.at + kHalf), _mm512_load_ps(values.at));
  _mm512_store_si512(words, _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), (__m512i)halves));
#else
#pragma omp simd
  for (int64_t j = 0; j < kHalf; ++j)
    words[j] =
        rounded_bits(values.at[j]) >> 16 | (rounded_bits(values.at[kHalf + j]) & 0xffff0000u);
#endif
  copy_lines<sizeof words>(row, words, stream);
}
template <class A>
inline void put_chunk(Values<A>& values, A* row, bool stream) {
  copy_lines<sizeof values.at>(row, values.at, stream);
}

// Whether rows of T at y are to be stored past the caches.
template <class T>
inline bool worth_streaming(const void* y, int64_t rows, int64_t cols, int64_t stride) {
  constexpr int64_t kSize = sizeof(T);
  return worth_streaming(y, rows, cols * kSize, stride * kSize);
}

// The sum of a register's worth of values, by halves: added one after the other they would take
// longer than a short row.
template <class A, int64_t kCount>
inline A sum_of_lanes(const A* values) {
  if constexpr (kCount == 1) {
    return values[0];
  } else {
    typedef A Half __attribute__((vector_size(sizeof(A) * kCount / 2)));
    Half low, high;
    std::memcpy(&low, values, sizeof low);
    std::memcpy(&high, values + kCount / 2, sizeof high);
    low += high;
    A sums[kCount / 2];
    std::memcpy(sums, &low, sizeof low);
    return sum_of_lanes<A, kCount / 2>(sums);
  }
}

// Sums of a chunk's lanes, kept apart until the row ends.
template <class A>
class LaneSums {
 public:
  void add(const A* values) {
    Lanes a, b;
    std::memcpy(&a, values, sizeof a);
    std::memcpy(&b, values + kLanes, sizeof b);
    first_ += a, second_ += b;
  }
  A total() const {
    const Lanes both = first_ + second_;
    A sums[kLanes];
    std::memcpy(sums, &both, sizeof sums);
    return sum_of_lanes<A, kLanes>(sums);
  }

 private:
  static constexpr int64_t kLanes = kChunk<A> / 2;
  typedef A Lanes __attribute__((vector_size(64)));
  Lanes first_ = {}, second_ = {};
};

// The sum of term(elements of the rows at i) for i in [0, count).
template <class A, class Term, class... Rows>
inline A row_sum(int64_t count, Term term, Rows... rows) {
  LaneSums<A> sums;
  int64_t i = 0;
  for (; i + kChunk<A> <= count; i += kChunk<A>) {
    Values<A> terms;
    [&](auto&&... of) {
#pragma omp simd
      for (int64_t j = 0; j < kChunk<A>; ++j) terms.at[j] = term(of[j]...);
    }(chunk_at(rows, i)...);
    sums.add(terms.at);
  }
  A sum = sums.total();
  for (; i < count; ++i) sum += term(element_at(rows, i)...);
  return sum;
}

template <class A>
struct Pair {
  A first, second;
};

// Two sums at once: term gives the addends of both.
template <class A, class Term, class... Rows>
inline Pair<A> row_sums(int64_t count, Term term, Rows... rows) {
  LaneSums<A> firsts, seconds;
  int64_t i = 0;
  for (; i + kChunk<A> <= count; i += kChunk<A>) {
    Values<A> a, b;
    [&](auto&&... of) {
#pragma omp simd
      for (int64_t j = 0; j < kChunk<A>; ++j) {
        const Pair<A> both = term(of[j]...);
        a.at[j] = both.first, b.at[j] = both.second;
      }
    }(chunk_at(rows, i)...);
    firsts.add(a.at), seconds.add(b.at);
  }
  Pair<A> sums = {firsts.total(), seconds.total()};
  for (; i < count; ++i) {
    const Pair<A> both = term(element_at(rows, i)...);
    sums.first += both.first, sums.second += both.second;
  }
  return sums;
}

// y[i] = value(elements of the rows at i) for i in [0, count). `value` is called once for every i
// and may write to the elements of a LaneRow. y may be one of the rows; `stream` is as in
// stream.hpp.
template <class T, class Value, class... Rows>
inline void store_row(int64_t count, T* y, bool stream, Value value, Rows... rows) {
  using A = acc_t<T>;
  int64_t i = 0;
  for (; i + kChunk<A> <= count; i += kChunk<A>) {
    Values<A> values;
    [&](auto&&... of) {
#pragma omp simd
      for (int64_t j = 0; j < kChunk<A>; ++j) values.at[j] = value(of[j]...);
    }(chunk_at(rows, i)...);
    put_chunk(values, y + i, stream);
  }
  finish_streaming(stream);
  for (; i < count; ++i) y[i] = store<T>(value(element_at(rows, i)...));
}

}  // namespace
}  // namespace lora_engine
