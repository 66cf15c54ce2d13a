// As much of CUDA's runtime as host code made by nvcc needs to start kernels, which a Python
// function then executes: launches are handed on with the kernel's name and its parameters.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <string>

#include "bindings.hpp"

namespace py = pybind11;

namespace {

struct Dim3 {
  unsigned x, y, z;
};

struct Configuration {
  Dim3 grid, block;
  size_t shared;
  void* stream;
};

std::map<const void*, std::string>& kernels() {
  static std::map<const void*, std::string> names;
  return names;
}

Configuration pushed;
PyObject* launcher = nullptr;  // of the module, which is never unloaded
constexpr int kMultiprocessors = 3;
constexpr int kMultiprocessorCount = 16, kCapabilityMajor = 75, kCapabilityMinor = 76;

int launch(const void* kernel, Dim3 grid, Dim3 block, void** args, size_t shared) {
  py::gil_scoped_acquire held;
  py::reinterpret_borrow<py::object>(launcher)(
      kernels().at(kernel), py::make_tuple(grid.x, grid.y, grid.z),
      py::make_tuple(block.x, block.y, block.z), shared, reinterpret_cast<uintptr_t>(args));
  return 0;
}

// What tests/support/ptx/core/bulk.cpp reads out of the 128 bytes.
struct TensorMap {
  uint64_t magic, address;
  uint32_t rank, element_bytes, swizzle, type;
  uint32_t dims[5], box[5];
  uint64_t strides[4];
};

// By CUtensorMapDataType: bytes, and the core's number of a type that can be added.
constexpr uint32_t kBytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4};
constexpr uint32_t kTypes[] = {0, 0, 5, 6, 7, 0, 2, 1, 4, 3, 1, 1};

int encode_tiled(void* map, int type, uint32_t rank, void* address, const uint64_t* dims,
                 const uint64_t* strides, const uint32_t* box, const uint32_t* steps,
                 int interleave, int swizzle, int, int) {
  constexpr uint32_t kSwizzles[] = {0, 32, 64, 128};
  constexpr int kInvalid = 1;
  if (type < 0 || type > 11 || rank < 1 || rank > 5 || interleave || swizzle < 0 || swizzle > 3)
    return kInvalid;
  TensorMap encoded = {0x70616d726f736e74, reinterpret_cast<uint64_t>(address), rank, kBytes[type],
                       kSwizzles[swizzle], kTypes[type], {}, {}, {}};
  for (uint32_t d = 0; d < rank; ++d) {
    if (!dims[d] || dims[d] >> 32 || !box[d] || box[d] > 256 || steps[d] != 1) return kInvalid;
    encoded.dims[d] = static_cast<uint32_t>(dims[d]);
    encoded.box[d] = box[d];
    if (d) encoded.strides[d - 1] = strides[d - 1];
    if (d && strides[d - 1] % 16) return kInvalid;
  }
  const uint32_t row = encoded.box[0] * encoded.element_bytes;
  if (encoded.address % 16 || row % 16 || (encoded.swizzle && row > encoded.swizzle))
    return kInvalid;
  std::memset(map, 0, 128);
  std::memcpy(map, &encoded, sizeof encoded);
  return 0;
}

}  // namespace

extern "C" {

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*,
                            void*, void*, int*) {
  kernels()[host] = name;
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 block, size_t shared, void* stream) {
  pushed = {grid, block, shared, stream};
  return 0;
}
int __cudaPopCallConfiguration(Dim3* grid, Dim3* block, size_t* shared, void* stream) {
  *grid = pushed.grid;
  *block = pushed.block;
  *shared = pushed.shared;
  *static_cast<void**>(stream) = pushed.stream;
  return 0;
}
int __cudaGetKernel(const void** kernel, const void* host) {
  *kernel = host;
  return 0;
}
int __cudaLaunchKernel(const void* kernel, Dim3 grid, Dim3 block, void** args, size_t shared,
                       void*) {
  return launch(kernel, grid, block, args, shared);
}
int cudaLaunchKernel(const void* kernel, Dim3 grid, Dim3 block, void** args, size_t shared, void*) {
  return launch(kernel, grid, block, args, shared);
}

int cudaGetLastError() { return 0; }
const char* cudaGetErrorString(int) { return "no error"; }
int cudaFuncSetAttribute(const void*, int, int) { return 0; }
int cudaGetDevice(int* device) { return *device = 0; }
int cudaDeviceGetAttribute(int* value, int attribute, int) {
  *value = attribute == kMultiprocessorCount ? kMultiprocessors
           : attribute == kCapabilityMajor   ? 9
           : attribute == kCapabilityMinor   ? 0
                                             : -1;
  return *value < 0;
}
int cudaMemsetAsync(void* to, int value, size_t bytes, void*) {
  std::memset(to, value, bytes);
  return 0;
}
int cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                     unsigned long long, int* found) {
  const bool known = std::string(name) == "cuTensorMapEncodeTiled";
  *function = known ? reinterpret_cast<void*>(&encode_tiled) : nullptr;
  *found = known ? 0 : 1;
  return 0;
}

}  // extern "C"

PYBIND11_MODULE(cuda_on_ptx, m) {
  lora_engine::cuda::bind(m);
  m.def("set_launcher", [](py::object function) { launcher = function.release().ptr(); });
}
