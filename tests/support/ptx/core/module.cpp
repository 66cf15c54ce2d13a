// The Python module: programs as parser.py makes them, and their launches.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <unordered_map>

#include "decode.hpp"

namespace py = pybind11;

namespace ptx {

Action make_action(const Op& op) {
  static const std::unordered_map<std::string, Maker> makers = [] {
    std::unordered_map<std::string, Maker> all;
    for (const auto& entries :
         {integer_entries(), bit_entries(), float_entries(), convert_entries(), move_entries(),
          memory_entries(), atomic_entries(), warp_entries(), matrix_entries(), copy_entries(),
          barrier_entries()})
      for (const Entry& entry : entries) all.emplace(entry.base, entry.make);
    return all;
  }();
  const auto found = makers.find(op.base());
  return found == makers.end() ? nullptr : found->second(op);
}

namespace {

Kind kind_of(char letter) {
  switch (letter) {
    case 'r': return Kind::kRegister;
    case 'i': return Kind::kImmediate;
    case 'm': return Kind::kMemory;
    case 'v': return Kind::kVector;
    case 'p': return Kind::kPair;
    case 'l': return Kind::kLabel;
    case 's': return Kind::kSymbol;
    default: return Kind::kSink;
  }
}

// (kind, text, width, negated, offset, value, parts)
Operand operand_of(const py::tuple& given) {
  Operand o;
  o.kind = kind_of(given[0].cast<std::string>()[0]);
  o.text = given[1].cast<std::string>();
  const std::string width = given[2].cast<std::string>();
  o.width = width.empty() ? 0 : width[0];
  o.negated = given[3].cast<bool>();
  o.offset = given[4].cast<uint32_t>();
  o.value = given[5].cast<uint64_t>();
  for (const py::handle part : given[6]) o.parts.push_back(operand_of(part.cast<py::tuple>()));
  return o;
}

void collect_registers(const Operand& o, std::vector<uint32_t>& offsets) {
  if (o.kind == Kind::kRegister && o.width != 'p') offsets.push_back(o.offset);
  for (const Operand& part : o.parts) collect_registers(part, offsets);
}

std::vector<std::string> split(const std::string& opcode) {
  std::vector<std::string> parts;
  size_t begin = 0;
  for (size_t dot; (dot = opcode.find('.', begin)) != std::string::npos; begin = dot + 1)
    parts.push_back(opcode.substr(begin, dot - begin));
  parts.push_back(opcode.substr(begin));
  return parts;
}

// (text, opcode, guard, negated, operands, targets)
Instruction instruction_of(const py::tuple& given) {
  Instruction in;
  in.text = given[0].cast<std::string>();
  in.opcode = given[1].cast<std::string>();
  in.guard = given[2].cast<int>();
  in.negated = given[3].cast<bool>();
  Op op;
  op.text = in.text;
  op.parts = split(in.opcode);
  for (const py::handle o : given[4]) op.operands.push_back(operand_of(o.cast<py::tuple>()));
  in.targets = given[5].cast<std::vector<int>>();
  for (const Operand& o : op.operands) collect_registers(o, in.registers);
  in.is_matrix_async = op.base() == "wgmma";
  if (op.base() == "bra") {
    in.flow = Flow::kBranch;
    in.target = in.targets.at(0);
    return in;
  }
  if (op.base() == "brx") {
    in.flow = Flow::kTable;
    in.selector = op[0].offset;
    return in;
  }
  if (op.base() == "ret" || op.base() == "exit") {
    in.flow = Flow::kExit;
    return in;
  }
  try {
    in.run = make_action(op);
  } catch (const Fault& fault) {
    throw Fault(std::string(fault.what()) + ": " + in.text);
  }
  if (!in.run) throw Fault("not implemented: " + in.text);
  return in;
}

bool is_async_proxy(const std::string& opcode) {
  return opcode.rfind("wgmma.mma", 0) == 0 ||
         (opcode.rfind("cp.", 0) == 0 && opcode.find(".bulk") != std::string::npos);
}

Program program_of(const py::list& instructions, const py::bytes& constants,
                   size_t register_bytes, size_t predicate_bytes, size_t local_bytes,
                   std::vector<std::pair<std::string, uint32_t>> specials) {
  Program program;
  for (const py::handle given : instructions) {
    program.instructions.push_back(instruction_of(given.cast<py::tuple>()));
    program.uses_async_proxy |= is_async_proxy(program.instructions.back().opcode);
  }
  const std::string bytes = constants;
  program.constants.assign(bytes.begin(), bytes.end());
  program.register_bytes = register_bytes;
  program.predicate_bytes = predicate_bytes;
  program.local_bytes = local_bytes;
  program.specials = std::move(specials);
  return program;
}

Completion completion_of(const std::string& name) {
  if (name == "late") return Completion::kLate;
  if (name == "early") return Completion::kEarly;
  if (name == "random") return Completion::kRandom;
  throw py::value_error("completion: late, early or random, not " + name);
}

// Returns the instructions that warps executed.
uint64_t launch(Program& program, const std::array<uint32_t, 3>& grid,
                const std::array<uint32_t, 3>& block, const py::bytes& params,
                uint32_t static_shared, uint32_t dynamic_shared,
                const std::vector<std::pair<uint64_t, uint64_t>>& ranges,
                const std::string& completion, uint32_t seed, uint32_t residents, bool in_order,
                bool copies_need_fence, uint64_t most_steps) {
  Machine machine;
  machine.program = &program;
  std::copy(grid.begin(), grid.end(), machine.grid);
  std::copy(block.begin(), block.end(), machine.block);
  const std::string bytes = params;
  machine.params.assign(bytes.begin(), bytes.end());
  machine.shared_bytes = static_shared + dynamic_shared;
  machine.dynamic_bytes = dynamic_shared;
  for (const auto& [begin, end] : ranges) machine.ranges.push_back({begin, end});
  machine.completion = completion_of(completion);
  machine.random.seed(seed);
  machine.residents = residents;
  machine.in_order = in_order;
  machine.copies_need_fence = copies_need_fence;
  machine.most_steps = most_steps;
  machine.poll = [] {
    if (PyErr_CheckSignals()) throw py::error_already_set();
  };
  machine.run();
  return machine.steps;
}

std::vector<std::pair<std::string, uint64_t>> counts(const Program& program) {
  std::vector<std::pair<std::string, uint64_t>> result;
  for (const Instruction& in : program.instructions) result.emplace_back(in.opcode, in.count);
  return result;
}

}  // namespace
}  // namespace ptx

PYBIND11_MODULE(ptx_core, m) {
  using namespace ptx;
  py::register_exception<Fault>(m, "Fault", PyExc_RuntimeError);
  py::class_<Program>(m, "Program").def(py::init(&program_of)).def("counts", &counts);
  m.def("launch", &launch);
  m.attr("SHARED_BASE") = kSharedBase;
}
