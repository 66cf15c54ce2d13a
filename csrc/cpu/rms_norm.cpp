// RMSNorm (Zhang and Sennrich, 2019): y = h / rms(h) * (weight + offset),
// rms(h) = sqrt(mean(h^2) + eps), where h is x, or x + residual rounded to x's type.
#include "isa.hpp"
#include "norm.hpp"

namespace lora_engine {
namespace {

// Where a row begins. Heads that are adjacent rows are not stored past the caches, since they may
// begin anywhere in a cache line.
inline int64_t row_start(int64_t row, int64_t heads, int64_t cols, int64_t stride) {
  return heads == 1 ? row * stride : row / heads * stride + row % heads * cols;
}

template <class T>
void forward(const RmsNormArgs& a) {
  using A = acc_t<T>;
  Scratch scratch;
  const auto weight = parameter_row<T>(scratch, a.weight, A(a.offset), a.cols);
  A* rstd = static_cast<A*>(a.rstd);
  const bool nontemporal = a.heads == 1 && worth_nontemporal<T>(a.y, a.rows, a.cols, a.y_stride);
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < a.rows; ++row) {
    const T* h = static_cast<const T*>(a.x) + row_start(row, a.heads, a.cols, a.x_stride);
    T* y = static_cast<T*>(a.y) + row_start(row, a.heads, a.cols, a.y_stride);
    if (a.residual) {
      const T* x = h;
      const T* residual = static_cast<const T*>(a.residual) + row * a.residual_stride;
      T* sum = static_cast<T*>(a.h) + row * a.cols;
      store_row(a.cols, sum, false, [](A one, A other) { return one + other; }, x, residual);
      h = sum;
    }
    const A squares = row_sum<A>(a.cols, [](A value) { return value * value; }, h);
    const A scale = A(1) / std::sqrt(squares / A(a.cols) + A(a.eps));
    rstd[row] = scale;
    store_row(a.cols, y, nontemporal, [=](A value, A w) { return value * scale * w; }, h, weight);
  }
}

// With n = h * rstd and g = dy * (weight + offset):
//   dx = rstd * (g - n * mean(g * n)) + dh,  dweight = sum of dy * n over the rows.
template <class T, bool kDh, bool kDweight>
void backward(const RmsNormBwdArgs& a) {
  using A = acc_t<T>;
  Scratch scratch;
  const auto weight = parameter_row<T>(scratch, a.weight, A(a.offset), a.cols);
  const bool nontemporal = a.heads == 1 && worth_nontemporal<T>(a.dx, a.rows, a.cols, a.dx_stride);
  const int64_t width = kDweight ? whole_chunks<A>(a.cols) : 0;
  const LaneRow<T, A> total{scratch.allocate<A>(width)};
  for_row_blocks(a.rows, width, total.data, [&](int64_t begin, int64_t end, A* partial) {
    const LaneRow<T, A> dweight{partial};
    for (int64_t row = begin; row < end; ++row) {
      const T* dy = static_cast<const T*>(a.dy) + row_start(row, a.heads, a.cols, a.dy_stride);
      const T* dh = kDh ? static_cast<const T*>(a.dh) + row * a.dh_stride : nullptr;
      const T* h = static_cast<const T*>(a.h) + row_start(row, a.heads, a.cols, a.h_stride);
      T* dx = static_cast<T*>(a.dx) + row_start(row, a.heads, a.cols, a.dx_stride);
      const A rstd = static_cast<const A*>(a.rstd)[row];
      const auto term = [=](A d, A w, A value) { return d * w * (value * rstd); };
      const A pull = row_sum<A>(a.cols, term, dy, weight, h) / A(a.cols);
      const auto gradient = [=](A d, A w, A n) { return multiply_add(-n, pull, d * w); };
      if constexpr (kDweight && kDh)
        store_row(
            a.cols, dx, nontemporal,
            [=](A d, A w, A value, A more, A& sum) {
              const A n = value * rstd;
              sum += d * n;
              return multiply_add(rstd, gradient(d, w, n), more);
            },
            dy, weight, h, dh, dweight);
      else if constexpr (kDweight)
        store_row(
            a.cols, dx, nontemporal,
            [=](A d, A w, A value, A& sum) {
              const A n = value * rstd;
              sum += d * n;
              return rstd * gradient(d, w, n);
            },
            dy, weight, h, dweight);
      else if constexpr (kDh)
        store_row(
            a.cols, dx, nontemporal,
            [=](A d, A w, A value, A more) {
              return multiply_add(rstd, gradient(d, w, value * rstd), more);
            },
            dy, weight, h, dh);
      else
        store_row(
            a.cols, dx, nontemporal,
            [=](A d, A w, A value) { return rstd * gradient(d, w, value * rstd); }, dy, weight, h);
    }
  });
  if (kDweight) copy_lanes(total, a.cols, static_cast<A*>(a.dweight));
}

template <class T>
void backward(const RmsNormBwdArgs& a) {
  if (a.dweight)
    a.dh ? backward<T, true, true>(a) : backward<T, false, true>(a);
  else
    a.dh ? backward<T, true, false>(a) : backward<T, false, false>(a);
}

}  // namespace

namespace LORA_ENGINE_ISA {

void rms_norm_fwd(DType dtype, const RmsNormArgs& args) {
  dispatch(dtype, [&](auto t) { forward<decltype(t)>(args); });
}

void rms_norm_bwd(DType dtype, const RmsNormBwdArgs& args) {
  dispatch(dtype, [&](auto t) { backward<decltype(t)>(args); });
}

}  // namespace LORA_ENGINE_ISA
}  // namespace lora_engine
