#pragma once

#include <pybind11/pybind11.h>

namespace lora_engine {
namespace cuda {

// Adds the launchers to `m`: lora_engine._C.cuda, or the tests' emulation of it.
void bind(pybind11::module_ m);

}  // namespace cuda
}  // namespace lora_engine
