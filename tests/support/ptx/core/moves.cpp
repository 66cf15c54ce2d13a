// Moves, selections, comparisons and what the other files share of reading operands.
#include <cmath>
#include <unordered_map>

#include "decode.hpp"

namespace ptx {

bool Op::has(const char* part) const {
  for (const std::string& own : parts)
    if (own == part) return true;
  return false;
}

bool Op::only(std::initializer_list<const char*> known, bool with_type) const {
  for (size_t i = 1; i + (with_type ? 1 : 0) < parts.size(); ++i) {
    bool found = false;
    for (const char* part : known) found = found || parts[i] == part;
    if (!found) return false;
  }
  return true;
}

Condition::Condition(const Operand& o) : offset(o.offset), negated(o.negated) {
  if (o.kind == Kind::kImmediate) {
    constant = true;
    value = o.value ? kAll : 0;
  } else if (o.kind != Kind::kRegister || o.width != 'p') {
    throw Fault("operand " + o.text + " is no predicate");
  }
}

PredicateTarget::PredicateTarget(const Operand& o) : offset(o.offset), sink(false) {
  if (o.kind == Kind::kSink)
    sink = true;
  else if (o.kind != Kind::kRegister || o.width != 'p')
    throw Fault("result " + o.text + " is no predicate");
}

Address::Address(const Operand& o) {
  if (o.kind != Kind::kMemory) throw Fault("operand " + o.text + " is no address");
  base = o.parts.at(0);
  displacement = static_cast<int64_t>(o.value);
}

uint64_t Address::get(Warp& warp, int lane) const {
  return read_any(warp, base, lane) + static_cast<uint64_t>(displacement);
}

uint64_t read_any(Warp& warp, const Operand& o, int lane) {
  if (o.kind == Kind::kImmediate) return o.value;
  if (o.kind == Kind::kRegister && o.width == 'd') return warp.lanes<uint64_t>(o.offset)[lane];
  if (o.kind == Kind::kRegister && o.width == 'w') return warp.lanes<uint32_t>(o.offset)[lane];
  throw Fault("operand " + o.text + " has no value");
}

namespace {

Action move_predicate(const Op& op) {
  const PredicateTarget d(op[0]);
  const Condition a(op[1]);
  return [=](Warp& warp, Mask mask) {
    d.set(warp, mask, a.get(warp));
    return Outcome::kDone;
  };
}

// mov.b32 %r, {%rs1, %rs2} and back.
Action pack(const Op& op, int bits) {
  const Operand to = op[0], from = op[1];
  const int count = static_cast<int>(from.parts.size()), part = bits / count;
  const uint64_t ones = part == 64 ? ~uint64_t{0} : (uint64_t{1} << part) - 1;
  return [=](Warp& warp, Mask mask) {
    each_lane(mask, [&](int l) {
      uint64_t value = 0;
      for (int i = 0; i < count; ++i) value |= (read_any(warp, from.parts[i], l) & ones) << part * i;
      if (to.width == 'd')
        warp.lanes<uint64_t>(to.offset)[l] = value;
      else
        warp.lanes<uint32_t>(to.offset)[l] = static_cast<uint32_t>(value);
    });
    return Outcome::kDone;
  };
}

Action unpack(const Op& op, int bits) {
  const Operand to = op[0], from = op[1];
  const int count = static_cast<int>(to.parts.size()), part = bits / count;
  const uint64_t ones = part == 64 ? ~uint64_t{0} : (uint64_t{1} << part) - 1;
  return [=](Warp& warp, Mask mask) {
    each_lane(mask, [&](int l) {
      const uint64_t value = read_any(warp, from, l);
      for (int i = 0; i < count; ++i) {
        const Operand& out = to.parts[i];
        if (out.kind == Kind::kSink) continue;
        const uint64_t bits_of_part = value >> part * i & ones;
        if (out.width == 'd')
          warp.lanes<uint64_t>(out.offset)[l] = bits_of_part;
        else
          warp.lanes<uint32_t>(out.offset)[l] = static_cast<uint32_t>(bits_of_part);
      }
    });
    return Outcome::kDone;
  };
}

Action copy(const Op& op, int bits) {
  if (bits == 64)
    return unary<uint64_t, uint64_t>(op[0], op[1], [](uint64_t x) { return x; });
  if (bits == 16)
    return unary<uint16_t, uint16_t>(op[0], op[1], [](uint16_t x) { return x; });
  return unary<uint32_t, uint32_t>(op[0], op[1], [](uint32_t x) { return x; });
}

Action mov(const Op& op) {
  if (op.parts.size() != 2) return nullptr;
  if (op.type() == "pred") return move_predicate(op);
  const int bits = std::stoi(op.type().substr(1));
  if (op[1].kind == Kind::kVector) return pack(op, bits);
  if (op[0].kind == Kind::kVector) return unpack(op, bits);
  return copy(op, bits);
}

template <class T>
Action select(const Op& op) {
  const Target<T> d(op[0]);
  const Source<T> a(op[1]), b(op[2]);
  const Condition c(op[3]);
  return [=](Warp& warp, Mask mask) {
    const Mask chosen = c.get(warp);
    Slot<T>* out = warp.lanes<Slot<T>>(d.offset);
    const Slot<T>*p = a.at(warp), *q = b.at(warp);
    each_lane(mask, [=](int l) { out[l] = chosen >> l & 1 ? p[l] : q[l]; });
    return Outcome::kDone;
  };
}

Action selp(const Op& op) {
  if (op.parts.size() != 2) return nullptr;
  const int bits = std::stoi(op.type().substr(1));
  if (bits == 64) return select<uint64_t>(op);
  return bits == 16 ? select<uint16_t>(op) : select<uint32_t>(op);
}

Action slct(const Op& op) {
  if (op.parts.size() != 3 && !op.has("ftz")) return nullptr;
  const bool by_float = op.type() == "f32";
  const int bits = std::stoi(op.parts[op.parts.size() - 2].substr(1));
  const Operand d = op[0], a = op[1], b = op[2], c = op[3];
  return [=](Warp& warp, Mask mask) {
    each_lane(mask, [&](int l) {
      const uint32_t key = static_cast<uint32_t>(read_any(warp, c, l));
      const bool first = by_float ? bits_as<float>(key) >= 0 : static_cast<int32_t>(key) >= 0;
      const uint64_t value = read_any(warp, first ? a : b, l);
      if (bits == 64)
        warp.lanes<uint64_t>(d.offset)[l] = value;
      else
        warp.lanes<uint32_t>(d.offset)[l] = static_cast<uint32_t>(value);
    });
    return Outcome::kDone;
  };
}

enum class Compare { kEq, kNe, kLt, kLe, kGt, kGe, kEqu, kNeu, kLtu, kLeu, kGtu, kGeu, kNum, kNan };

const std::unordered_map<std::string, Compare>& comparisons() {
  static const std::unordered_map<std::string, Compare> known = {
      {"eq", Compare::kEq},   {"ne", Compare::kNe},   {"lt", Compare::kLt},
      {"le", Compare::kLe},   {"gt", Compare::kGt},   {"ge", Compare::kGe},
      {"equ", Compare::kEqu}, {"neu", Compare::kNeu}, {"ltu", Compare::kLtu},
      {"leu", Compare::kLeu}, {"gtu", Compare::kGtu}, {"geu", Compare::kGeu},
      {"num", Compare::kNum}, {"nan", Compare::kNan}, {"lo", Compare::kLt},
      {"ls", Compare::kLe},   {"hi", Compare::kGt},   {"hs", Compare::kGe}};
  return known;
}

// Ordered comparisons are false of a NaN, those ending in u true.
template <class T>
bool compared(Compare how, T a, T b) {
  const bool nan = a != a || b != b;
  switch (how) {
    case Compare::kEq: return a == b;
    case Compare::kNe: return !nan && a != b;
    case Compare::kLt: return a < b;
    case Compare::kLe: return a <= b;
    case Compare::kGt: return a > b;
    case Compare::kGe: return a >= b;
    case Compare::kEqu: return nan || a == b;
    case Compare::kNeu: return nan || a != b;
    case Compare::kLtu: return nan || a < b;
    case Compare::kLeu: return nan || a <= b;
    case Compare::kGtu: return nan || a > b;
    case Compare::kGeu: return nan || a >= b;
    case Compare::kNum: return !nan;
    default: return nan;
  }
}

template <class T>
auto comparable(T x) {
  if constexpr (std::is_same_v<T, Float16> || std::is_same_v<T, BFloat16>)
    return widen(x);
  else
    return x;
}

Mask combined(const std::string& how, Mask a, Mask b) {
  if (how == "and") return a & b;
  if (how == "or") return a | b;
  return how == "xor" ? a ^ b : a;
}

template <class T>
Action set_predicate(const Op& op, Compare how, const std::string& combine) {
  const bool is_pair = op[0].kind == Kind::kPair;
  const PredicateTarget d(is_pair ? op[0].parts[0] : op[0]);
  const PredicateTarget complement = is_pair ? PredicateTarget(op[0].parts[1]) : PredicateTarget();
  const Source<T> a(op[1]), b(op[2]);
  const Condition c = combine.empty() ? Condition() : Condition(op[3]);
  const bool ftz = op.has("ftz");
  return [=](Warp& warp, Mask mask) {
    const Slot<T>*p = a.at(warp), *q = b.at(warp);
    Mask result = 0;
    each_lane(mask, [&](int l) {
      auto x = comparable(from_slot<T>(p[l]));
      auto y = comparable(from_slot<T>(q[l]));
      if constexpr (std::is_same_v<T, float>)
        if (ftz) x = flushed(x), y = flushed(y);
      result |= Mask{compared(how, x, y)} << l;
    });
    const Mask other = combine.empty() ? 0 : c.get(warp);
    d.set(warp, mask, combined(combine, result, other));
    complement.set(warp, mask, combined(combine, ~result, other));
    return Outcome::kDone;
  };
}

// Halves of a register: a predicate for each.
template <class T>
Action set_pair(const Op& op, Compare how) {
  if (op[0].kind != Kind::kPair || op.size() != 3) return nullptr;
  const PredicateTarget low(op[0].parts[0]), high(op[0].parts[1]);
  const Source<uint32_t> a(op[1]), b(op[2]);
  return [=](Warp& warp, Mask mask) {
    Mask results[2] = {0, 0};
    each_lane(mask, [&](int l) {
      for (int half = 0; half < 2; ++half) {
        const T x{static_cast<uint16_t>(a.get(warp, l) >> 16 * half)};
        const T y{static_cast<uint16_t>(b.get(warp, l) >> 16 * half)};
        results[half] |= Mask{compared(how, widen(x), widen(y))} << l;
      }
    });
    low.set(warp, mask, results[0]);
    high.set(warp, mask, results[1]);
    return Outcome::kDone;
  };
}

Action setp(const Op& op) {
  const auto how = comparisons().find(op.parts[1]);
  if (how == comparisons().end()) return nullptr;
  std::string combine;
  for (size_t i = 2; i + 1 < op.parts.size(); ++i) {
    if (op.parts[i] == "and" || op.parts[i] == "or" || op.parts[i] == "xor")
      combine = op.parts[i];
    else if (op.parts[i] != "ftz")
      return nullptr;
  }
  const auto make = [&](auto t) {
    return set_predicate<decltype(t)>(op, how->second, combine);
  };
  const std::string& type = op.type();
  if (type == "f32") return make(float{});
  if (type == "f64") return make(double{});
  if (type == "f16") return make(Float16{});
  if (type == "bf16") return make(BFloat16{});
  if (type == "bf16x2" && combine.empty()) return set_pair<BFloat16>(op, how->second);
  if (type == "f16x2" && combine.empty()) return set_pair<Float16>(op, how->second);
  return with_integer(type, make);
}

// set.lt.u32.f32: all bits, or 1.0, where a comparison holds.
Action set(const Op& op) {
  if (op.parts.size() != 4) return nullptr;
  const auto how = comparisons().find(op.parts[1]);
  if (how == comparisons().end()) return nullptr;
  const Compare compare = how->second;
  const std::string& to = op.parts[2];
  const uint32_t yes = to == "f32" ? 0x3f800000u : ~0u;
  if (to != "f32" && to != "u32" && to != "s32") return nullptr;
  const auto make = [&](auto t) {
    using T = decltype(t);
    return binary<uint32_t, T, T>(
        op[0], op[1], op[2], [=](T a, T b) { return compared(compare, a, b) ? yes : 0u; });
  };
  if (op.type() == "f32") return make(float{});
  if (op.type() == "f64") return make(double{});
  return with_integer(op.type(), make);
}

// Global addresses are generic ones; the other spaces have windows.
Action cvta(const Op& op) {
  const bool to = op.has("to");
  const size_t at = to ? 2 : 1;
  const std::string& space = op.parts.at(at);
  uint64_t window = 0;
  if (space == "shared" || space == "shared::cta" || space == "shared::cluster")
    window = kSharedWindow;
  else if (space == "local")
    window = kLocalWindow;
  else if (space == "param")
    window = kParamWindow;
  else if (space != "global" && space != "const")
    return nullptr;
  if (op.type() != "u64") return nullptr;
  return unary<uint64_t, uint64_t>(op[0], op[1],
                                   [=](uint64_t x) { return to ? x - window : x + window; });
}

Action isspacep(const Op& op) {
  const PredicateTarget d(op[0]);
  const Source<uint64_t> a(op[1]);
  const std::string space = op.parts[1];
  uint64_t window = 0;
  if (space == "shared" || space == "shared::cta" || space == "shared::cluster")
    window = kSharedWindow;
  else if (space == "local")
    window = kLocalWindow;
  else if (space == "param")
    window = kParamWindow;
  else if (space != "global")
    return nullptr;
  return [=](Warp& warp, Mask mask) {
    Mask result = 0;
    each_lane(mask, [&](int l) {
      const uint64_t x = a.get(warp, l);
      const bool in = window ? (x & window) != 0 : x < kSharedWindow;
      result |= Mask{in} << l;
    });
    d.set(warp, mask, result);
    return Outcome::kDone;
  };
}

}  // namespace

std::vector<Entry> move_entries() {
  return {{"mov", mov},   {"selp", selp}, {"slct", slct},        {"setp", setp},
          {"set", set},   {"cvta", cvta}, {"isspacep", isspacep}};
}

}  // namespace ptx
