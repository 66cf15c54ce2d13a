// CUDA for the host compiler: what a kernel without tensor-core or inline PTX instructions uses of
// the language, so that its numerics and its barriers are tested on a machine without a GPU.
//
// Blocks run one after the other. Each thread of a block is a coroutine that runs until its next
// barrier or shuffle; the block goes on when all whom that concerns have arrived. Threads take
// turns in an order that is drawn anew (from a fixed seed) for every turn, and blocks in a drawn
// order, so that a missing barrier shows as a wrong result rather than as luck. Shared memory holds
// NaN when a block starts. Threads that wait for each other in vain, because one has exited, waits
// at another barrier or is not in the shuffle's mask, are a std::runtime_error that says who waits
// where. What is not played: memory ordering between blocks, warps in lockstep, time.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
// One copy for all threads, and in a section of its own that each block finds filled with NaN.
// (Some compilers leave a template's variables out of it: those are shared, but not filled.)
#define __shared__ static __attribute__((section("emulated_shared")))
#define LORA_ENGINE_DYNAMIC_SHARED(type, name) type* name = ::emulation::dynamic_shared<type>()

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
#define LORA_ENGINE_VECTOR(type, name)                                    \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };                \
  struct alignas(4 * sizeof(type)) name##4 { type x, y, z, w; };          \
  static inline name##2 make_##name##2(type x, type y) { return {x, y}; } \
  static inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
LORA_ENGINE_VECTOR(float, float)
LORA_ENGINE_VECTOR(int, int)
LORA_ENGINE_VECTOR(unsigned, uint)
LORA_ENGINE_VECTOR(unsigned char, uchar)
#undef LORA_ENGINE_VECTOR

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace emulation {

constexpr unsigned kWarp = 32;

enum class State { kReady, kBarrier, kWarp, kExited };
enum class Shuffle { kIdx, kUp, kDown, kXor, kBallot, kSync };

struct Thread {
  ucontext_t context;
  State state = State::kReady;
  int line = 0;  // of the barrier or shuffle it waits at
  Shuffle shuffle = Shuffle::kSync;
  unsigned mask = 0, operand = 0, width = kWarp;
  uint64_t value = 0, result = 0;
};

struct Block {
  const char* kernel;
  dim3 size;
  std::function<void()> body;
  std::vector<Thread> threads;
  std::vector<std::unique_ptr<char[]>> stacks;
  std::vector<char> dynamic_shared;
  ucontext_t scheduler;
  unsigned current = 0;
};

inline Block* block = nullptr;

template <class T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(block->dynamic_shared.data());
}

inline Thread& self() { return block->threads[block->current]; }

inline void wait(State state, int line) {
  Thread& thread = self();
  thread.state = state;
  thread.line = line;
  swapcontext(&thread.context, &block->scheduler);
}

inline void barrier(int line) { wait(State::kBarrier, line); }

inline uint64_t exchange(Shuffle kind, unsigned mask, uint64_t value, unsigned operand,
                         unsigned width, int line) {
  Thread& thread = self();
  thread.shuffle = kind;
  thread.mask = mask;
  thread.value = value;
  thread.operand = operand;
  thread.width = width;
  wait(State::kWarp, line);
  return self().result;
}

template <class T>
T shuffle(Shuffle kind, unsigned mask, T value, unsigned operand, unsigned width, int line) {
  static_assert(sizeof(T) <= 8, "shuffles move up to eight bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(kind, mask, bits, operand, width, line);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline std::string describe(unsigned index) {
  const Thread& thread = block->threads[index];
  std::string text = "thread " + std::to_string(index);
  if (thread.state == State::kExited) return text + " has exited";
  text += thread.state == State::kBarrier ? " is at __syncthreads" : " is at a warp operation";
  return text + " in line " + std::to_string(thread.line);
}

[[noreturn]] inline void fail(const std::string& problem, unsigned a, unsigned b) {
  throw std::runtime_error(std::string(block->kernel) + ", block " + std::to_string(blockIdx.x) +
                           ": " + problem + ": " + describe(a) + ", " + describe(b));
}

// Lets a warp's operation happen if every lane of its mask has come to it.
inline bool resolve_warp(unsigned first) {
  const unsigned count = static_cast<unsigned>(block->threads.size());
  Thread* lanes = &block->threads[first];
  const unsigned size = std::min(kWarp, count - first);
  bool progress = false;
  for (unsigned lane = 0; lane < size; ++lane) {
    if (lanes[lane].state != State::kWarp) continue;
    const unsigned mask = lanes[lane].mask;
    if (!(mask >> lane & 1)) fail("a lane is not in its own mask", first + lane, first + lane);
    bool complete = true;
    for (unsigned other = 0; other < size; ++other) {
      if (!(mask >> other & 1)) continue;
      const Thread& peer = lanes[other];
      const bool here = peer.state == State::kWarp;
      if (peer.state == State::kExited)
        fail("a warp operation waits for an exited lane", first + lane, first + other);
      if (here && (peer.mask != mask || peer.shuffle != lanes[lane].shuffle ||
                   peer.line != lanes[lane].line))
        fail("lanes of one mask are at different operations", first + lane, first + other);
      complete = complete && here;
    }
    if (!complete) continue;
    for (unsigned other = 0; other < size; ++other) {
      if (!(mask >> other & 1)) continue;
      Thread& t = lanes[other];
      const unsigned start = other / t.width * t.width, within = other - start;
      unsigned source = other;
      if (t.shuffle == Shuffle::kIdx) source = start + t.operand % t.width;
      if (t.shuffle == Shuffle::kUp && within >= t.operand) source = other - t.operand;
      if (t.shuffle == Shuffle::kDown && within + t.operand < t.width) source = other + t.operand;
      if (t.shuffle == Shuffle::kXor && (within ^ t.operand) < t.width)
        source = start + (within ^ t.operand);
      if (!(mask >> source & 1) || source >= size)
        fail("a shuffle reads a lane outside its mask", first + other, first + other);
      t.result = lanes[source].value;
      if (t.shuffle == Shuffle::kBallot) {
        t.result = 0;
        for (unsigned voter = 0; voter < size; ++voter)
          if (mask >> voter & 1 && lanes[voter].value) t.result |= 1u << voter;
      }
    }
    for (unsigned other = 0; other < size; ++other)
      if (mask >> other & 1) lanes[other].state = State::kReady;
    progress = true;
  }
  return progress;
}

// Called when no thread can run. False once all have exited.
inline bool resolve() {
  const unsigned count = static_cast<unsigned>(block->threads.size());
  bool progress = false;
  for (unsigned first = 0; first < count; first += kWarp) progress |= resolve_warp(first);
  if (progress) return true;
  const Thread& leader = block->threads[0];
  for (unsigned i = 1; i < count; ++i) {
    const Thread& other = block->threads[i];
    const bool same_line = other.line == leader.line || other.state == State::kExited;
    const bool alike = other.state == leader.state && same_line;
    if (!alike || leader.state == State::kWarp) fail("threads wait in vain", 0, i);
  }
  if (leader.state == State::kExited) return false;
  if (leader.state == State::kWarp) fail("a warp operation waits in vain", 0, 0);
  for (Thread& thread : block->threads) thread.state = State::kReady;
  return true;
}

inline void enter() {
  block->body();
  self().state = State::kExited;
  swapcontext(&self().context, &block->scheduler);
}

// The bounds of the section that __shared__ names; absent where nothing is in it.
extern "C" __attribute__((weak, visibility("hidden"))) char __start_emulated_shared[];
extern "C" __attribute__((weak, visibility("hidden"))) char __stop_emulated_shared[];

inline void run_block(std::mt19937& random) {
  constexpr size_t kStack = 64 * 1024;
  const unsigned count = static_cast<unsigned>(block->threads.size());
  if (__start_emulated_shared)
    std::fill(__start_emulated_shared, __stop_emulated_shared, static_cast<char>(0xff));
  std::fill(block->dynamic_shared.begin(), block->dynamic_shared.end(), static_cast<char>(0xff));
  std::vector<unsigned> order(count);
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = block->threads[i];
    thread = Thread();
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = block->stacks[i].get();
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, enter, 0);
    order[i] = i;
  }
  do {
    std::shuffle(order.begin(), order.end(), random);
    for (const unsigned i : order) {
      if (block->threads[i].state != State::kReady) continue;
      block->current = i;
      threadIdx = {i % block->size.x, i / block->size.x % block->size.y,
                   i / block->size.x / block->size.y};
      swapcontext(&block->scheduler, &block->threads[i].context);
    }
  } while (resolve());
}

// Runs `body`, a call of a kernel, as every thread of the grid.
inline void run(const char* kernel, dim3 grid, dim3 size, size_t dynamic_shared,
                std::function<void()> body) {
  constexpr size_t kStack = 64 * 1024;
  const unsigned count = size.x * size.y * size.z, blocks = grid.x * grid.y * grid.z;
  if (!count || count > 1024 || !blocks)
    throw std::runtime_error(std::string(kernel) + ": invalid configuration");
  Block running{kernel, size, std::move(body), std::vector<Thread>(count), {}, {}, {}};
  running.dynamic_shared.resize(dynamic_shared);
  for (unsigned i = 0; i < count; ++i) running.stacks.emplace_back(new char[kStack]);
  std::mt19937 random(1);
  std::vector<unsigned> order(blocks);
  for (unsigned i = 0; i < blocks; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), random);
  blockDim = size;
  gridDim = grid;
  block = &running;
  for (const unsigned i : order) {
    blockIdx = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
    run_block(random);
  }
  block = nullptr;
}

}  // namespace emulation

#define __syncthreads() ::emulation::barrier(__LINE__)
#define __syncwarp(...) \
  ::emulation::exchange(::emulation::Shuffle::kSync, ~0u, 0, 0, ::emulation::kWarp, __LINE__)
#define __ballot_sync(mask, predicate)                                                            \
  static_cast<unsigned>(::emulation::exchange(::emulation::Shuffle::kBallot, mask, !!(predicate), \
                                              0, ::emulation::kWarp, __LINE__))
#define __shfl_sync(mask, value, source) \
  ::emulation::shuffle(::emulation::Shuffle::kIdx, mask, value, source, 32, __LINE__)
#define __shfl_up_sync(mask, value, delta) \
  ::emulation::shuffle(::emulation::Shuffle::kUp, mask, value, delta, 32, __LINE__)
#define __shfl_down_sync(mask, value, delta) \
  ::emulation::shuffle(::emulation::Shuffle::kDown, mask, value, delta, 32, __LINE__)
#define __shfl_xor_sync(mask, value, lanes) \
  ::emulation::shuffle(::emulation::Shuffle::kXor, mask, value, lanes, 32, __LINE__)

static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __fdividef(float a, float b) { return a / b; }
static inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
template <class T>
static inline T __ldg(const T* address) {
  return *address;
}
static inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
static inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
