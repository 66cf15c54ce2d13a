// RMSNorm (Zhang and Sennrich, 2019): y = h / rms(h) * (weight + offset),
// rms(h) = sqrt(mean(h^2) + eps), where h is x, or x + residual rounded to x's type.
#include "isa.hpp"
#include "norm.hpp"

namespace lora_engine {
namespace {

inline int64_t row_start(int64_t row, int64_t heads, int64_t cols, int64_t stride) {
  return heads == 1 ? row * stride : row / heads * stride + row % heads * cols;
}

template <class T>
void forward(const RmsNormArgs& a) {
  using A = acc_t<T>;
  Scratch scratch;
  const A* weight = parameter_row<T>(scratch, a.weight, A(a.offset), a.cols);
  A* rstd = static_cast<A*>(a.rstd);
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < a.rows; ++row) {
    const T* h = static_cast<const T*>(a.x) + row_start(row, a.heads, a.cols, a.x_stride);
    T* y = static_cast<T*>(a.y) + row_start(row, a.heads, a.cols, a.y_stride);
    if (a.residual) {
      const T* x = h;
      const T* residual = static_cast<const T*>(a.residual) + row * a.residual_stride;
      T* sum = static_cast<T*>(a.h) + row * a.cols;
      store_row(a.cols, sum, [=](int64_t i) { return load(x[i]) + load(residual[i]); });
      h = sum;
    }
    const A squares = row_sum<A>(a.cols, [=](int64_t i) { return load(h[i]) * load(h[i]); });
    const A scale = A(1) / std::sqrt(squares / A(a.cols) + A(a.eps));
    rstd[row] = scale;
    store_row(a.cols, y, [=](int64_t i) { return load(h[i]) * scale * weight[i]; });
  }
}

// With n = h * rstd and g = dy * (weight + offset):
//   dx = rstd * (g - n * mean(g * n)) + dh,  dweight = sum of dy * n over the rows.
template <class T, bool kDh, bool kDweight>
void backward(const RmsNormBwdArgs& a) {
  using A = acc_t<T>;
  Scratch scratch;
  const A* weight = parameter_row<T>(scratch, a.weight, A(a.offset), a.cols);
  const auto rows = [&](int64_t begin, int64_t end, A* dweight) {
    for (int64_t row = begin; row < end; ++row) {
      const T* dy = static_cast<const T*>(a.dy) + row_start(row, a.heads, a.cols, a.dy_stride);
      const T* dh = kDh ? static_cast<const T*>(a.dh) + row * a.dh_stride : nullptr;
      const T* h = static_cast<const T*>(a.h) + row_start(row, a.heads, a.cols, a.h_stride);
      T* dx = static_cast<T*>(a.dx) + row_start(row, a.heads, a.cols, a.dx_stride);
      const A rstd = static_cast<const A*>(a.rstd)[row];
      const A dot = row_sum<A>(
          a.cols, [=](int64_t i) { return load(dy[i]) * weight[i] * (load(h[i]) * rstd); });
      const A pull = dot / A(a.cols);
      store_row(a.cols, dx, [=](int64_t i) {
        const A d = load(dy[i]), n = load(h[i]) * rstd;
        if (kDweight) dweight[i] += d * n;
        const A across = multiply_add(-n, pull, d * weight[i]);
        return kDh ? multiply_add(rstd, across, load(dh[i])) : rstd * across;
      });
    }
  };
  for_row_blocks(a.rows, kDweight ? a.cols : 0, static_cast<A*>(a.dweight), rows);
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
