// Gated linear units (Shazeer, 2020): y = act(gate) * up.
#include "activation.hpp"
#include "isa.hpp"

namespace lora_engine {
namespace {

template <class T, class Act>
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
      y[i] = store<T>(Act::value(g) * load(up[i]));
    }
  }
}

// The gradients of one row; with h, the forward result as well. Every element is read before any
// of the same place is written, so dgate may be gate and dup may be up.
template <class T, class Act, bool kWithH>
inline void backward_row(const T* dy, const T* gate, const T* up, T* dgate, T* dup, T* h,
                         int64_t cols) {
  using A = acc_t<T>;
#pragma omp simd
  for (int64_t i = 0; i < cols; ++i) {
    const A d = load(dy[i]), g = load(gate[i]), u = load(up[i]);
    A value, slope;
    Act::value_and_slope(g, value, slope);
    dgate[i] = store<T>(d * u * slope);
    dup[i] = store<T>(d * value);
    if (kWithH) h[i] = store<T>(value * u);
  }
}

template <class T, class Act>
void backward(const GluBwdArgs& a) {
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < a.rows; ++row) {
    const T* dy = static_cast<const T*>(a.dy) + row * a.dy_stride;
    const T* gate = static_cast<const T*>(a.gate) + row * a.gate_stride;
    const T* up = static_cast<const T*>(a.up) + row * a.up_stride;
    T* dgate = static_cast<T*>(a.dgate) + row * a.dgate_stride;
    T* dup = static_cast<T*>(a.dup) + row * a.dup_stride;
    T* h = static_cast<T*>(a.h);
    if (h)
      backward_row<T, Act, true>(dy, gate, up, dgate, dup, h + row * a.h_stride, a.cols);
    else
      backward_row<T, Act, false>(dy, gate, up, dgate, dup, h, a.cols);
  }
}

}  // namespace

namespace LORA_ENGINE_ISA {

void glu_fwd(DType dtype, const GluArgs& args) {
  dispatch_activation(args.activation, [&](auto act) {
    dispatch(dtype, [&](auto t) { forward<decltype(t), decltype(act)>(args); });
  });
}

void glu_bwd(DType dtype, const GluBwdArgs& args) {
  dispatch_activation(args.activation, [&](auto act) {
    dispatch(dtype, [&](auto t) { backward<decltype(t), decltype(act)>(args); });
  });
}

}  // namespace LORA_ENGINE_ISA
}  // namespace lora_engine
