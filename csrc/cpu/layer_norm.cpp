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
  const auto weight = parameter_row<T>(scratch, a.weight, A(a.weight ? 0 : 1), a.cols);
  const auto bias = parameter_row<T>(scratch, a.bias, A(0), a.cols);
  const bool nontemporal = worth_nontemporal<T>(a.y, a.rows, a.cols, a.y_stride);
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < a.rows; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
    T* y = static_cast<T*>(a.y) + row * a.y_stride;
    const A mean = row_sum<A>(a.cols, [](A value) { return value; }, x) / A(a.cols);
    const auto square = [=](A value) { return (value - mean) * (value - mean); };
    const A squares = row_sum<A>(a.cols, square, x);
    const A rstd = A(1) / std::sqrt(squares / A(a.cols) + A(a.eps));
    static_cast<A*>(a.mean)[row] = mean;
    static_cast<A*>(a.rstd)[row] = rstd;
    const auto value = [=](A value, A w, A b) { return (value - mean) * rstd * w + b; };
    store_row(a.cols, y, nontemporal, value, x, weight, bias);
  }
}

// With g = dy * weight:  dx = rstd * (g - mean(g) - n * mean(g * n)),
// and over the rows  dweight = sum of dy * n,  dbias = sum of dy.
template <class T, bool kSums>
void backward_rows(const LayerNormBwdArgs& a, LaneRow<T, const acc_t<T>> weight, int64_t begin,
                   int64_t end, LaneRow<T, acc_t<T>> dweight, LaneRow<T, acc_t<T>> dbias) {
  using A = acc_t<T>;
  const bool nontemporal = worth_nontemporal<T>(a.dx, a.rows, a.cols, a.dx_stride);
  for (int64_t row = begin; row < end; ++row) {
    const T* dy = static_cast<const T*>(a.dy) + row * a.dy_stride;
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
    T* dx = static_cast<T*>(a.dx) + row * a.dx_stride;
    const A mean = static_cast<const A*>(a.mean)[row], rstd = static_cast<const A*>(a.rstd)[row];
    const auto terms = [=](A d, A w, A value) {
      const A g = d * w;
      return Pair<A>{g, g * ((value - mean) * rstd)};
    };
    const Pair<A> sums = row_sums<A>(a.cols, terms, dy, weight, x);
    const A shift = sums.first / A(a.cols), pull = sums.second / A(a.cols);
    const auto gradient = [=](A d, A w, A n) {
      return rstd * multiply_add(-n, pull, multiply_add(d, w, -shift));
    };
    if constexpr (kSums)
      store_row(
          a.cols, dx, nontemporal,
          [=](A d, A w, A value, A& weight_sum, A& bias_sum) {
            const A n = (value - mean) * rstd;
            weight_sum += d * n;
            bias_sum += d;
            return gradient(d, w, n);
          },
          dy, weight, x, dweight, dbias);
    else
      store_row(
          a.cols, dx, nontemporal,
          [=](A d, A w, A value) { return gradient(d, w, (value - mean) * rstd); }, dy, weight, x);
  }
}

template <class T>
void backward(const LayerNormBwdArgs& a) {
  using A = acc_t<T>;
  // Both sums are computed if either is wanted: they cost little beside reading the rows.
  const bool sums = a.dweight || a.dbias;
  const int64_t width = whole_chunks<A>(a.cols);
  Scratch scratch;
  const auto weight = parameter_row<T>(scratch, a.weight, A(a.weight ? 0 : 1), a.cols);
  const LaneRow<T, A> dweight{scratch.allocate<A>(2 * width)}, dbias{dweight.data + width};
  const auto rows = [&](int64_t begin, int64_t end, A* partial) {
    if (sums)
      backward_rows<T, true>(a, weight, begin, end, {partial}, {partial + width});
    else
      backward_rows<T, false>(a, weight, begin, end, {}, {});
  };
  for_row_blocks(a.rows, sums ? 2 * width : 0, dweight.data, rows);
  if (a.dweight) copy_lanes(dweight, a.cols, static_cast<A*>(a.dweight));
  if (a.dbias) copy_lanes(dbias, a.cols, static_cast<A*>(a.dbias));
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
