// LayerNorm (Ba, Kiros and Hinton, 2016): y = n * weight + bias, n = (x - mean(x)) * rstd,
// rstd = 1 / sqrt(mean((x - mean(x))^2) + eps).
#include "isa.hpp"
#include "norm.hpp"

namespace lora_engine {
namespace {

template <class T>
void forward(const LayerNormArgs& a) {
  using A = acc_t<T>;
  Scratch scratch;
  const A* weight = parameter_row<T>(scratch, a.weight, A(a.weight ? 0 : 1), a.cols);
  const A* bias = parameter_row<T>(scratch, a.bias, A(0), a.cols);
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
    store_row(a.cols, y,
              [=](int64_t i) { return (load(x[i]) - mean) * rstd * weight[i] + bias[i]; });
  }
}

// With g = dy * weight:  dx = rstd * (g - mean(g) - n * mean(g * n)),
// and over the rows  dweight = sum of dy * n,  dbias = sum of dy.
template <class T, bool kSums>
void backward_rows(const LayerNormBwdArgs& a, const acc_t<T>* weight, int64_t begin, int64_t end,
                   acc_t<T>* dweight, acc_t<T>* dbias) {
  using A = acc_t<T>;
  for (int64_t row = begin; row < end; ++row) {
    const T* dy = static_cast<const T*>(a.dy) + row * a.dy_stride;
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
    T* dx = static_cast<T*>(a.dx) + row * a.dx_stride;
    const A mean = static_cast<const A*>(a.mean)[row], rstd = static_cast<const A*>(a.rstd)[row];
    const Pair<A> sums = row_sums<A>(a.cols, [=](int64_t i) {
      const A g = load(dy[i]) * weight[i];
      return Pair<A>{g, g * ((load(x[i]) - mean) * rstd)};
    });
    const A shift = sums.first / A(a.cols), pull = sums.second / A(a.cols);
    store_row(a.cols, dx, [=](int64_t i) {
      const A d = load(dy[i]), n = (load(x[i]) - mean) * rstd;
      if (kSums) {
        dweight[i] += d * n;
        dbias[i] += d;
      }
      return rstd * multiply_add(-n, pull, multiply_add(d, weight[i], -shift));
    });
  }
}

template <class T>
void backward(const LayerNormBwdArgs& a) {
  using A = acc_t<T>;
  // Whoever wants one of the two sums gets both: they cost next to nothing beside the rows.
  const bool sums = a.dweight || a.dbias;
  const int64_t width = sums ? 2 * a.cols : 0;
  Scratch scratch;
  const A* weight = parameter_row<T>(scratch, a.weight, A(a.weight ? 0 : 1), a.cols);
  A* total = scratch.allocate<A>(width);
  for_row_blocks(a.rows, width, total, [&](int64_t begin, int64_t end, A* partial) {
    if (sums)
      backward_rows<T, true>(a, weight, begin, end, partial, partial + a.cols);
    else
      backward_rows<T, false>(a, weight, begin, end, nullptr, nullptr);
  });
  if (a.dweight) std::memcpy(a.dweight, total, sizeof(A) * a.cols);
  if (a.dbias) std::memcpy(a.dbias, total + a.cols, sizeof(A) * a.cols);
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
