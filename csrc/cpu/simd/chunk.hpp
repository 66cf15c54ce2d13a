// Rows of elements worked through in chunks of a few vectors of arithmetic values.
//
// Widening bfloat16 to float32 in the order in memory takes shuffles, of which a processor does one
// in the time of two to four other operations. So a chunk of bfloat16 is split into its even and
// its odd elements, by a shift and a mask of 32-bit words, and interleaved again when it is stored.
// This order of a chunk's values is called lane order; for other types it is the order in memory.
#pragma once

#include "../scratch.hpp"
#include "interleave.hpp"
#include "nontemporal.hpp"
#include "numeric.hpp"

namespace lora_engine {
namespace {

constexpr int64_t kChunkBytes = 128;
template <class A>
constexpr int64_t kChunk = kChunkBytes / sizeof(A);

// The values of one chunk; the compiler keeps them in registers.
template <class A>
struct Values {
  alignas(64) A at[kChunk<A>];
  A& operator[](int64_t j) { return at[j]; }
  const A& operator[](int64_t j) const { return at[j]; }
};

// A row in the arithmetic type, of a whole number of chunks in T's lane order.
template <class T, class A>
struct LaneRow {
  A* data;
};

// Where element i of a row stands in lane order: pairs of bfloat16 fill a vector, whose even
// elements come first.
template <class T>
inline int64_t lane_of(int64_t i) {
  if constexpr (sizeof(T) == sizeof(bf16)) {
    constexpr int64_t kHalf = kRegisterBytes / sizeof(float);
    const int64_t inside = i % (2 * kHalf);
    return i - inside + inside / 2 + inside % 2 * kHalf;
  }
  return i;
}
template <class A>
constexpr int64_t whole_chunks(int64_t count) {
  return (count + kChunk<A> - 1) / kChunk<A> * kChunk<A>;
}

// One register of 32-bit words: float32, or pairs of bfloat16. A vector type, because GCC unrolls a
// loop over so few words fully and then does not vectorise it.
typedef uint32_t Words __attribute__((vector_size(kRegisterBytes)));

// The chunk that begins at element i.
inline Values<float> chunk_at(const bf16* row, int64_t i) {
  constexpr int64_t kHalf = kRegisterBytes / sizeof(float);
  Values<float> values;
  for (int64_t j = 0; j < kChunk<float>; j += 2 * kHalf) {
    Words pairs;
    std::memcpy(&pairs, row + i + j, sizeof pairs);
    const Words even = pairs << 16, odd = pairs & 0xffff0000u;
    std::memcpy(values.at + j, &even, sizeof even);
    std::memcpy(values.at + j + kHalf, &odd, sizeof odd);
  }
  return values;
}
template <class A>
inline Values<A> chunk_at(const A* row, int64_t i) {
  Values<A> values;
  copy_registers<kChunkBytes>(values.at, row + i, false);
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

// Two vectors of float32 rounded to bfloat16, the first one's as even elements.
inline Words round_pairs(const float* even, const float* odd) {
#ifdef __AVX512BF16__
  return (Words)interleave_rounded(even, odd);
#else
  Words low, high;
  std::memcpy(&low, even, sizeof low);
  std::memcpy(&high, odd, sizeof high);
  return rounded_bits(low) >> 16 | (rounded_bits(high) & 0xffff0000u);
#endif
}

// Stores a chunk at `row`; `nontemporal` is as in nontemporal.hpp.
inline void put_chunk(const Values<float>& values, bf16* row, bool nontemporal) {
  constexpr int64_t kHalf = kRegisterBytes / sizeof(float);
  for (int64_t j = 0; j < kChunk<float>; j += 2 * kHalf) {
    const Words pairs = round_pairs(values.at + j, values.at + j + kHalf);
    copy_registers<sizeof pairs>(row + j, &pairs, nontemporal);
  }
}
template <class A>
inline void put_chunk(const Values<A>& values, A* row, bool nontemporal) {
  copy_registers<sizeof values.at>(row, values.at, nontemporal);
}

// Whether rows of T at y are to be stored past the caches.
template <class T>
inline bool worth_nontemporal(const void* y, int64_t rows, int64_t cols, int64_t stride) {
  constexpr int64_t kSize = sizeof(T);
  return worth_nontemporal(y, rows, cols * kSize, stride * kSize);
}

// The sum of a register's lanes, by halves: one after the other the additions would take longer
// than the rest of a short row.
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
  void add(const Values<A>& values) {
    for (int64_t i = 0; i < kVectors; ++i) {
      Lanes terms;
      std::memcpy(&terms, values.at + i * kLanes, sizeof terms);
      sums_[i] += terms;
    }
  }
  A total() const {
    Lanes all = sums_[0];
    for (int64_t i = 1; i < kVectors; ++i) all += sums_[i];
    A lanes[kLanes];
    std::memcpy(lanes, &all, sizeof all);
    return sum_of_lanes<A, kLanes>(lanes);
  }

 private:
  static constexpr int64_t kLanes = kRegisterBytes / sizeof(A),
                           kVectors = kChunkBytes / kRegisterBytes;
  typedef A Lanes __attribute__((vector_size(kRegisterBytes)));
  Lanes sums_[kVectors] = {};
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
    sums.add(terms);
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
    firsts.add(a), seconds.add(b);
  }
  Pair<A> sums = {firsts.total(), seconds.total()};
  for (; i < count; ++i) {
    const Pair<A> both = term(element_at(rows, i)...);
    sums.first += both.first, sums.second += both.second;
  }
  return sums;
}

// y[i] = value(elements of the rows at i) for i in [0, count). `value` is called once for every i
// and may write to the elements of a LaneRow. y may be one of the rows; `nontemporal` is as in
// nontemporal.hpp.
template <class T, class Value, class... Rows>
inline void store_row(int64_t count, T* y, bool nontemporal, Value value, Rows... rows) {
  using A = acc_t<T>;
  int64_t i = 0;
  for (; i + kChunk<A> <= count; i += kChunk<A>) {
    Values<A> values;
    [&](auto&&... of) {
#pragma omp simd
      for (int64_t j = 0; j < kChunk<A>; ++j) values.at[j] = value(of[j]...);
    }(chunk_at(rows, i)...);
    put_chunk(values, y + i, nontemporal);
  }
  finish_nontemporal(nontemporal);
  for (; i < count; ++i) y[i] = store<T>(value(element_at(rows, i)...));
}

}  // namespace
}  // namespace lora_engine
