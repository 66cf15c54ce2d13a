// cp.async: copies of 4, 8 or 16 bytes a lane, which are there when their group is waited for.
#include <cstring>

#include "memory.hpp"

namespace ptx {
namespace {

void finish(Warp& warp, size_t allowed) {
  while (warp.copies.size() > allowed) {
    for (const Job& job : warp.copies.front()) job();
    warp.copies.pop_front();
  }
}

Outcome commit(Warp& warp, Mask) {
  warp.copies.push_back(std::move(warp.open_copies));
  warp.open_copies.clear();
  return Outcome::kDone;
}

Action wait(const Op& op, bool all) {
  const size_t allowed = all ? 0 : static_cast<size_t>(op[0].value);
  return [=](Warp& warp, Mask mask) {
    if (all) commit(warp, mask);
    finish(warp, allowed);
    return Outcome::kDone;
  };
}

// The arrival at an mbarrier follows the copies that the warp has issued so far.
Action arrive(const Op& op) {
  const Address address(op[0]);
  const bool counted = op.has("noinc");  // in the barrier's own count
  return [=](Warp& warp, Mask mask) {
    std::vector<uint32_t> at;
    each_lane(mask, [&](int l) { at.push_back(shared_address(address.get(warp, l))); });
    Cta* cta = warp.cta;
    for (uint32_t a : at)
      if (!counted) ++cta->mbarrier(a).pending;
    std::vector<Job> before;
    for (auto& group : warp.copies) {
      before.insert(before.end(), group.begin(), group.end());
      group.clear();
    }
    before.insert(before.end(), warp.open_copies.begin(), warp.open_copies.end());
    warp.open_copies.clear();
    const Job job = [=] {
      for (const Job& copy : before) copy();
      for (uint32_t a : at) cta->mbarrier(a).arrive(1);
    };
    if (cta->machine->at_once())
      job();
    else
      cta->pending.push_back(job);
    return Outcome::kDone;
  };
}

// cp.async.cg.shared.global [to], [from], 16, size; what `size` leaves out becomes zero.
Action copy(const Op& op) {
  for (size_t i = 2; i < op.parts.size(); ++i) {
    const std::string& part = op.parts[i];
    if (part != "ca" && part != "cg" && part != "shared" && part != "shared::cta" &&
        part != "global" && part.rfind("L2::", 0) != 0)
      return nullptr;
  }
  const Address to(op[0]), from(op[1]);
  const uint32_t bytes = static_cast<uint32_t>(op[2].value);
  const bool has_hint = op.has("L2::cache_hint");
  const bool has_size = op.size() > (has_hint ? 4u : 3u);
  const Operand size = has_size ? op[3] : Operand();
  if (bytes != 4 && bytes != 8 && bytes != 16) return nullptr;
  if (has_size && size.width == 'p') throw Fault("ignore-src is not implemented");
  return [=](Warp& warp, Mask mask) {
    struct One {
      int lane;
      uint32_t to, size;
      uint64_t from;
    };
    std::vector<One> lanes;
    each_lane(mask, [&](int l) {
      const uint32_t n =
          has_size ? static_cast<uint32_t>(read_any(warp, size, l)) : bytes;
      if (n > bytes) throw Fault("cp.async of more bytes than its size");
      lanes.push_back({l, shared_address(to.get(warp, l)), n, from.get(warp, l)});
    });
    Warp* own = &warp;
    const Job job = [=] {
      for (const One& one : lanes) {
        uint8_t* out = locate(*own, one.lane, Space::kShared, one.to, bytes);
        if (one.from % bytes && one.size) throw Fault("cp.async from an address not aligned");
        if (one.size) std::memcpy(out, own->cta->machine->global(one.from, one.size), one.size);
        std::memset(out + one.size, 0, bytes - one.size);
        if (own->cta->machine->copies_need_fence)
          own->cta->wrote(one.to, bytes);
        else
          own->cta->publish(one.to, bytes);
      }
    };
    if (warp.cta->machine->at_once())
      job();
    else
      warp.open_copies.push_back(job);
    return Outcome::kDone;
  };
}

Action cp(const Op& op) {
  if (op.has("bulk")) return make_bulk_copy(op);
  if (op.parts.size() < 3 || op.parts[1] != "async") return nullptr;
  if (op.parts[2] == "commit_group") return commit;
  if (op.parts[2] == "wait_group") return wait(op, false);
  if (op.parts[2] == "wait_all") return wait(op, true);
  if (op.parts[2] == "mbarrier") return arrive(op);
  return copy(op);
}

}  // namespace

std::vector<Entry> copy_entries() { return {{"cp", cp}}; }

}  // namespace ptx
