// The module lora_engine._C: the CPU kernels, the CUDA kernels where nvcc built them, and what a
// process sets once. Callers check shapes, dtypes and layouts (lora_engine/ops).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#include "cpu/bindings.hpp"
#include "cpu/memory.hpp"
#include "cpu/openmp_crowd.hpp"
#include "cuda/bindings.hpp"
#include "triton/bindings.hpp"

namespace py = pybind11;
using namespace lora_engine;

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ kernels of lora_engine, called through lora_engine.ops";

  m.def("keep_freed_memory", &keep_freed_memory, py::arg("expected_bytes"),
        "Let the allocator keep freed memory for reuse and grow in huge pages, at once by so many "
        "bytes; False where the C library has no such setting.");
  m.def("crowd_openmp", &crowd_openmp, py::call_guard<py::gil_scoped_release>(),
        "Have the threads of GNU's OpenMP runtime, loaded already, wait asleep; False where they "
        "do not.");

  bind_cpu(m);
  triton::bind(m.def_submodule("triton", "Launches of Triton kernels that are compiled already"));
#ifdef LORA_ENGINE_CUDA_ARCHITECTURES
  cuda::bind(m.def_submodule("cuda", "CUDA kernels, called through lora_engine.backends.cuda"));
#endif
  m.def(
      "cuda_architectures",
      [] {
        std::vector<std::string> list;
#ifdef LORA_ENGINE_CUDA_ARCHITECTURES
        std::istringstream names(LORA_ENGINE_CUDA_ARCHITECTURES);
        for (std::string name; names >> name;) list.push_back(name);
#endif
        return list;
      },
      "What the CUDA kernels were compiled for, as \"90a\"; empty where they were left out.");
}
