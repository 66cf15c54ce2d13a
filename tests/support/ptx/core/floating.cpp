// Arithmetic in float16, bfloat16, float32 and float64, alone and in pairs.
#include <cfenv>
#include <cmath>

#include "decode.hpp"

namespace ptx {
namespace {

Rounding rounding_of(const Op& op) {
  if (op.has("rz")) return Rounding::kZero;
  if (op.has("rm")) return Rounding::kDown;
  if (op.has("rp")) return Rounding::kUp;
  return Rounding::kNearest;
}

// Computes with the host's rounding set, for the rare modes.
template <class F>
auto rounded(Rounding rounding, F f) {
  const int mode = rounding == Rounding::kZero ? FE_TOWARDZERO
                   : rounding == Rounding::kDown ? FE_DOWNWARD
                                                 : FE_UPWARD;
  std::fesetround(mode);
  const auto result = f();
  std::fesetround(FE_TONEAREST);
  return result;
}

// NaN loses against a number, and -0 is less than +0.
template <class T>
T lesser(T a, T b, bool keeps_nan) {
  if (a != a || b != b) {
    if (keeps_nan || (a != a && b != b)) return std::numeric_limits<T>::quiet_NaN();
    return a != a ? b : a;
  }
  if (a == b) return std::signbit(a) ? a : b;
  return a < b ? a : b;
}
template <class T>
T greater(T a, T b, bool keeps_nan) {
  if (a != a || b != b) return lesser(a, b, keeps_nan);
  if (a == b) return std::signbit(a) ? b : a;
  return a > b ? a : b;
}

enum class Kernel { kAdd, kSub, kMul, kFma, kMin, kMax, kNeg, kAbs, kNone };

Kernel kernel_of(const std::string& base) {
  if (base == "add") return Kernel::kAdd;
  if (base == "sub") return Kernel::kSub;
  if (base == "mul") return Kernel::kMul;
  if (base == "fma" || base == "mad") return Kernel::kFma;
  if (base == "min") return Kernel::kMin;
  if (base == "max") return Kernel::kMax;
  if (base == "neg") return Kernel::kNeg;
  if (base == "abs") return Kernel::kAbs;
  return Kernel::kNone;
}

template <class T>
T computed(Kernel kernel, bool keeps_nan, T a, T b, T c) {
  switch (kernel) {
    case Kernel::kAdd: return a + b;
    case Kernel::kSub: return a - b;
    case Kernel::kMul: return a * b;
    case Kernel::kFma: return std::fma(a, b, c);
    case Kernel::kMin: return lesser(a, b, keeps_nan);
    case Kernel::kMax: return greater(a, b, keeps_nan);
    case Kernel::kNeg: return -a;
    default: return std::fabs(a);
  }
}

// 16-bit results are those of doubles, rounded once; a pair does both halves.
template <class T>
Action of_halves(const Op& op, bool is_pair) {
  if (!op.only({"rn", "ftz", "NaN", "relu", "sat"})) return nullptr;
  if (op.has("ftz") && std::is_same_v<T, BFloat16>) return nullptr;
  const Kernel kernel = kernel_of(op.base());
  if (kernel == Kernel::kNone) return nullptr;
  const size_t inputs = op.size() - 1;
  const bool relu = op.has("relu"), sat = op.has("sat"), ftz = op.has("ftz");
  const bool is_sign = kernel == Kernel::kNeg || kernel == Kernel::kAbs, nan = op.has("NaN");
  const auto flush = [ftz](double x) {
    return ftz && std::fabs(x) < 6.103515625e-05 ? std::copysign(0.0, x) : x;
  };
  const auto one = [=](uint16_t a, uint16_t b, uint16_t c) -> uint16_t {
    if (is_sign && !ftz)  // NaN too has its sign changed
      return kernel == Kernel::kNeg ? a ^ 0x8000 : a & 0x7fff;
    double x = computed<double>(kernel, nan, flush(widen(T{a})), flush(widen(T{b})),
                                flush(widen(T{c})));
    if (relu && !(x != x)) x = x > 0 ? x : 0.0;
    if (sat) x = x > 0 ? std::min(x, 1.0) : 0.0;
    return narrow<T>(flush(x)).bits;
  };
  if (!is_pair)
    return ternary<uint16_t, uint16_t, uint16_t, uint16_t>(
        op[0], op[1], op[inputs > 1 ? 2 : 1], op[inputs > 2 ? 3 : 1], one);
  return ternary<uint32_t, uint32_t, uint32_t, uint32_t>(
      op[0], op[1], op[inputs > 1 ? 2 : 1], op[inputs > 2 ? 3 : 1],
      [one](uint32_t a, uint32_t b, uint32_t c) {
        const uint32_t low = one(uint16_t(a), uint16_t(b), uint16_t(c));
        const uint32_t high = one(uint16_t(a >> 16), uint16_t(b >> 16), uint16_t(c >> 16));
        return low | high << 16;
      });
}

// The hot ones, with nothing to decide at run time.
Action plain_float(const Op& op) {
  const std::string& b = op.base();
  using F = float;
  if (b == "add") return binary<F, F, F>(op[0], op[1], op[2], [](F x, F y) { return x + y; });
  if (b == "sub") return binary<F, F, F>(op[0], op[1], op[2], [](F x, F y) { return x - y; });
  if (b == "mul") return binary<F, F, F>(op[0], op[1], op[2], [](F x, F y) { return x * y; });
  if (b == "fma" || b == "mad")
    return ternary<F, F, F, F>(op[0], op[1], op[2], op[3],
                               [](F x, F y, F z) { return __builtin_fmaf(x, y, z); });
  if (b == "max" && op.size() == 3)
    return binary<F, F, F>(op[0], op[1], op[2], [](F x, F y) { return greater(x, y, false); });
  if (b == "min" && op.size() == 3)
    return binary<F, F, F>(op[0], op[1], op[2], [](F x, F y) { return lesser(x, y, false); });
  if (b == "neg")
    return unary<uint32_t, uint32_t>(op[0], op[1], [](uint32_t x) { return x ^ 0x80000000u; });
  if (b == "abs")
    return unary<uint32_t, uint32_t>(op[0], op[1], [](uint32_t x) { return x & 0x7fffffffu; });
  return nullptr;
}

template <class T>
Action of_floats(const Op& op) {
  if (!op.only({"rn", "rz", "rm", "rp", "ftz", "sat", "NaN"})) return nullptr;
  const Rounding rounding = rounding_of(op);
  const bool ftz = op.has("ftz"), sat = op.has("sat"), keeps_nan = op.has("NaN");
  const bool is_plain = rounding == Rounding::kNearest && !ftz && !sat && !keeps_nan;
  if (std::is_same_v<T, float> && is_plain)
    if (Action action = plain_float(op)) return action;
  const size_t inputs = op.size() - 1;
  const Kernel kernel = kernel_of(op.base());
  if (kernel == Kernel::kNone) return nullptr;
  return ternary<T, T, T, T>(
      op[0], op[1], op[inputs > 1 ? 2 : 1], op[inputs > 2 ? 3 : 1], [=](T a, T b, T c) -> T {
        const auto flush = [ftz](T x) { return ftz ? static_cast<T>(flushed(float(x))) : x; };
        a = flush(a), b = flush(b), c = flush(c);
        T x = rounding == Rounding::kNearest
                  ? computed(kernel, keeps_nan, a, b, c)
                  : rounded(rounding, [&] {
                      volatile T p = a, q = b, r = c;
                      volatile T result = computed<T>(kernel, keeps_nan, p, q, r);
                      return T{result};
                    });
        x = flush(x);
        if (sat) x = x > 0 ? std::min(x, T{1}) : T{0};
        return x;
      });
}

// Functions of one argument: in double, rounded once. A GPU's .approx differ by a few units.
template <class F>
Action function(const Op& op, F f) {
  const bool ftz = op.has("ftz");
  if (op.type() == "f32") {
    const Rounding rounding = rounding_of(op);
    if (rounding != Rounding::kNearest) {
      const Format single{8, 23, 0x7f800000, 0x7f7fffff, 0x7fffffff};
      return unary<uint32_t, float>(op[0], op[1], [=](float x) {
        return encode(f(ftz ? flushed(x) : x), single, rounding, false);
      });
    }
    return unary<float, float>(op[0], op[1], [=](float x) {
      const float y = static_cast<float>(f(ftz ? flushed(x) : x));
      return ftz ? flushed(y) : y;
    });
  }
  if (op.type() == "f64") return unary<double, double>(op[0], op[1], f);
  if (op.type() == "f16")
    return unary<Float16, Float16>(op[0], op[1], [=](Float16 x) {
      return narrow<Float16>(f(widen(x)));
    });
  if (op.type() == "bf16")
    return unary<BFloat16, BFloat16>(op[0], op[1], [=](BFloat16 x) {
      return narrow<BFloat16>(f(widen(x)));
    });
  const bool is_half = op.type() == "f16x2";
  if (!is_half && op.type() != "bf16x2") return nullptr;
  return unary<uint32_t, uint32_t>(op[0], op[1], [=](uint32_t x) {
    uint32_t result = 0;
    for (int shift = 0; shift < 32; shift += 16) {
      const uint16_t bits = static_cast<uint16_t>(x >> shift);
      const uint32_t y = is_half ? narrow<Float16>(f(widen(Float16{bits}))).bits
                                 : narrow<BFloat16>(f(widen(BFloat16{bits}))).bits;
      result |= y << shift;
    }
    return result;
  });
}

#define PTX_FUNCTION(name, formula)                                           \
  Action name(const Op& op) {                                                 \
    if (!op.only({"approx", "ftz", "rn", "rz", "rm", "rp"})) return nullptr;  \
    return function(op, [](double x) { return formula; });                    \
  }
PTX_FUNCTION(ex2, std::exp2(x))
PTX_FUNCTION(lg2, std::log2(x))
PTX_FUNCTION(square_root, std::sqrt(x))
PTX_FUNCTION(inverse_root, 1 / std::sqrt(x))
PTX_FUNCTION(reciprocal, 1 / x)
PTX_FUNCTION(sine, std::sin(x))
PTX_FUNCTION(cosine, std::cos(x))
PTX_FUNCTION(hyperbolic, std::tanh(x))
#undef PTX_FUNCTION

Action fma(const Op& op) { return make_packed_float(op); }

Action copysign(const Op& op) {
  if (op.type() == "f32")
    return binary<float, float, float>(op[0], op[1], op[2],
                                       [](float a, float b) { return std::copysign(b, a); });
  if (op.type() == "f64")
    return binary<double, double, double>(op[0], op[1], op[2],
                                          [](double a, double b) { return std::copysign(b, a); });
  return nullptr;
}

template <class T>
bool tested(const std::string& property, T x) {
  if (property == "finite") return std::isfinite(x);
  if (property == "infinite") return std::isinf(x);
  if (property == "number") return !std::isnan(x);
  if (property == "notanumber") return std::isnan(x);
  if (property == "normal") return std::isnormal(x);
  return std::fpclassify(x) == FP_SUBNORMAL;
}

Action testp(const Op& op) {
  if (!op.only({"finite", "infinite", "number", "notanumber", "normal", "subnormal"}))
    return nullptr;
  const PredicateTarget d(op[0]);
  const std::string property = op.parts[1];
  const auto make = [&](auto t) -> Action {
    const Source<decltype(t)> a(op[1]);
    return [=](Warp& warp, Mask mask) {
      Mask result = 0;
      each_lane(mask, [&](int l) { result |= Mask{tested(property, a.get(warp, l))} << l; });
      d.set(warp, mask, result);
      return Outcome::kDone;
    };
  };
  if (op.type() == "f32") return make(float{});
  if (op.type() == "f64") return make(double{});
  return nullptr;
}

template <class T>
Action divide(const Op& op) {
  const Rounding rounding = rounding_of(op);
  const bool ftz = op.has("ftz");
  return binary<T, T, T>(op[0], op[1], op[2], [=](T a, T b) -> T {
    const auto flush = [ftz](T x) { return ftz ? static_cast<T>(flushed(float(x))) : x; };
    a = flush(a), b = flush(b);
    if (rounding == Rounding::kNearest) return flush(a / b);
    return flush(rounded(rounding, [&] {
      volatile T p = a, q = b;
      volatile T result = p / q;
      return T{result};
    }));
  });
}

}  // namespace

// Arithmetic whose base word integers have too, and fma.
Action make_packed_float(const Op& op) {
  const std::string& type = op.type();
  if (op.base() == "div") {
    if (!op.only({"rn", "rz", "rm", "rp", "ftz", "approx", "full"})) return nullptr;
    return type == "f32" ? divide<float>(op) : type == "f64" ? divide<double>(op) : nullptr;
  }
  if (type == "f32") return of_floats<float>(op);
  if (type == "f64") return of_floats<double>(op);
  if (type == "f16" || type == "f16x2") return of_halves<Float16>(op, type == "f16x2");
  if (type == "bf16" || type == "bf16x2") return of_halves<BFloat16>(op, type == "bf16x2");
  return nullptr;
}

std::vector<Entry> float_entries() {
  return {{"fma", fma},           {"ex2", ex2},          {"lg2", lg2},
          {"sqrt", square_root},  {"rsqrt", inverse_root}, {"rcp", reciprocal},
          {"sin", sine},          {"cos", cosine},       {"tanh", hyperbolic},
          {"copysign", copysign}, {"testp", testp}};
}

}  // namespace ptx
