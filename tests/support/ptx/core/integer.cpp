// Integer arithmetic.
#include <algorithm>
#include <type_traits>

#include "decode.hpp"

namespace ptx {
namespace {

template <class T>
using Unsigned = std::make_unsigned_t<T>;

// Wraps around as a GPU does; the host's signed overflow is undefined.
template <class T, class F>
T wrapped(T a, T b, F f) {
  return static_cast<T>(f(static_cast<Unsigned<T>>(a), static_cast<Unsigned<T>>(b)));
}

template <class T>
T high_product(T a, T b) {
  if constexpr (sizeof(T) == 8) {
    using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
    return static_cast<T>(static_cast<Wide>(a) * static_cast<Wide>(b) >> 64);
  } else {
    using Wide = std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>;
    return static_cast<T>(static_cast<Wide>(a) * static_cast<Wide>(b) >> 8 * sizeof(T));
  }
}

// The type of twice the size, as wide products have.
template <class T>
struct Wider;
template <>
struct Wider<int16_t> { using type = int32_t; };
template <>
struct Wider<uint16_t> { using type = uint32_t; };
template <>
struct Wider<int32_t> { using type = int64_t; };
template <>
struct Wider<uint32_t> { using type = uint64_t; };

// add, sub and their forms with a carry, which each lane keeps.
template <class T, bool kSubtract>
Action carried(const Op& op, bool in, bool out) {
  const Target<T> d(op[0]);
  const Source<T> a(op[1]), b(op[2]);
  return [=](Warp& warp, Mask mask) {
    each_lane(mask, [&](int l) {
      using U = Unsigned<T>;
      const U x = static_cast<U>(a.get(warp, l)), y = static_cast<U>(b.get(warp, l));
      const U c = in ? warp.carry >> l & 1 : 0;
      const U sum = static_cast<U>(kSubtract ? x - y - c : x + y + c);
      // Subtraction keeps a borrow.
      const bool over = kSubtract ? x < y || (c && x == y) : sum < x || (c && sum == x);
      if (out) warp.carry = (warp.carry & ~(1u << l)) | static_cast<Mask>(over) << l;
      d.set(warp, l, static_cast<T>(sum));
    });
    return Outcome::kDone;
  };
}

// add, min and max of the halves of a register.
template <class T, class F>
Action of_halves(const Op& op, F f) {
  if (op.parts.size() != 2) return nullptr;
  return binary<uint32_t, uint32_t, uint32_t>(op[0], op[1], op[2], [f](uint32_t a, uint32_t b) {
    const auto half = [&](int shift) -> uint32_t {
      return static_cast<uint16_t>(f(static_cast<T>(a >> shift), static_cast<T>(b >> shift)));
    };
    return half(0) | half(16) << 16;
  });
}

template <bool kSubtract>
Action add_or_sub(const Op& op) {
  if (op.type().find('f') != std::string::npos) return make_packed_float(op);
  if (!kSubtract && (op.type() == "s16x2" || op.type() == "u16x2"))
    return of_halves<uint16_t>(op, [](uint16_t a, uint16_t b) { return a + b; });
  if (!op.only({"cc", "sat"})) return nullptr;
  const bool in = op.base() == "addc" || op.base() == "subc", out = op.has("cc");
  return with_integer(op.type(), [&](auto t) -> Action {
    using T = decltype(t);
    if (in || out) return carried<T, kSubtract>(op, in, out);
    if (op.has("sat")) {
      if (!std::is_same_v<T, int32_t>) return nullptr;
      return binary<int32_t, int32_t, int32_t>(op[0], op[1], op[2], [](int32_t a, int32_t b) {
        const int64_t exact = kSubtract ? int64_t{a} - b : int64_t{a} + b;
        return static_cast<int32_t>(std::clamp<int64_t>(exact, INT32_MIN, INT32_MAX));
      });
    }
    return binary<T, T, T>(op[0], op[1], op[2], [](T a, T b) {
      return wrapped(a, b, [](auto x, auto y) { return kSubtract ? x - y : x + y; });
    });
  });
}

Action mul(const Op& op) {
  if (op.type().find('f') != std::string::npos) return make_packed_float(op);
  if (!op.only({"lo", "hi", "wide"}) || op.parts.size() != 3) return nullptr;
  return with_integer(op.type(), [&](auto t) -> Action {
    using T = decltype(t);
    if constexpr (sizeof(T) == 2 || sizeof(T) == 4) {
      using W = typename Wider<T>::type;
      if (op.has("wide"))
        return binary<W, T, T>(op[0], op[1], op[2],
                               [](T a, T b) { return static_cast<W>(W{a} * W{b}); });
    }
    if (op.has("lo"))
      return binary<T, T, T>(op[0], op[1], op[2], [](T a, T b) {
        return static_cast<T>(uint64_t(a) * uint64_t(b));
      });
    if (op.has("hi"))
      return binary<T, T, T>(op[0], op[1], op[2], [](T a, T b) { return high_product(a, b); });
    return nullptr;
  });
}

Action mad(const Op& op) {
  if (!op.only({"lo", "hi", "wide"}) || op.parts.size() != 3) return nullptr;
  return with_integer(op.type(), [&](auto t) -> Action {
    using T = decltype(t);
    if constexpr (sizeof(T) == 2 || sizeof(T) == 4) {
      using W = typename Wider<T>::type;
      if (op.has("wide"))
        return ternary<W, T, T, W>(op[0], op[1], op[2], op[3], [](T a, T b, W c) {
          return wrapped(static_cast<W>(W{a} * W{b}), c, [](auto x, auto y) { return x + y; });
        });
    }
    if (op.has("lo"))
      return ternary<T, T, T, T>(op[0], op[1], op[2], op[3], [](T a, T b, T c) {
        return static_cast<T>(uint64_t(a) * uint64_t(b) + uint64_t(c));
      });
    if (op.has("hi"))
      return ternary<T, T, T, T>(op[0], op[1], op[2], op[3], [](T a, T b, T c) {
        return wrapped(high_product(a, b), c, [](auto x, auto y) { return x + y; });
      });
    return nullptr;
  });
}

// Division by zero is unspecified: all bits set, as GPUs answer.
template <class T>
T quotient(T a, T b) {
  if (b == 0) return static_cast<T>(~T{0});
  if (std::is_signed_v<T> && b == static_cast<T>(-1)) return static_cast<T>(0 - uint64_t(a));
  return static_cast<T>(a / b);
}

Action div(const Op& op) {
  if (op.type().find('f') != std::string::npos) return make_packed_float(op);
  if (op.parts.size() != 2) return nullptr;
  return with_integer(op.type(), [&](auto t) -> Action {
    using T = decltype(t);
    return binary<T, T, T>(op[0], op[1], op[2], [](T a, T b) { return quotient(a, b); });
  });
}

Action rem(const Op& op) {
  if (op.parts.size() != 2) return nullptr;
  return with_integer(op.type(), [&](auto t) -> Action {
    using T = decltype(t);
    return binary<T, T, T>(op[0], op[1], op[2], [](T a, T b) {
      if (b == 0) return a;
      return static_cast<T>(uint64_t(a) - uint64_t(quotient(a, b)) * uint64_t(b));
    });
  });
}

template <bool kLeast>
Action min_or_max(const Op& op) {
  if (op.type().find('f') != std::string::npos) return make_packed_float(op);
  const auto chosen = [](auto a, auto b) { return kLeast ? std::min(a, b) : std::max(a, b); };
  if (op.type() == "s16x2") return of_halves<int16_t>(op, chosen);
  if (op.type() == "u16x2") return of_halves<uint16_t>(op, chosen);
  if (op.parts.size() != 2) return nullptr;
  return with_integer(op.type(), [&](auto t) -> Action {
    using T = decltype(t);
    return binary<T, T, T>(op[0], op[1], op[2],
                           [](T a, T b) { return kLeast ? std::min(a, b) : std::max(a, b); });
  });
}

template <bool kNegate>
Action neg_or_abs(const Op& op) {
  if (op.type().find('f') != std::string::npos) return make_packed_float(op);
  if (op.parts.size() != 2 || op.type()[0] != 's') return nullptr;
  return with_integer(op.type(), [&](auto t) -> Action {
    using T = decltype(t);
    return unary<T, T>(op[0], op[1], [](T a) {
      return kNegate || a < 0 ? static_cast<T>(0 - uint64_t(a)) : a;
    });
  });
}

Action sad(const Op& op) {
  if (op.parts.size() != 2) return nullptr;
  return with_integer(op.type(), [&](auto t) -> Action {
    using T = decltype(t);
    return ternary<T, T, T, T>(op[0], op[1], op[2], op[3], [](T a, T b, T c) {
      return static_cast<T>(uint64_t(c) + (a < b ? uint64_t(b) - uint64_t(a)
                                                 : uint64_t(a) - uint64_t(b)));
    });
  });
}

}  // namespace

std::vector<Entry> integer_entries() {
  return {{"add", add_or_sub<false>}, {"sub", add_or_sub<true>}, {"addc", add_or_sub<false>},
          {"subc", add_or_sub<true>}, {"mul", mul},              {"mad", mad},
          {"div", div},               {"rem", rem},              {"min", min_or_max<true>},
          {"max", min_or_max<false>}, {"neg", neg_or_abs<true>}, {"abs", neg_or_abs<false>},
          {"sad", sad}};
}

}  // namespace ptx
