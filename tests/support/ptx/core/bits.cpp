// Logic, shifts and bit fields.
#include <type_traits>

#include "decode.hpp"

namespace ptx {
namespace {

template <class F>
Action of_predicates(const Op& op, F f) {
  const PredicateTarget d(op[0]);
  const Condition a(op[1]), b(op[op.size() > 2 ? 2 : 1]);
  return [=](Warp& warp, Mask mask) {
    d.set(warp, mask, f(a.get(warp), b.get(warp)));
    return Outcome::kDone;
  };
}

template <class F>
Action logic(const Op& op, F f) {
  if (op.parts.size() != 2) return nullptr;
  if (op.type() == "pred") return of_predicates(op, f);
  if (op.type() == "b16") return binary<uint16_t, uint16_t, uint16_t>(op[0], op[1], op[2], f);
  if (op.type() == "b32") return binary<uint32_t, uint32_t, uint32_t>(op[0], op[1], op[2], f);
  if (op.type() == "b64") return binary<uint64_t, uint64_t, uint64_t>(op[0], op[1], op[2], f);
  return nullptr;
}

Action bit_and(const Op& op) {
  return logic(op, [](auto a, auto b) { return static_cast<decltype(a)>(a & b); });
}
Action bit_or(const Op& op) {
  return logic(op, [](auto a, auto b) { return static_cast<decltype(a)>(a | b); });
}
Action bit_xor(const Op& op) {
  return logic(op, [](auto a, auto b) { return static_cast<decltype(a)>(a ^ b); });
}

Action bit_not(const Op& op) {
  if (op.parts.size() != 2) return nullptr;
  if (op.type() == "pred") return of_predicates(op, [](Mask a, Mask) { return ~a; });
  return with_integer(op.type(), [&](auto t) -> Action {
    using T = decltype(t);
    return unary<T, T>(op[0], op[1], [](T a) { return static_cast<T>(~a); });
  });
}

// A table of all eight combinations of three bits.
Action lop3(const Op& op) {
  if (op.type() != "b32" || op.parts.size() != 2) return nullptr;
  const uint32_t table = static_cast<uint32_t>(op[4].value);
  return ternary<uint32_t, uint32_t, uint32_t, uint32_t>(
      op[0], op[1], op[2], op[3], [table](uint32_t a, uint32_t b, uint32_t c) {
        uint32_t result = 0;
        for (uint32_t k = 0; k < 8; ++k)
          if (table >> k & 1)
            result |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
        return result;
      });
}

// Shifts by the type's size or more give zero, or the sign.
Action shl(const Op& op) {
  if (op.parts.size() != 2) return nullptr;
  return with_integer(op.type(), [&](auto t) -> Action {
    using T = decltype(t);
    return binary<T, T, uint32_t>(op[0], op[1], op[2], [](T a, uint32_t n) {
      return n >= 8 * sizeof(T) ? T{0} : static_cast<T>(uint64_t(a) << n);
    });
  });
}

Action shr(const Op& op) {
  if (op.parts.size() != 2) return nullptr;
  return with_integer(op.type(), [&](auto t) -> Action {
    using T = decltype(t);
    return binary<T, T, uint32_t>(op[0], op[1], op[2], [](T a, uint32_t n) {
      constexpr uint32_t kBits = 8 * sizeof(T);
      if (n >= kBits) return std::is_signed_v<T> && a < 0 ? static_cast<T>(-1) : T{0};
      return static_cast<T>(a >> n);
    });
  });
}

// A window of 32 bits on b:a.
Action shf(const Op& op) {
  if (!op.only({"l", "r", "wrap", "clamp"}) || op.type() != "b32") return nullptr;
  const bool left = op.has("l"), wrap = op.has("wrap");
  return ternary<uint32_t, uint32_t, uint32_t, uint32_t>(
      op[0], op[1], op[2], op[3], [=](uint32_t a, uint32_t b, uint32_t n) {
        n = wrap ? n & 31 : n < 32 ? n : 32;
        const uint64_t both = uint64_t{b} << 32 | a;
        return static_cast<uint32_t>(left ? both << n >> 32 : both >> n);
      });
}

Action bfe(const Op& op) {
  if (op.parts.size() != 2) return nullptr;
  return with_integer(op.type(), [&](auto t) -> Action {
    using T = decltype(t);
    if constexpr (sizeof(T) < 4) return nullptr;
    return ternary<T, T, uint32_t, uint32_t>(
        op[0], op[1], op[2], op[3], [](T a, uint32_t start, uint32_t length) {
          constexpr uint32_t kBits = 8 * sizeof(T);
          start &= 255;
          length &= 255;
          using U = std::make_unsigned_t<T>;
          const U x = static_cast<U>(a);
          // Bits beyond the word, and above the field, are the sign of its last bit that exists.
          const uint32_t top = std::min(start + length - 1, kBits - 1);
          const bool sign = std::is_signed_v<T> && length && (x >> top & 1);
          U field = start < kBits ? x >> start : 0;
          const uint32_t kept = start < kBits ? std::min(length, kBits - start) : 0;
          if (kept < kBits) {
            const U ones = (U{1} << kept) - 1;
            field = (field & ones) | (sign ? ~ones : 0);
          }
          return static_cast<T>(field);
        });
  });
}

Action bfi(const Op& op) {
  if (op.parts.size() != 2) return nullptr;
  const auto make = [&](auto t) -> Action {
    using T = decltype(t);
    const Target<T> d(op[0]);
    const Source<T> a(op[1]), b(op[2]);
    const Source<uint32_t> start(op[3]), length(op[4]);
    return [=](Warp& warp, Mask mask) {
      each_lane(mask, [&](int l) {
        constexpr uint32_t kBits = 8 * sizeof(T);
        const uint32_t at = start.get(warp, l) & 255, n = length.get(warp, l) & 255;
        const T ones = n >= kBits ? ~T{0} : (T{1} << n) - 1;
        const T field = at >= kBits ? 0 : ones << at;
        const T value = at >= kBits ? 0 : a.get(warp, l) << at;
        d.set(warp, l, static_cast<T>((b.get(warp, l) & ~field) | (value & field)));
      });
      return Outcome::kDone;
    };
  };
  if (op.type() == "b32") return make(uint32_t{});
  if (op.type() == "b64") return make(uint64_t{});
  return nullptr;
}

template <class F32, class F64>
Action counted(const Op& op, F32 narrow, F64 wide) {
  if (op.parts.size() != 2) return nullptr;
  if (op.type() == "b32" || op.type() == "u32" || op.type() == "s32")
    return unary<uint32_t, uint32_t>(op[0], op[1], narrow);
  if (op.type() == "b64" || op.type() == "u64" || op.type() == "s64")
    return unary<uint32_t, uint64_t>(op[0], op[1], wide);
  return nullptr;
}

Action popc(const Op& op) {
  return counted(
      op, [](uint32_t a) { return static_cast<uint32_t>(__builtin_popcount(a)); },
      [](uint64_t a) { return static_cast<uint32_t>(__builtin_popcountll(a)); });
}

Action clz(const Op& op) {
  return counted(
      op, [](uint32_t a) { return a ? static_cast<uint32_t>(__builtin_clz(a)) : 32u; },
      [](uint64_t a) { return a ? static_cast<uint32_t>(__builtin_clzll(a)) : 64u; });
}

// The place of the highest bit that is not the sign; all bits set if there is none.
Action bfind(const Op& op) {
  if (!op.only({"shiftamt"})) return nullptr;
  const bool is_signed = op.type()[0] == 's', amount = op.has("shiftamt");
  if (op.type() == "u32" || op.type() == "s32")
    return unary<uint32_t, uint32_t>(op[0], op[1], [=](uint32_t a) {
      if (is_signed && a >> 31) a = ~a;
      if (!a) return ~0u;
      const uint32_t place = 31 - static_cast<uint32_t>(__builtin_clz(a));
      return amount ? 31 - place : place;
    });
  if (op.type() == "u64" || op.type() == "s64")
    return unary<uint32_t, uint64_t>(op[0], op[1], [=](uint64_t a) {
      if (is_signed && a >> 63) a = ~a;
      if (!a) return ~0u;
      const uint32_t place = 63 - static_cast<uint32_t>(__builtin_clzll(a));
      return amount ? 63 - place : place;
    });
  return nullptr;
}

Action brev(const Op& op) {
  if (op.parts.size() != 2) return nullptr;
  const auto reversed = [](auto a) {
    decltype(a) result = 0;
    for (size_t i = 0; i < 8 * sizeof(a); ++i) result = result << 1 | (a >> i & 1);
    return result;
  };
  if (op.type() == "b32") return unary<uint32_t, uint32_t>(op[0], op[1], reversed);
  if (op.type() == "b64") return unary<uint64_t, uint64_t>(op[0], op[1], reversed);
  return nullptr;
}

// Selects four of the eight bytes of a and b; bit 3 of a selector copies the byte's sign instead.
uint32_t selected_bytes(uint32_t a, uint32_t b, const uint32_t (&selector)[4]) {
  const uint64_t both = uint64_t{b} << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    uint32_t byte = static_cast<uint32_t>(both >> 8 * (selector[i] & 7)) & 255;
    if (selector[i] & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << 8 * i;
  }
  return result;
}

Action prmt(const Op& op) {
  if (op.parts[1] != "b32" || op.parts.size() > 3) return nullptr;
  const std::string mode = op.parts.size() == 3 ? op.parts[2] : "";
  if (!mode.empty() && mode != "f4e" && mode != "b4e" && mode != "rc8" && mode != "ecl" &&
      mode != "ecr" && mode != "rc16")
    return nullptr;
  return ternary<uint32_t, uint32_t, uint32_t, uint32_t>(
      op[0], op[1], op[2], op[3], [mode](uint32_t a, uint32_t b, uint32_t c) {
        uint32_t selector[4];
        const uint32_t low = c & 3;
        for (uint32_t i = 0; i < 4; ++i) {
          if (mode.empty()) selector[i] = c >> 4 * i & 15;
          if (mode == "f4e") selector[i] = (low + i) & 7;
          if (mode == "b4e") selector[i] = (low - i) & 7;
          if (mode == "rc8") selector[i] = low;
          if (mode == "ecl") selector[i] = std::max(i, low);
          if (mode == "ecr") selector[i] = std::min(i, low);
          if (mode == "rc16") selector[i] = (low & 1) * 2 + (i & 1);
        }
        return selected_bytes(a, b, selector);
      });
}

}  // namespace

std::vector<Entry> bit_entries() {
  return {{"and", bit_and}, {"or", bit_or},     {"xor", bit_xor}, {"not", bit_not},
          {"lop3", lop3},   {"shl", shl},       {"shr", shr},     {"shf", shf},
          {"bfe", bfe},     {"bfi", bfi},       {"popc", popc},   {"clz", clz},
          {"bfind", bfind}, {"brev", brev},     {"prmt", prmt}};
}

}  // namespace ptx
