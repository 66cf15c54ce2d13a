// The products of a LoRA adapter that have few ranks (see thin_gemm.hpp).
#include <omp.h>

#include "isa.hpp"
#include "thin_operands.hpp"

namespace lora_engine {
namespace {

// Of X that one core reads twice in a row: they stay in its level-2 cache.
constexpr int64_t kBlockBytes = 768 * 1024;

// Rows a multiple of 2 KiB apart map to few sets of the level-1 cache; a tile of such rows is
// copied to rows at another distance, but for a matrix unit, which reads whole lines.
constexpr int64_t kShareLines = 2048;

template <class E>
inline int64_t copied_stride(int64_t k) {
  return round_up(k, kLine<E>) + kLine<E>;
}

// out [.., ranks] = x p for the tile of rows from `row` on. `copy` holds kProjectRows<E> rows
// copied_stride apart.
template <class T>
inline void project_from(int64_t row, int64_t end, const T* x, int64_t ldx, const Packed<T>& p,
                         T* out, int64_t ldo, typename Packed<T>::E* copy) {
  using E = typename Packed<T>::E;
  const int64_t rows = smaller(end - row, kProjectRows<E>), k = round_up(p.k, Dot<E>::kGroup);
  const bool may_stay = kOnUnit<E> || ldx * static_cast<int64_t>(sizeof(E)) % kShareLines != 0;
  const Part<E> part =
      part_of(may_stay, x + row * ldx, ldx, rows, p.k, rows, k, copy, copied_stride<E>(k));
  project(rows, k, p.ranks, part.data, part.ld, p.data, p.ld, out + row * ldo, ldo);
}

// How many rows of X [.., cols] a core takes at a time, to read them twice from its level-2 cache.
template <class E>
inline int64_t block_rows(int64_t cols) {
  const int64_t tiles = kBlockBytes / static_cast<int64_t>(sizeof(E)) / (cols * kProjectRows<E>);
  return (tiles < 2 ? 2 : smaller(tiles, 8)) * kProjectRows<E>;
}

// Calls body(first, count) for every run of adjacent columns that the spans cover: X is read once
// for the whole run.
template <class Body>
inline void for_runs(const LoraSpan* spans, int64_t count, Body body) {
  int64_t begin = 0, end = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (spans[i].columns == 0) continue;
    if (spans[i].column != end) {
      if (end > begin) body(begin, end - begin);
      begin = spans[i].column;
    }
    end = spans[i].column + spans[i].columns;
  }
  if (end > begin) body(begin, end - begin);
}

template <class T>
void a_fwd(const LoraAFwdArgs& a, int64_t first, int64_t ranks) {
  using E = typename Packed<T>::E;
  const T *x = static_cast<const T*>(a.x),
          *lora_a = static_cast<const T*>(a.lora_a) + first * a.a_stride;
  T *s = static_cast<T*>(a.s) + first, *copies = static_cast<T*>(a.copy);
  Scratch scratch;
  Packed<T> p(scratch, a.cols, ranks);
#pragma omp parallel
  {
    [[maybe_unused]] const MatrixUnit unit;
    Scratch own;
    E* work = own.allocate<E>(kPackRows * p.ld);
    E* copy = own.allocate<E>(kProjectRows<E> * copied_stride<E>(a.cols));
#pragma omp for schedule(static)
    for (int64_t i = 0; i < p.pieces; ++i) p.pack_transpose(i, lora_a, a.a_stride, work);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < a.rows; row += kProjectRows<E>) {
      project_from(row, a.rows, x, a.x_stride, p, s, a.s_stride, copy);
      const int64_t end = copies ? smaller(row + kProjectRows<E>, a.rows) : row;
      for (int64_t i = row; i < end; ++i)
        std::memcpy(copies + i * a.copy_stride + first, s + i * a.s_stride, sizeof(T) * ranks);
    }
  }
}

// scaled = ds with each of the rows [begin, end) times its factor.
template <class T>
inline void scale_rows(int64_t begin, int64_t end, int64_t ranks, const T* ds, int64_t ld_ds,
                       const acc_t<T>* factors, T* scaled, int64_t ld_scaled) {
  for (int64_t i = begin; i < end; ++i)
    for (int64_t r = 0; r < ranks; ++r)
      scaled[i * ld_scaled + r] = store<T>(load(ds[i * ld_ds + r]) * factors[i]);
}

// Multiplies what stands at `values`; a sum that is added elsewhere is rounded here first.
template <class A>
inline void scale_sums(int64_t count, A scale, A* values) {
  for (int64_t i = 0; i < count; ++i) values[i] *= scale;
}

// A span's sums dy' s of the columns of strip i, to the parts of the span: each [cols, ranks].
// `work` holds a strip.
template <class T>
inline void store_parts(const LoraBBwdArgs& a, const LoraSpan& span, const Sums<T>& sums, int64_t i,
                        acc_t<T>* work) {
  using A = acc_t<T>;
  constexpr int64_t kWidth = kTileN<typename Packed<T>::E>;
  for (int64_t j = 0; j < a.part_count; ++j) {
    const LoraSpan& place = a.parts[j].place;
    A* gradient = static_cast<A*>(a.parts[j].gradient);
    if (!gradient || place.row != span.row || place.rows != span.rows) continue;
    A* strip = sums.strip(i) + (place.column - span.column) * kWidth;
    scale_sums(place.columns * kWidth, static_cast<A>(a.parts[j].scale), strip);
    A* out = gradient + i * kWidth * place.columns;
    transpose(place.columns, sums.width(i), strip, kWidth, a.adds ? work : out, place.columns);
    const int64_t added = a.adds ? sums.width(i) * place.columns : 0;
    for (int64_t e = 0; e < added; ++e) out[e] += work[e];
  }
}

// Row `row` of the gradient of A; null: it is not needed.
template <class A>
inline A* gradient_row(const LoraABwdArgs& a, int64_t row) {
  if (a.d_lora_a) return static_cast<A*>(a.d_lora_a) + row * a.d_stride;
  for (int64_t j = 0; j < a.part_count; ++j) {
    const int64_t first = a.parts[j].place.column;
    A* gradient = static_cast<A*>(a.parts[j].gradient);
    if (gradient && row >= first && row < first + a.parts[j].place.columns)
      return gradient + (row - first) * a.cols;
  }
  return nullptr;
}

// A thread adds to the same strips in every block of rows: no barrier is needed between blocks.
template <class T>
void b_bwd(const LoraBBwdArgs& a, const LoraSpan& span) {
  using E = typename Packed<T>::E;
  const int64_t cols = span.rows, ranks = span.columns;
  const T* dy = static_cast<const T*>(a.dy) + span.row;
  const T* lora_b = static_cast<const T*>(a.lora_b) + span.row * a.b_stride + span.column;
  const T* low_rank = static_cast<const T*>(a.s) + span.column;
  T *ds = static_cast<T*>(a.ds) + span.column, *scaled = static_cast<T*>(a.scaled_ds);
  const acc_t<T>* factors = static_cast<const acc_t<T>*>(a.row_factors);
  const bool with_gradient = a.part_count > 0;
  const int64_t step = block_rows<E>(cols) * omp_get_max_threads();
  Scratch scratch;
  Packed<T> p(scratch, cols, ranks), s(scratch, with_gradient ? a.rows : 0, ranks);
  Sums<T> sums(scratch, ranks, with_gradient ? cols : 0);
#pragma omp parallel
  {
    [[maybe_unused]] const MatrixUnit unit;
    Scratch own;
    const int64_t tile = kProjectRows<E> * copied_stride<E>(cols), strip = step * kTileN<E>;
    E* copy = own.allocate<E>(tile > strip ? tile : strip);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < p.pieces; ++i) p.pack(i, lora_b, a.b_stride);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < s.pieces; ++i) s.pack_columns(i, low_rank, a.s_stride);
    const Strips mine(sums.strips);
    for (int64_t i = mine.begin; i < mine.end; ++i) sums.clear(i);
    for (int64_t begin = 0; begin < a.rows; begin += step) {
      const int64_t end = smaller(begin + step, a.rows);
#pragma omp for schedule(static) nowait
      for (int64_t row = begin; row < end; row += kProjectRows<E>) {
        project_from(row, end, dy, a.dy_stride, p, ds, a.ds_stride, copy);
        if (factors)
          scale_rows(row, smaller(row + kProjectRows<E>, end), ranks, ds, a.ds_stride, factors,
                     scaled + span.column, a.scaled_stride);
      }
      sums.add(mine.begin, mine.end, begin, end, dy, a.dy_stride, s, copy);
    }
    acc_t<T>* work = own.allocate<acc_t<T>>(a.adds ? sums.size() : 0);
    for (int64_t i = mine.begin; i < mine.end; ++i) store_parts(a, span, sums, i, work);
  }
}

template <class T>
void a_bwd(const LoraABwdArgs& a, int64_t first, int64_t ranks) {
  using A = acc_t<T>;
  using E = typename Packed<T>::E;
  const T *x = static_cast<const T*>(a.x), *ds = static_cast<const T*>(a.ds) + first;
  const T* weight = static_cast<const T*>(a.column_weight);
  const A offset = static_cast<A>(a.column_offset);
  const int64_t step = block_rows<E>(a.cols);
  Scratch scratch;
  Packed<T> s(scratch, a.rows, ranks);
  Sums<T> sums(scratch, ranks, a.cols);
#pragma omp parallel
  {
    [[maybe_unused]] const MatrixUnit unit;
    Scratch own;
    E* copy = own.allocate<E>(step * kTileN<E>);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < s.pieces; ++i) s.pack_columns(i, ds, a.ds_stride);
    const Strips mine(sums.strips);
    for (int64_t i = mine.begin; i < mine.end; ++i) sums.clear(i);
    for (int64_t begin = 0; begin < a.rows; begin += step)
      sums.add(mine.begin, mine.end, begin, smaller(begin + step, a.rows), x, a.x_stride, s, copy);
    for (int64_t i = mine.begin; i < mine.end; ++i)
      for (int64_t r = 0; r < ranks; ++r) {
        A* sum = sums.strip(i) + r * kTileN<E>;
        A* out = gradient_row<A>(a, first + r);
        if (!out) continue;
        const int64_t column = i * kTileN<E>, width = sums.width(i);
        if (weight)
          for (int64_t j = 0; j < width; ++j) sum[j] *= load(weight[column + j]) + offset;
        if (a.d_lora_a)
          std::memcpy(out + column, sum, sizeof(A) * width);
        else
          for (int64_t j = 0; j < width; ++j) out[column + j] += sum[j];
      }
  }
}

// Rows of this many elements altogether are placed by one thread alone.
constexpr int64_t kPlacedAlone = 64 * 1024;

template <class T, class F>
inline void place_row(const LoraPlacing& p, int64_t row) {
  const F* from = static_cast<const F*>(p.factor) + row * p.row_stride;
  T* to = static_cast<T*>(p.place) + row * p.place_stride;
  const acc_t<F> scale = static_cast<acc_t<F>>(p.scale);
  const auto placed = [scale](F x) {
    return store<T>(static_cast<acc_t<T>>(load(store<F>(load(x) * scale))));
  };
  if (p.col_stride == 1)
    for (int64_t i = 0; i < p.cols; ++i) to[i] = placed(from[i]);
  else
    for (int64_t i = 0; i < p.cols; ++i) to[i] = placed(from[i * p.col_stride]);
}

template <class T>
void place(const PlaceFactorsArgs& a) {
  int64_t size = 0;
  for (int64_t i = 0; i < a.placing_count; ++i) size += a.placings[i].rows * a.placings[i].cols;
#pragma omp parallel if (size > kPlacedAlone)
  for (int64_t i = 0; i < a.placing_count; ++i) {
    const LoraPlacing& p = a.placings[i];
    dispatch(p.dtype, [&](auto f) {
#pragma omp for schedule(static) nowait
      for (int64_t row = 0; row < p.rows; ++row) place_row<T, decltype(f)>(p, row);
    });
  }
}

}  // namespace

namespace LORA_ENGINE_ISA {

void place_factors(DType dtype, const PlaceFactorsArgs& args) {
  dispatch(dtype, [&](auto t) { place<decltype(t)>(args); });
}

void lora_a_fwd(DType dtype, const LoraAFwdArgs& args) {
  dispatch(dtype, [&](auto t) {
    for_runs(args.spans, args.span_count,
             [&](int64_t first, int64_t ranks) { a_fwd<decltype(t)>(args, first, ranks); });
  });
}

void lora_b_bwd(DType dtype, const LoraBBwdArgs& args) {
  dispatch(dtype, [&](auto t) {
    for (int64_t i = 0; i < args.span_count; ++i)
      if (args.spans[i].columns > 0) b_bwd<decltype(t)>(args, args.spans[i]);
  });
}

void lora_a_bwd(DType dtype, const LoraABwdArgs& args) {
  dispatch(dtype, [&](auto t) {
    for_runs(args.spans, args.span_count,
             [&](int64_t first, int64_t ranks) { a_bwd<decltype(t)>(args, first, ranks); });
  });
}

}  // namespace LORA_ENGINE_ISA
}  // namespace lora_engine
