// cvt: between all types.
#include <algorithm>
#include <cmath>

#include "decode.hpp"

namespace ptx {
namespace {

bool is_float(const std::string& type) {
  return type[0] == 'f' || type[0] == 'e' || type.substr(0, 2) == "bf" || type == "tf32";
}

// Bits of a type's name: 16 of "bf16", 8 of "s8".
int bits_of(const std::string& type) {
  if (type == "tf32") return 32;
  return std::stoi(type.substr(type.find_first_of("0123456789")));
}

const Format* format_of(const std::string& type) {
  if (type == "f16") return &kFloat16;
  if (type == "bf16") return &kBFloat16;
  if (type == "e4m3") return &kE4m3;
  if (type == "e5m2") return &kE5m2;
  return nullptr;
}

double float_value(const std::string& type, uint64_t bits) {
  if (type == "f32") return bits_as<float>(static_cast<uint32_t>(bits));
  if (type == "f64") return bits_as<double>(bits);
  return decode(static_cast<uint32_t>(bits) & 0xffff, *format_of(type));
}

struct Conversion {
  std::string to, from;
  Rounding rounding = Rounding::kNearest;
  bool to_integer_rounding = false;  // .rni and its like
  bool ftz = false, saturate = false, relu = false, finite = false;
  int to_bits = 0, from_bits = 0;

  uint64_t from_float(double x) const {
    if (ftz && from == "f32") x = flushed(static_cast<float>(x));
    if (to_integer_rounding && !std::isnan(x) && !std::isinf(x))
      x = std::copysign(rounded_integer(std::fabs(x), rounding, std::signbit(x)), x);
    if (!is_float(to)) return clamped(x);
    if (relu) x = x > 0 || x != x ? x : 0.0;
    if (saturate) x = x > 0 ? std::min(x, 1.0) : 0.0;  // NaN too becomes 0
    return float_bits(x);
  }

  uint64_t float_bits(double x) const {
    if (to == "f64") return bits_as<uint64_t>(x);
    if (to == "tf32") return uint64_t{encode(x, kTf32, rounding, finite)} << 13;
    if (to != "f32") return encode(x, *format_of(to), rounding, finite);
    const Format single{8, 23, 0x7f800000, 0x7f7fffff, 0x7fffffff};
    const float y = rounding == Rounding::kNearest
                        ? static_cast<float>(x)
                        : bits_as<float>(encode(x, single, rounding, false));
    return bits_as<uint32_t>(ftz ? flushed(y) : y);
  }

  // To an integer: towards zero unless told otherwise; NaN is 0, the rest is clamped.
  uint64_t clamped(double x) const {
    if (std::isnan(x)) return 0;
    const double low = to[0] == 's' ? -std::ldexp(1.0, to_bits - 1) : 0.0;
    const double beyond = std::ldexp(1.0, to[0] == 's' ? to_bits - 1 : to_bits);
    const double whole = std::trunc(x);
    if (whole < low) return static_cast<uint64_t>(static_cast<int64_t>(low));
    if (whole >= beyond) return to[0] == 's' ? (uint64_t{1} << (to_bits - 1)) - 1 : ones();
    return to[0] == 's' ? static_cast<uint64_t>(static_cast<int64_t>(whole))
                        : static_cast<uint64_t>(whole);
  }

  uint64_t ones() const { return to_bits == 64 ? ~uint64_t{0} : (uint64_t{1} << to_bits) - 1; }

  uint64_t extended(uint64_t bits) const {
    if (from_bits == 64) return bits;
    bits &= (uint64_t{1} << from_bits) - 1;
    const bool negative = from[0] == 's' && bits >> (from_bits - 1);
    return negative ? bits | ~uint64_t{0} << from_bits : bits;
  }

  uint64_t from_integer(uint64_t bits) const {
    bits = extended(bits);
    if (is_float(to)) {
      if (to == "f32" && rounding == Rounding::kNearest) {  // once, from all 64 bits
        const float x = from[0] == 's' ? static_cast<float>(static_cast<int64_t>(bits))
                                       : static_cast<float>(bits);
        return bits_as<uint32_t>(x);
      }
      if (from_bits == 64 && to != "f64")
        throw Fault("cvt." + to + "." + from + " in this rounding is not implemented");
      return float_bits(from[0] == 's' ? static_cast<double>(static_cast<int64_t>(bits))
                                       : static_cast<double>(bits));
    }
    if (saturate) {
      const bool negative = from[0] == 's' && bits >> 63;
      const uint64_t most = to[0] == 's' ? ones() >> 1 : ones();
      if (!negative && bits > most) bits = most;
      if (negative && to[0] == 'u') bits = 0;
      if (negative && to[0] == 's' && to_bits < 64) {
        const int64_t least = -(int64_t{1} << (to_bits - 1));
        if (static_cast<int64_t>(bits) < least) bits = static_cast<uint64_t>(least);
      }
    }
    // A register wider than the result holds it with its sign.
    return bits;
  }

  uint64_t operator()(uint64_t bits) const {
    if (is_float(from)) return from_float(float_value(from, bits));
    return from_integer(bits);
  }
};

void write_any(Warp& warp, const Operand& to, int lane, uint64_t value) {
  if (to.kind == Kind::kSink) return;
  if (to.width == 'd')
    warp.lanes<uint64_t>(to.offset)[lane] = value;
  else
    warp.lanes<uint32_t>(to.offset)[lane] = static_cast<uint32_t>(value);
}

// What most conversions are, without the general path.
Action frequent(const Op& op, const Conversion& c) {
  const bool narrow = op[0].width == 'w' && (op[1].width == 'w' || op[1].kind == Kind::kImmediate);
  if (is_float(c.to) && !narrow) return nullptr;
  if (c.saturate || c.relu || c.ftz || c.rounding != Rounding::kNearest || c.to_integer_rounding)
    return nullptr;
  if (c.to == "f32" && c.from == "bf16")
    return unary<float, BFloat16>(op[0], op[1], [](BFloat16 x) { return widen(x); });
  if (c.to == "f32" && c.from == "f16")
    return unary<float, Float16>(op[0], op[1], [](Float16 x) { return widen(x); });
  if (c.to == "bf16" && c.from == "f32")
    return unary<BFloat16, float>(op[0], op[1], [](float x) { return to_bfloat16(x); });
  const bool widens = op[0].width == 'd' && op[1].width == 'w';
  if (c.from == "s32" && (c.to == "s64" || c.to == "u64") && widens)
    return unary<int64_t, int32_t>(op[0], op[1], [](int32_t x) { return int64_t{x}; });
  if (c.from == "u32" && (c.to == "s64" || c.to == "u64") && widens)
    return unary<uint64_t, uint32_t>(op[0], op[1], [](uint32_t x) { return uint64_t{x}; });
  return nullptr;
}

Action pair_of_floats(const Op& op, const Conversion& half) {
  if (half.to == "bf16" && !half.relu && !half.finite && half.rounding == Rounding::kNearest)
    return binary<uint32_t, float, float>(op[0], op[1], op[2], [](float high, float low) {
      return uint32_t{to_bfloat16(high).bits} << 16 | to_bfloat16(low).bits;
    });
  const int bits = half.to_bits;
  if (bits == 8)
    return binary<uint16_t, float, float>(op[0], op[1], op[2], [=](float high, float low) {
      return static_cast<uint16_t>(half.from_float(high) << 8 | half.from_float(low));
    });
  return binary<uint32_t, float, float>(op[0], op[1], op[2], [=](float high, float low) {
    return static_cast<uint32_t>(half.from_float(high) << 16 | half.from_float(low));
  });
}

// Two elements of one register to two of another.
Action pair_of_pairs(const Op& op, const Conversion& one) {
  const Operand to = op[0], from = op[1];
  const uint64_t mask = (uint64_t{1} << one.from_bits) - 1;
  return [=](Warp& warp, Mask lanes) {
    each_lane(lanes, [&](int l) {
      const uint64_t bits = read_any(warp, from, l);
      const uint64_t low = one.from_float(decode(bits & mask, *format_of(one.from)));
      const uint64_t high =
          one.from_float(decode(bits >> one.from_bits & mask, *format_of(one.from)));
      write_any(warp, to, l, high << one.to_bits | low);
    });
    return Outcome::kDone;
  };
}

Action cvt(const Op& op) {
  if (op.parts.size() < 3) return nullptr;
  Conversion c;
  c.from = op.parts.back();
  c.to = op.parts[op.parts.size() - 2];
  for (size_t i = 1; i + 2 < op.parts.size(); ++i) {
    const std::string& part = op.parts[i];
    if (part == "rn" || part == "rni") c.rounding = Rounding::kNearest;
    else if (part == "rz" || part == "rzi") c.rounding = Rounding::kZero;
    else if (part == "rm" || part == "rmi") c.rounding = Rounding::kDown;
    else if (part == "rp" || part == "rpi") c.rounding = Rounding::kUp;
    else if (part == "rna") c.rounding = Rounding::kNearestAway;
    else if (part == "ftz") c.ftz = true;
    else if (part == "sat") c.saturate = true;
    else if (part == "relu") c.relu = true;
    else if (part == "satfinite") c.finite = true;
    else return nullptr;
    c.to_integer_rounding |= part.size() == 3 && part[2] == 'i';
  }
  const auto single = [](const std::string& type) {
    const bool is_pair = type.size() > 2 && type.substr(type.size() - 2) == "x2";
    return is_pair ? type.substr(0, type.size() - 2) : type;
  };
  const bool to_pair = single(c.to) != c.to, from_pair = single(c.from) != c.from;
  c.to = single(c.to);
  c.from = single(c.from);
  c.to_bits = c.to == "e4m3" || c.to == "e5m2" ? 8 : bits_of(c.to);
  c.from_bits = c.from == "e4m3" || c.from == "e5m2" ? 8 : bits_of(c.from);
  if (to_pair && from_pair) return pair_of_pairs(op, c);
  if (to_pair) return c.from == "f32" && op.size() == 3 ? pair_of_floats(op, c) : nullptr;
  if (from_pair) return nullptr;
  if (is_float(c.to) && c.to != "f32" && c.to != "f64" && c.to != "tf32" && !format_of(c.to))
    return nullptr;
  if (Action action = frequent(op, c)) return action;
  const Operand to = op[0], from = op[1];
  return [=](Warp& warp, Mask lanes) {
    each_lane(lanes, [&](int l) { write_any(warp, to, l, c(read_any(warp, from, l))); });
    return Outcome::kDone;
  };
}

}  // namespace

std::vector<Entry> convert_entries() { return {{"cvt", cvt}}; }

}  // namespace ptx
