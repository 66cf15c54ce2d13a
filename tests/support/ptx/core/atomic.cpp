// atom and red. Lanes take their turns from a drawn one on: a sum of floats has no fixed order.
#include <algorithm>
#include <cstring>

#include "memory.hpp"

namespace ptx {
namespace {

// b: of the instruction; the second operand of exch and cas.
template <class T>
T updated(const std::string& how, T old, T b, T c) {
  if (how == "exch") return b;
  if constexpr (std::is_integral_v<T>) {
    if (how == "add") return static_cast<T>(uint64_t(old) + uint64_t(b));
    if (how == "and") return old & b;
    if (how == "or") return old | b;
    if (how == "xor") return old ^ b;
    if (how == "inc") return old >= b ? T{0} : static_cast<T>(old + 1);
    if (how == "dec") return old == 0 || old > b ? b : static_cast<T>(old - 1);
    if (how == "cas") return old == b ? c : old;
    return how == "min" ? std::min(old, b) : std::max(old, b);
  } else {
    const double x = widen(old), y = widen(b);
    if (how == "add") return narrow<T>(x + y);
    return narrow<T>(how == "min" ? std::fmin(x, y) : std::fmax(x, y));
  }
}

bool known_update(const std::string& part) {
  for (const char* how : {"add", "and", "or", "xor", "inc", "dec", "cas", "exch", "min", "max"})
    if (part == how) return true;
  return false;
}

template <class T>
Action update(const Op& op, const std::string& how) {
  const bool returns = op.base() == "atom";
  const size_t first = returns ? 1 : 0;
  const Space space = space_of(op);
  const Address address(op[first]);
  const auto list = [](const Operand& o) {
    return o.kind == Kind::kVector ? o.parts : std::vector<Operand>{o};
  };
  // A register may hold a pair of 16-bit floats.
  const bool is_packed = op.type() == "f16x2" || op.type() == "bf16x2";
  const std::vector<Operand> with = list(op[first + 1]);
  const std::vector<Operand> to = returns ? list(op[0]) : std::vector<Operand>();
  const Operand swap = how == "cas" ? op[first + 2] : Operand();
  const uint32_t each = is_packed ? 4 : sizeof(T);
  const uint32_t bytes = each * static_cast<uint32_t>(with.size());
  return [=](Warp& warp, Mask mask) {
    const int start = static_cast<int>(warp.cta->machine->draw(kLanes));
    for (int k = 0; k < kLanes; ++k) {
      const int l = (start + k) % kLanes;
      if (!(mask >> l & 1)) continue;
      const uint64_t at = address.get(warp, l);
      uint8_t* place = locate(warp, l, space, at, bytes);
      for (size_t i = 0; i < with.size(); ++i) {
        uint64_t operand = read_any(warp, with[i], l), before = 0;
        std::memcpy(&before, place + i * each, each);
        const uint64_t third = how == "cas" ? read_any(warp, swap, l) : 0;
        for (uint32_t part = 0; part < each; part += sizeof(T)) {
          T old, b, c;
          std::memcpy(&old, place + i * each + part, sizeof(T));
          std::memcpy(&b, reinterpret_cast<const uint8_t*>(&operand) + part, sizeof(T));
          std::memcpy(&c, reinterpret_cast<const uint8_t*>(&third) + part, sizeof(T));
          const T next = updated(how, old, b, c);
          std::memcpy(place + i * each + part, &next, sizeof(T));
        }
        if (!returns || to[i].kind == Kind::kSink) continue;
        if (to[i].width == 'd')
          warp.lanes<uint64_t>(to[i].offset)[l] = before;
        else
          warp.lanes<uint32_t>(to[i].offset)[l] = static_cast<uint32_t>(before);
      }
      note_write(warp, space, at, bytes);
    }
    return Outcome::kDone;
  };
}

Action atomic(const Op& op) {
  std::string how;
  for (size_t i = 1; i + 1 < op.parts.size(); ++i) {
    const std::string& part = op.parts[i];
    if (known_update(part)) {
      how = part;
      continue;
    }
    bool found = part.rfind("L2::", 0) == 0 || part.rfind("level::", 0) == 0;
    for (const char* known : {"global", "shared", "shared::cta", "shared::cluster", "relaxed",
                              "acquire", "release", "acq_rel", "cta", "cluster", "gpu", "sys",
                              "noftz", "v2", "v4", "v8"})
      found = found || part == known;
    if (!found) return nullptr;
  }
  if (how.empty()) return nullptr;
  const std::string& type = op.type();
  const bool is_float = type.find('f') != std::string::npos;
  if (is_float && how != "add" && how != "min" && how != "max") return nullptr;
  if (type == "f32") return update<float>(op, how);
  if (type == "f64") return update<double>(op, how);
  if (type == "f16" || type == "f16x2") return update<Float16>(op, how);
  if (type == "bf16" || type == "bf16x2") return update<BFloat16>(op, how);
  return with_integer(type, [&](auto t) { return update<decltype(t)>(op, how); });
}

}  // namespace

std::vector<Entry> atomic_entries() { return {{"atom", atomic}, {"red", atomic}}; }

}  // namespace ptx
