// Runs the CTAs of a launch: warps take turns in a drawn order, for a drawn number of instructions.
#include <algorithm>
#include <cstring>

#include "decode.hpp"

namespace ptx {

namespace {

constexpr uint32_t kLongestTurn = 256;
constexpr uint32_t kSteadyRounds = 16, kLongestDelay = 15;
// A turn of so few instructions that ends at the poll where it began has found nothing to do.
constexpr uint32_t kIdleTurn = 32;

struct Special {
  const char* name;
  uint32_t (*value)(const Warp& warp, int lane);
};

uint32_t thread_of(const Warp& warp, int lane) {
  return static_cast<uint32_t>(warp.index * kLanes + lane);
}

const Machine& machine_of(const Warp& warp) { return *warp.cta->machine; }

const Special kSpecials[] = {
    {"%tid.x", [](const Warp& w, int l) { return thread_of(w, l) % machine_of(w).block[0]; }},
    {"%tid.y",
     [](const Warp& w, int l) {
       return thread_of(w, l) / machine_of(w).block[0] % machine_of(w).block[1];
     }},
    {"%tid.z",
     [](const Warp& w, int l) {
       return thread_of(w, l) / machine_of(w).block[0] / machine_of(w).block[1];
     }},
    {"%ntid.x", [](const Warp& w, int) { return machine_of(w).block[0]; }},
    {"%ntid.y", [](const Warp& w, int) { return machine_of(w).block[1]; }},
    {"%ntid.z", [](const Warp& w, int) { return machine_of(w).block[2]; }},
    {"%ctaid.x", [](const Warp& w, int) { return w.cta->index[0]; }},
    {"%ctaid.y", [](const Warp& w, int) { return w.cta->index[1]; }},
    {"%ctaid.z", [](const Warp& w, int) { return w.cta->index[2]; }},
    {"%nctaid.x", [](const Warp& w, int) { return machine_of(w).grid[0]; }},
    {"%nctaid.y", [](const Warp& w, int) { return machine_of(w).grid[1]; }},
    {"%nctaid.z", [](const Warp& w, int) { return machine_of(w).grid[2]; }},
    {"%laneid", [](const Warp&, int l) { return static_cast<uint32_t>(l); }},
    {"%warpid", [](const Warp& w, int) { return static_cast<uint32_t>(w.index); }},
    {"%nwarpid", [](const Warp& w, int) { return static_cast<uint32_t>(w.cta->warps.size()); }},
    {"%lanemask_eq", [](const Warp&, int l) { return 1u << l; }},
    {"%lanemask_lt", [](const Warp&, int l) { return (1u << l) - 1; }},
    {"%lanemask_le", [](const Warp&, int l) { return l == 31 ? kAll : (2u << l) - 1; }},
    {"%lanemask_gt", [](const Warp&, int l) { return l == 31 ? 0 : ~((2u << l) - 1); }},
    {"%lanemask_ge", [](const Warp&, int l) { return ~((1u << l) - 1); }},
    {"%dynamic_smem_size", [](const Warp& w, int) { return machine_of(w).dynamic_bytes; }},
    {"%total_smem_size", [](const Warp& w, int) { return machine_of(w).shared_bytes; }},
    {"%smid", [](const Warp&, int) { return 0u; }},
    {"%nsmid", [](const Warp&, int) { return 1u; }},
    {"%cluster_ctarank", [](const Warp&, int) { return 0u; }},
    {"%cluster_nctarank", [](const Warp&, int) { return 1u; }},
};

void set_specials(Warp& warp) {
  for (const auto& [name, offset] : machine_of(warp).program->specials) {
    const auto* known = std::find_if(std::begin(kSpecials), std::end(kSpecials),
                                     [&](const Special& s) { return name == s.name; });
    if (known == std::end(kSpecials)) throw Fault("not implemented: the register " + name);
    for (int l = 0; l < kLanes; ++l) warp.lanes<uint32_t>(offset)[l] = known->value(warp, l);
  }
}

// The next place where other lanes of the warp are; -1 if others that can go on are behind.
int next_group(const std::vector<Group>& groups, size_t current, int pc) {
  int limit = INT32_MAX;
  for (size_t i = 0; i < groups.size(); ++i) {
    if (i == current) continue;
    if (groups[i].pc >= pc)
      limit = std::min(limit, groups[i].pc);
    else if (!groups[i].stalled)
      return -1;
  }
  return limit;
}

void check_products(const Warp& warp, const Instruction& instruction) {
  for (uint32_t offset : instruction.registers)
    if (warp.flight[offset / 128])
      throw Fault("a register is used that a wgmma still in flight reads or writes");
}

}  // namespace

bool Cta::is_done() const {
  return std::none_of(warps.begin(), warps.end(), [](const auto& w) { return w->alive; });
}

uint32_t Cta::live_warps() const {
  uint32_t count = 0;
  for (const auto& warp : warps) count += warp->alive != 0;
  return count;
}

std::unique_ptr<Cta> Machine::admit(uint32_t number) {
  auto cta = std::make_unique<Cta>();
  cta->machine = this;
  cta->index[0] = number % grid[0];
  cta->index[1] = number / grid[0] % grid[1];
  cta->index[2] = number / grid[0] / grid[1];
  cta->shared.assign(kSharedBase + shared_bytes, 0xff);
  if (program->uses_async_proxy) {
    cta->async_shared = cta->shared;
    cta->unfenced.assign(cta->shared.size(), 0);
  }
  const uint32_t threads = block[0] * block[1] * block[2];
  for (uint32_t first = 0; first < threads; first += kLanes) {
    auto warp = std::make_unique<Warp>();
    warp->cta = cta.get();
    warp->index = static_cast<int>(first / kLanes);
    warp->alive = threads - first >= kLanes ? kAll : (1u << (threads - first)) - 1;
    warp->registers.assign(program->register_bytes, 0xff);
    warp->predicates.assign(program->predicate_bytes, 0xff);
    warp->local.assign(program->local_bytes * kLanes, 0xff);
    warp->constants = program->constants.data();
    warp->flight.assign(program->register_bytes / 128 + 1, 0);
    warp->groups.push_back({0, warp->alive, false});
    cta->warps.push_back(std::move(warp));
  }
  for (auto& warp : cta->warps) set_specials(*warp);
  return cta;
}

// Lanes part at a branch; lanes at the lowest place go on, and join those they come to.
void Machine::turn(Warp& warp) {
  uint32_t budget = 1 + draw(kLongestTurn), done = 0;
  const int began = warp.at;
  for (Group& group : warp.groups) group.stalled = false;
  bool failed = false;  // a poll brought nothing
  while (budget && !warp.groups.empty()) {
    size_t current = warp.groups.size();
    for (size_t i = 0; i < warp.groups.size(); ++i)
      if (!warp.groups[i].stalled &&
          (current == warp.groups.size() || warp.groups[i].pc < warp.groups[current].pc))
        current = i;
    if (current == warp.groups.size()) break;  // all wait
    int pc = warp.groups[current].pc;
    Mask mask = warp.groups[current].mask;
    int limit = next_group(warp.groups, current, pc);
    bool present = true;  // the group still exists
    while (budget) {
      if (pc >= limit) {
        if (pc > limit) break;
        for (size_t i = 0; i < warp.groups.size(); ++i)
          if (i != current && warp.groups[i].pc == pc) {
            mask |= warp.groups[i].mask;
            warp.groups.erase(warp.groups.begin() + static_cast<long>(i));
            if (i < current) --current;
            break;
          }
        limit = next_group(warp.groups, current, pc);
        continue;
      }
      const Instruction& instruction = program->instructions[static_cast<size_t>(pc)];
      warp.at = pc;
      Mask active = mask;
      if (instruction.guard >= 0) {
        const Mask guard = warp.predicate(static_cast<uint32_t>(instruction.guard));
        active &= instruction.negated ? ~guard : guard;
      }
      --budget;
      ++done;
      if (!active) {
        ++pc;
        continue;
      }
      ++instruction.count;
      if (instruction.flow == Flow::kNone) {
        if (warp.products.in_flight && !instruction.is_matrix_async)
          check_products(warp, instruction);
        const Outcome outcome = instruction.run(warp, active);
        if (outcome == Outcome::kWait) {
          --instruction.count;
          --done;
          break;
        }
        ++pc;
        if (outcome == Outcome::kYield) {
          failed = true;
          break;
        }
        continue;
      }
      if (instruction.flow == Flow::kExit) {
        warp.alive &= ~active;
        mask &= ~active;
        if (!mask) {
          warp.groups.erase(warp.groups.begin() + static_cast<long>(current));
          present = false;
          break;
        }
        ++pc;
        continue;
      }
      int target = instruction.target;
      if (instruction.flow == Flow::kTable) {
        // Lanes with another selector than the first take the same instruction again.
        const uint32_t* lanes = warp.lanes<uint32_t>(instruction.selector);
        const uint32_t selected = lanes[__builtin_ctz(active)];
        if (selected >= instruction.targets.size()) throw Fault("a branch outside of its table");
        target = instruction.targets[selected];
        Mask same = 0;
        each_lane(active, [&](int l) { same |= Mask{lanes[l] == selected} << l; });
        active = same;
        if (mask != active) {
          warp.groups.push_back({target, active, false});
          mask &= ~active;
          limit = next_group(warp.groups, current, pc);
          continue;
        }
      } else if (active != mask) {
        warp.groups.push_back({target, active, false});
        mask &= ~active;
        ++pc;
        limit = next_group(warp.groups, current, pc);
        continue;
      }
      pc = target;
      if (warp.groups.size() > 1) limit = next_group(warp.groups, current, pc);
    }
    if (!present) continue;
    Group& group = warp.groups[current];
    const bool waits = budget && !(pc > limit);
    group = {pc, mask, waits};
  }
  steps += done;
  warp.idle = done == 0 || (failed && done <= kIdleTurn && warp.at == began);
}

// One bulk copy of any CTA arrives.
bool Machine::finish_one(std::vector<std::unique_ptr<Cta>>& ctas) {
  std::vector<Cta*> waiting;
  for (auto& cta : ctas)
    if (!cta->pending.empty()) waiting.push_back(cta.get());
  if (waiting.empty()) return false;
  Cta& cta = *waiting[draw(static_cast<uint32_t>(waiting.size()))];
  const size_t index = draw(static_cast<uint32_t>(cta.pending.size()));
  const Job job = std::move(cta.pending[index]);
  cta.pending.erase(cta.pending.begin() + static_cast<long>(index));
  job();
  return true;
}

void Machine::deadlock(const std::vector<std::unique_ptr<Cta>>& ctas) {
  std::string text = "deadlock:";
  int shown = 0;
  for (const auto& cta : ctas)
    for (const auto& warp : cta->warps)
      for (const Group& group : warp->groups) {
        if (++shown > 40) continue;
        text += "\n  CTA " + std::to_string(cta->index[0]) + "," + std::to_string(cta->index[1]) +
                "," + std::to_string(cta->index[2]) + " warp " + std::to_string(warp->index) +
                (group.mask == kAll ? "" : " lanes " + lane_list(group.mask)) + ": " +
                program->instructions[static_cast<size_t>(group.pc)].text;
      }
  throw Fault(text);
}

namespace {

// What a CTA leaves undone when its threads have exited.
void settle_exit(Cta& cta) {
  if (!cta.pending.empty())
    throw Fault("the CTA exits with " + std::to_string(cta.pending.size()) +
                " bulk copies into its shared memory in flight");
  for (auto& warp : cta.warps) {
    if (warp->products.in_flight) throw Fault("a warp exits with a wgmma in flight");
    bool unread = !warp->open_stores.empty();
    for (auto& group : warp->stores)
      for (BulkStore& store : group) unread = unread || !store.is_read;
    if (unread) throw Fault("a warp exits before its bulk stores have read shared memory");
    for (auto& group : warp->stores)
      for (BulkStore& store : group) store.write();
    warp->stores.clear();
  }
}

std::string place(const Cta& cta, const Warp& warp, const Program& program) {
  const auto at = static_cast<size_t>(warp.at);
  return " (CTA " + std::to_string(cta.index[0]) + "," + std::to_string(cta.index[1]) + "," +
         std::to_string(cta.index[2]) + ", warp " + std::to_string(warp.index) + ")\n  at " +
         (at < program.instructions.size() ? program.instructions[at].text.substr(0, 200) : "");
}

}  // namespace

void Machine::run() {
  const uint32_t total = grid[0] * grid[1] * grid[2];
  std::vector<uint32_t> order(total);
  for (uint32_t i = 0; i < total; ++i) order[i] = i;
  if (!in_order)
    for (uint32_t i = total; i > 1; --i) std::swap(order[i - 1], order[draw(i)]);
  std::vector<std::unique_ptr<Cta>> ctas;
  uint32_t next = 0, rounds = 0, idle_rounds = 0;
  while (next < total || !ctas.empty()) {
    while (next < total && ctas.size() < residents) ctas.push_back(admit(order[next++]));
    std::vector<Warp*> warps;
    for (auto& cta : ctas)
      for (auto& warp : cta->warps)
        if (warp->alive) warps.push_back(warp.get());
    bool moved = false;
    for (size_t i = warps.size(); i > 1; --i)
      std::swap(warps[i - 1], warps[draw(static_cast<uint32_t>(i))]);
    for (Warp* warp : warps) {
      // Now and then a warp falls behind the others, for a while.
      if (draw(kSteadyRounds) == 0) warp->delay = draw(4) ? 0 : 1 + draw(kLongestDelay);
      if (warp->delay && !idle_rounds && draw(warp->delay + 1)) {
        moved = moved || !warp->idle;
        continue;
      }
      try {
        turn(*warp);
      } catch (const Fault& fault) {
        throw Fault(fault.what() + place(*warp->cta, *warp, *program));
      }
      moved = moved || !warp->idle;
      if (!warp->alive)
        for (NamedBarrier& barrier : warp->cta->barriers) warp->cta->settle(barrier);
    }
    for (size_t i = 0; i < ctas.size();) {
      if (ctas[i]->is_done()) {
        settle_exit(*ctas[i]);
        ctas.erase(ctas.begin() + static_cast<long>(i));
        moved = true;
      } else {
        ++i;
      }
    }
    if (steps > most_steps) throw Fault("more than " + std::to_string(most_steps) + " steps");
    // Warps that poll global memory are never idle.
    if (++rounds % 1024 == 0) {
      poll();
      finish_one(ctas);
    }
    if (completion == Completion::kRandom && draw(4) == 0) moved |= finish_one(ctas);
    // In the second idle round every warp has had its turn.
    idle_rounds = moved ? 0 : idle_rounds + 1;
    if (idle_rounds < 2 || ctas.empty()) continue;
    idle_rounds = 0;
    if (finish_one(ctas)) continue;
    if (next == total) deadlock(ctas);
    ctas.push_back(admit(order[next++]));  // what all wait for may be another CTA
  }
}

}  // namespace ptx
