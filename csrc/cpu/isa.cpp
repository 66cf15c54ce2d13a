// The table of one instruction set. Compiled once for each, like the kernels.
#include "isa.hpp"

#define LORA_ENGINE_STRING_(x) #x
#define LORA_ENGINE_STRING(x) LORA_ENGINE_STRING_(x)

namespace lora_engine {
namespace LORA_ENGINE_ISA {

extern const Kernels table;
const Kernels table = {
    LORA_ENGINE_STRING(LORA_ENGINE_ISA),
    rms_norm_fwd,
    rms_norm_bwd,
    layer_norm_fwd,
    layer_norm_bwd,
    rope,
    glu_fwd,
    glu_bwd,
    cross_entropy,
    attention_fwd,
    attention_bwd,
    attention_decode,
    adamw,
    dropout,
    adamw_8bit,
    grad_norm,
    matmul,
    lora_a_fwd,
    lora_b_bwd,
    lora_a_bwd,
    place_factors,
    lora_linear_few_rows,
    quantize_4bit,
    dequantize_4bit,
    quantize_k,
    decode_scaled,
    decode_blocks,
};

}  // namespace LORA_ENGINE_ISA
}  // namespace lora_engine
