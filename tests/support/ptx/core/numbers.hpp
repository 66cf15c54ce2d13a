// Number formats of PTX: conversions that round as its manual says.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace ptx {

template <class To, class From>
inline To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To to;
  std::memcpy(&to, &value, sizeof(To));
  return to;
}

// 16-bit floats as their bits, so that templates tell them from integers.
struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

enum class Rounding { kNearest, kZero, kDown, kUp, kNearestAway };

// A binary format of fewer than 32 bits. `infinite` is the code of infinity, 0 if it has none;
// `largest` that of the largest finite number, `nan` that of the NaN a conversion makes.
struct Format {
  int exponent_bits, mantissa_bits;
  uint32_t infinite, largest, nan;
  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
};
constexpr Format kFloat16{5, 10, 0x7c00, 0x7bff, 0x7fff};
constexpr Format kBFloat16{8, 7, 0x7f80, 0x7f7f, 0x7fff};
constexpr Format kTf32{8, 10, 0x3fc00, 0x3fbff, 0x3ffff};
constexpr Format kE4m3{4, 3, 0, 0x7e, 0x7f};
constexpr Format kE5m2{5, 2, 0x7c, 0x7b, 0x7f};

inline double rounded_integer(double x, Rounding rounding, bool negative) {
  switch (rounding) {
    case Rounding::kZero: return std::trunc(x);
    case Rounding::kDown: return negative ? std::ceil(x) : std::floor(x);
    case Rounding::kUp: return negative ? std::floor(x) : std::ceil(x);
    case Rounding::kNearestAway: return std::floor(x + 0.5);
    default: return std::nearbyint(x);
  }
}

// The code of x. saturate: what is too large becomes the largest finite number.
inline uint32_t encode(double x, const Format& f, Rounding rounding, bool saturate) {
  const uint32_t sign = std::signbit(x) ? 1u << (f.exponent_bits + f.mantissa_bits) : 0;
  if (std::isnan(x)) return f.nan;
  const double a = std::fabs(x);
  uint32_t code = std::numeric_limits<uint32_t>::max();
  if (a == 0) {
    code = 0;
  } else if (!std::isinf(a)) {
    const int exponent = std::max(std::ilogb(a), 1 - f.bias());
    const double units = std::ldexp(a, f.mantissa_bits - exponent);
    const double whole = rounded_integer(units, rounding, sign != 0);
    // Units of 2^mantissa_bits and more carry into the exponent by themselves.
    const int64_t base = static_cast<int64_t>(exponent + f.bias() - 1) << f.mantissa_bits;
    const int64_t wide = base + static_cast<int64_t>(whole);
    code = wide > f.largest ? std::numeric_limits<uint32_t>::max() : static_cast<uint32_t>(wide);
  }
  if (code > f.largest) {
    const bool towards_zero = rounding == Rounding::kZero ||
                              (rounding == Rounding::kDown && !sign) ||
                              (rounding == Rounding::kUp && sign);
    if (saturate || (towards_zero && !std::isinf(a)))
      code = f.largest;
    else
      code = f.infinite ? f.infinite : f.nan;
  }
  return sign | code;
}

inline double decode(uint32_t code, const Format& f) {
  const uint32_t sign = code >> (f.exponent_bits + f.mantissa_bits) & 1;
  const uint32_t magnitude = code & ((1u << (f.exponent_bits + f.mantissa_bits)) - 1);
  double a;
  if (f.infinite && magnitude == f.infinite) {
    a = std::numeric_limits<double>::infinity();
  } else if (magnitude > f.largest) {
    a = std::numeric_limits<double>::quiet_NaN();
  } else {
    const int exponent = static_cast<int>(magnitude >> f.mantissa_bits);
    const double fraction = magnitude & ((1u << f.mantissa_bits) - 1);
    const double units = exponent ? fraction + (1 << f.mantissa_bits) : fraction;
    a = std::ldexp(units, (exponent ? exponent : 1) - f.bias() - f.mantissa_bits);
  }
  return sign ? -a : a;
}

// Every code of 16-bit floats is looked up: they are read by the thousand in matrix products.
struct Float16Table {
  float value[65536];
  Float16Table() {
    for (uint32_t code = 0; code < 65536; ++code)
      value[code] = static_cast<float>(decode(code, kFloat16));
  }
};

inline float widen(Float16 x) {
  static const Float16Table table;
  return table.value[x.bits];
}
inline float widen(BFloat16 x) { return bits_as<float>(static_cast<uint32_t>(x.bits) << 16); }
inline float widen(float x) { return x; }
inline double widen(double x) { return x; }

inline BFloat16 to_bfloat16(float x) {
  if (x != x) return {0x7fff};
  const uint32_t bits = bits_as<uint32_t>(x);
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// To the nearest, ties to even.
template <class T>
inline T narrow(double x);
template <>
inline double narrow<double>(double x) {
  return x;
}
template <>
inline float narrow<float>(double x) {
  return static_cast<float>(x);
}
template <>
inline BFloat16 narrow<BFloat16>(double x) {
  return {static_cast<uint16_t>(encode(x, kBFloat16, Rounding::kNearest, false))};
}
template <>
inline Float16 narrow<Float16>(double x) {
  return {static_cast<uint16_t>(encode(x, kFloat16, Rounding::kNearest, false))};
}

inline float flushed(float x) {
  return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x;
}

}  // namespace ptx
