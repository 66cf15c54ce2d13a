// Softmax cross-entropy over rows of logits x, with z = x or z = c tanh(x / c) for a soft-cap c:
//
//   loss = lse - (1 - s) z[target] - s mean(z) + w lse^2,   lse = log sum exp(z)
//
// for label smoothing s and z-loss w. Columns of -inf are no classes: they take no part in mean(z).
// The gradient needs nothing of the first pass but lse (and with smoothing the number of classes).
#include "isa.hpp"
#include "simd/chunk.hpp"
#include "simd/exponential.hpp"

namespace lora_engine {
namespace {

inline double tanh_acc(double x) { return std::tanh(x); }
// 1 - 2 / (exp(2x) + 1) cancels near 0; there the series' first terms are exact to the last bit.
inline float tanh_acc(float x) {
  const float square = x * x;
  float series = -5.3968254e-2f;
  series = series * square + 1.3333333e-1f;
  series = series * square - 3.3333333e-1f;
  series = x + x * square * series;
  const float quotient = 1.0f - 2.0f / (exp_acc(2.0f * x) + 1.0f);
  return square < 0.04f ? series : quotient;
}

// z of a logit.
template <class A, bool kCap>
struct Logit {
  A cap, inverse;
  explicit Logit(double softcap) : cap(A(softcap)), inverse(kCap ? A(1 / softcap) : A(0)) {}
  A operator()(A x) const {
    if constexpr (kCap) return cap * tanh_acc(x * inverse);
    return x;
  }
  A derivative(A z) const {
    if constexpr (kCap) return A(1) - (z * inverse) * (z * inverse);
    return A(1);
  }
};

template <class T>
acc_t<T> largest_of(const T* x, int64_t cols) {
  using A = acc_t<T>;
  A largest = -INFINITY;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < cols; ++i) {
    const A value = load(x[i]);
    largest = value > largest ? value : largest;
  }
  return largest;
}

// The sum of term(x[i]), by chunks of kTerms: one running sum over a quarter million columns would
// lose the last two digits of what is added to it.
template <int64_t kTerms, class T, class Term>
acc_t<T> sum_of(const T* x, int64_t cols, Term term) {
  using A = acc_t<T>;
  A total = 0;
  for (int64_t begin = 0; begin < cols; begin += kTerms) {
    const int64_t end = begin + kTerms < cols ? begin + kTerms : cols;
    total += row_sum<A>(end - begin, term, x + begin);
  }
  return total;
}

// sum exp(z - shift)
template <class T, bool kCap>
acc_t<T> sum_exp(const T* x, int64_t cols, Logit<acc_t<T>, kCap> z, acc_t<T> shift) {
  return sum_of<8192>(x, cols, [=](acc_t<T> value) { return exp_of_difference(z(value) - shift); });
}

// sum exp(d) d with d = z - lse: minus the entropy. A class of probability 0 adds 0.
template <class T, bool kCap>
acc_t<T> sum_p_log_p(const T* x, int64_t cols, Logit<acc_t<T>, kCap> z, acc_t<T> lse) {
  using A = acc_t<T>;
  return sum_of<512>(x, cols, [=](A value) {
    const A d = z(value) - lse, p = exp_of_difference(d);
    return p == A(0) ? A(0) : p * d;
  });
}

// The number of classes and sum(z - shift) over them.
template <class A>
struct Classes {
  A count, sum;
};
template <class T, bool kCap>
Classes<acc_t<T>> classes_of(const T* x, int64_t cols, Logit<acc_t<T>, kCap> z, acc_t<T> shift) {
  using A = acc_t<T>;
  int64_t count = 0;
  A sum = 0;
#pragma omp simd reduction(+ : sum, count)
  for (int64_t i = 0; i < cols; ++i) {
    const A value = z(load(x[i]));
    const bool absent = value == A(-INFINITY);
    count += absent ? 0 : 1;
    sum += absent ? A(0) : value - shift;
  }
  return {A(count), sum};
}

template <class T, bool kCap>
void row_gradient(const CrossEntropyArgs& a, const T* x, T* grad, int64_t target,
                  Logit<acc_t<T>, kCap> z, acc_t<T> lse, acc_t<T> classes, acc_t<T> scale) {
  using A = acc_t<T>;
  const A of_p = scale * (A(1) + A(2 * a.z_loss) * lse);
  const A of_target = scale * A(1 - a.label_smoothing);
  const A x_target = load(x[target]);  // before grad, which may be x, is written
  const bool nontemporal =
      a.grad != a.logits && worth_nontemporal<T>(a.grad, a.rows, a.cols, a.grad_stride);
  A everywhere = 0;
  if (a.label_smoothing > 0) {
    everywhere = scale * A(a.label_smoothing) / classes;
    const auto smooth = [=](A logit) {
      const A value = z(logit);
      const A p = of_p * exp_of_difference(value - lse);
      return (value == A(-INFINITY) ? A(0) : p - everywhere) * z.derivative(value);
    };
    store_row(a.cols, grad, nontemporal, smooth, x);
  } else {
    const auto plain = [=](A logit) {
      const A value = z(logit);
      return of_p * exp_of_difference(value - lse) * z.derivative(value);
    };
    store_row(a.cols, grad, nontemporal, plain, x);
  }
  const A value = z(x_target);
  grad[target] = store<T>((of_p * exp_of_difference(value - lse) - everywhere - of_target) *
                          z.derivative(value));
}

template <class A>
inline void put(void* output, int64_t row, A value) {
  if (output) static_cast<A*>(output)[row] = value;
}

template <class T, bool kCap>
void cross_entropy_row(const CrossEntropyArgs& a, int64_t row) {
  using A = acc_t<T>;
  const T* x = static_cast<const T*>(a.logits) + row * a.stride;
  T* grad = a.grad ? static_cast<T*>(a.grad) + row * a.grad_stride : nullptr;
  const int64_t target = a.target[row];
  if (target == a.ignore_index) {
    if (!a.lse_given) {
      put(a.loss, row, A(0));
      put(a.logprob, row, A(0));
      put(a.entropy, row, A(0));
      put(a.lse, row, A(0));
      a.correct[row] = 0;
    }
    if (grad) std::memset(grad, 0, sizeof(T) * a.cols);
    return;
  }
  const Logit<A, kCap> z(a.softcap);
  const bool smooth = a.label_smoothing > 0;
  A lse;
  Classes<A> classes{0, 0};
  if (a.lse_given) {
    lse = static_cast<const A*>(a.lse)[row];
    if (smooth && grad) classes = classes_of<T, kCap>(x, a.cols, z, lse);
  } else {
    const A largest = largest_of(x, a.cols), chosen = load(x[target]);
    const A shift = z(largest);
    lse = shift + std::log(sum_exp<T, kCap>(x, a.cols, z, shift));
    const A logprob = z(chosen) - lse;
    A loss = -logprob;
    if (smooth) {
      classes = classes_of<T, kCap>(x, a.cols, z, lse);
      loss = A(1 - a.label_smoothing) * loss - A(a.label_smoothing) * classes.sum / classes.count;
    }
    if (a.z_loss != 0) loss += A(a.z_loss) * lse * lse;
    put(a.loss, row, loss);
    put(a.logprob, row, logprob);
    put(a.lse, row, lse);
    if (a.entropy) put(a.entropy, row, -sum_p_log_p<T, kCap>(x, a.cols, z, lse));
    a.correct[row] = chosen == largest;
  }
  if (!grad) return;
  const A scale = a.lse_given ? static_cast<const A*>(a.grad_scale)[row] : A(1);
  row_gradient<T, kCap>(a, x, grad, target, z, lse, classes.count, scale);
}

template <class T, bool kCap>
void cross_entropy_rows(const CrossEntropyArgs& a) {
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < a.rows; ++row) cross_entropy_row<T, kCap>(a, row);
}

}  // namespace

namespace LORA_ENGINE_ISA {

void cross_entropy(DType dtype, const CrossEntropyArgs& args) {
  dispatch(dtype, [&](auto t) {
    using T = decltype(t);
    if (args.softcap > 0)
      cross_entropy_rows<T, true>(args);
    else
      cross_entropy_rows<T, false>(args);
  });
}

}  // namespace LORA_ENGINE_ISA
}  // namespace lora_engine
