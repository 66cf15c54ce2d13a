// Linears with LoRA for few rows X, as when a model generates:
//
//   S = X A'    Y [M, N] = X W' + S (scaling B)' + bias + residual
//
// Weights and adapters are read once, in place, in the type that the model stores them in. Elements
// are multiplied in vectors along the rows of X and W, for up to kOuter rows of W and kRows of X at
// a time, whose sums stay in registers. A sum adds its terms in an order that K alone decides:
// other rows beside one, and other threads, change no bit of it.
//
// bfloat16 on a matrix unit: unit_few_rows.hpp.
#include "few_rows.hpp"

#include "isa.hpp"
#include "scratch.hpp"
#include "unit_few_rows.hpp"

namespace lora_engine {
namespace {

constexpr int kOuter = 3;
constexpr int kRows = kTileRows * 2 / kOuter;  // kOuter * kRows sums, as tile_gemm has
constexpr int64_t kAhead = 1024;               // bytes of a row of W that are fetched ahead
constexpr int64_t kChunk = 16 * kOuter;        // rows of W that a thread takes at a time

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// How a vector of a row of W, of type T, is multiplied with one of a row of X, of type E.
template <class T>
struct Along {
  using E = T;
  using Acc = acc_t<T>;
  using Vector = typename Dot<T>::Vector;
  using Operand = Vector;
  static constexpr int64_t kLanes = kVectorBytes / sizeof(T);
  static inline Operand load(const T* p) {
    Operand v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static inline Vector multiply_add(Vector acc, Operand w, const E* x) { return acc + w * load(x); }
};

template <>
struct Along<bf16> {
  using Acc = float;
  using Vector = float_vector;
#ifdef __AVX512BF16__
  using E = bf16;
  using Operand = __m512i;
  static constexpr int64_t kLanes = kVectorBytes / sizeof(bf16);
  static inline Operand load(const bf16* p) { return _mm512_loadu_si512(p); }
  static inline Vector multiply_add(Vector acc, Operand w, const E* x) {
    return (Vector)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)_mm512_loadu_si512(x));
  }
#else
  using E = float;
  using Operand = Vector;
  static constexpr int64_t kLanes = kVectorBytes / sizeof(float);
  static inline Operand load(const bf16* p) {
    typedef uint16_t half_vector __attribute__((vector_size(kVectorBytes / 2)));
    typedef uint32_t bits_vector __attribute__((vector_size(kVectorBytes)));
    half_vector half;
    std::memcpy(&half, p, sizeof half);
    return (Vector)(__builtin_convertvector(half, bits_vector) << 16);
  }
  static inline Vector multiply_add(Vector acc, Operand w, const E* x) {
    Vector v;
    std::memcpy(&v, x, sizeof v);
    return acc + w * v;
  }
#endif
};

template <class T>
constexpr int64_t padded(int64_t k) {
  return round_up(k, Along<T>::kLanes);
}

// The first `count` elements of a vector, zeros behind them.
template <class T>
inline typename Along<T>::Operand load_part(const T* p, int64_t count) {
  T part[Along<T>::kLanes] = {};
  std::memcpy(part, p, sizeof(T) * count);
  return Along<T>::load(part);
}

// acc += w x' along k elements. Rows of x are padded with zeros to whole vectors.
template <class T, int Outer, int Rows>
inline void along(int64_t k, const T* w, int64_t ldw, const typename Along<T>::E* x, int64_t ldx,
                  typename Along<T>::Vector* sums) {
  using D = Along<T>;
  typename D::Vector acc[Outer][Rows];
  std::memcpy(acc, sums, sizeof acc);
  int64_t j = 0;
  const auto step = [&](auto load) {
    typename D::Operand v[Outer];
#pragma GCC unroll 3
    for (int n = 0; n < Outer; ++n) {
      __builtin_prefetch(w + n * ldw + j + kAhead / sizeof(T));
      v[n] = load(w + n * ldw + j);
    }
#pragma GCC unroll 8
    for (int m = 0; m < Rows; ++m) {
#pragma GCC unroll 3
      for (int n = 0; n < Outer; ++n) acc[n][m] = D::multiply_add(acc[n][m], v[n], x + m * ldx + j);
    }
  };
  for (; j + D::kLanes <= k; j += D::kLanes) step([](const T* p) { return D::load(p); });
  if (j < k) step([&](const T* p) { return load_part(p, k - j); });
  std::memcpy(sums, acc, sizeof acc);
}

// The sum of a vector's elements. Bits: a vector of as many integers of the same size.
template <class Bits, class V>
inline auto sum_of(V v) {
  constexpr int kCount = sizeof(Bits) / sizeof(Bits{}[0]);
#pragma GCC unroll 4
  for (int width = kCount / 2; width > 0; width /= 2) {
    Bits other;
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) other[i] = i ^ width;
    v += __builtin_shuffle(v, other);
  }
  return v[0];
}
inline float sum_of(float_vector v) {
  typedef int32_t bits __attribute__((vector_size(kVectorBytes)));
  return sum_of<bits>(v);
}
inline double sum_of(double_vector v) {
  typedef int64_t bits __attribute__((vector_size(kVectorBytes)));
  return sum_of<bits>(v);
}

// One product x w' of a sum of products: w [.., k], and x [.., k] padded to whole vectors.
template <class T>
struct Term {
  int64_t k;
  const T* w;
  int64_t ldw;
  const typename Along<T>::E* x;
  int64_t ldx;
};

// out [Rows, Outer] = the sum of all terms, for Outer rows of w and Rows of x from `row` on.
template <class T, int Outer, int Rows>
inline void sum_tile(const Term<T>* terms, int64_t count, int64_t row, acc_t<T>* out, int64_t ldo,
                     int64_t step) {
  typename Along<T>::Vector sums[Outer * Rows] = {};
  for (int64_t i = 0; i < count; ++i) {
    const Term<T>& a = terms[i];
    along<T, Outer, Rows>(a.k, a.w, a.ldw, a.x + row * a.ldx, a.ldx, sums);
  }
#pragma GCC unroll 3
  for (int n = 0; n < Outer; ++n) {
#pragma GCC unroll 8
    for (int m = 0; m < Rows; ++m) out[(row + m) * ldo + n * step] = sum_of(sums[n * Rows + m]);
  }
}

// `sum_tile` for `rows` <= Rows.
template <class T, int Outer, int Rows>
inline void sum_rows(int64_t rows, const Term<T>* terms, int64_t count, int64_t row, acc_t<T>* out,
                     int64_t ldo, int64_t step) {
  if constexpr (Rows > 0) {
    if (rows == Rows)
      sum_tile<T, Outer, Rows>(terms, count, row, out, ldo, step);
    else
      sum_rows<T, Outer, Rows - 1>(rows, terms, count, row, out, ldo, step);
  }
}

// out [rows, outer] = the sum of all terms, for `outer` <= Outer; the rows are divided evenly into
// tiles.
template <class T, int Outer>
inline void sum_terms(int64_t outer, int64_t rows, const Term<T>* terms, int64_t count,
                      acc_t<T>* out, int64_t ldo, int64_t step) {
  if constexpr (Outer > 0) {
    if (outer < Outer) {
      sum_terms<T, Outer - 1>(outer, rows, terms, count, out, ldo, step);
      return;
    }
    const int64_t tiles = (rows + kRows - 1) / kRows;
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t row = rows * i / tiles, end = rows * (i + 1) / tiles;
      sum_rows<T, Outer, kRows>(end - row, terms, count, row, out, ldo, step);
    }
  }
}

template <class T>
void few_rows(const FewRowsArgs& a) {
  using E = typename Along<T>::E;
  const T *x = static_cast<const T*>(a.x), *weight = static_cast<const T*>(a.weight);
  const T* residual = static_cast<const T*>(a.residual);
  T* y = static_cast<T*>(a.y);
  const int64_t ldx = padded<T>(a.cols);
  Scratch scratch;
  E* xs = scratch.allocate<E>(a.rows * ldx);
  for (int64_t m = 0; m < a.rows; ++m) {
    convert_row(a.cols, x + m * a.x_stride, xs + m * ldx);
    std::memset(xs + m * ldx + a.cols, 0, sizeof(E) * (ldx - a.cols));
  }
  // S of each adapter, padded.
  E** low_rank = scratch.allocate<E*>(a.adapter_count);
  int64_t widest = 0, most = 0;
  for (int64_t i = 0; i < a.adapter_count; ++i) {
    const int64_t width = padded<T>(a.adapters[i].ranks);
    low_rank[i] = scratch.allocate<E>(a.rows * width);
    std::memset(low_rank[i], 0, sizeof(E) * a.rows * width);
    if (width > widest) widest = width;
  }
  for (int64_t i = 0; i < a.linear_count; ++i)
    if (a.linears[i].adapters > most) most = a.linears[i].adapters;
#pragma omp parallel
  {
    Scratch own;
    T* factors = own.allocate<T>(kOuter * ldx > most * kOuter * widest ? kOuter * ldx
                                                                       : most * kOuter * widest);
    Term<T>* terms = own.allocate<Term<T>>(1 + most);
    acc_t<T>* sums = own.allocate<acc_t<T>>(a.rows * kChunk);
    for (int64_t i = 0; i < a.adapter_count; ++i) {
      const LoraAdapter& adapter = a.adapters[i];
      const int64_t width = padded<T>(adapter.ranks);
#pragma omp for schedule(static) nowait
      for (int64_t r = 0; r < adapter.ranks; r += kOuter) {
        const int64_t outer = smaller(kOuter, adapter.ranks - r);
        for (int64_t n = 0; n < outer; ++n)
          take_row(adapter.dtype, adapter.lora_a, (r + n) * adapter.a_stride, a.cols, 1.0,
                   factors + n * ldx, ldx);
        terms[0] = {ldx, factors, ldx, xs, ldx};
        sum_terms<T, kOuter>(outer, a.rows, terms, 1, sums, kChunk, 1);
        for (int64_t m = 0; m < a.rows; ++m) {
          T rounded[kOuter];
          convert_row(outer, sums + m * kChunk, rounded);
          convert_row(outer, rounded, low_rank[i] + m * width + r);
        }
      }
    }
#pragma omp barrier
    int64_t start = 0, first = 0;
    for (int64_t i = 0; i < a.linear_count; ++i) {
      const LoraBase& linear = a.linears[i];
      const T* bias = static_cast<const T*>(linear.bias);
#pragma omp for schedule(static) nowait
      for (int64_t begin = 0; begin < linear.rows; begin += kChunk) {
        const int64_t end = smaller(begin + kChunk, linear.rows);
        // The rows as kOuter runs of adjacent ones, of each run one row at a time: every run is
        // read in the order in memory.
        const int64_t whole = (end - begin) / kOuter, rest = (end - begin) % kOuter;
        const auto rows_of = [&](int64_t row, int64_t outer, int64_t step) {
          terms[0] = {a.cols, weight + (start + row) * a.w_stride, step * a.w_stride, xs, ldx};
          for (int64_t j = 0; j < linear.adapters; ++j) {
            const LoraAdapter& adapter = a.adapters[first + j];
            const int64_t width = padded<T>(adapter.ranks);
            T* scaled = factors + j * kOuter * widest;
            for (int64_t n = 0; n < outer; ++n)
              take_row(adapter.dtype, adapter.lora_b, (row + n * step) * adapter.b_stride,
                       adapter.ranks, adapter.scaling, scaled + n * width, width);
            terms[1 + j] = {width, scaled, width, low_rank[first + j], width};
          }
          sum_terms<T, kOuter>(outer, a.rows, terms, 1 + linear.adapters, sums + row - begin,
                               kChunk, step);
        };
        for (int64_t i = 0; i < whole; ++i) rows_of(begin + i, kOuter, whole);
        if (rest) rows_of(end - rest, rest, 1);
        const int64_t place = start + begin;
        for (int64_t m = 0; m < a.rows; ++m)
          finish_row(end - begin, sums + m * kChunk, bias ? bias + begin : nullptr,
                     residual ? residual + m * a.residual_stride + place : nullptr,
                     y + m * a.y_stride + place);
      }
      start += linear.rows;
      first += linear.adapters;
    }
  }
}

}  // namespace

namespace LORA_ENGINE_ISA {

void lora_linear_few_rows(DType dtype, const FewRowsArgs& args) {
  dispatch(dtype, [&](auto t) {
#ifdef LORA_ENGINE_TILES
    if constexpr (std::is_same_v<decltype(t), bf16>) return unit_few_rows(args);
#endif
    few_rows<decltype(t)>(args);
  });
}

}  // namespace LORA_ENGINE_ISA
}  // namespace lora_engine
