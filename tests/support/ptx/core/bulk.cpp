// cp.async.bulk and cp.reduce.async.bulk: lines of bytes and tiles of tensors.
#include <algorithm>
#include <cstring>

#include "memory.hpp"

namespace ptx {
namespace {

// What tensor_map.py writes into the 128 bytes of a tensor map. dims and box: innermost first.
struct TensorMap {
  uint64_t magic, address;
  uint32_t rank, element_bytes, swizzle, type;
  uint32_t dims[5], box[5];
  uint64_t strides[4];  // bytes, from the second dimension on
};
static_assert(sizeof(TensorMap) <= 128, "a tensor map has 128 bytes");
constexpr uint64_t kMagic = 0x70616d726f736e74;

enum class Reduction { kNone, kAdd, kMin, kMax };

template <class T>
void reduce_as(Reduction how, uint8_t* to, const uint8_t* from, uint32_t bytes) {
  for (uint32_t i = 0; i < bytes; i += sizeof(T)) {
    T a, b;
    std::memcpy(&a, to + i, sizeof(T));
    std::memcpy(&b, from + i, sizeof(T));
    if constexpr (std::is_integral_v<T>) {
      if (how == Reduction::kAdd) a = static_cast<T>(uint64_t(a) + uint64_t(b));
      if (how == Reduction::kMin) a = std::min(a, b);
      if (how == Reduction::kMax) a = std::max(a, b);
    } else {
      const double x = widen(a), y = widen(b);
      if (how == Reduction::kAdd) a = narrow<T>(x + y);
      if (how == Reduction::kMin) a = narrow<T>(std::fmin(x, y));
      if (how == Reduction::kMax) a = narrow<T>(std::fmax(x, y));
    }
    std::memcpy(to + i, &a, sizeof(T));
  }
}

// Types by the numbers that tensor_map.py gives them.
void put(Reduction how, uint32_t type, uint8_t* to, const uint8_t* from, uint32_t bytes) {
  if (how == Reduction::kNone) {
    std::memcpy(to, from, bytes);
    return;
  }
  switch (type) {
    case 1: return reduce_as<float>(how, to, from, bytes);
    case 2: return reduce_as<Float16>(how, to, from, bytes);
    case 3: return reduce_as<BFloat16>(how, to, from, bytes);
    case 4: return reduce_as<double>(how, to, from, bytes);
    case 5: return reduce_as<uint32_t>(how, to, from, bytes);
    case 6: return reduce_as<int32_t>(how, to, from, bytes);
    case 7: return reduce_as<uint64_t>(how, to, from, bytes);
    default: throw Fault("a reduction of this type is not implemented");
  }
}

uint32_t type_number(const std::string& type) {
  static const char* known[] = {"", "f32", "f16", "bf16", "f64", "u32", "s32", "u64"};
  for (uint32_t i = 1; i < 8; ++i)
    if (type == known[i]) return i;
  return 0;
}

Reduction reduction_of(const Op& op) {
  if (op.parts[1] != "reduce") return Reduction::kNone;
  if (op.has("add")) return Reduction::kAdd;
  if (op.has("min")) return Reduction::kMin;
  if (op.has("max")) return Reduction::kMax;
  throw Fault("this reduction is not implemented");
}

// Into shared memory: done at once, or left to the scheduler.
void start_load(Cta& cta, Job job) {
  if (cta.machine->at_once())
    job();
  else
    cta.pending.push_back(std::move(job));
}

void start_store(Warp& warp, BulkStore store) {
  if (warp.cta->machine->at_once()) {
    store.read();
    store.write();
  } else {
    warp.open_stores.push_back(std::move(store));
  }
}

void need_multiple(uint64_t value, uint64_t of, const char* what) {
  if (value % of)
    throw Fault(std::string(what) + " " + hexadecimal(value) + " is no multiple of " +
                std::to_string(of));
}

Action line_load(const Op& op) {
  const Address to(op[0]), from(op[1]), barrier(op[3]);
  const Operand size = op[2];
  return [=](Warp& warp, Mask mask) {
    each_lane(mask, [&](int l) {
      const uint32_t at = shared_address(to.get(warp, l)), mbar = shared_address(barrier.get(warp, l));
      const uint32_t bytes = static_cast<uint32_t>(read_any(warp, size, l));
      const uint64_t source = from.get(warp, l);
      need_multiple(at, 16, "the address");
      need_multiple(source, 16, "the address");
      need_multiple(bytes, 16, "the size");
      Cta* cta = warp.cta;
      cta->mbarrier(mbar);
      start_load(*cta, [=] {
        cta->async_write(at, cta->machine->global(source, bytes), bytes);
        Mbarrier& done = cta->mbarrier(mbar);
        done.bytes -= bytes;
        done.settle();
      });
    });
    return Outcome::kDone;
  };
}

Action line_store(const Op& op) {
  const Address to(op[0]), from(op[1]);
  const Operand size = op[2];
  const Reduction how = reduction_of(op);
  const uint32_t type = how == Reduction::kNone ? 0 : type_number(op.type());
  return [=](Warp& warp, Mask mask) {
    each_lane(mask, [&](int l) {
      const uint32_t at = shared_address(from.get(warp, l));
      const uint32_t bytes = static_cast<uint32_t>(read_any(warp, size, l));
      const uint64_t target = to.get(warp, l);
      need_multiple(at, 16, "the address");
      need_multiple(target, 16, "the address");
      need_multiple(bytes, 16, "the size");
      Cta* cta = warp.cta;
      auto data = std::make_shared<std::vector<uint8_t>>();
      BulkStore store;
      store.read = [=] {
        const uint8_t* seen = cta->async_read(at, bytes);
        data->assign(seen, seen + bytes);
      };
      store.write = [=] {
        put(how, type, cta->machine->global(target, bytes), data->data(), bytes);
      };
      start_store(warp, std::move(store));
    });
    return Outcome::kDone;
  };
}

// A box of a tensor, at coordinates that may lie outside of it.
struct Box {
  TensorMap map;
  int32_t at[5] = {0, 0, 0, 0, 0};
  uint32_t shared = 0;

  uint32_t row_bytes() const { return map.box[0] * map.element_bytes; }
  uint32_t rows() const {
    uint32_t n = 1;
    for (uint32_t d = 1; d < map.rank; ++d) n *= map.box[d];
    return n;
  }
  uint32_t bytes() const { return row_bytes() * rows(); }

  // 16 bytes of the box, counted in a plain order, among those of shared memory.
  uint32_t place(uint32_t offset) const {
    const uint32_t address = shared + offset;
    const uint32_t bits = map.swizzle == 128 ? 7 : map.swizzle == 64 ? 3 : map.swizzle == 32 ? 1 : 0;
    return address ^ ((address >> 7 & bits) << 4);
  }

  // Calls f(first byte in the box, global address, bytes) for what of each row is in the tensor.
  template <class F>
  void each_row(F f) const {
    for (uint32_t row = 0; row < rows(); ++row) {
      uint64_t address = map.address;
      bool inside = true;
      for (uint32_t d = 1, rest = row; d < map.rank; ++d) {
        const int64_t c = at[d] + static_cast<int64_t>(rest % map.box[d]);
        rest /= map.box[d];
        inside = inside && c >= 0 && c < static_cast<int64_t>(map.dims[d]);
        address += static_cast<uint64_t>(c) * map.strides[d - 1];
      }
      const int64_t first = std::max<int64_t>(at[0], 0);
      const int64_t last = std::min<int64_t>(at[0] + static_cast<int64_t>(map.box[0]), map.dims[0]);
      if (!inside || last <= first) continue;
      const uint32_t skipped = static_cast<uint32_t>(first - at[0]) * map.element_bytes;
      f(row * row_bytes() + skipped, address + static_cast<uint64_t>(first) * map.element_bytes,
        static_cast<uint32_t>(last - first) * map.element_bytes);
    }
  }
};

// [%rd1, {%r1, %r2}]
struct TensorAddress {
  Operand base;
  std::vector<Operand> coordinates;
  explicit TensorAddress(const Operand& o) {
    if (o.kind != Kind::kMemory || o.parts.size() != 2) throw Fault("no tensor: " + o.text);
    base = o.parts[0];
    coordinates = o.parts[1].kind == Kind::kVector ? o.parts[1].parts
                                                   : std::vector<Operand>{o.parts[1]};
  }
  Box box(Warp& warp, int lane, uint32_t shared) const {
    Box box;
    const uint64_t address = read_any(warp, base, lane);
    uint8_t bytes[128];
    for (uint32_t at = 0; at < 128; at += 64)
      std::memcpy(bytes + at, warp.cta->machine->generic(warp, lane, address + at, 64), 64);
    std::memcpy(&box.map, bytes, sizeof box.map);
    if (box.map.magic != kMagic) throw Fault("there is no tensor map at " + hexadecimal(address));
    if (box.map.rank != coordinates.size()) throw Fault("coordinates and the map's rank differ");
    for (size_t d = 0; d < coordinates.size(); ++d)
      box.at[d] = static_cast<int32_t>(read_any(warp, coordinates[d], lane));
    need_multiple(shared, 128, "the address");
    box.shared = shared;
    return box;
  }
};

Action tensor_load(const Op& op) {
  const Address to(op[0]), barrier(op[2]);
  const TensorAddress from(op[1]);
  return [=](Warp& warp, Mask mask) {
    each_lane(mask, [&](int l) {
      const Box box = from.box(warp, l, shared_address(to.get(warp, l)));
      const uint32_t mbar = shared_address(barrier.get(warp, l));
      Cta* cta = warp.cta;
      cta->mbarrier(mbar);
      start_load(*cta, [=] {
        std::vector<uint8_t> data(box.bytes(), 0);
        box.each_row([&](uint32_t at, uint64_t address, uint32_t bytes) {
          std::memcpy(&data[at], cta->machine->global(address, bytes), bytes);
        });
        for (uint32_t at = 0; at < box.bytes(); at += 16)
          cta->async_write(box.place(at), &data[at], 16);
        Mbarrier& done = cta->mbarrier(mbar);
        done.bytes -= box.bytes();
        done.settle();
      });
    });
    return Outcome::kDone;
  };
}

Action tensor_store(const Op& op) {
  const TensorAddress to(op[0]);
  const Address from(op[1]);
  const Reduction how = reduction_of(op);
  return [=](Warp& warp, Mask mask) {
    each_lane(mask, [&](int l) {
      const Box box = to.box(warp, l, shared_address(from.get(warp, l)));
      Cta* cta = warp.cta;
      auto data = std::make_shared<std::vector<uint8_t>>(box.bytes());
      BulkStore store;
      store.read = [=] {
        for (uint32_t at = 0; at < box.bytes(); at += 16)
          std::memcpy(&(*data)[at], cta->async_read(box.place(at), 16), 16);
      };
      store.write = [=] {
        box.each_row([&](uint32_t at, uint64_t address, uint32_t bytes) {
          put(how, box.map.type, cta->machine->global(address, bytes), &(*data)[at], bytes);
        });
      };
      start_store(warp, std::move(store));
    });
    return Outcome::kDone;
  };
}

Outcome commit(Warp& warp, Mask) {
  warp.stores.push_back(std::move(warp.open_stores));
  warp.open_stores.clear();
  return Outcome::kDone;
}

// .read: the source may be written again; else the target is written too.
Action wait(const Op& op) {
  const size_t allowed = static_cast<size_t>(op[0].value);
  const bool reads = op.has("read");
  return [=](Warp& warp, Mask) {
    if (warp.stores.size() <= allowed) return Outcome::kDone;
    const size_t count = warp.stores.size() - allowed;
    for (size_t i = 0; i < count; ++i)
      for (BulkStore& store : warp.stores[i]) {
        if (!store.is_read) store.read();
        store.is_read = true;
        if (!reads) store.write();
      }
    if (!reads) warp.stores.erase(warp.stores.begin(), warp.stores.begin() + static_cast<long>(count));
    return Outcome::kDone;
  };
}

}  // namespace

Action make_bulk_copy(const Op& op) {
  const std::string& last = op.parts.back();
  if (last == "commit_group") return commit;
  if (op.has("wait_group")) return wait(op);
  if (op.has("prefetch")) return [](Warp&, Mask) { return Outcome::kDone; };
  for (size_t i = 1; i < op.parts.size(); ++i) {
    bool found = op.parts[i].rfind("L2::", 0) == 0 || type_number(op.parts[i]) != 0;
    for (const char* known : {"async", "reduce", "bulk", "tensor", "1d", "2d", "3d", "4d", "5d",
                              "tile", "shared::cta", "shared::cluster", "global",
                              "mbarrier::complete_tx::bytes", "bulk_group", "add", "min", "max",
                              "noftz"})
      found = found || op.parts[i] == known;
    if (!found) return nullptr;
  }
  const bool is_tensor = op.has("tensor");
  if (op.has("bulk_group")) return is_tensor ? tensor_store(op) : line_store(op);
  if (!op.has("mbarrier::complete_tx::bytes") || !op.has("global")) return nullptr;
  return is_tensor ? tensor_load(op) : line_load(op);
}

}  // namespace ptx
