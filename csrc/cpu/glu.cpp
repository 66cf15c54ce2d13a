// SwiGLU (Shazeer, 2020): y = silu(gate) * up, silu(g) = g * sigmoid(g).
#include "isa.hpp"
#include "numeric.hpp"

namespace lora_engine {
namespace {

template <class A>
inline A sigmoid(A x) {
  return A(1) / (A(1) + exp_acc(-x));
}

template <class T>
void forward(const GluArgs& a) {
  using A = acc_t<T>;
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < a.rows; ++row) {
    const T* gate = static_cast<const T*>(a.gate) + row * a.gate_stride;
    const T* up = static_cast<const T*>(a.up) + row * a.up_stride;
    T* y = static_cast<T*>(a.y) + row * a.y_stride;
#pragma omp simd
    for (int64_t i = 0; i < a.cols; ++i) {
      const A g = load(gate[i]);
      y[i] = store<T>(g * sigmoid(g) * load(up[i]));
    }
  }
}

template <class T>
void backward(const GluBwdArgs& a) {
  using A = acc_t<T>;
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < a.rows; ++row) {
    const T* dy = static_cast<const T*>(a.dy) + row * a.dy_stride;
    const T* gate = static_cast<const T*>(a.gate) + row * a.gate_stride;
    const T* up = static_cast<const T*>(a.up) + row * a.up_stride;
    T* dgate = static_cast<T*>(a.dgate) + row * a.dgate_stride;
    T* dup = static_cast<T*>(a.dup) + row * a.dup_stride;
#pragma omp simd
    for (int64_t i = 0; i < a.cols; ++i) {
      const A d = load(dy[i]), g = load(gate[i]), u = load(up[i]);
      const A s = sigmoid(g);
      dgate[i] = store<T>(d * u * s * (A(1) + g * (A(1) - s)));
      dup[i] = store<T>(d * g * s);
    }
  }
}

}  // namespace

namespace LORA_ENGINE_ISA {

void swiglu_fwd(DType dtype, const GluArgs& args) {
  dispatch(dtype, [&](auto t) { forward<decltype(t)>(args); });
}

void swiglu_bwd(DType dtype, const GluBwdArgs& args) {
  dispatch(dtype, [&](auto t) { backward<decltype(t)>(args); });
}

}  // namespace LORA_ENGINE_ISA
}  // namespace lora_engine
