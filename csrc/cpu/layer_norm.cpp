// LayerNorm (Ba, Kiros and Hinton, 2016): y = n * weight + bias, n = (x - mean(x)) * rstd,
// rstd = 1 / sqrt(mean((x - mean(x))^2) + eps).
#include "isa.hpp"
#include "norm.hpp"

namespace lora_engine {
namespace {

template <class T>
void forward(const LayerNormArgs& a) {
  using A = acc_t<T>;
  const T* weight = static_cast<const T*>(a.weight);
  const T* bias = static_cast<const T*>(a.bias);
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < a.rows; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
    T* y = static_cast<T*>(a.y) + row * a.y_stride;
    const A mean = row_sum<A>(a.cols, [=](int64_t i) { return load(x[i]); }) / A(a.cols);
    const A squares = row_sum<A>(a.cols, [=](int64_t i) {
      const A centred = load(x[i]) - mean;
      return centred * centred;
    });
    const A rstd = A(1) / std::sqrt(squares / A(a.cols) + A(a.eps));
    static_cast<A*>(a.mean)[row] = mean;
    static_cast<A*>(a.rstd)[row] = rstd;
    const auto normed = [=](int64_t i) { return (load(x[i]) - mean) * rstd; };
    if (weight && bias) {
#pragma omp simd
      for (int64_t i = 0; i < a.cols; ++i)
        y[i] = store<T>(normed(i) * load(weight[i]) + load(bias[i]));
    } else if (weight) {
#pragma omp simd
      for (int64_t i = 0; i < a.cols; ++i) y[i] = store<T>(normed(i) * load(weight[i]));
    } else if (bias) {
#pragma omp simd
      for (int64_t i = 0; i < a.cols; ++i) y[i] = store<T>(normed(i) + load(bias[i]));
    } else {
#pragma omp simd
      for (int64_t i = 0; i < a.cols; ++i) y[i] = store<T>(normed(i));
    }
  }
}

// With g = dy * weight:  dx = rstd * (g - mean(g) - n * mean(g * n)),
// and over the rows  dweight = sum of dy * n,  dbias = sum of dy.
template <class T, bool kWeight>
void backward_rows(const LayerNormBwdArgs& a, int64_t begin, int64_t end, acc_t<T>* dweight,
                   acc_t<T>* dbias) {
  using A = acc_t<T>;
  const T* weight = static_cast<const T*>(a.weight);
  for (int64_t row = begin; row < end; ++row) {
    const T* dy = static_cast<const T*>(a.dy) + row * a.dy_stride;
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
    T* dx = static_cast<T*>(a.dx) + row * a.dx_stride;
    const A mean = static_cast<const A*>(a.mean)[row], rstd = static_cast<const A*>(a.rstd)[row];
    const auto g = [=](int64_t i) { return kWeight ? load(dy[i]) * load(weight[i]) : load(dy[i]); };
    const auto n = [=](int64_t i) { return (load(x[i]) - mean) * rstd; };
    const A shift = row_sum<A>(a.cols, g) / A(a.cols);
    const A pull = row_sum<A>(a.cols, [=](int64_t i) { return g(i) * n(i); }) / A(a.cols);
#pragma omp simd
    for (int64_t i = 0; i < a.cols; ++i) dx[i] = store<T>(rstd * (g(i) - shift - n(i) * pull));
    if (dweight) {
#pragma omp simd
      for (int64_t i = 0; i < a.cols; ++i) dweight[i] += load(dy[i]) * n(i);
    }
    if (dbias) {
#pragma omp simd
      for (int64_t i = 0; i < a.cols; ++i) dbias[i] += load(dy[i]);
    }
  }
}

template <class T>
void backward(const LayerNormBwdArgs& a) {
  using A = acc_t<T>;
  // Both sums over the rows side by side, then to their places.
  const int64_t width = ((a.dweight ? 1 : 0) + (a.dbias ? 1 : 0)) * a.cols;
  Scratch scratch;
  A* total = width ? scratch.allocate<A>(width) : nullptr;
  for_row_blocks(a.rows, width, total, [&](int64_t begin, int64_t end, A* sums) {
    A* dweight = a.dweight ? sums : nullptr;
    A* dbias = a.dbias ? sums + (a.dweight ? a.cols : 0) : nullptr;
    if (a.weight)
      backward_rows<T, true>(a, begin, end, dweight, dbias);
    else
      backward_rows<T, false>(a, begin, end, dweight, dbias);
  });
  if (a.dweight) std::memcpy(a.dweight, total, sizeof(A) * a.cols);
  if (a.dbias) std::memcpy(a.dbias, total + (a.dweight ? a.cols : 0), sizeof(A) * a.cols);
}

}  // namespace

namespace LORA_ENGINE_ISA {

void layer_norm_fwd(DType dtype, const LayerNormArgs& args) {
  dispatch(dtype, [&](auto t) { forward<decltype(t)>(args); });
}

void layer_norm_bwd(DType dtype, const LayerNormBwdArgs& args) {
  dispatch(dtype, [&](auto t) { backward<decltype(t)>(args); });
}

}  // namespace LORA_ENGINE_ISA
}  // namespace lora_engine
