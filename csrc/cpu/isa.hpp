// The entry points that every instruction set provides, in its own namespace.
#pragma once

#include "kernels.hpp"

namespace lora_engine {
namespace LORA_ENGINE_ISA {

void rms_norm_fwd(DType, const RmsNormArgs&);
void rms_norm_bwd(DType, const RmsNormBwdArgs&);
void layer_norm_fwd(DType, const LayerNormArgs&);
void layer_norm_bwd(DType, const LayerNormBwdArgs&);
void rope(DType, const RopeArgs&);
void glu_fwd(DType, const GluArgs&);
void glu_bwd(DType, const GluBwdArgs&);
void cross_entropy(DType, const CrossEntropyArgs&);
void attention_fwd(DType, const AttentionArgs&);
void attention_bwd(DType, const AttentionBwdArgs&);
void attention_decode(DType, const AttentionDecodeArgs&);
void adamw(DType, const AdamWArgs&);
void dropout(DType, const DropoutArgs&);
void adamw_8bit(const AdamW8bitArgs&);
void grad_norm(DType, const GradNormArgs&);
void matmul(DType, const MatmulArgs&);
void lora_a_fwd(DType, const LoraAFwdArgs&);
void lora_b_bwd(DType, const LoraBBwdArgs&);
void lora_a_bwd(DType, const LoraABwdArgs&);
void place_factors(DType, const PlaceFactorsArgs&);
void lora_linear_few_rows(DType, const FewRowsArgs&);
void quantize_4bit(DType, const Quantize4bitArgs&);
void dequantize_4bit(DType, const Dequantize4bitArgs&);
void quantize_k(const QuantizeKArgs&);
void decode_scaled(DType, const DecodeScaledArgs&);
void decode_blocks(DType, const DecodeBlocksArgs&);

}  // namespace LORA_ENGINE_ISA
}  // namespace lora_engine
