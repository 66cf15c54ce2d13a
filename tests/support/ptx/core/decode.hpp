// Statements of a program, and how instructions reach their operands.
#pragma once

#include <initializer_list>
#include <string>
#include <vector>

#include "machine.hpp"
#include "numbers.hpp"

namespace ptx {

enum class Kind { kRegister, kImmediate, kMemory, kVector, kSink, kPair, kLabel, kSymbol };

// An operand as it is written. `width` of a register: 'p' predicate, 'w' up to 32 bits, 'd' 64.
// kMemory: parts[0] is the base, value the displacement, parts[1] a vector of coordinates, if any.
struct Operand {
  Kind kind = Kind::kSink;
  char width = 0;
  bool negated = false;
  uint32_t offset = 0;  // of a register, or of an immediate among the constants
  uint64_t value = 0;
  std::string text;
  std::vector<Operand> parts;
};

struct Op {
  std::string text;
  std::vector<std::string> parts;  // of the opcode, between its dots
  std::vector<Operand> operands;

  const std::string& base() const { return parts.front(); }
  const std::string& type() const { return parts.back(); }
  size_t size() const { return operands.size(); }
  const Operand& operator[](size_t i) const {
    if (i >= operands.size()) throw Fault("too few operands");
    return operands[i];
  }
  bool has(const char* part) const;
  // Every part of the opcode but the first and last must be one of these, or is unknown.
  bool only(std::initializer_list<const char*> known, bool with_type = true) const;
};

// The action of an instruction; empty if it is unknown.
Action make_action(const Op& op);
using Maker = Action (*)(const Op& op);
struct Entry {
  const char* base;
  Maker make;
};
// The families, each in a file of its own.
std::vector<Entry> integer_entries();
std::vector<Entry> bit_entries();
std::vector<Entry> float_entries();
std::vector<Entry> convert_entries();
std::vector<Entry> move_entries();
std::vector<Entry> memory_entries();
std::vector<Entry> atomic_entries();
std::vector<Entry> warp_entries();
std::vector<Entry> matrix_entries();
std::vector<Entry> copy_entries();
std::vector<Entry> barrier_entries();
// Members of families that share a first word.
Action make_wgmma(const Op& op);
Action make_bulk_copy(const Op& op);
Action make_packed_float(const Op& op);

// A register's lane: 32 bits hold smaller types too.
template <class T>
using Slot = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
template <class T>
using Bits = std::conditional_t<
    sizeof(T) == 8, uint64_t,
    std::conditional_t<sizeof(T) == 4, uint32_t,
                       std::conditional_t<sizeof(T) == 2, uint16_t, uint8_t>>>;

template <class T>
inline T from_slot(Slot<T> slot) {
  return bits_as<T>(static_cast<Bits<T>>(slot));
}
template <class T>
inline Slot<T> to_slot(T value) {
  return bits_as<Bits<T>>(value);
}

template <class F>
inline void each_lane(Mask mask, F f) {
  if (mask == kAll) {
#pragma GCC ivdep
    for (int lane = 0; lane < kLanes; ++lane) f(lane);
    return;
  }
  for (; mask; mask &= mask - 1) f(__builtin_ctz(mask));
}

// Lanes of a register or of an immediate.
template <class T>
struct Source {
  uint32_t offset = 0;
  bool constant = false;

  explicit Source(const Operand& o) {
    constexpr char kWidth = sizeof(T) == 8 ? 'd' : 'w';
    if (o.kind == Kind::kImmediate) {
      constant = true;
      offset = o.offset + (sizeof(T) == 8 ? 128 : 0);
    } else if (o.kind == Kind::kRegister && o.width == kWidth) {
      offset = o.offset;
    } else {
      throw Fault("operand " + o.text + " is no register of the instruction's size");
    }
  }
  const Slot<T>* at(const Warp& warp) const {
    const uint8_t* from = constant ? warp.constants : warp.registers.data();
    return reinterpret_cast<const Slot<T>*>(from + offset);
  }
  T get(const Warp& warp, int lane) const { return from_slot<T>(at(warp)[lane]); }
};

template <class T>
struct Target {
  uint32_t offset = 0;
  bool sink = false;

  explicit Target(const Operand& o) {
    constexpr char kWidth = sizeof(T) == 8 ? 'd' : 'w';
    if (o.kind == Kind::kSink)
      sink = true;
    else if (o.kind == Kind::kRegister && o.width == kWidth)
      offset = o.offset;
    else
      throw Fault("result " + o.text + " is no register of the instruction's size");
  }
  void set(Warp& warp, int lane, T value) const {
    if (!sink) warp.lanes<Slot<T>>(offset)[lane] = to_slot<T>(value);
  }
};

// A predicate as an operand, negated or a constant.
struct Condition {
  uint32_t offset = 0;
  bool negated = false, constant = false;
  Mask value = 0;
  Condition() = default;
  explicit Condition(const Operand& o);
  Mask get(Warp& warp) const {
    const Mask mask = constant ? value : warp.predicate(offset);
    return negated ? ~mask : mask;
  }
};

struct PredicateTarget {
  uint32_t offset = 0;
  bool sink = true;
  PredicateTarget() = default;
  explicit PredicateTarget(const Operand& o);
  void set(Warp& warp, Mask lanes, Mask value) const {
    if (sink) return;
    Mask& mask = warp.predicate(offset);
    mask = (mask & ~lanes) | (value & lanes);
  }
};

// Addresses that a memory operand has in each lane.
struct Address {
  Operand base;
  int64_t displacement = 0;
  explicit Address(const Operand& o);
  uint64_t get(Warp& warp, int lane) const;
};

// Source of any integer width, as 64 bits without a sign.
uint64_t read_any(Warp& warp, const Operand& o, int lane);

template <class D, class A, class F>
Action unary(const Operand& to, const Operand& a, F f) {
  const Target<D> d(to);
  const Source<A> x(a);
  return [=](Warp& warp, Mask mask) {
    Slot<D>* out = warp.lanes<Slot<D>>(d.offset);
    const Slot<A>* in = x.at(warp);
    if (!d.sink)
      each_lane(mask, [=](int l) { out[l] = to_slot<D>(f(from_slot<A>(in[l]))); });
    return Outcome::kDone;
  };
}

template <class D, class A, class B, class F>
Action binary(const Operand& to, const Operand& a, const Operand& b, F f) {
  const Target<D> d(to);
  const Source<A> x(a);
  const Source<B> y(b);
  return [=](Warp& warp, Mask mask) {
    Slot<D>* out = warp.lanes<Slot<D>>(d.offset);
    const Slot<A>* p = x.at(warp);
    const Slot<B>* q = y.at(warp);
    if (!d.sink)
      each_lane(mask, [=](int l) {
        out[l] = to_slot<D>(f(from_slot<A>(p[l]), from_slot<B>(q[l])));
      });
    return Outcome::kDone;
  };
}

template <class D, class A, class B, class C, class F>
Action ternary(const Operand& to, const Operand& a, const Operand& b, const Operand& c, F f) {
  const Target<D> d(to);
  const Source<A> x(a);
  const Source<B> y(b);
  const Source<C> z(c);
  return [=](Warp& warp, Mask mask) {
    Slot<D>* out = warp.lanes<Slot<D>>(d.offset);
    const Slot<A>* p = x.at(warp);
    const Slot<B>* q = y.at(warp);
    const Slot<C>* r = z.at(warp);
    if (!d.sink)
      each_lane(mask, [=](int l) {
        out[l] = to_slot<D>(f(from_slot<A>(p[l]), from_slot<B>(q[l]), from_slot<C>(r[l])));
      });
    return Outcome::kDone;
  };
}

// Calls f with a value of the integer type; "b32" is unsigned.
template <class F>
Action with_integer(const std::string& type, F f) {
  if (type == "u8" || type == "b8") return f(uint8_t{});
  if (type == "s8") return f(int8_t{});
  if (type == "u16" || type == "b16") return f(uint16_t{});
  if (type == "s16") return f(int16_t{});
  if (type == "u32" || type == "b32") return f(uint32_t{});
  if (type == "s32") return f(int32_t{});
  if (type == "u64" || type == "b64") return f(uint64_t{});
  if (type == "s64") return f(int64_t{});
  return nullptr;
}

// Lanes that an instruction of the whole warp needs but that are elsewhere: it waits for them.
inline bool misses(const Warp& warp, Mask here, Mask members) {
  return (members & warp.alive & ~here) != 0;
}

}  // namespace ptx
