// Named barriers and mbarriers.
#include "memory.hpp"

namespace ptx {

Mbarrier& Cta::mbarrier(uint32_t address) {
  const auto found = mbarriers.find(address);
  if (found == mbarriers.end())
    throw Fault("there is no mbarrier at " + hexadecimal(address) + " of shared memory");
  return found->second;
}

void Mbarrier::arrive(uint32_t arrivals) {
  if (arrivals > pending)
    throw Fault("more arrivals at an mbarrier than the " + std::to_string(count) + " it is for");
  pending -= arrivals;
  settle();
}

void Cta::settle(NamedBarrier& barrier) {
  const uint32_t expected = barrier.expected ? barrier.expected : kLanes * live_warps();
  if (!barrier.arrived || barrier.arrived < expected) return;
  ++barrier.phase;
  barrier.result = barrier.votes;
  barrier.voters = barrier.arrived;
  barrier.arrived = barrier.votes = 0;
}

namespace {

// Counts the warp in. expected: threads; 0 for all that live.
void arrive(Warp& warp, uint32_t id, uint32_t expected, uint32_t votes) {
  if (id > 15) throw Fault("there is no barrier " + std::to_string(id));
  if (expected % kLanes) throw Fault("a barrier's threads must be whole warps");
  Cta& cta = *warp.cta;
  NamedBarrier& barrier = cta.barriers[id];
  const uint32_t all = kLanes * cta.live_warps();
  const auto threads = [all](uint32_t count) { return count ? count : all; };
  if (barrier.arrived && threads(barrier.expected) != threads(expected))
    throw Fault("barrier " + std::to_string(id) + " is for " +
                std::to_string(threads(barrier.expected)) + " threads to some warps and for " +
                std::to_string(threads(expected)) + " to this one");
  barrier.expected = expected;
  barrier.arrived += kLanes;
  barrier.votes += votes;
  if (barrier.arrived > threads(expected))
    throw Fault("more threads at barrier " + std::to_string(id) + " than it is for");
  cta.settle(barrier);
}

// Arrives once, and is not done before the others have.
Outcome join(Warp& warp, uint32_t id, uint32_t expected, uint32_t votes) {
  if (warp.barrier < 0) {
    const uint64_t phase = id < 16 ? warp.cta->barriers[id].phase : 0;
    arrive(warp, id, expected, votes);
    warp.barrier = static_cast<int>(id);
    warp.barrier_phase = phase;
  }
  if (warp.cta->barriers[warp.barrier].phase == warp.barrier_phase) return Outcome::kWait;
  warp.barrier = -1;
  return Outcome::kDone;
}

struct Place {
  Operand id, threads;
  Place(const Op& op, size_t first) {
    id = op[first];
    if (op.size() > first + 1) threads = op[first + 1];
  }
  uint32_t number(Warp& warp, Mask mask) const {
    return static_cast<uint32_t>(read_any(warp, id, __builtin_ctz(mask)));
  }
  uint32_t count(Warp& warp, Mask mask) const {
    if (threads.kind == Kind::kSink) return 0;
    return static_cast<uint32_t>(read_any(warp, threads, __builtin_ctz(mask)));
  }
};

// barrier.red: how many predicates hold, or whether any or all do.
Action reducing(const Op& op) {
  const bool counts = op.type() == "u32", any = op.has("or");
  const Operand to = op[0];
  Op places = op;
  places.operands.pop_back();
  const Place place(places, 1);
  const Condition a(op.operands.back());
  return [=](Warp& warp, Mask mask) {
    if (misses(warp, mask, kAll)) return Outcome::kWait;
    const uint32_t votes = static_cast<uint32_t>(__builtin_popcount(a.get(warp) & mask));
    const uint32_t id = place.number(warp, mask);
    if (join(warp, id, place.count(warp, mask), votes) == Outcome::kWait) return Outcome::kWait;
    const NamedBarrier& barrier = warp.cta->barriers[id];
    if (counts) {
      const Target<uint32_t> d(to);
      each_lane(mask, [&](int l) { d.set(warp, l, barrier.result); });
    } else {
      const bool holds = any ? barrier.result > 0 : barrier.result == barrier.voters;
      PredicateTarget(to).set(warp, mask, holds ? kAll : 0);
    }
    return Outcome::kDone;
  };
}

Action whole_warp(const Op& op) {
  const Operand members = op[0];
  return [=](Warp& warp, Mask mask) {
    const Mask needed = static_cast<Mask>(read_any(warp, members, __builtin_ctz(mask)));
    return misses(warp, mask, needed) ? Outcome::kWait : Outcome::kDone;
  };
}

Action barrier(const Op& op) {
  if (op.has("warp")) return whole_warp(op);
  // A CTA that is a cluster of its own: its threads meet, and nobody else.
  if (op.has("cluster")) {
    if (op.has("arrive")) return [](Warp&, Mask) { return Outcome::kDone; };
    return nullptr;
  }
  if (!op.only({"cta", "sync", "arrive", "red", "aligned", "popc", "and", "or"}, false) &&
      !op.has("red"))
    return nullptr;
  if (op.has("red")) return reducing(op);
  const Place place(op, 0);
  if (op.has("arrive"))
    return [=](Warp& warp, Mask mask) {
      if (misses(warp, mask, kAll)) return Outcome::kWait;
      const uint32_t count = place.count(warp, mask);
      if (!count) throw Fault("bar.arrive needs the number of threads");
      arrive(warp, place.number(warp, mask), count, 0);
      return Outcome::kDone;
    };
  if (!op.has("sync")) return nullptr;
  return [=](Warp& warp, Mask mask) {
    if (misses(warp, mask, kAll)) return Outcome::kWait;
    return join(warp, place.number(warp, mask), place.count(warp, mask), 0);
  };
}

template <class F>
Action on_mbarrier(const Operand& place, F f) {
  const Address address(place);
  return [=](Warp& warp, Mask mask) {
    each_lane(mask, [&](int l) {
      const uint32_t at = shared_address(address.get(warp, l));
      warp.cta->reach(at, 8);
      if (at % 8) throw Fault("an mbarrier's address is not a multiple of 8");
      f(warp, l, at);
    });
    return Outcome::kDone;
  };
}

Action mbarrier_init(const Op& op) {
  const Operand count = op[1];
  return on_mbarrier(op[0], [=](Warp& warp, int l, uint32_t at) {
    Mbarrier fresh;
    fresh.count = fresh.pending = static_cast<uint32_t>(read_any(warp, count, l));
    if (!fresh.count) throw Fault("an mbarrier for no arrivals");
    warp.cta->mbarriers[at] = fresh;
  });
}

Action mbarrier_inval(const Op& op) {
  return on_mbarrier(op[0], [](Warp& warp, int, uint32_t at) {
    warp.cta->mbarrier(at);
    warp.cta->mbarriers.erase(at);
  });
}

// arrive and arrive_drop, with bytes to expect or a number of arrivals.
Action mbarrier_arrive(const Op& op) {
  if (op.has("noComplete")) return nullptr;
  const bool drops = op.has("arrive_drop"), expects = op.has("expect_tx");
  const bool has_state = op[0].kind != Kind::kMemory;
  const size_t first = has_state ? 1 : 0;
  const Operand to = has_state ? op[0] : Operand();
  const Operand number = op.size() > first + 1 ? op[first + 1] : Operand();
  return on_mbarrier(op[first], [=](Warp& warp, int l, uint32_t at) {
    Mbarrier& barrier = warp.cta->mbarrier(at);
    const uint64_t state = barrier.phase;
    uint32_t arrivals = 1;
    if (number.kind != Kind::kSink) {
      const uint32_t value = static_cast<uint32_t>(read_any(warp, number, l));
      if (expects)
        barrier.bytes += value;
      else
        arrivals = value;
    }
    if (drops) --barrier.count;
    barrier.arrive(arrivals);
    if (to.kind == Kind::kRegister) warp.lanes<uint64_t>(to.offset)[l] = state;
  });
}

Action mbarrier_bytes(const Op& op, int sign) {
  const Operand number = op[1];
  return on_mbarrier(op[0], [=](Warp& warp, int l, uint32_t at) {
    Mbarrier& barrier = warp.cta->mbarrier(at);
    barrier.bytes += sign * static_cast<int64_t>(read_any(warp, number, l) & 0xffffffffu);
    if (sign < 0) barrier.settle();
  });
}

// test_wait and try_wait: whether a phase is over, given by its parity or by an arrival's state.
Action mbarrier_wait(const Op& op) {
  const PredicateTarget d(op[0]);
  const Address address(op[1]);
  const Operand given = op[2];
  const bool by_parity = op.has("parity");
  return [=](Warp& warp, Mask mask) {
    Mask over = 0;
    each_lane(mask, [&](int l) {
      const Mbarrier& barrier = warp.cta->mbarrier(shared_address(address.get(warp, l)));
      const uint64_t value = read_any(warp, given, l);
      if (by_parity && value > 1) throw Fault("a parity is 0 or 1, not " + std::to_string(value));
      const bool done = by_parity ? (barrier.phase & 1) != value : barrier.phase != value;
      over |= Mask{done} << l;
    });
    d.set(warp, mask, over);
    return over == mask ? Outcome::kDone : Outcome::kYield;
  };
}

Action mbarrier(const Op& op) {
  if (!op.only({"init", "inval", "arrive", "arrive_drop", "expect_tx", "complete_tx", "noComplete",
                "test_wait", "try_wait", "parity", "shared", "shared::cta", "shared::cluster",
                "acquire", "release", "relaxed", "cta", "cluster"}) ||
      op.type() != "b64")
    return nullptr;
  const std::string& what = op.parts[1];
  if (what == "init") return mbarrier_init(op);
  if (what == "inval") return mbarrier_inval(op);
  if (what == "arrive" || what == "arrive_drop") return mbarrier_arrive(op);
  if (what == "expect_tx") return mbarrier_bytes(op, 1);
  if (what == "complete_tx") return mbarrier_bytes(op, -1);
  return what == "test_wait" || what == "try_wait" ? mbarrier_wait(op) : nullptr;
}

}  // namespace

std::vector<Entry> barrier_entries() {
  return {{"bar", barrier}, {"barrier", barrier}, {"mbarrier", mbarrier}};
}

}  // namespace ptx
