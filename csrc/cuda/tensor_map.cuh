// What bulk copies of boxes need to know of a tensor in global memory.
#pragma once

#include <cuda.h>

#include <cstring>
#include <stdexcept>
#include <string>

#include "hopper.cuh"
#include "launch.cuh"

namespace lora_engine {
namespace cuda {
namespace {

// The driver's own function, which is asked for at run time: the extension imports where there is
// no driver.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder(const char* name) {
  static const auto found = [name] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                           cudaEnableDefault, &result),
          name);
    if (result != cudaDriverEntryPointSuccess)
      throw std::runtime_error(std::string(name) + ": the driver is older than CUDA 12.0");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  return found;
}

// Of heads in a tensor [tokens, heads * head_dim] of 16-bit elements, tokens `stride` elements
// apart, base and stride multiples of 16 bytes. A box is `rows` tokens of a head, 64 columns after
// 64 columns, in rows of 128 bytes swizzled over 128: (0, token, head * head_dim / 64).
inline TensorMap head_map(const char* name, bool bfloat16, const void* base, int64_t tokens,
                          int heads, int head_dim, int64_t stride, int rows) {
  const cuuint32_t halves = head_dim / 64;
  const cuuint64_t sizes[3] = {64, static_cast<cuuint64_t>(tokens),
                               static_cast<cuuint64_t>(heads) * halves};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(stride) * 2, 128};
  const cuuint32_t box[3] = {64, static_cast<cuuint32_t>(rows), halves}, steps[3] = {1, 1, 1};
  CUtensorMap map;
  const CUresult result = tensor_map_encoder(name)(
      &map, bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 3,
      const_cast<void*>(base), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error(std::string(name) + ": cuTensorMapEncodeTiled: error " +
                             std::to_string(static_cast<int>(result)));
  TensorMap passed;
  static_assert(sizeof passed == sizeof map, "the same bytes");
  std::memcpy(&passed, &map, sizeof map);
  return passed;
}

}  // namespace
}  // namespace cuda
}  // namespace lora_engine
