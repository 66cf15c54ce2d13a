// Gated linear units (Shazeer, 2020): y = act(gate) * up.
#include "activation.hpp"
#include "isa.hpp"
#include "simd/chunk.hpp"

namespace lora_engine {
namespace {

template <class T, class Act>
void forward(const GluArgs& a) {
  using A = acc_t<T>;
  const bool nontemporal = worth_nontemporal<T>(a.y, a.rows, a.cols, a.y_stride);
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < a.rows; ++row) {
    const T* gate = static_cast<const T*>(a.gate) + row * a.gate_stride;
    const T* up = static_cast<const T*>(a.up) + row * a.up_stride;
    T* y = static_cast<T*>(a.y) + row * a.y_stride;
    store_row(a.cols, y, nontemporal, [](A g, A u) { return Act::value(g) * u; }, gate, up);
  }
}

// The gradients of one element, and the forward result.
template <class Act, class A>
inline void gradients(A d, A g, A u, A& for_gate, A& for_up, A& result) {
  A value, slope;
  Act::value_and_slope(g, value, slope);
  for_gate = d * u * slope;
  for_up = d * value;
  result = value * u;
}

// The gradients of one row; with h, the forward result as well. A chunk is read before any of it
// is written, so dgate may be gate and dup may be up.
template <class T, class Act, bool kWithH>
inline void backward_row(const T* dy, const T* gate, const T* up, T* dgate, T* dup, T* h,
                         int64_t cols, bool nontemporal_gate, bool nontemporal_up) {
  using A = acc_t<T>;
  int64_t i = 0;
  for (; i + kChunk<A> <= cols; i += kChunk<A>) {
    const auto d = chunk_at(dy, i), g = chunk_at(gate, i), u = chunk_at(up, i);
    Values<A> for_gate, for_up, result;
#pragma omp simd
    for (int64_t j = 0; j < kChunk<A>; ++j)
      gradients<Act>(d[j], g[j], u[j], for_gate[j], for_up[j], result[j]);
    put_chunk(for_gate, dgate + i, nontemporal_gate);
    put_chunk(for_up, dup + i, nontemporal_up);
    if (kWithH) put_chunk(result, h + i, false);
  }
  finish_nontemporal(nontemporal_gate || nontemporal_up);
  for (; i < cols; ++i) {
    A for_gate, for_up, result;
    gradients<Act>(load(dy[i]), load(gate[i]), load(up[i]), for_gate, for_up, result);
    dgate[i] = store<T>(for_gate);
    dup[i] = store<T>(for_up);
    if (kWithH) h[i] = store<T>(result);
  }
}

template <class T, class Act>
void backward(const GluBwdArgs& a) {
  // A result that overwrites its input is stored through the caches, which hold its lines.
  const bool nontemporal_gate =
      a.dgate != a.gate && worth_nontemporal<T>(a.dgate, a.rows, a.cols, a.dgate_stride);
  const bool nontemporal_up =
      a.dup != a.up && worth_nontemporal<T>(a.dup, a.rows, a.cols, a.dup_stride);
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < a.rows; ++row) {
    const T* dy = static_cast<const T*>(a.dy) + row * a.dy_stride;
    const T* gate = static_cast<const T*>(a.gate) + row * a.gate_stride;
    const T* up = static_cast<const T*>(a.up) + row * a.up_stride;
    T* dgate = static_cast<T*>(a.dgate) + row * a.dgate_stride;
    T* dup = static_cast<T*>(a.dup) + row * a.dup_stride;
    T* h = static_cast<T*>(a.h);
    if (h)
      backward_row<T, Act, true>(dy, gate, up, dgate, dup, h + row * a.h_stride, a.cols,
                                 nontemporal_gate, nontemporal_up);
    else
      backward_row<T, Act, false>(dy, gate, up, dgate, dup, h, a.cols, nontemporal_gate,
                                  nontemporal_up);
  }
}

}  // namespace

namespace LORA_ENGINE_ISA {

void glu_fwd(DType dtype, const GluArgs& args) {
  dispatch(dtype, [&](auto t) {
    using T = decltype(t);
    dispatch_activation<T>(args.activation, [&](auto act) { forward<T, decltype(act)>(args); });
  });
}

void glu_bwd(DType dtype, const GluBwdArgs& args) {
  dispatch(dtype, [&](auto t) {
    using T = decltype(t);
    dispatch_activation<T>(args.activation, [&](auto act) { backward<T, decltype(act)>(args); });
  });
}

}  // namespace LORA_ENGINE_ISA
}  // namespace lora_engine
