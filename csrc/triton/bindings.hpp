#pragma once

#include <pybind11/pybind11.h>

namespace lora_engine {
namespace triton {

// Adds Driver and Launcher (launcher.cpp) to `m`: lora_engine._C.triton.
void bind(pybind11::module_ m);

}  // namespace triton
}  // namespace lora_engine
