// The CPU kernels as a table of functions, one table for each instruction set.
//
// Pointers are addresses of row-major data; a `stride` counts elements from one row (token) to
// the next. Inner arithmetic is float32 (float64 for float64 data).
#pragma once

#include <cstdint>

namespace lora_engine {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat64 = 2 };

// With heads > 1, `heads` rows of x and y (dy, h, dx) are adjacent and the stride goes from the
// first of them to the first of the next ones; there is no residual (dh) then.
struct RmsNormArgs {
  const void* x;         // [rows, cols]
  const void* residual;  // [rows, cols] or null
  const void* weight;    // [cols]; offset is added to it
  void* y;               // [rows, cols]
  void* h;               // [rows, cols], contiguous: x + residual, what is normed; null without
  void* rstd;            // [rows], float32 (float64 for float64 data): 1 / rms
  int64_t rows, heads, cols, x_stride, residual_stride, y_stride;
  double eps, offset;
};

struct RmsNormBwdArgs {
  const void* dy;      // [rows, cols]
  const void* dh;      // [rows, cols], added to dx, or null
  const void* h;       // [rows, cols], what was normed
  const void* weight;  // [cols]
  const void* rstd;    // [rows]
  void* dx;            // [rows, cols]
  void* dweight;       // [cols] in the arithmetic type, or null for a frozen weight
  int64_t rows, heads, cols, dy_stride, dh_stride, h_stride, dx_stride;
  double offset;
};

struct LayerNormArgs {
  const void* x;       // [rows, cols]
  const void* weight;  // [cols], or null: ones
  const void* bias;    // [cols], or null: zeros
  void* y;             // [rows, cols]
  void* mean;          // [rows] in the arithmetic type
  void* rstd;          // [rows]: 1 / standard deviation
  int64_t rows, cols, x_stride, y_stride;
  double eps;
};

struct LayerNormBwdArgs {
  const void* dy;         // [rows, cols]
  const void* x;          // [rows, cols]
  const void* weight;     // [cols] or null
  const void* mean;       // [rows]
  const void* rstd;       // [rows]
  void* dx;               // [rows, cols]
  void *dweight, *dbias;  // [cols] in the arithmetic type, or null where frozen
  int64_t rows, cols, dy_stride, x_stride, dx_stride;
};

// The heads of the queries or of the keys.
struct RopeHeads {
  const void* x;  // [tokens, heads, head_dim]
  void* y;        // the same shape; may be x
  int64_t heads, x_stride, x_head_stride, y_stride, y_head_stride;
};

struct RopeArgs {
  RopeHeads q, k;               // either may have no heads
  const void *cos, *sin;        // [positions, rotary_dim] of `table_dtype`
  const int64_t* position_ids;  // [tokens], or null: token t reads row t
  DType table_dtype;
  int64_t tokens, head_dim, rotary_dim, cos_stride, sin_stride;
  bool interleaved;  // pairs are neighbours, not halves
  bool inverse;      // the transposed rotation: the backward pass
};

enum class Activation : int { kSilu = 0, kGelu = 1, kGeluTanh = 2 };

struct GluArgs {
  const void* gate;  // [rows, cols]
  const void* up;    // [rows, cols]
  void* y;           // [rows, cols]
  int64_t rows, cols, gate_stride, up_stride, y_stride;
  Activation activation;
};

struct GluBwdArgs {
  const void* dy;    // [rows, cols]
  const void* gate;  // [rows, cols]
  const void* up;    // [rows, cols]
  void* dgate;       // [rows, cols]; may be gate
  void* dup;         // [rows, cols]; may be up
  void* h;           // [rows, cols], the forward result again, or null
  int64_t rows, cols, dy_stride, gate_stride, up_stride, dgate_stride, dup_stride, h_stride;
  Activation activation;
};

struct CrossEntropyArgs {
  const void* logits;      // [rows, cols]
  const int64_t* target;   // [rows]; a row of `ignore_index` has results 0 and gradient 0
  void* loss;              // [rows] in the arithmetic type, as are the next three
  void* logprob;           // [rows]
  void* entropy;           // [rows], or null
  void* lse;               // [rows], or null; an input with `lse_given`
  uint8_t* correct;        // [rows]: whether the target has the largest logit
  void* grad;              // [rows, cols]: d loss / d logits; may be `logits`; or null
  const void* grad_scale;  // [rows] in the arithmetic type: a factor of the gradient, `lse_given`
  int64_t rows, cols, stride, grad_stride, ignore_index;
  double label_smoothing, softcap, z_loss;  // softcap 0: none
  bool lse_given;                           // only `grad` is written
};

struct AttentionArgs {
  const void *q, *k, *v;      // [tokens, heads, head_dim], heads contiguous
  const void *cos, *sin;      // [tokens, head_dim] in the arithmetic type, or null: no rotation
  const int32_t* cu_seqlens;  // [sequences + 1]
  const int32_t* parents;     // [sequences]: the earlier sequence each continues, or -1; or null
  void* o;                    // [tokens, q_heads, head_dim]
  void* lse;                  // [q_heads, tokens] in the arithmetic type
  int64_t tokens, sequences, q_heads, kv_heads, head_dim;
  int64_t q_stride, k_stride, v_stride, o_stride;
  int64_t window;  // keys a query sees, itself included; 0: all before it
  double softmax_scale;
  bool causal;
};

// `rows` rows of a cache from `first` on.
struct DecodeSpan {
  int64_t first, rows;
};

// One new token of each sequence. A sequence's keys are the rows of its spans, in their order; its
// own row, `slots`, is the last of them, and is written.
struct AttentionDecodeArgs {
  const void* q;            // [sequences, q_heads, head_dim], heads contiguous
  const void *k, *v;        // [sequences, kv_heads, head_dim]
  const void *cos, *sin;    // [sequences, head_dim] in the arithmetic type, or null: no rotation
  void *keys, *values;      // [slots of the cache, kv_heads, head_dim]
  const int64_t* slots;     // [sequences]
  const DecodeSpan* spans;  // [cu_spans[sequences]]
  const int32_t* cu_spans;  // [sequences + 1]: sequence s has spans cu_spans[s] to cu_spans[s + 1]
  void* o;                  // [sequences, q_heads, head_dim]
  int64_t sequences, q_heads, kv_heads, head_dim;
  int64_t q_stride, k_stride, v_stride, o_stride, cache_stride;
  int64_t window;  // keys a query sees, itself included; 0: all
  double softmax_scale;
};

struct AttentionBwdArgs {
  AttentionArgs fwd;  // with o and lse as the forward pass left them
  const void* d_o;    // [tokens, q_heads, head_dim]
  void *dq, *dk, *dv;
  int64_t do_stride, dq_stride, dk_stride, dv_stride;
};

struct AdamWArgs {
  void* params;       // [size] float32 (or float64), as are the others
  const void* grads;  // [size]
  void* exp_avg;      // [size]
  void* exp_avg_sq;   // [size]
  int64_t size;
  double lr, beta1, beta2, eps, weight_decay, bias_correction1, bias_correction2;
  const void* grad_norm;  // [] of grads, which are clipped to max_grad_norm; null: no clipping
  double max_grad_norm;
};

struct AdamW8bitArgs {
  AdamWArgs adamw;           // with exp_avg and exp_avg_sq [size] uint8
  float* exp_avg_absmax;     // [ceil(size / 256)]
  float* exp_avg_sq_absmax;  // [ceil(size / 256)]
};

struct GradNormArgs {
  const void* grads;  // [size] float32 (or float64)
  void* norm;         // [], as grads
  int64_t size;
};

struct DropoutArgs {
  const void* x;  // [rows, cols]
  void* y;        // [rows, cols]; may be x
  int64_t rows, cols, x_stride, y_stride;
  double p;
  uint64_t seed;
  uint32_t substream;  // of the linear whose mask it is
};

// One linear of a group: its rows of [cols, ..] and its columns of [.., ranks].
struct LoraSpan {
  int64_t row, rows, column, columns;
};

// Columns of the spans ascend; what lies in no span is neither read nor written. Gradients of
// factors are in the arithmetic type.
struct LoraAFwdArgs {
  const void* x;       // [rows, cols]
  const void* lora_a;  // [ranks, cols]
  void* s;             // [rows, ranks]: x lora_a'
  void* copy;          // [rows, ranks]: s once more, or null
  int64_t rows, cols, x_stride, a_stride, s_stride, copy_stride;
  const LoraSpan* spans;
  int64_t span_count;
};

// One adapter of a linear, by the linear's rows and its own columns, and where a factor's gradient
// goes, contiguous: B's [rows, columns] times scale, or A's [columns, cols]; null: it is not
// needed.
struct LoraPart {
  LoraSpan place;
  double scale;
  void* gradient;
};

struct LoraBBwdArgs {
  const void* dy;           // [rows, cols]
  const void* lora_b;       // [cols, ranks]
  const void* s;            // [rows, ranks]; not read without parts
  void* ds;                 // [rows, ranks]: dy lora_b
  const void* row_factors;  // [rows], of the arithmetic type; or null
  void* scaled_ds;          // [rows, ranks]: each row of ds times its factor
  int64_t rows, dy_stride, b_stride, s_stride, ds_stride, scaled_stride;
  const LoraSpan* spans;
  int64_t span_count;
  const LoraPart* parts;  // dy' s
  int64_t part_count;
  bool adds;  // to the gradients, which are overwritten otherwise
};

struct LoraABwdArgs {
  const void* ds;             // [rows, ranks]
  const void* x;              // [rows, cols]
  void* d_lora_a;             // [ranks, cols]: ds' x, overwritten; null: it goes to the parts
  const void* column_weight;  // [cols]: columns of ds' x are multiplied by it; null: as they are
  int64_t rows, cols, ds_stride, x_stride, d_stride;
  double column_offset;  // added to column_weight
  const LoraSpan* spans;
  int64_t span_count;
  const LoraPart* parts;  // each is added to
  int64_t part_count;
};

// A factor of an adapter as products read it: place = scale * factor, rounded to the factor's type
// and then to the place's.
struct LoraPlacing {
  const void* factor;  // [rows, cols]
  DType dtype;         // of the factor
  void* place;         // [rows, cols]
  int64_t rows, cols, row_stride, col_stride, place_stride;
  double scale;
};

struct PlaceFactorsArgs {
  const LoraPlacing* placings;
  int64_t placing_count;
};

// An adapter of a linear, as the model stores it.
struct LoraAdapter {
  const void* lora_a;  // [ranks, cols]
  const void* lora_b;  // [rows of the linear, ranks]
  DType dtype;         // of both
  int64_t ranks, a_stride, b_stride;
  double scaling;
};

// One linear of a group: how many rows of the group's weight are its own, and how many adapters.
struct LoraBase {
  int64_t rows;
  const void* bias;  // [rows], or null
  int64_t adapters;
};

// Adapters stand in the order of their linears.
struct FewRowsArgs {
  const void* x;         // [rows, cols]
  const void* weight;    // [outer, cols], the linears' weights one below the other
  const void* residual;  // [rows, outer], or null
  void* y;               // [rows, outer]
  int64_t rows, cols, x_stride, w_stride, residual_stride, y_stride;
  const LoraBase* linears;
  int64_t linear_count;
  const LoraAdapter* adapters;
  int64_t adapter_count;
};

// A weight of `size` values in blocks of `block` consecutive ones, a power of two from 32; two
// codes in a byte, the first in its upper half. See lora_engine/quantization/blockwise_4bit.py.
struct Quantize4bitArgs {
  const void* w;             // [size]
  const float* bounds;       // [15], ascending: between the values of neighbouring codes
  const uint8_t* ascending;  // [16]: the codes in the order of their values
  uint8_t* codes;            // [ceil(size / 2)]
  float* absmax;             // [ceil(size / block)]
  int64_t size, block;
};

// Rows of such a weight; `first` is the place of w[0, 0] among its values.
struct Dequantize4bitArgs {
  const uint8_t* codes;
  const void* absmax;          // float32, or with nested_absmax uint8
  const float* nested_absmax;  // of 256 blocks' codes, or null
  const float* nested_code;    // [256]: the values of those codes
  const float* offset;         // [1], added to them
  const float* values;         // [16]: of the codes
  void* w;                     // [rows, cols]
  int64_t rows, cols, stride, first, block;
};

// Blocks of 256 float32 values as GGUF's Q4_K, Q5_K or Q6_K, by their bits.
struct QuantizeKArgs {
  const float* w;  // [256 blocks]
  uint8_t* codes;  // [blocks, 144, 176 or 210]
  int64_t blocks, bits;
};

// What a code of a packed weight is; of four bits two are in a byte, the first in its lower half.
enum class PackedElement : int64_t { kInt8, kUint8, kE4m3, kE2m1, kUint4 };

// w = (code - zero) * scale * factor, with a scale, and perhaps a zero, for each `group` columns.
struct DecodeScaledArgs {
  const uint8_t* codes;  // [rows], codes_stride bytes apart
  const float* scale;    // [rows, ceil(cols / group)]; a stride of 0 lets all rows share it
  const float* zero;     // as scale, or null: then zero_of_all
  void* w;               // [rows, cols]
  int64_t rows, cols, group, codes_stride, scale_stride, zero_stride, stride;
  int64_t element;  // a PackedElement
  float zero_of_all, factor;
};

enum class GgufType : int64_t { kQ4_0, kQ4_1, kQ5_0, kQ5_1, kQ8_0, kQ4_K, kQ5_K, kQ6_K };

// Rows of whole blocks of a GGUF file.
struct DecodeBlocksArgs {
  const uint8_t* codes;  // [rows], codes_stride bytes apart
  void* w;               // [rows, cols]
  int64_t rows, cols, codes_stride, stride;
  int64_t type;  // a GgufType
};

// k may be 0: the sums are then 0.
struct MatmulArgs {
  const void* a;       // [m, k]
  const void* b;       // [n, k] if b_transposed, else [k, n]
  const void* addend;  // [m, n], may be c; with addend_stride 0 [n]; or null
  void* c;             // [m, n]: a b + addend, rounded once
  int64_t m, n, k, a_stride, b_stride, addend_stride, c_stride;
  bool b_transposed;
};

struct Kernels {
  const char* isa;
  void (*rms_norm_fwd)(DType, const RmsNormArgs&);
  void (*rms_norm_bwd)(DType, const RmsNormBwdArgs&);
  void (*layer_norm_fwd)(DType, const LayerNormArgs&);
  void (*layer_norm_bwd)(DType, const LayerNormBwdArgs&);
  void (*rope)(DType, const RopeArgs&);
  void (*glu_fwd)(DType, const GluArgs&);
  void (*glu_bwd)(DType, const GluBwdArgs&);
  void (*cross_entropy)(DType, const CrossEntropyArgs&);
  void (*attention_fwd)(DType, const AttentionArgs&);
  void (*attention_bwd)(DType, const AttentionBwdArgs&);
  void (*attention_decode)(DType, const AttentionDecodeArgs&);
  void (*adamw)(DType, const AdamWArgs&);
  void (*dropout)(DType, const DropoutArgs&);
  void (*adamw_8bit)(const AdamW8bitArgs&);
  void (*grad_norm)(DType, const GradNormArgs&);
  void (*matmul)(DType, const MatmulArgs&);
  void (*lora_a_fwd)(DType, const LoraAFwdArgs&);
  void (*lora_b_bwd)(DType, const LoraBBwdArgs&);
  void (*lora_a_bwd)(DType, const LoraABwdArgs&);
  void (*place_factors)(DType, const PlaceFactorsArgs&);
  void (*lora_linear_few_rows)(DType, const FewRowsArgs&);
  void (*quantize_4bit)(DType, const Quantize4bitArgs&);
  void (*dequantize_4bit)(DType, const Dequantize4bitArgs&);
  void (*quantize_k)(const QuantizeKArgs&);
  void (*decode_scaled)(DType, const DecodeScaledArgs&);
  void (*decode_blocks)(DType, const DecodeBlocksArgs&);
};

// The best table that was built and that this processor can run; null where it can run none.
const Kernels* kernels();

// Every table that was built, best first; `runs` says whether this processor can run it.
struct BuiltIsa {
  const Kernels* table;
  bool runs;
};
int built_isas(const BuiltIsa** list);

// Make kernels() answer with the table named `isa`; false where it is not built or cannot run.
bool select_isa(const char* isa);

}  // namespace lora_engine
