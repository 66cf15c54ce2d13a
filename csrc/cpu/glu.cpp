// Gated linear units (Shazeer, 2020): y = act(gate) * up.
#include "activation.hpp"
#include "isa.hpp"
#include "tile_gemm.hpp"

namespace lora_engine {
namespace {

// Results are made in the arithmetic type, this many at a time, and converted together: some
// instruction sets have an instruction for that which compilers do not find.
constexpr int64_t kChunk = 256;

template <class T, class Act>
void forward(const GluArgs& a) {
  using A = acc_t<T>;
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < a.rows; ++row) {
    const T* gate = static_cast<const T*>(a.gate) + row * a.gate_stride;
    const T* up = static_cast<const T*>(a.up) + row * a.up_stride;
    T* y = static_cast<T*>(a.y) + row * a.y_stride;
    A result[kChunk];
    for (int64_t begin = 0; begin < a.cols; begin += kChunk) {
      const int64_t count = a.cols - begin < kChunk ? a.cols - begin : kChunk;
#pragma omp simd
      for (int64_t i = 0; i < count; ++i)
        result[i] = Act::value(load(gate[begin + i])) * load(up[begin + i]);
      convert_row(count, result, y + begin);
    }
  }
}

// The gradients of one row; with h, the forward result as well. A chunk is read before any of it
// is written, so dgate may be gate and dup may be up.
template <class T, class Act, bool kWithH>
inline void backward_row(const T* dy, const T* gate, const T* up, T* dgate, T* dup, T* h,
                         int64_t cols) {
  using A = acc_t<T>;
  A for_gate[kChunk], for_up[kChunk], result[kWithH ? kChunk : 1];
  for (int64_t begin = 0; begin < cols; begin += kChunk) {
    const int64_t count = cols - begin < kChunk ? cols - begin : kChunk;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const A d = load(dy[begin + i]), g = load(gate[begin + i]), u = load(up[begin + i]);
      A value, slope;
      Act::value_and_slope(g, value, slope);
      for_gate[i] = d * u * slope;
      for_up[i] = d * value;
      if (kWithH) result[i] = value * u;
    }
    convert_row(count, for_gate, dgate + begin);
    convert_row(count, for_up, dup + begin);
    if (kWithH) convert_row(count, result, h + begin);
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
