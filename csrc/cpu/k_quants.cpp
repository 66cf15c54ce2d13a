// GGUF's Q4_K, Q5_K and Q6_K: blocks of 256 values whose codes are searched for the least squared
// error. What the bytes mean is in lora_engine/quantization/gguf.py.
//
// Q4_K, Q5_K: value i of run j (32 values) is d s_j q_i - m t_j, with 6-bit s_j and t_j.
// Q6_K: value i of run j (16 values) is d s_j q_i, with a signed byte s_j and q_i from -32 to 31.
//
// First each run alone gets the best real scale (and minimum): codes rounded by several tentative
// scales, and for each the least-squares solution. Then d and m are chosen for the largest, s_j and
// t_j are searched around their rounded values, and d and m are solved again for what was found.
#include <cmath>
#include <cstring>

#include "isa.hpp"
#include "simd/numeric.hpp"

namespace lora_engine {
namespace {

constexpr int kBlock = 256;
constexpr int kRounds = 3;     // of refining d, m, s and t of a block
constexpr int kTentative = 8;  // tentative scales to either side of the plain one

// The float16 nearest to a value, ties to even, as its bits; too large a value is the largest.
inline uint16_t to_float16(float value) {
  const uint16_t sign = static_cast<uint16_t>(bits_of(value) >> 16 & 0x8000u);
  const float size = std::fabs(value);
  if (!(size < 65520.0f)) return sign | 0x7bff;
  if (size < 0x1p-14f)  // subnormal: whole multiples of 2^-24
    return sign | static_cast<uint16_t>(std::nearbyint(size * 0x1p24f));
  const uint32_t bits = bits_of(size);
  const uint32_t rounded = bits + 0xfffu + (bits >> 13 & 1u);
  return sign | static_cast<uint16_t>((rounded >> 13) - (112u << 10));
}

inline float from_float16(uint16_t half) {
  const float sign = half & 0x8000 ? -1.0f : 1.0f;
  const uint32_t exponent = half >> 10 & 31, mantissa = half & 1023;
  if (exponent == 0) return sign * 0x1p-24f * static_cast<float>(mantissa);
  return sign * float_of((exponent + 112) << 23 | mantissa << 13);
}

inline float in_float16(float value) { return from_float16(to_float16(value)); }

// Ties to even; |x| < 2^22.
inline float rounded(float x) { return (x + 0x1.8p23f) - 0x1.8p23f; }
template <class A>
inline A larger(A a, A b) {
  return a < b ? b : a;
}
template <class A>
inline A smaller(A a, A b) {
  return b < a ? b : a;
}
inline float clamped(float x, float least, float most) {
  return x < least ? least : x > most ? most : x;
}

// Sums over a run of values x and their codes q.
struct Sums {
  float q = 0, qq = 0, xq = 0;
};

// ---- with a minimum ----

template <int kMost>
inline Sums sums_of(const float* x, float inverse, float shift) {
  float q_sum = 0, qq = 0, xq = 0;
#pragma omp simd reduction(+ : q_sum, qq, xq)
  for (int i = 0; i < 32; ++i) {
    const float q = clamped(rounded(x[i] * inverse + shift), 0, kMost);
    q_sum += q;
    qq += q * q;
    xq += x[i] * q;
  }
  return {q_sum, qq, xq};
}

// The scale s >= 0 and the minimum m >= 0 of least error for a run as s q - m.
template <int kMost>
inline void fit_run(const float* x, float& scale, float& minimum) {
  float least = 0, most = x[0], sum = 0;
  for (int i = 0; i < 32; ++i) {
    least = smaller(least, x[i]);
    most = larger(most, x[i]);
    sum += x[i];
  }
  scale = 0;
  minimum = -least;
  const float width = most - least;
  if (!(width > 0)) return;
  float best = INFINITY;
  const auto attempt = [&](float inverse, float shift) {
    const Sums s = sums_of<kMost>(x, inverse, shift);
    const float determinant = 32 * s.qq - s.q * s.q;
    float a = 0, b = 0;
    if (determinant > 0) {
      a = (32 * s.xq - sum * s.q) / determinant;
      b = (s.q * s.xq - sum * s.qq) / determinant;
    }
    if (b < 0 || !(determinant > 0)) {
      b = 0;
      a = s.qq > 0 ? s.xq / s.qq : 0;
    }
    if (!(a > 0)) return;
    // The squared error without the sum of x^2, which all have.
    const float error = a * a * s.qq - 2 * a * s.xq + 2 * b * sum - 2 * a * b * s.q + 32 * b * b;
    if (error < best) {
      best = error;
      scale = a;
      minimum = b;
    }
  };
  for (int k = -kTentative; k <= kTentative; ++k) {
    const float inverse = (kMost + 0.125f * static_cast<float>(k)) / width;
    attempt(inverse, -least * inverse);
  }
  for (int again = 0; again < 2; ++again)
    if (scale > 0) attempt(1 / scale, minimum / scale);
}

template <int kMost>
inline float error_of(const float* x, float scale, float minimum) {
  const float inverse = scale > 0 ? 1 / scale : 0, shift = minimum * inverse;
  float error = 0;
#pragma omp simd reduction(+ : error)
  for (int i = 0; i < 32; ++i) {
    const float q = clamped(rounded(x[i] * inverse + shift), 0, kMost);
    const float difference = x[i] - (scale * q - minimum);
    error += difference * difference;
  }
  return error;
}

struct Affine {
  float d, m;                // as float16 holds them
  int scales[8], minima[8];  // 0 to 63
};

template <int kMost>
inline float search_runs(const float* x, Affine& block) {
  float total = 0;
  for (int j = 0; j < 8; ++j) {
    const int s0 = block.scales[j], t0 = block.minima[j];
    float best = INFINITY;
    for (int s = larger(0, s0 - 1); s <= smaller(63, s0 + 1); ++s) {
      for (int t = larger(0, t0 - 1); t <= smaller(63, t0 + 1); ++t) {
        const float error = error_of<kMost>(x + 32 * j, block.d * static_cast<float>(s),
                                            block.m * static_cast<float>(t));
        if (error < best) {
          best = error;
          block.scales[j] = s;
          block.minima[j] = t;
        }
      }
    }
    total += best;
  }
  return total;
}

// d and m of least error for the codes that the block has; false where they are not determined.
template <int kMost>
inline bool solve_block(const float* x, Affine& block) {
  double uu = 0, uv = 0, vv = 0, ux = 0, vx = 0;
  for (int j = 0; j < 8; ++j) {
    const float s = static_cast<float>(block.scales[j]), t = static_cast<float>(block.minima[j]);
    const float scale = block.d * s, inverse = scale > 0 ? 1 / scale : 0;
    const Sums sums = sums_of<kMost>(x + 32 * j, inverse, block.m * t * inverse);
    float sum = 0;
    for (int i = 0; i < 32; ++i) sum += x[32 * j + i];
    uu += static_cast<double>(s) * s * sums.qq;
    uv += static_cast<double>(s) * t * sums.q;
    vv += 32.0 * t * t;
    ux += static_cast<double>(s) * sums.xq;
    vx += static_cast<double>(t) * sum;
  }
  const double determinant = uu * vv - uv * uv;
  if (determinant > 1e-9 * uu * vv) {
    block.d = in_float16(static_cast<float>((ux * vv - vx * uv) / determinant));
    block.m = in_float16(static_cast<float>((ux * uv - vx * uu) / determinant));
  } else if (uu > 0 && vv == 0) {
    block.d = in_float16(static_cast<float>(ux / uu));
  } else {
    return false;
  }
  return block.d > 0 && block.m >= 0;
}

template <int kMost>
inline Affine fit_affine(const float* x) {
  float scales[8], minima[8], largest = 0, deepest = 0;
  for (int j = 0; j < 8; ++j) {
    fit_run<kMost>(x + 32 * j, scales[j], minima[j]);
    largest = larger(largest, scales[j]);
    deepest = larger(deepest, minima[j]);
  }
  Affine block;
  block.d = in_float16(largest / 63);
  block.m = in_float16(deepest / 63);
  for (int j = 0; j < 8; ++j) {
    const float s = block.d > 0 ? scales[j] / block.d : 0;
    const float t = block.m > 0 ? minima[j] / block.m : 0;
    block.scales[j] = static_cast<int>(clamped(rounded(s), 0, 63));
    block.minima[j] = static_cast<int>(clamped(rounded(t), 0, 63));
  }
  float error = search_runs<kMost>(x, block);
  for (int round = 0; round < kRounds; ++round) {
    Affine other = block;
    if (!solve_block<kMost>(x, other)) break;
    const float of_other = search_runs<kMost>(x, other);
    if (!(of_other < error)) break;
    error = of_other;
    block = other;
  }
  return block;
}

// Bits: 4 or 5.
template <int kBits>
void quantize_affine(const float* x, uint8_t* out) {
  constexpr int kMost = (1 << kBits) - 1;
  const Affine block = fit_affine<kMost>(x);
  const uint16_t d = to_float16(block.d), m = to_float16(block.m);
  std::memcpy(out, &d, 2);
  std::memcpy(out + 2, &m, 2);
  uint8_t* packed = out + 4;
  for (int j = 0; j < 4; ++j) {
    packed[j] = static_cast<uint8_t>(block.scales[j] | (block.scales[j + 4] >> 4) << 6);
    packed[j + 4] = static_cast<uint8_t>(block.minima[j] | (block.minima[j + 4] >> 4) << 6);
    packed[j + 8] =
        static_cast<uint8_t>((block.scales[j + 4] & 15) | (block.minima[j + 4] & 15) << 4);
  }
  uint8_t codes[kBlock];
  for (int j = 0; j < 8; ++j) {
    const float scale = block.d * static_cast<float>(block.scales[j]);
    const float inverse = scale > 0 ? 1 / scale : 0;
    const float shift = block.m * static_cast<float>(block.minima[j]) * inverse;
    for (int i = 0; i < 32; ++i)
      codes[32 * j + i] =
          static_cast<uint8_t>(clamped(rounded(x[32 * j + i] * inverse + shift), 0, kMost));
  }
  uint8_t* lower = out + 16;
  if (kBits == 5) {
    for (int i = 0; i < 32; ++i) {
      int bits = 0;
      for (int j = 0; j < 8; ++j) bits |= (codes[32 * j + i] >> 4) << j;
      lower[i] = static_cast<uint8_t>(bits);
    }
    lower += 32;
  }
  for (int pair = 0; pair < 4; ++pair)
    for (int i = 0; i < 32; ++i)
      lower[32 * pair + i] =
          static_cast<uint8_t>((codes[64 * pair + i] & 15) | (codes[64 * pair + 32 + i] & 15) << 4);
}

// ---- without ----

inline Sums signed_sums(const float* x, float inverse) {
  float qq = 0, xq = 0;
#pragma omp simd reduction(+ : qq, xq)
  for (int i = 0; i < 16; ++i) {
    const float q = clamped(rounded(x[i] * inverse), -32, 31);
    qq += q * q;
    xq += x[i] * q;
  }
  return {0, qq, xq};
}

// The scale of least error for a run as s q; of either sign.
inline float fit_signed_run(const float* x) {
  float extreme = 0;
  for (int i = 0; i < 16; ++i)
    if (std::fabs(x[i]) > std::fabs(extreme)) extreme = x[i];
  if (extreme == 0) return 0;
  float best = -1, scale = 0;
  constexpr float kEnds[] = {-32.0f, 31.0f};
  for (const float end : kEnds) {
    for (int k = -kTentative; k <= kTentative; ++k) {
      const Sums s = signed_sums(x, (end + 0.125f * static_cast<float>(k)) / extreme);
      const float gain = s.qq > 0 ? s.xq * s.xq / s.qq : 0;
      if (gain > best) {
        best = gain;
        scale = s.qq > 0 ? s.xq / s.qq : 0;
      }
    }
  }
  return scale;
}

inline float signed_error(const float* x, float scale) {
  const float inverse = scale != 0 ? 1 / scale : 0;
  float error = 0;
#pragma omp simd reduction(+ : error)
  for (int i = 0; i < 16; ++i) {
    const float q = clamped(rounded(x[i] * inverse), -32, 31);
    error += (x[i] - scale * q) * (x[i] - scale * q);
  }
  return error;
}

struct Signed {
  float d;         // as float16 holds it
  int scales[16];  // -128 to 127
};

inline float search_signed(const float* x, Signed& block) {
  float total = 0;
  for (int j = 0; j < 16; ++j) {
    const int s0 = block.scales[j];
    float best = INFINITY;
    for (int s = larger(-128, s0 - 1); s <= smaller(127, s0 + 1); ++s) {
      const float error = signed_error(x + 16 * j, block.d * static_cast<float>(s));
      if (error < best) {
        best = error;
        block.scales[j] = s;
      }
    }
    total += best;
  }
  return total;
}

inline Signed fit_signed(const float* x) {
  float scales[16], extreme = 0;
  for (int j = 0; j < 16; ++j) {
    scales[j] = fit_signed_run(x + 16 * j);
    if (std::fabs(scales[j]) > std::fabs(extreme)) extreme = scales[j];
  }
  Signed block;
  block.d = in_float16(extreme / -128);
  for (int j = 0; j < 16; ++j) {
    const float s = block.d != 0 ? scales[j] / block.d : 0;
    block.scales[j] = static_cast<int>(clamped(rounded(s), -128, 127));
  }
  float error = search_signed(x, block);
  for (int round = 0; round < kRounds; ++round) {
    Signed other = block;
    double uu = 0, ux = 0;
    for (int j = 0; j < 16; ++j) {
      const float s = static_cast<float>(block.scales[j]), scale = block.d * s;
      const Sums sums = signed_sums(x + 16 * j, scale != 0 ? 1 / scale : 0);
      uu += static_cast<double>(s) * s * sums.qq;
      ux += static_cast<double>(s) * sums.xq;
    }
    if (!(uu > 0)) break;
    other.d = in_float16(static_cast<float>(ux / uu));
    const float of_other = search_signed(x, other);
    if (!(of_other < error)) break;
    error = of_other;
    block = other;
  }
  return block;
}

void quantize_signed(const float* x, uint8_t* out) {
  const Signed block = fit_signed(x);
  uint8_t codes[kBlock];
  for (int j = 0; j < 16; ++j) {
    const float scale = block.d * static_cast<float>(block.scales[j]);
    const float inverse = scale != 0 ? 1 / scale : 0;
    for (int i = 0; i < 16; ++i)
      codes[16 * j + i] =
          static_cast<uint8_t>(clamped(rounded(x[16 * j + i] * inverse), -32, 31) + 32);
    out[192 + j] = static_cast<uint8_t>(static_cast<int8_t>(block.scales[j]));
  }
  for (int half = 0; half < 2; ++half) {
    const uint8_t* q = codes + 128 * half;
    for (int i = 0; i < 32; ++i) {
      out[64 * half + i] = static_cast<uint8_t>((q[i] & 15) | (q[i + 64] & 15) << 4);
      out[64 * half + 32 + i] = static_cast<uint8_t>((q[i + 32] & 15) | (q[i + 96] & 15) << 4);
      out[128 + 32 * half + i] = static_cast<uint8_t>(
          q[i] >> 4 | (q[i + 32] >> 4) << 2 | (q[i + 64] >> 4) << 4 | (q[i + 96] >> 4) << 6);
    }
  }
  const uint16_t d = to_float16(block.d);
  std::memcpy(out + 208, &d, 2);
}

}  // namespace

namespace LORA_ENGINE_ISA {

void quantize_k(const QuantizeKArgs& a) {
  const int64_t bytes = a.bits == 4 ? 144 : a.bits == 5 ? 176 : 210;
#pragma omp parallel for schedule(static)
  for (int64_t block = 0; block < a.blocks; ++block) {
    const float* x = a.w + block * kBlock;
    uint8_t* out = a.codes + block * bytes;
    if (a.bits == 4)
      quantize_affine<4>(x, out);
    else if (a.bits == 5)
      quantize_affine<5>(x, out);
    else
      quantize_signed(x, out);
  }
}

}  // namespace LORA_ENGINE_ISA
}  // namespace lora_engine
