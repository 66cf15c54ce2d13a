// RMSNorm (Zhang and Sennrich, 2019): y = h / rms(h) * (weight + offset),
// rms(h) = sqrt(mean(h^2) + eps), where h is x, or x + residual rounded to x's type.
#include "isa.hpp"
#include "norm.hpp"

namespace lora_engine {
namespace {

template <class T>
void forward(const RmsNormArgs& a) {
  using A = acc_t<T>;
  const T* weight = static_cast<const T*>(a.weight);
  const A offset = A(a.offset);
  A* rstd = static_cast<A*>(a.rstd);
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < a.rows; ++row) {
    const T* h = static_cast<const T*>(a.x) + row * a.x_stride;
    T* y = static_cast<T*>(a.y) + row * a.y_stride;
    if (a.residual) {
      const T* x = h;
      const T* residual = static_cast<const T*>(a.residual) + row * a.residual_stride;
      T* sum = static_cast<T*>(a.h) + row * a.cols;
#pragma omp simd
      for (int64_t i = 0; i < a.cols; ++i) sum[i] = store<T>(load(x[i]) + load(residual[i]));
      h = sum;
    }
    const A squares = row_sum<A>(a.cols, [=](int64_t i) { return load(h[i]) * load(h[i]); });
    const A scale = A(1) / std::sqrt(squares / A(a.cols) + A(a.eps));
    rstd[row] = scale;
#pragma omp simd
    for (int64_t i = 0; i < a.cols; ++i)
      y[i] = store<T>(load(h[i]) * scale * (load(weight[i]) + offset));
  }
}

// With n = h * rstd and g = dy * (weight + offset):
//   dx = rstd * (g - n * mean(g * n)) + dh,  dweight = sum of dy * n over the rows.
template <class T>
void backward(const RmsNormBwdArgs& a) {
  using A = acc_t<T>;
  const T* weight = static_cast<const T*>(a.weight);
  const A offset = A(a.offset);
  const auto rows = [&](int64_t begin, int64_t end, A* dweight) {
    for (int64_t row = begin; row < end; ++row) {
      const T* dy = static_cast<const T*>(a.dy) + row * a.dy_stride;
      const T* h = static_cast<const T*>(a.h) + row * a.h_stride;
      T* dx = static_cast<T*>(a.dx) + row * a.dx_stride;
      const A rstd = static_cast<const A*>(a.rstd)[row];
      const A dot = row_sum<A>(a.cols, [=](int64_t i) {
        return load(dy[i]) * (load(weight[i]) + offset) * (load(h[i]) * rstd);
      });
      const A pull = dot / A(a.cols);
      const auto gradient = [=](int64_t i) {
        return rstd * (load(dy[i]) * (load(weight[i]) + offset) - load(h[i]) * rstd * pull);
      };
      if (a.dh) {
        const T* dh = static_cast<const T*>(a.dh) + row * a.dh_stride;
#pragma omp simd
        for (int64_t i = 0; i < a.cols; ++i) dx[i] = store<T>(gradient(i) + load(dh[i]));
      } else {
#pragma omp simd
        for (int64_t i = 0; i < a.cols; ++i) dx[i] = store<T>(gradient(i));
      }
      if (dweight) {
#pragma omp simd
        for (int64_t i = 0; i < a.cols; ++i) dweight[i] += load(dy[i]) * (load(h[i]) * rstd);
      }
    }
  };
  for_row_blocks(a.rows, a.dweight ? a.cols : 0, static_cast<A*>(a.dweight), rows);
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
