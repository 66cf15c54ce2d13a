// Dropout by Philox4x32-10 (Salmon et al., SC 2011), see lora_engine/reference/dropout.py: element
// (row, k) has word k % 4 of the counter (k / 4, row, substream, 0) and is kept if it is at least
// round(p 2^32).
#include "isa.hpp"
#include "simd/numeric.hpp"

namespace lora_engine {
namespace {

constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kKeyStep0 = 0x9E3779B9u, kKeyStep1 = 0xBB67AE85u;
constexpr int kRounds = 10;
// Counters computed together: their words stay in the level-1 cache.
constexpr int64_t kGroups = 64;

// words[4 * i + j] = word j of counter (first + i, row, substream, 0).
inline void philox(uint64_t seed, uint32_t first, uint32_t row, uint32_t substream,
                   uint32_t* __restrict words) {
#pragma omp simd
  for (int64_t i = 0; i < kGroups; ++i) {
    uint32_t c0 = first + static_cast<uint32_t>(i), c1 = row, c2 = substream, c3 = 0;
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < kRounds; ++round) {
      const uint64_t product0 = static_cast<uint64_t>(kMultiplier0) * c0;
      const uint64_t product1 = static_cast<uint64_t>(kMultiplier1) * c2;
      c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
      c1 = static_cast<uint32_t>(product1);
      c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
      c3 = static_cast<uint32_t>(product0);
      k0 += kKeyStep0;
      k1 += kKeyStep1;
    }
    words[4 * i] = c0;
    words[4 * i + 1] = c1;
    words[4 * i + 2] = c2;
    words[4 * i + 3] = c3;
  }
}

template <class T>
void apply(const DropoutArgs& a) {
  using A = acc_t<T>;
  const double scaled = std::nearbyint(a.p * 4294967296.0);
  const uint32_t threshold = scaled < 4294967295.0 ? static_cast<uint32_t>(scaled) : 0xFFFFFFFFu;
  const A scale = static_cast<A>(1.0 / (1.0 - a.p));
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < a.rows; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
    T* y = static_cast<T*>(a.y) + row * a.y_stride;
    uint32_t words[4 * kGroups];
    for (int64_t start = 0; start < a.cols; start += 4 * kGroups) {
      philox(a.seed, static_cast<uint32_t>(start / 4), static_cast<uint32_t>(row), a.substream,
             words);
      const int64_t left = a.cols - start;
      const int64_t count = left < 4 * kGroups ? left : 4 * kGroups;
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        const A value = load(x[start + i]) * scale;
        y[start + i] = store<T>(words[i] >= threshold ? value : A(0));
      }
    }
  }
}

}  // namespace

namespace LORA_ENGINE_ISA {

void dropout(DType dtype, const DropoutArgs& args) {
  dispatch(dtype, [&](auto t) { apply<decltype(t)>(args); });
}

}  // namespace LORA_ENGINE_ISA
}  // namespace lora_engine
