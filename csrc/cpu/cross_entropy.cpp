// Softmax cross-entropy over rows of logits: loss = log sum exp(z) - z[target]. With `gradient`
// the logits are overwritten by softmax(z) - onehot(target), unscaled.
#include "isa.hpp"
#include "numeric.hpp"

namespace lora_engine {
namespace {

template <class T>
void cross_entropy_row(T* z, const CrossEntropyArgs& a, int64_t row) {
  using A = acc_t<T>;
  const int64_t target = a.target[row];
  if (target == a.ignore_index) {
    static_cast<acc_t<T>*>(a.loss)[row] = 0;
    a.correct[row] = 0;
    if (a.gradient) std::memset(z, 0, sizeof(T) * a.cols);
    return;
  }
  A largest = -INFINITY;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < a.cols; ++i) {
    const A value = load(z[i]);
    largest = value > largest ? value : largest;
  }
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < a.cols; ++i) sum += exp_acc(load(z[i]) - largest);
  const A chosen = load(z[target]);
  const A lse = largest + std::log(sum);
  static_cast<acc_t<T>*>(a.loss)[row] = lse - chosen;
  a.correct[row] = chosen == largest;
  if (!a.gradient) return;
#pragma omp simd
  for (int64_t i = 0; i < a.cols; ++i) z[i] = store<T>(exp_acc(load(z[i]) - lse));
  z[target] = store<T>(exp_acc(chosen - lse) - A(1));
}

}  // namespace

namespace LORA_ENGINE_ISA {

void cross_entropy(DType dtype, const CrossEntropyArgs& args) {
  dispatch(dtype, [&](auto t) {
    using T = decltype(t);
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < args.rows; ++row)
      cross_entropy_row(static_cast<T*>(args.logits) + row * args.stride, args, row);
  });
}

}  // namespace LORA_ENGINE_ISA
}  // namespace lora_engine
