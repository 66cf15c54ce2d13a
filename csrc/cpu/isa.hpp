// The entry points that every instruction set provides, in its own namespace.
#pragma once

#include "kernels.hpp"

namespace lora_engine {
namespace LORA_ENGINE_ISA {

void rms_norm_fwd(DType, const RmsNormArgs&);
void rms_norm_bwd(DType, const RmsNormBwdArgs&);
void rope(DType, const RopeArgs&);
void glu_fwd(DType, const GluArgs&);
void glu_bwd(DType, const GluBwdArgs&);
void cross_entropy(DType, const CrossEntropyArgs&);
void attention_fwd(DType, const AttentionArgs&);
void attention_bwd(DType, const AttentionBwdArgs&);
void adamw(DType, const AdamWArgs&);

}  // namespace LORA_ENGINE_ISA
}  // namespace lora_engine
