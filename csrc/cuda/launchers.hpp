// What csrc/cuda offers: functions that start kernels on a stream and return at once. Pointers are
// device addresses; a launch that fails is a std::runtime_error with CUDA's message.
#pragma once

#include <cstdint>

namespace lora_engine {
namespace cuda {

struct AdamWHyper {
  double lr, beta1, beta2, eps, weight_decay, bias_correction1, bias_correction2;
  const float* grad_norm;  // [] of grads, which are clipped to max_grad_norm; null: no clipping
  double max_grad_norm;
};

struct AdamWArgs {
  float* params;       // [size]
  const float* grads;  // [size]
  float* exp_avg;      // [size]
  float* exp_avg_sq;   // [size]
  int64_t size;
  AdamWHyper hyper;
};

struct AdamW8bitArgs {
  float* params;             // [size]
  const float* grads;        // [size]
  uint8_t* exp_avg;          // [size]
  uint8_t* exp_avg_sq;       // [size]
  float* exp_avg_absmax;     // [ceil(size / 256)]
  float* exp_avg_sq_absmax;  // [ceil(size / 256)]
  int64_t size;
  AdamWHyper hyper;
};

struct GradNormArgs {
  const float* grads;  // [size]
  float* partials;     // [1024], work space
  float* norm;         // []
  int64_t size;
};

// Of elements, where an address is void*.
enum DType : int64_t { kFloat32, kBFloat16, kFloat16 };

// The format is lora_engine/quantization/blockwise_4bit.py's. block: a power of two, at least 32.
struct Quantize4bitArgs {
  const void* w;             // [size]
  const float* bounds;       // [15] between ascending values; a value on one takes the code below
  const uint8_t* ascending;  // [16] codes in the order of their values
  uint8_t* codes;            // [ceil(size / 2)]
  float* absmax;             // [ceil(size / block)]
  int64_t size, block, dtype;
};

struct Dequantize4bitArgs {
  const uint8_t* codes;        // of the whole weight
  const void* absmax;          // [blocks] float, or uint8 with the others
  const float* nested_absmax;  // [ceil(blocks / 256)]
  const float* nested_code;    // [256]
  const float* offset;         // []
  const float* values;         // [16] of codes
  void* w;                     // [rows, cols], rows `stride` elements apart
  int64_t rows, cols, stride;
  int64_t first;  // the place of w[0, 0] among the weight's values
  int64_t block, dtype;
};

// Tokens are rows of [heads, D], k's and v's of [kv_heads, D], strides from one to the next in
// elements. Addresses and strides are multiples of 16 bytes; D is 64 or 128, of 16-bit elements.
struct AttentionFwdArgs {
  const void *q, *k, *v;
  const int32_t* cu_seqlens;  // [sequences + 1]
  void* o;
  float* lse;      // [heads, tokens]
  int32_t* taken;  // [], work space
  int64_t stride_q, stride_k, stride_v, stride_o;
  int64_t tokens, sequences, heads, kv_heads, head_dim, causal;
  int64_t window;  // 0: none
  int64_t dtype;
  double scale;  // positive
};

// Rows of `tokens` lie side by side: [heads, D], or [kv_heads, D] of k, v, dk and dv; strides are
// from token to token, in elements. Addresses and rows begin at multiples of 16 bytes.
struct AttentionBwdArgs {
  const void *d_o, *q, *k, *v, *o;
  const float* lse;  // [heads, tokens]
  void *dq, *dk, *dv;
  const int32_t* cu_seqlens;  // [sequences + 1]
  float* stats;    // [heads, tiles, 2, rows], work space: tiles = tokens / rows + sequences
  float* dq_sum;   // [heads, tiles, rows * D], likewise; rows = 64 with D = 128, else 128
  int32_t* order;  // [tokens / 128 + sequences], likewise
  int64_t stride_do, stride_q, stride_k, stride_v, stride_o, stride_dq, stride_dk, stride_dv;
  int64_t tokens, sequences, heads, kv_heads, head_dim, causal, dtype;
  double scale;
};

// As of the two above, with heads of 8, 16, ... 128 and strides that are multiples of 16 bytes.
struct AttentionMmaFwdArgs {
  const void *q, *k, *v;
  const int32_t* cu_seqlens;  // [sequences + 1]
  const int32_t* parents;     // [sequences]: the earlier one that each continues, or -1; or null
  void* o;
  float* lse;  // [heads, tokens]
  int64_t stride_q, stride_k, stride_v, stride_o;
  int64_t tokens, sequences, heads, kv_heads, head_dim, causal;
  int64_t window;  // 0: none
  int64_t dtype;
  double scale;  // positive
};

struct AttentionMmaBwdArgs {
  const void *d_o, *q, *k, *v, *o;
  const float* lse;  // [heads, tokens]
  void *dq, *dk, *dv;
  const int32_t* cu_seqlens;  // [sequences + 1]
  const int32_t* parents;     // as above
  float* delta;               // [heads, tokens], work space
  int32_t* last;              // [sequences], likewise; null without parents
  int64_t stride_do, stride_q, stride_k, stride_v, stride_o, stride_dq, stride_dk, stride_dv;
  int64_t tokens, sequences, heads, kv_heads, head_dim, causal;
  int64_t window;  // 0: none
  int64_t dtype;
  double scale;
};

void adamw(const AdamWArgs&, void* stream);
void adamw_8bit(const AdamW8bitArgs&, void* stream);
void attention_fwd(const AttentionFwdArgs&, void* stream);
void attention_bwd(const AttentionBwdArgs&, void* stream);
void attention_mma_fwd(const AttentionMmaFwdArgs&, void* stream);
void attention_mma_bwd(const AttentionMmaBwdArgs&, void* stream);
void grad_norm(const GradNormArgs&, void* stream);
void quantize_4bit(const Quantize4bitArgs&, void* stream);
void dequantize_4bit(const Dequantize4bitArgs&, void* stream);

}  // namespace cuda
}  // namespace lora_engine
