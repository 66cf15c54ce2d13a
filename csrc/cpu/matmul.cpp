// Products of large matrices: C = A B + addend, B in rows [k, n] or as the transpose of [n, k].
//
// A thread packs some strips of kTileN columns of B as tile_gemm.hpp says: they stay in its level-2
// cache while blocks of A's rows, each in the level-1 cache, pass by them. Where one strip is
// larger than that, its rows are packed some at a time and the sums of all of A's rows are kept. No
// packed copy of B is kept, and nothing is compiled for a size when it is first seen.
#include <omp.h>

#include "gemm/tile_gemm.hpp"
#include "isa.hpp"
#include "scratch.hpp"

namespace lora_engine {
namespace {

constexpr int64_t kBlockBytes = 40 * 1024;     // of a block of A: of a level-1 cache
constexpr int64_t kPackedBytes = 1024 * 1024;  // of strips of B: of a level-2 cache
constexpr int64_t kLeastStrips = 4;            // that a block of A is read for, where there are
constexpr int64_t kDepthStep = 32;             // of pieces of k: whole tiles of a matrix unit

// Rows of A in a block.
template <class E>
constexpr int64_t kBlockRows = 4 * kTileRows;
#ifdef LORA_ENGINE_TILES
template <>
constexpr int64_t kBlockRows<bf16> = kUnitBlock;
#endif
// Strips are packed to whole multiples of this depth, with zeros.
template <class E>
constexpr int64_t kPackedStep = kOnUnit<E> ? kDepthStep : Dot<E>::kGroup;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t parts(int64_t size, int64_t part) { return (size + part - 1) / part; }

// A block of A's rows as elements. On a matrix unit its last columns are apart, filled up with
// zeros to a whole tile.
template <class E>
struct Block {
  const E* data;
  int64_t ld;
  int64_t whole;  // columns at `data`
  const E* tail;  // [kBlockRows, kDepthStep], or null
};

template <class T>
struct Product {
  using E = typename Element<T>::type;
  using A = acc_t<T>;
  static constexpr int64_t kStrip = kTileN<E>, kRows = kBlockRows<E>;
  const MatmulArgs& args;
  int64_t piece, panel;           // columns of A: of a block, and those that a strip is packed for
  int64_t strips, group, groups;  // strips of B, those that a thread packs at a time
  int64_t rows, row_parts;        // rows of A in a task
  int64_t padded;                 // packed rows of a panel of a strip

  explicit Product(const MatmulArgs& a) : args(a) {
    const int64_t size = sizeof(E), threads = omp_get_max_threads();
    const int64_t pieces = larger(parts(a.k, kBlockBytes / (kRows * size)), 1);
    piece = larger(round_up(parts(a.k, pieces), kDepthStep), kDepthStep);
    panel = smaller(larger(kPackedBytes / (kStrip * size) / piece, 1) * piece, larger(a.k, 1));
    padded = round_up(panel, kPackedStep<E>);
    strips = parts(a.n, kStrip);
    const int64_t fitting = kPackedBytes / (padded * kStrip * size);
    const int64_t most = smaller(larger(fitting, 1), strips);
    // As many groups as threads, or a multiple: all threads end at the same time.
    groups = round_up(parts(strips, most), smaller(threads, larger(strips / kLeastStrips, 1)));
    group = parts(strips, groups);
    groups = parts(strips, group);
    row_parts = smaller(parts(threads, groups), parts(a.m, kRows));
    rows = round_up(parts(a.m, row_parts), kRows);
    row_parts = parts(a.m, rows);
  }

  // Whether pack_transposed reads B's panels where they are.
  bool aligned() const {
    constexpr int kGroup = Dot<E>::kGroup;
    return sizeof(T) == sizeof(E) && args.k % kGroup == 0 && args.b_stride % kGroup == 0;
  }

  // Rows [inner, inner + depth) of a strip of B. `work` holds [kStrip, padded], or is null where
  // B is not transposed or aligned.
  void pack(int64_t strip, int64_t inner, int64_t depth, E* packed, E* work) const {
    const int64_t column = strip * kStrip, width = smaller(kStrip, args.n - column);
    const T* b =
        static_cast<const T*>(args.b) +
        (args.b_transposed ? column * args.b_stride + inner : inner * args.b_stride + column);
    if (width < kStrip || depth < padded) std::memset(packed, 0, sizeof(E) * padded * kStrip);
    if (!args.b_transposed) {
      pack_rows(depth, width, b, args.b_stride, packed, kStrip);
      return;
    }
    if constexpr (sizeof(T) == sizeof(E)) {
      if (aligned()) {
        pack_transposed(depth, width, b, args.b_stride, packed, kStrip);
        return;
      }
    }
    for (int64_t j = 0; j < width; ++j) {
      convert_row(depth, b + j * args.b_stride, work + j * padded);
      for (int64_t p = depth; p < padded; ++p) work[j * padded + p] = E{};
    }
    pack_transposed(padded, width, work, padded, packed, kStrip);
  }

  // Columns [inner, inner + depth) of `count` rows of A. `copy` holds [kRows, piece].
  Block<E> block(int64_t row, int64_t count, int64_t inner, int64_t depth, E* copy) const {
    const T* a = static_cast<const T*>(args.a) + row * args.a_stride + inner;
    if constexpr (sizeof(T) == sizeof(E)) {
      const int64_t whole = depth / kPackedStep<E> * kPackedStep<E>;
      if (whole == depth || kOnUnit<E>) {
        if (whole < depth) std::memset(copy, 0, sizeof(E) * kRows * kDepthStep);
        for (int64_t i = 0; i < count && whole < depth; ++i)
          std::memcpy(copy + i * kDepthStep, a + i * args.a_stride + whole,
                      sizeof(E) * (depth - whole));
        return {reinterpret_cast<const E*>(a), args.a_stride, whole,
                whole < depth ? copy : nullptr};
      }
    }
    const int64_t ld = round_up(depth, Dot<E>::kGroup);
    for (int64_t i = 0; i < count; ++i) {
      convert_row(depth, a + i * args.a_stride, copy + i * ld);
      for (int64_t p = depth; p < ld; ++p) copy[i * ld + p] = E{};
    }
    return {copy, ld, ld, nullptr};
  }

  // sums [count, kStrip] (+)= block times the strip's rows at `packed`.
  void multiply(int64_t count, const Block<E>& a, const E* packed, A* sums, bool accumulate) const {
    if constexpr (kOnUnit<E>)
      unit_strip(count, a.whole, a.data, a.ld, a.tail, packed, sums, accumulate);
    else
      tile_gemm<E>(count, kStrip, a.whole, a.data, a.ld, packed, kStrip, sums, kStrip, accumulate);
  }

  // C's rows [row, row + count) of a strip.
  void finish(int64_t row, int64_t count, int64_t strip, const A* sums) const {
    const int64_t column = strip * kStrip, width = smaller(kStrip, args.n - column);
    const T* addend = static_cast<const T*>(args.addend);
    for (int64_t i = 0; i < count; ++i) {
      T* c = static_cast<T*>(args.c) + (row + i) * args.c_stride + column;
      const A* sum = sums + i * kStrip;
      if (!addend) {
        convert_row(width, sum, c);
        continue;
      }
      const T* added = addend + (row + i) * args.addend_stride + column;
#pragma omp simd
      for (int64_t j = 0; j < width; ++j) c[j] = store<T>(sum[j] + load(added[j]));
    }
  }

  bool one_panel() const { return panel >= args.k; }

  // Sums of a block of A's rows and the strips of a group; several pieces add to them.
  int64_t block_sums() const { return (piece < args.k ? group : 1) * kRows * kStrip; }

  // C's rows [first, end) of strips [begin, last).
  void task(int64_t first, int64_t end, int64_t begin, int64_t last, E* packed, E* work, E* copy,
            A* sums) const {
    for (int64_t outer = 0; outer == 0 || outer < args.k; outer += panel) {
      const int64_t stop = smaller(outer + panel, args.k);
      for (int64_t strip = begin; strip < last; ++strip)
        pack(strip, outer, stop - outer, packed + (strip - begin) * padded * kStrip, work);
      for (int64_t row = first; row < end; row += kRows) {
        A* of_block = sums + (one_panel() ? 0 : (row - first) / kRows * block_sums());
        add_panel(row, smaller(kRows, end - row), outer, stop, begin, last, packed, copy, of_block);
      }
    }
  }

  // The part of `count` rows' sums that columns [outer, stop) of A make; the last part is written.
  void add_panel(int64_t row, int64_t count, int64_t outer, int64_t stop, int64_t begin,
                 int64_t last, const E* packed, E* copy, A* sums) const {
    for (int64_t inner = outer; inner == outer || inner < stop; inner += piece) {
      const int64_t depth = smaller(piece, stop - inner);
      const Block<E> a = block(row, count, inner, depth, copy);
      for (int64_t strip = begin; strip < last; ++strip) {
        const int64_t i = strip - begin;
        A* own = sums + (piece < args.k ? i * kRows * kStrip : 0);
        multiply(count, a, packed + (i * padded + inner - outer) * kStrip, own, inner > 0);
        if (inner + depth == args.k) finish(row, count, strip, own);
      }
    }
  }

  void run() const {
    const bool converts = args.b_transposed && !aligned();
#pragma omp parallel
    {
      [[maybe_unused]] const MatrixUnit unit;
      Scratch scratch;
      E* packed = scratch.allocate<E>(group * padded * kStrip);
      E* work = converts ? scratch.allocate<E>(padded * kStrip) : nullptr;
      E* copy = scratch.allocate<E>(piece * kRows);
      A* sums = scratch.allocate<A>((one_panel() ? 1 : rows / kRows) * block_sums());
#pragma omp for schedule(dynamic)
      for (int64_t index = 0; index < groups * row_parts; ++index) {
        const int64_t begin = index % groups * group, last = smaller(begin + group, strips);
        const int64_t first = index / groups * rows;
        task(first, smaller(first + rows, args.m), begin, last, packed, work, copy, sums);
      }
    }
  }
};

}  // namespace

namespace LORA_ENGINE_ISA {

void matmul(DType dtype, const MatmulArgs& args) {
  if (args.m > 0 && args.n > 0) dispatch(dtype, [&](auto t) { Product<decltype(t)>(args).run(); });
}

}  // namespace LORA_ENGINE_ISA
}  // namespace lora_engine
