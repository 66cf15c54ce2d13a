// The machine's state: what a warp, a thread block (CTA) and a launch consist of.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace ptx {

using Mask = uint32_t;  // of a warp's lanes
constexpr int kLanes = 32;
constexpr Mask kAll = ~Mask{0};

// Generic addresses: global ones are the host's own, the other state spaces have windows above.
constexpr uint64_t kSharedWindow = uint64_t{1} << 56;
constexpr uint64_t kLocalWindow = uint64_t{1} << 57;
constexpr uint64_t kParamWindow = uint64_t{1} << 58;
// The first bytes of shared memory are the system's on a GPU: a null address is none of a kernel's.
constexpr uint32_t kSharedBase = 1024;

// What the program did wrong, or what this machine cannot do.
class Fault : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// kDone: the warp goes on. kWait: the instruction is tried again later. kYield: it is done, but what
// it asked for has not happened; others run first.
enum class Outcome { kDone, kWait, kYield };

struct Warp;
struct Cta;
struct Machine;
using Action = std::function<Outcome(Warp&, Mask)>;
using Job = std::function<void()>;

enum class Flow { kNone, kBranch, kTable, kExit };

struct Instruction {
  std::string text, opcode;
  Action run;
  Flow flow = Flow::kNone;
  int guard = -1;  // offset of a predicate register
  bool negated = false;
  int target = -1;
  std::vector<int> targets;            // of a branch by a table
  uint32_t selector = 0;               // register that selects one of them
  std::vector<uint32_t> registers;     // offsets of all that it names
  bool is_matrix_async = false;        // may name registers of products in flight
  mutable uint64_t count = 0;          // warps that executed it
};

struct Program {
  std::vector<Instruction> instructions;
  std::vector<uint8_t> constants;
  size_t register_bytes = 0, predicate_bytes = 0, local_bytes = 0;
  std::vector<std::pair<std::string, uint32_t>> specials;  // %tid.x and its register, say
  bool uses_async_proxy = false;
};

// Lanes at one place of the program.
struct Group {
  int pc;
  Mask mask;
  bool stalled;
};

// The products of a warp that wgmma started, in commit groups.
struct Products {
  std::vector<Job> open;
  std::deque<std::vector<Job>> committed;
  uint64_t commits = 0, completed = 0;
  int in_flight = 0;
};

// A bulk copy to global memory: what it reads in shared memory, then what it writes.
struct BulkStore {
  Job read, write;
  bool is_read = false;
};

struct Warp {
  Cta* cta = nullptr;
  int index = 0;
  Mask alive = 0;
  std::vector<uint8_t> registers;
  std::vector<uint8_t> predicates;
  std::vector<uint8_t> local;      // of every lane, one after the other
  const uint8_t* constants = nullptr;
  Mask carry = 0;
  std::vector<Group> groups;
  int at = 0;                      // program counter of the last instruction
  bool idle = false;               // its last turn brought nothing
  uint32_t delay = 0;              // it takes one of so many turns, beside the next

  std::vector<Job> open_copies;    // cp.async not yet committed
  std::deque<std::vector<Job>> copies;
  std::vector<BulkStore> open_stores;
  std::deque<std::vector<BulkStore>> stores;
  Products products;
  std::vector<uint8_t> flight;     // products in flight that name a register, by its offset / 128

  int barrier = -1;                // the named barrier it waits at
  uint64_t barrier_phase = 0;

  template <class T>
  T* lanes(uint32_t offset) {
    return reinterpret_cast<T*>(registers.data() + offset);
  }
  Mask& predicate(uint32_t offset) { return *reinterpret_cast<Mask*>(predicates.data() + offset); }
};

// Threads that have arrived, and that it is for; 0 stands for all that live.
struct NamedBarrier {
  uint64_t phase = 0;
  uint32_t arrived = 0, expected = 0;
  uint32_t votes = 0, result = 0, voters = 0;  // of barrier.red, in this phase and the last
};

struct Mbarrier {
  uint32_t count = 0, pending = 0;
  int64_t bytes = 0;
  uint64_t phase = 0;
  void arrive(uint32_t arrivals);
  void settle() {
    if (pending == 0 && bytes == 0) {
      ++phase;
      pending = count;
    }
  }
};

struct Cta {
  Machine* machine = nullptr;
  uint32_t index[3] = {};
  std::vector<uint8_t> shared;  // as threads see it
  // As the asynchronous proxy (wgmma, bulk copies) sees it: a thread's write is there after a fence.
  std::vector<uint8_t> async_shared;
  std::vector<uint8_t> unfenced;  // by byte: written since
  bool has_unfenced = false;
  std::vector<std::unique_ptr<Warp>> warps;
  NamedBarrier barriers[16];
  std::unordered_map<uint32_t, Mbarrier> mbarriers;
  std::vector<Job> pending;  // bulk copies into shared memory

  bool is_done() const;
  uint32_t live_warps() const;
  uint8_t* reach(uint64_t address, uint32_t bytes);
  void wrote(uint64_t address, uint32_t bytes);
  void async_write(uint64_t address, const uint8_t* from, uint32_t bytes);
  const uint8_t* async_read(uint64_t address, uint32_t bytes);
  void publish(uint64_t address, uint32_t bytes);
  void fence();
  void settle(NamedBarrier& barrier);
  Mbarrier& mbarrier(uint32_t address);
};

struct Range {
  uint64_t begin, end;
};

enum class Completion { kLate, kEarly, kRandom };

struct Machine {
  Program* program = nullptr;
  uint32_t grid[3] = {1, 1, 1}, block[3] = {1, 1, 1};
  uint32_t shared_bytes = 0, dynamic_bytes = 0;
  std::vector<uint8_t> params;
  std::vector<Range> ranges;  // of global memory that a kernel may touch, ascending
  size_t last_range = 0;
  Completion completion = Completion::kLate;
  bool in_order = false;
  bool copies_need_fence = true;  // before wgmma and bulk copies see what cp.async wrote
  uint32_t residents = 1;
  uint64_t most_steps = 0, steps = 0;
  std::mt19937 random;
  Job poll;  // raises what a signal asks for

  void run();
  uint8_t* global(uint64_t address, uint64_t bytes);
  // Any generic address of a lane.
  uint8_t* generic(Warp& warp, int lane, uint64_t address, uint32_t bytes);
  uint32_t draw(uint32_t below) { return random() % below; }
  bool at_once() const { return completion == Completion::kEarly; }

 private:
  std::unique_ptr<Cta> admit(uint32_t number);
  void turn(Warp& warp);
  bool finish_one(std::vector<std::unique_ptr<Cta>>& ctas);
  [[noreturn]] void deadlock(const std::vector<std::unique_ptr<Cta>>& ctas);
};

std::string hexadecimal(uint64_t value);
std::string lane_list(Mask mask);

}  // namespace ptx
