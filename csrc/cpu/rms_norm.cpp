// RMSNorm (Zhang and Sennrich, 2019): y = x / rms(x) * weight, rms(x) = sqrt(mean(x^2) + eps).
#include "isa.hpp"
#include "numeric.hpp"
#include "scratch.hpp"

namespace lora_engine {
namespace {

template <class T>
void forward(const RmsNormArgs& a) {
  using A = acc_t<T>;
  const T* weight = static_cast<const T*>(a.weight);
  A* rstd = static_cast<A*>(a.rstd);
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < a.rows; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
    T* y = static_cast<T*>(a.y) + row * a.y_stride;
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < a.cols; ++i) {
      const A value = load(x[i]);
      sum += value * value;
    }
    const A scale = A(1) / std::sqrt(sum / A(a.cols) + A(a.eps));
    rstd[row] = scale;
#pragma omp simd
    for (int64_t i = 0; i < a.cols; ++i) y[i] = store<T>(load(x[i]) * scale * load(weight[i]));
  }
}

// With n = x * rstd and g = dy * weight:  dx = rstd * (g - n * mean(g * n)),  dweight = sum dy * n.
template <class T>
void backward_rows(const RmsNormBwdArgs& a, int64_t begin, int64_t end, acc_t<T>* dweight) {
  using A = acc_t<T>;
  const T* weight = static_cast<const T*>(a.weight);
  for (int64_t row = begin; row < end; ++row) {
    const T* dy = static_cast<const T*>(a.dy) + row * a.dy_stride;
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
    T* dx = static_cast<T*>(a.dx) + row * a.cols;
    const A rstd = static_cast<const A*>(a.rstd)[row];
    A dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t i = 0; i < a.cols; ++i) dot += load(dy[i]) * load(weight[i]) * load(x[i]);
    const A pull = dot * rstd * rstd / A(a.cols);
#pragma omp simd
    for (int64_t i = 0; i < a.cols; ++i)
      dx[i] = store<T>(rstd * (load(dy[i]) * load(weight[i]) - load(x[i]) * pull));
    if (dweight) {
#pragma omp simd
      for (int64_t i = 0; i < a.cols; ++i) dweight[i] += load(dy[i]) * load(x[i]) * rstd;
    }
  }
}

// The weight's gradient is summed in blocks of rows that do not depend on the number of threads,
// then over the blocks in order: the same bits on every run.
template <class T>
void backward(const RmsNormBwdArgs& a) {
  using A = acc_t<T>;
  constexpr int64_t kRowsPerBlock = 64;
  const int64_t blocks = (a.rows + kRowsPerBlock - 1) / kRowsPerBlock;
  A* partial = nullptr;
  Scratch scratch;
  if (a.dweight) {
    partial = scratch.allocate<A>(blocks * a.cols);
    std::memset(partial, 0, sizeof(A) * blocks * a.cols);
  }
#pragma omp parallel for schedule(static)
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t begin = block * kRowsPerBlock;
    const int64_t end = begin + kRowsPerBlock < a.rows ? begin + kRowsPerBlock : a.rows;
    backward_rows<T>(a, begin, end, partial ? partial + block * a.cols : nullptr);
  }
  if (a.dweight) {
    A* dweight = static_cast<A*>(a.dweight);
    std::memset(dweight, 0, sizeof(A) * a.cols);
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t i = 0; i < a.cols; ++i) dweight[i] += partial[block * a.cols + i];
  }
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
