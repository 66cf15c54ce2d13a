#pragma once

#include <pybind11/pybind11.h>

namespace lora_engine {

// Adds the CPU kernels to `m`, lora_engine._C, with what chooses among their instruction sets.
void bind_cpu(pybind11::module_ m);

}  // namespace lora_engine
