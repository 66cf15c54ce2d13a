// What lanes of a warp do together, and instructions that change nothing this machine models.
#include <algorithm>
#include <type_traits>

#include "memory.hpp"

namespace ptx {

std::string lane_list(Mask mask) {
  std::string text;
  for (int l = 0; l < kLanes; ++l)
    if (mask >> l & 1) text += (text.empty() ? "" : ",") + std::to_string(l);
  return text;
}

namespace {

constexpr uint32_t kUndefined = ~0u;  // what a lane gets from one that takes no part

// The member mask, which is the same for all lanes that come together.
Mask members(Warp& warp, Mask here, const Operand& o) {
  const int lane = __builtin_ctz(here);
  const Mask mask = static_cast<Mask>(read_any(warp, o, lane));
  if (!(mask >> lane & 1)) throw Fault("lane " + std::to_string(lane) + " is not in its own mask");
  return mask;
}

Action shfl(const Op& op) {
  if (op.parts.size() != 4 || op.parts[1] != "sync" || op.type() != "b32") return nullptr;
  const std::string mode = op.parts[2];
  if (mode != "up" && mode != "down" && mode != "bfly" && mode != "idx") return nullptr;
  const bool is_pair = op[0].kind == Kind::kPair;
  const Target<uint32_t> d(is_pair ? op[0].parts[0] : op[0]);
  const PredicateTarget valid = is_pair ? PredicateTarget(op[0].parts[1]) : PredicateTarget();
  const Source<uint32_t> a(op[1]), b(op[2]), c(op[3]);
  const Operand mask_operand = op[4];
  return [=](Warp& warp, Mask mask) {
    const Mask needed = members(warp, mask, mask_operand);
    if (misses(warp, mask, needed)) return Outcome::kWait;
    uint32_t in[kLanes], out[kLanes];
    std::copy_n(a.at(warp), kLanes, in);
    Mask in_range = 0;
    each_lane(mask, [&](int lane) {
      const int by = static_cast<int>(b.get(warp, lane) & 31);
      const int clamp = static_cast<int>(c.get(warp, lane) & 31);
      const int segment = static_cast<int>(c.get(warp, lane) >> 8 & 31);
      const int most = (lane & segment) | (clamp & ~segment), least = lane & segment;
      int source = lane;
      bool inside = false;
      if (mode == "up") source = lane - by, inside = source >= most;
      if (mode == "down") source = lane + by, inside = source <= most;
      if (mode == "bfly") source = lane ^ by, inside = source <= most;
      if (mode == "idx") source = least | (by & ~segment), inside = source <= most;
      if (!inside) source = lane;
      in_range |= Mask{inside} << lane;
      out[lane] = mask >> source & 1 ? in[source] : kUndefined;
    });
    each_lane(mask, [&](int lane) { d.set(warp, lane, out[lane]); });
    valid.set(warp, mask, in_range);
    return Outcome::kDone;
  };
}

Action vote(const Op& op) {
  if (op.parts.size() != 4 || op.parts[1] != "sync") return nullptr;
  const std::string mode = op.parts[2];
  const bool is_ballot = mode == "ballot" && op.type() == "b32";
  if (!is_ballot && (op.type() != "pred" || (mode != "all" && mode != "any" && mode != "uni")))
    return nullptr;
  const Condition a(op[1]);
  const Operand mask_operand = op[2], to = op[0];
  return [=](Warp& warp, Mask mask) {
    const Mask needed = members(warp, mask, mask_operand);
    if (misses(warp, mask, needed)) return Outcome::kWait;
    const Mask voters = needed & mask, votes = a.get(warp) & voters;
    if (is_ballot) {
      const Target<uint32_t> d(to);
      each_lane(mask, [&](int l) { d.set(warp, l, votes); });
      return Outcome::kDone;
    }
    bool result = mode == "any" ? votes != 0 : votes == voters;
    if (mode == "uni") result = votes == voters || votes == 0;
    PredicateTarget(to).set(warp, mask, result ? kAll : 0);
    return Outcome::kDone;
  };
}

Action match(const Op& op) {
  if (op.parts.size() != 4 || op.parts[2] != "sync") return nullptr;
  const bool all = op.parts[1] == "all";
  const bool is_pair = op[0].kind == Kind::kPair;
  const Target<uint32_t> d(is_pair ? op[0].parts[0] : op[0]);
  const PredicateTarget p = is_pair ? PredicateTarget(op[0].parts[1]) : PredicateTarget();
  const Operand a = op[1], mask_operand = op[2];
  return [=](Warp& warp, Mask mask) {
    const Mask needed = members(warp, mask, mask_operand);
    if (misses(warp, mask, needed)) return Outcome::kWait;
    Mask equal[kLanes] = {};
    each_lane(mask, [&](int l) {
      each_lane(mask & needed, [&](int k) {
        equal[l] |= Mask{read_any(warp, a, l) == read_any(warp, a, k)} << k;
      });
    });
    each_lane(mask, [&](int l) {
      const Mask result = !all || equal[l] == (mask & needed) ? equal[l] : 0;
      d.set(warp, l, result);
      p.set(warp, 1u << l, result ? kAll : 0);
    });
    return Outcome::kDone;
  };
}

Action activemask(const Op& op) {
  const Target<uint32_t> d(op[0]);
  return [=](Warp& warp, Mask mask) {
    each_lane(mask, [&](int l) { d.set(warp, l, mask); });
    return Outcome::kDone;
  };
}

template <class T>
Action reduce(const Op& op) {
  const std::string how = op.parts[2];
  const Target<T> d(op[0]);
  const Source<T> a(op[1]);
  const Operand mask_operand = op[2];
  return [=](Warp& warp, Mask mask) {
    const Mask needed = members(warp, mask, mask_operand);
    if (misses(warp, mask, needed)) return Outcome::kWait;
    T result = a.get(warp, __builtin_ctz(mask));
    each_lane(mask & needed & (mask - 1), [&](int l) {
      const T x = a.get(warp, l);
      using U = std::make_unsigned_t<T>;
      if (how == "add") result = static_cast<T>(static_cast<U>(result) + static_cast<U>(x));
      if (how == "min") result = std::min(result, x);
      if (how == "max") result = std::max(result, x);
      if (how == "and") result &= x;
      if (how == "or") result |= x;
      if (how == "xor") result ^= x;
    });
    each_lane(mask, [&](int l) { d.set(warp, l, result); });
    return Outcome::kDone;
  };
}

Action redux(const Op& op) {
  if (op.parts.size() != 4 || op.parts[1] != "sync") return nullptr;
  if (op.type() == "s32") return reduce<int32_t>(op);
  return op.type() == "u32" || op.type() == "b32" ? reduce<uint32_t>(op) : nullptr;
}

// The first lane of the mask is elected.
Action elect(const Op& op) {
  if (op.parts.size() != 2 || op.parts[1] != "sync" || op[0].kind != Kind::kPair) return nullptr;
  const Target<uint32_t> d(op[0].parts[0]);
  const PredicateTarget p(op[0].parts[1]);
  const Operand mask_operand = op[1];
  return [=](Warp& warp, Mask mask) {
    const Mask needed = members(warp, mask, mask_operand);
    if (misses(warp, mask, needed)) return Outcome::kWait;
    const uint32_t leader = static_cast<uint32_t>(__builtin_ctz(mask & needed));
    each_lane(mask, [&](int l) { d.set(warp, l, leader); });
    p.set(warp, mask, 1u << leader);
    return Outcome::kDone;
  };
}

Outcome nothing(Warp&, Mask) { return Outcome::kDone; }

Action without_effect(const Op&) { return nothing; }

// fence.proxy.async shows threads' writes to shared memory to wgmma and bulk copies.
Action fence(const Op& op) {
  const bool shows = op.parts.size() >= 3 && op.parts[1] == "proxy" && op.parts[2] == "async";
  if (!shows) return nothing;
  return [](Warp& warp, Mask) {
    warp.cta->fence();
    return Outcome::kDone;
  };
}

Action nanosleep(const Op&) {
  return [](Warp&, Mask) { return Outcome::kYield; };
}

Action trap(const Op&) {
  return [](Warp&, Mask) -> Outcome { throw Fault("the kernel trapped"); };
}

Action setmaxnreg(const Op& op) {
  if (!op.only({"inc", "dec", "sync", "aligned"})) return nullptr;
  const uint64_t count = op[0].value;
  if (count < 24 || count > 256 || count % 8) throw Fault("registers must be 24 to 256, by eights");
  return nothing;
}

// Without clusters every address is the CTA's own, of rank 0.
Action mapa(const Op& op) {
  if (op.type() == "u64")
    return unary<uint64_t, uint64_t>(op[0], op[1], [](uint64_t x) { return x; });
  return unary<uint32_t, uint32_t>(op[0], op[1], [](uint32_t x) { return x; });
}

Action getctarank(const Op& op) {
  const Target<uint32_t> d(op[0]);
  return [=](Warp& warp, Mask mask) {
    each_lane(mask, [&](int l) { d.set(warp, l, 0); });
    return Outcome::kDone;
  };
}

Action createpolicy(const Op& op) {
  const Target<uint64_t> d(op[0]);
  return [=](Warp& warp, Mask mask) {
    each_lane(mask, [&](int l) { d.set(warp, l, 0); });
    return Outcome::kDone;
  };
}

}  // namespace

std::vector<Entry> warp_entries() {
  return {{"shfl", shfl},
          {"vote", vote},
          {"match", match},
          {"activemask", activemask},
          {"redux", redux},
          {"elect", elect},
          {"fence", fence},
          {"membar", without_effect},
          {"griddepcontrol", without_effect},
          {"prefetch", without_effect},
          {"prefetchu", without_effect},
          {"discard", without_effect},
          {"applypriority", without_effect},
          {"pmevent", without_effect},
          {"nanosleep", nanosleep},
          {"trap", trap},
          {"setmaxnreg", setmaxnreg},
          {"mapa", mapa},
          {"getctarank", getctarank},
          {"createpolicy", createpolicy}};
}

}  // namespace ptx
