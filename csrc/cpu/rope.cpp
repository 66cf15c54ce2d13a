// Rotary position embedding (Su et al., 2021) of queries and keys. Of each head the first
// rotary_dim elements turn and the rest are copied. A pair (x1, x2) is the elements (i, i + half)
// or, interleaved, (2i, 2i + 1); y1 = x1 cos1 - x2 sin1 and y2 = x2 cos2 + x1 sin2. The inverse is
// the transposed map.
#include "isa.hpp"
#include "rotate.hpp"
#include "scratch.hpp"
#include "simd/numeric.hpp"

namespace lora_engine {
namespace {

// One row of a table in the arithmetic type; interleaved columns become half-rotated ones.
template <class S, class A>
inline void copy_row(const S* src, int64_t dim, bool interleaved, A* dst) {
  const int64_t half = dim / 2;
  if (interleaved) {
    for (int64_t i = 0; i < half; ++i) {
      dst[i] = static_cast<A>(load(src[2 * i]));
      dst[i + half] = static_cast<A>(load(src[2 * i + 1]));
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < dim; ++i) dst[i] = static_cast<A>(load(src[i]));
  }
}

template <class A>
inline void table_row(const RopeArgs& a, const void* table, int64_t offset, A* dst) {
  dispatch(a.table_dtype, [&](auto s) {
    copy_row(static_cast<const decltype(s)*>(table) + offset, a.rotary_dim, a.interleaved, dst);
  });
}

// Rotates interleaved pairs: a pair's first element uses the tables' first half, its second element
// the second half.
template <class T, class A>
inline void rotate_pairs(const T* x, T* y, const A* cos, const A* sin, int64_t dim, bool inverse) {
  const int64_t half = dim / 2;
  if (!inverse) {
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) {
      const A x1 = load(x[2 * i]), x2 = load(x[2 * i + 1]);
      y[2 * i] = store<T>(x1 * cos[i] - x2 * sin[i]);
      y[2 * i + 1] = store<T>(x2 * cos[i + half] + x1 * sin[i + half]);
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) {
      const A x1 = load(x[2 * i]), x2 = load(x[2 * i + 1]);
      y[2 * i] = store<T>(x1 * cos[i] + x2 * sin[i + half]);
      y[2 * i + 1] = store<T>(x2 * cos[i + half] - x1 * sin[i]);
    }
  }
}

template <class T, class A>
inline void rotate_token(const RopeArgs& a, const RopeHeads& h, int64_t token, const A* cos,
                         const A* sin) {
  for (int64_t head = 0; head < h.heads; ++head) {
    const T* x = static_cast<const T*>(h.x) + token * h.x_stride + head * h.x_head_stride;
    T* y = static_cast<T*>(h.y) + token * h.y_stride + head * h.y_head_stride;
    if (a.interleaved)
      rotate_pairs(x, y, cos, sin, a.rotary_dim, a.inverse);
    else
      rotate(x, y, cos, sin, a.rotary_dim, a.inverse, [](A value) { return store<T>(value); });
#pragma omp simd
    for (int64_t i = a.rotary_dim; i < a.head_dim; ++i) y[i] = x[i];
  }
}

template <class T>
void rotate_tokens(const RopeArgs& a) {
  using A = acc_t<T>;
#pragma omp parallel
  {
    Scratch scratch;
    A* cos = scratch.allocate<A>(2 * a.rotary_dim);
    A* sin = cos + a.rotary_dim;
#pragma omp for schedule(static)
    for (int64_t token = 0; token < a.tokens; ++token) {
      const int64_t row = a.position_ids ? a.position_ids[token] : token;
      table_row(a, a.cos, row * a.cos_stride, cos);
      table_row(a, a.sin, row * a.sin_stride, sin);
      rotate_token<T>(a, a.q, token, cos, sin);
      rotate_token<T>(a, a.k, token, cos, sin);
    }
  }
}

}  // namespace

namespace LORA_ENGINE_ISA {

void rope(DType dtype, const RopeArgs& args) {
  dispatch(dtype, [&](auto t) { rotate_tokens<decltype(t)>(args); });
}

}  // namespace LORA_ENGINE_ISA
}  // namespace lora_engine
