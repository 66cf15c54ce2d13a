// Attention's backward pass with mma.sync and cp.async, for GPUs of capability 8.0 and later.
#include "launchers.hpp"

#ifdef __CUDACC__

#include "attention_mma_bwd.cuh"

namespace lora_engine {
namespace cuda {
namespace {

constexpr const char* kName = "attention_mma_bwd";
constexpr int kLastThreads = 128;

template <class T, int kD>
void run(const AttentionMmaBwdArgs& a, void* stream) {
  using Shape = MmaBwdShape<kD>;
  MmaBwd call;
  call.d_o = a.d_o, call.q = a.q, call.k = a.k, call.v = a.v, call.o = a.o, call.lse = a.lse;
  call.dq = a.dq, call.dk = a.dk, call.dv = a.dv, call.delta = a.delta, call.last = a.last;
  call.packed = packed_of(a);
  call.stride_do = a.stride_do, call.stride_q = a.stride_q, call.stride_o = a.stride_o;
  call.stride_k = a.stride_k, call.stride_v = a.stride_v;
  call.stride_dq = a.stride_dq, call.stride_dk = a.stride_dk, call.stride_dv = a.stride_dv;
  call.tokens = a.tokens;
  call.heads = static_cast<int>(a.heads);
  call.group = static_cast<int>(a.heads / a.kv_heads);
  call.columns = static_cast<int>(a.head_dim);
  call.scale = static_cast<float>(a.scale);
  if (a.parents) {
    check(
        cudaMemsetAsync(a.last, 0, sizeof *a.last * a.sequences, static_cast<cudaStream_t>(stream)),
        kName);
    launch(kName, attention_mma_last_kernel,
           static_cast<unsigned>(ceil_div(a.sequences, kLastThreads)), kLastThreads, 0, stream,
           a.parents, a.last, static_cast<int>(a.sequences));
  }
  const int64_t tiles = a.tokens / Shape::kRows + a.sequences;
  launch(kName, attention_mma_dq_kernel<T, kD>, static_cast<unsigned>(tiles * a.heads),
         Shape::kThreads, Shape::kBytes, stream, call);
  launch(kName, attention_mma_dkv_kernel<T, kD>, static_cast<unsigned>(tiles * a.kv_heads),
         Shape::kThreads, Shape::kBytes, stream, call);
}

}  // namespace

void attention_mma_bwd(const AttentionMmaBwdArgs& a, void* stream) {
  by_type_and_size(kName, a, [&](auto type, auto size) {
    run<decltype(type), decltype(size)::value>(a, stream);
  });
}

}  // namespace cuda
}  // namespace lora_engine

#else  // emulated: there are no tensor cores

#include <stdexcept>

void lora_engine::cuda::attention_mma_bwd(const AttentionMmaBwdArgs&, void*) {
  throw std::runtime_error("attention_mma_bwd: needs a GPU of capability 8.0");
}

#endif
