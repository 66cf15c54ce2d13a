// Attention's backward pass with wgmma: two passes over rows, and one over tiles of keys between.
#include "launchers.hpp"

#ifdef __CUDACC__

#include "attention_bwd_rows.cuh"
#include "tensor_map.cuh"

namespace lora_engine {
namespace cuda {
namespace {

constexpr const char* kName = "attention_bwd";

template <class T, int kD, bool kCausal>
void run(const AttentionBwdArgs& a, void* stream) {
  using Tiles = BwdTileKernel<T, kD, kCausal>;
  const int tokens = static_cast<int>(a.tokens), sequences = static_cast<int>(a.sequences);
  const int heads = static_cast<int>(a.heads), kv_heads = static_cast<int>(a.kv_heads);
  const int query_tiles = tokens / Tiles::kQueries + sequences;
  const int key_tiles = tokens / Tiles::kKeys + sequences;
  const float scale = static_cast<float>(a.scale);
  AttentionBwdRows rows{};
  rows.o = a.o, rows.d_o = a.d_o, rows.lse = a.lse, rows.dq = a.dq;
  rows.stats = a.stats, rows.dq_sum = a.dq_sum, rows.order = a.order,
  rows.cu_seqlens = a.cu_seqlens;
  rows.stride_o = a.stride_o, rows.stride_do = a.stride_do, rows.stride_dq = a.stride_dq;
  rows.tokens = tokens, rows.sequences = sequences, rows.heads = heads, rows.scale = scale;
  rows.query_tiles = query_tiles, rows.key_tiles = key_tiles;
  AttentionBwdTiles tiles{};
  tiles.stats = a.stats, tiles.dq_sum = a.dq_sum, tiles.dk = a.dk, tiles.dv = a.dv;
  tiles.cu_seqlens = a.cu_seqlens, tiles.order = a.order, tiles.sequences = sequences;
  tiles.stride_dk = a.stride_dk, tiles.stride_dv = a.stride_dv, tiles.kv_heads = kv_heads;
  tiles.group = heads / kv_heads, tiles.query_tiles = query_tiles, tiles.scale = scale;
  const auto map = [&](const void* x, int count, int64_t stride, int box) {
    return head_map(kName, a.dtype == kBFloat16, x, tokens, count, kD, stride, box);
  };
  const unsigned query_blocks = static_cast<unsigned>(query_tiles * heads);
  launch(kName, attention_bwd_delta_kernel<T, kD, kCausal>, query_blocks + 1, kRowThreads, 0,
         stream, rows);
  launch(kName, attention_bwd_tiles_kernel<T, kD, kCausal>,
         static_cast<unsigned>(key_tiles * kv_heads), kBwdThreads, Tiles::kBytes, stream,
         map(a.q, heads, a.stride_q, Tiles::kQueries),
         map(a.d_o, heads, a.stride_do, Tiles::kQueries),
         map(a.k, kv_heads, a.stride_k, Tiles::kKeys), map(a.v, kv_heads, a.stride_v, Tiles::kKeys),
         tiles);
  launch(kName, attention_bwd_dq_kernel<T, kD>, query_blocks, kRowThreads, 0, stream, rows);
}

template <class T>
void run_of_size(const AttentionBwdArgs& a, void* stream) {
  if (a.head_dim == 128)
    a.causal ? run<T, 128, true>(a, stream) : run<T, 128, false>(a, stream);
  else if (a.head_dim == 64)
    a.causal ? run<T, 64, true>(a, stream) : run<T, 64, false>(a, stream);
  else
    throw std::invalid_argument("attention_bwd: heads of 64 or 128");
}

}  // namespace

void attention_bwd(const AttentionBwdArgs& a, void* stream) {
  if (a.dtype == kBFloat16)
    run_of_size<BFloat16>(a, stream);
  else if (a.dtype == kFloat16)
    run_of_size<Float16>(a, stream);
  else
    throw std::invalid_argument("attention_bwd: bfloat16 or float16");
}

}  // namespace cuda
}  // namespace lora_engine

#else  // emulated: there are no tensor cores

#include <stdexcept>

void lora_engine::cuda::attention_bwd(const AttentionBwdArgs&, void*) {
  throw std::runtime_error("attention_bwd: needs a GPU of capability 9.0");
}

#endif
