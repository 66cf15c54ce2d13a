// Loads, stores and the state spaces.
#include "memory.hpp"

#include <algorithm>
#include <cstring>

namespace ptx {

std::string hexadecimal(uint64_t value) {
  char text[20];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

uint8_t* Machine::global(uint64_t address, uint64_t bytes) {
  const auto holds = [&](const Range& r) { return address >= r.begin && address + bytes <= r.end; };
  if (last_range >= ranges.size() || !holds(ranges[last_range])) {
    const auto after = std::upper_bound(ranges.begin(), ranges.end(), address,
                                        [](uint64_t a, const Range& r) { return a < r.begin; });
    const size_t index = static_cast<size_t>(after - ranges.begin()) - 1;
    if (after == ranges.begin() || !holds(ranges[index])) {
      std::string text = std::to_string(bytes) + " bytes of global memory at " +
                         hexadecimal(address) + " are outside every buffer";
      if (after != ranges.begin()) {
        const Range& r = ranges[index];
        text += ": " + std::to_string(address - r.begin) + " bytes into one of " +
                std::to_string(r.end - r.begin);
      }
      if (after != ranges.end())
        text += ", " + std::to_string(after->begin - address) + " before the next";
      throw Fault(text);
    }
    last_range = index;
  }
  return reinterpret_cast<uint8_t*>(address);
}

uint8_t* Cta::reach(uint64_t address, uint32_t bytes) {
  if (address < kSharedBase || address + bytes > shared.size())
    throw Fault(std::to_string(bytes) + " bytes of shared memory at " + hexadecimal(address) +
                " are outside of the " + std::to_string(shared.size() - kSharedBase) +
                " that the kernel has from " + hexadecimal(kSharedBase));
  return shared.data() + address;
}

void Cta::wrote(uint64_t address, uint32_t bytes) {
  if (unfenced.empty()) return;
  std::memset(unfenced.data() + address, 1, bytes);
  has_unfenced = true;
}

void Cta::async_write(uint64_t address, const uint8_t* from, uint32_t bytes) {
  std::memcpy(reach(address, bytes), from, bytes);
  if (unfenced.empty()) return;
  std::memcpy(async_shared.data() + address, from, bytes);
  std::memset(unfenced.data() + address, 0, bytes);
}

const uint8_t* Cta::async_read(uint64_t address, uint32_t bytes) {
  uint8_t* seen = reach(address, bytes);
  return unfenced.empty() ? seen : async_shared.data() + address;
}

void Cta::publish(uint64_t address, uint32_t bytes) {
  if (unfenced.empty()) return;
  std::memcpy(async_shared.data() + address, shared.data() + address, bytes);
  std::memset(unfenced.data() + address, 0, bytes);
}

void Cta::fence() {
  if (!has_unfenced) return;
  for (size_t i = 0; i < shared.size(); ++i)
    if (unfenced[i]) async_shared[i] = shared[i];
  std::fill(unfenced.begin(), unfenced.end(), 0);
  has_unfenced = false;
}

uint8_t* Machine::generic(Warp& warp, int lane, uint64_t address, uint32_t bytes) {
  if (address < kSharedWindow) return global(address, bytes);
  if (address < kLocalWindow) return locate(warp, lane, Space::kShared, address - kSharedWindow, bytes);
  if (address < kParamWindow) return locate(warp, lane, Space::kLocal, address - kLocalWindow, bytes);
  return locate(warp, lane, Space::kParam, address - kParamWindow, bytes);
}

Space space_of(const Op& op) {
  if (op.has("global") || op.has("const")) return Space::kGlobal;
  if (op.has("shared") || op.has("shared::cta") || op.has("shared::cluster")) return Space::kShared;
  if (op.has("local")) return Space::kLocal;
  if (op.has("param") || op.has("param::entry")) return Space::kParam;
  return Space::kGeneric;
}

uint8_t* locate(Warp& warp, int lane, Space space, uint64_t address, uint32_t bytes) {
  if (address & (bytes - 1) && (bytes & (bytes - 1)) == 0)
    throw Fault("an access of " + std::to_string(bytes) + " bytes at " + hexadecimal(address) +
                " is not aligned");
  Machine& machine = *warp.cta->machine;
  switch (space) {
    case Space::kGlobal: return machine.global(address, bytes);
    case Space::kShared: return warp.cta->reach(address, bytes);
    case Space::kLocal: {
      const size_t each = machine.program->local_bytes;
      if (address + bytes > each) throw Fault("local memory at " + hexadecimal(address));
      return warp.local.data() + static_cast<size_t>(lane) * each + address;
    }
    case Space::kParam:
      if (address + bytes > machine.params.size())
        throw Fault("a kernel parameter at " + hexadecimal(address));
      return machine.params.data() + address;
    default: return machine.generic(warp, lane, address, bytes);
  }
}

uint32_t shared_address(uint64_t address) {
  return static_cast<uint32_t>(address & ~kSharedWindow);
}

void note_write(Warp& warp, Space space, uint64_t address, uint32_t bytes) {
  if (warp.cta->unfenced.empty()) return;
  const bool is_window = address >= kSharedWindow && address < kLocalWindow;
  if (space == Space::kShared || (space == Space::kGeneric && is_window))
    warp.cta->wrote(shared_address(address), bytes);
}

namespace {

// Bytes of an element, and whether a load extends its sign.
uint32_t element_bytes(const std::string& type) {
  if (type == "b128") return 0;
  return static_cast<uint32_t>(std::stoi(type.substr(1)) / 8);
}

bool known_access(const Op& op) {
  static const char* known[] = {
      "global", "shared", "shared::cta", "shared::cluster", "local", "param", "param::entry",
      "const", "nc", "ca", "cg", "cs", "lu", "cv", "wb", "wt", "volatile", "relaxed", "acquire",
      "release", "weak", "cta", "cluster", "gpu", "sys", "mmio", "v2", "v4", "v8", "noallocate"};
  for (size_t i = 1; i + 1 < op.parts.size(); ++i) {
    const std::string& part = op.parts[i];
    bool found = part.rfind("L1::", 0) == 0 || part.rfind("L2::", 0) == 0;
    for (const char* name : known) found = found || part == name;
    if (!found) return false;
  }
  return true;
}

std::vector<Operand> elements(const Operand& o) {
  return o.kind == Kind::kVector ? o.parts : std::vector<Operand>{o};
}

template <class T>
inline void put(Warp& warp, const Operand& to, int lane, const uint8_t* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  if (to.width == 'd')
    warp.lanes<uint64_t>(to.offset)[lane] = static_cast<uint64_t>(static_cast<int64_t>(value));
  else
    warp.lanes<uint32_t>(to.offset)[lane] = static_cast<uint32_t>(static_cast<int64_t>(value));
}

template <class T>
Action load(const Op& op) {
  const Space space = space_of(op);
  const Address address(op[1]);
  const std::vector<Operand> to = elements(op[0]);
  const uint32_t bytes = static_cast<uint32_t>(sizeof(T) * to.size());
  return [=](Warp& warp, Mask mask) {
    each_lane(mask, [&](int l) {
      const uint8_t* from = locate(warp, l, space, address.get(warp, l), bytes);
      for (size_t i = 0; i < to.size(); ++i)
        if (to[i].kind != Kind::kSink) put<T>(warp, to[i], l, from + i * sizeof(T));
    });
    return Outcome::kDone;
  };
}

Action ld(const Op& op) {
  if (!known_access(op)) return nullptr;
  const bool is_signed = op.type()[0] == 's';
  switch (element_bytes(op.type())) {
    case 1: return is_signed ? load<int8_t>(op) : load<uint8_t>(op);
    case 2: return is_signed ? load<int16_t>(op) : load<uint16_t>(op);
    case 4: return is_signed ? load<int32_t>(op) : load<uint32_t>(op);
    case 8: return load<uint64_t>(op);
    default: return nullptr;
  }
}

Action st(const Op& op) {
  if (!known_access(op)) return nullptr;
  const uint32_t each = element_bytes(op.type());
  if (!each) return nullptr;
  const Space space = space_of(op);
  const Address address(op[0]);
  const std::vector<Operand> from = elements(op[1]);
  const uint32_t bytes = each * static_cast<uint32_t>(from.size());
  return [=](Warp& warp, Mask mask) {
    each_lane(mask, [&](int l) {
      const uint64_t at = address.get(warp, l);
      uint8_t* to = locate(warp, l, space, at, bytes);
      for (size_t i = 0; i < from.size(); ++i) {
        const uint64_t value = read_any(warp, from[i], l);
        std::memcpy(to + i * each, &value, each);
      }
      note_write(warp, space, at, bytes);
    });
    return Outcome::kDone;
  };
}

}  // namespace

std::vector<Entry> memory_entries() { return {{"ld", ld}, {"ldu", ld}, {"st", st}}; }

}  // namespace ptx
