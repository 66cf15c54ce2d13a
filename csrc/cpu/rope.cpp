// Rotary position embedding (Su et al., 2021), half-rotated layout: with x = [x1 | x2],
// y1 = x1 cos1 - x2 sin1 and y2 = x2 cos2 + x1 sin2. The inverse is the transposed map.
#include "isa.hpp"
#include "numeric.hpp"
#include "rotate.hpp"

namespace lora_engine {
namespace {

template <class T>
void rotate_tokens(const RopeArgs& a) {
  using A = acc_t<T>;
#pragma omp parallel for schedule(static)
  for (int64_t token = 0; token < a.tokens; ++token) {
    const A* cos = static_cast<const A*>(a.cos) + token * a.head_dim;
    const A* sin = static_cast<const A*>(a.sin) + token * a.head_dim;
    for (int64_t head = 0; head < a.heads; ++head) {
      const T* x = static_cast<const T*>(a.x) + token * a.x_stride + head * a.head_dim;
      T* y = static_cast<T*>(a.y) + token * a.y_stride + head * a.head_dim;
      rotate(x, y, cos, sin, a.head_dim, a.inverse, [](A value) { return store<T>(value); });
    }
  }
}

}  // namespace

namespace LORA_ENGINE_ISA {

void rope(DType dtype, const RopeArgs& args) {
  dispatch(dtype, [&](auto t) { rotate_tokens<decltype(t)>(args); });
}

}  // namespace LORA_ENGINE_ISA
}  // namespace lora_engine
