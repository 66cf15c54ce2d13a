// Attention's forward pass with wgmma.
#include "launchers.hpp"

#ifdef __CUDACC__

#include <algorithm>

#include "attention_fwd_tiles.cuh"
#include "tensor_map.cuh"

namespace lora_engine {
namespace cuda {
namespace {

constexpr const char* kName = "attention_fwd";

template <class T, int kD, int kGroups, int kKeys, int kStages>
void run(const AttentionFwdArgs& a, void* stream) {
  using Shape = FwdShape<T, kD, kGroups, kKeys, kStages>;
  AttentionFwd call;
  call.o = a.o;
  call.lse = a.lse;
  call.cu_seqlens = a.cu_seqlens;
  call.taken = a.taken;
  call.tokens = a.tokens;
  call.stride_o = a.stride_o;
  call.sequences = static_cast<int>(a.sequences);
  call.heads = static_cast<int>(a.heads);
  call.group = static_cast<int>(a.heads / a.kv_heads);
  call.tiles = static_cast<int>(a.tokens / Shape::kQueries + a.sequences);
  call.causal = a.causal != 0;
  call.window = a.window > 0 ? static_cast<int>(std::min<int64_t>(a.window, kNoWindow)) : kNoWindow;
  call.scale = static_cast<float>(a.scale) * kLog2E;
  const auto map = [&](const void* x, int64_t heads, int64_t stride, int rows) {
    return head_map(kName, a.dtype == kBFloat16, x, a.tokens, static_cast<int>(heads), kD, stride,
                    rows);
  };
  check(cudaMemsetAsync(a.taken, 0, sizeof *a.taken, static_cast<cudaStream_t>(stream)), kName);
  const int blocks = std::min(call.tiles * call.heads, multiprocessors(kName));
  launch(kName, attention_fwd_kernel<T, kD, kGroups, kKeys, kStages>, blocks, Shape::kThreads,
         Shape::kBytes + 1024, stream, map(a.q, a.heads, a.stride_q, Shape::kQueries),
         map(a.k, a.kv_heads, a.stride_k, kKeys), map(a.v, a.kv_heads, a.stride_v, kKeys), call);
}

template <class T>
void run_of_size(const AttentionFwdArgs& a, void* stream) {
  if (a.head_dim == 128)
    run<T, 128, 2, 128, 2>(a, stream);
  else if (a.head_dim == 64)
    run<T, 64, 3, 128, 2>(a, stream);
  else
    throw std::invalid_argument("attention_fwd: heads of 64 or 128");
}

}  // namespace

void attention_fwd(const AttentionFwdArgs& a, void* stream) {
  if (a.dtype == kBFloat16)
    run_of_size<BFloat16>(a, stream);
  else if (a.dtype == kFloat16)
    run_of_size<Float16>(a, stream);
  else
    throw std::invalid_argument("attention_fwd: bfloat16 or float16");
}

}  // namespace cuda
}  // namespace lora_engine

#else  // emulated: there are no tensor cores

#include <stdexcept>

void lora_engine::cuda::attention_fwd(const AttentionFwdArgs&, void*) {
  throw std::runtime_error("attention_fwd: needs a GPU of capability 9.0");
}

#endif
