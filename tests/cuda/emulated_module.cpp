// lora_engine._C.cuda as a module of its own, for kernels that are emulated.
#include "bindings.hpp"

PYBIND11_MODULE(emulated_cuda, m) { lora_engine::cuda::bind(m); }
