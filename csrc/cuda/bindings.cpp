// The launchers of csrc/cuda for Python: each takes its struct of arguments (csrc/fields.hpp) and
// the stream's handle.
#include "bindings.hpp"

#include "../fields.hpp"
#include "launchers.hpp"

namespace lora_engine {

LORA_ENGINE_FIELDS(cuda::AdamWHyper, FIELD(lr), FIELD(beta1), FIELD(beta2), FIELD(eps),
                   FIELD(weight_decay), FIELD(bias_correction1), FIELD(bias_correction2),
                   FIELD(grad_norm), FIELD(max_grad_norm));
LORA_ENGINE_FIELDS(cuda::AdamWArgs, FIELD(params), FIELD(grads), FIELD(exp_avg), FIELD(exp_avg_sq),
                   FIELD(size), FIELD(hyper));
LORA_ENGINE_FIELDS(cuda::AdamW8bitArgs, FIELD(params), FIELD(grads), FIELD(exp_avg),
                   FIELD(exp_avg_sq), FIELD(exp_avg_absmax), FIELD(exp_avg_sq_absmax), FIELD(size),
                   FIELD(hyper));
LORA_ENGINE_FIELDS(cuda::AttentionFwdArgs, FIELD(q), FIELD(k), FIELD(v), FIELD(cu_seqlens),
                   FIELD(o), FIELD(lse), FIELD(taken), FIELD(stride_q), FIELD(stride_k),
                   FIELD(stride_v), FIELD(stride_o), FIELD(tokens), FIELD(sequences), FIELD(heads),
                   FIELD(kv_heads), FIELD(head_dim), FIELD(causal), FIELD(window), FIELD(dtype),
                   FIELD(scale));
LORA_ENGINE_FIELDS(cuda::AttentionBwdArgs, FIELD(d_o), FIELD(q), FIELD(k), FIELD(v), FIELD(o),
                   FIELD(lse), FIELD(dq), FIELD(dk), FIELD(dv), FIELD(cu_seqlens), FIELD(stats),
                   FIELD(dq_sum), FIELD(order), FIELD(stride_do), FIELD(stride_q), FIELD(stride_k),
                   FIELD(stride_v), FIELD(stride_o), FIELD(stride_dq), FIELD(stride_dk),
                   FIELD(stride_dv), FIELD(tokens), FIELD(sequences), FIELD(heads), FIELD(kv_heads),
                   FIELD(head_dim), FIELD(causal), FIELD(dtype), FIELD(scale));
LORA_ENGINE_FIELDS(cuda::AttentionMmaFwdArgs, FIELD(q), FIELD(k), FIELD(v), FIELD(cu_seqlens),
                   FIELD(parents), FIELD(o), FIELD(lse), FIELD(stride_q), FIELD(stride_k),
                   FIELD(stride_v), FIELD(stride_o), FIELD(tokens), FIELD(sequences), FIELD(heads),
                   FIELD(kv_heads), FIELD(head_dim), FIELD(causal), FIELD(window), FIELD(dtype),
                   FIELD(scale));
LORA_ENGINE_FIELDS(cuda::AttentionMmaBwdArgs, FIELD(d_o), FIELD(q), FIELD(k), FIELD(v), FIELD(o),
                   FIELD(lse), FIELD(dq), FIELD(dk), FIELD(dv), FIELD(cu_seqlens), FIELD(parents),
                   FIELD(delta), FIELD(last), FIELD(stride_do), FIELD(stride_q), FIELD(stride_k),
                   FIELD(stride_v), FIELD(stride_o), FIELD(stride_dq), FIELD(stride_dk),
                   FIELD(stride_dv), FIELD(tokens), FIELD(sequences), FIELD(heads), FIELD(kv_heads),
                   FIELD(head_dim), FIELD(causal), FIELD(window), FIELD(dtype), FIELD(scale));
LORA_ENGINE_FIELDS(cuda::GradNormArgs, FIELD(grads), FIELD(partials), FIELD(norm), FIELD(size));
LORA_ENGINE_FIELDS(cuda::Quantize4bitArgs, FIELD(w), FIELD(bounds), FIELD(ascending), FIELD(codes),
                   FIELD(absmax), FIELD(size), FIELD(block), FIELD(dtype));
LORA_ENGINE_FIELDS(cuda::Dequantize4bitArgs, FIELD(codes), FIELD(absmax), FIELD(nested_absmax),
                   FIELD(nested_code), FIELD(offset), FIELD(values), FIELD(w), FIELD(rows),
                   FIELD(cols), FIELD(stride), FIELD(first), FIELD(block), FIELD(dtype));

namespace cuda {
namespace {

template <class Args>
void define(py::module_& m, const char* name, void (*launch)(const Args&, void*)) {
  m.def(name, [launch](py::handle given, uintptr_t stream) {
    Elements elements;
    const Args args = read_fields<Args>(given, elements);
    py::gil_scoped_release released;
    launch(args, reinterpret_cast<void*>(stream));
  });
}

}  // namespace

void bind(py::module_ m) {
  define(m, "adamw", &adamw);
  define(m, "adamw_8bit", &adamw_8bit);
  define(m, "attention_fwd", &attention_fwd);
  define(m, "attention_bwd", &attention_bwd);
  define(m, "attention_mma_fwd", &attention_mma_fwd);
  define(m, "attention_mma_bwd", &attention_mma_bwd);
  define(m, "grad_norm", &grad_norm);
  define(m, "quantize_4bit", &quantize_4bit);
  define(m, "dequantize_4bit", &dequantize_4bit);
}

}  // namespace cuda
}  // namespace lora_engine
