"""Plain PyTorch, made of nothing but values: what says which answer is right.

Arithmetic is float32 (float64 for float64 inputs), rounded once to the input's dtype at the end.
Every function is differentiable by autograd.
"""

from lora_engine.reference.adamw import adamw_, grad_norm
from lora_engine.reference.adamw_8bit import adamw_8bit_
from lora_engine.reference.attention import attention
from lora_engine.reference.attention_block import attention_block
from lora_engine.reference.attention_decode import attention_decode
from lora_engine.reference.blockwise_4bit import dequantize_4bit, quantize_4bit
from lora_engine.reference.cross_entropy import cross_entropy
from lora_engine.reference.dropout import drop, dropout_mask
from lora_engine.reference.glu import glu
from lora_engine.reference.k_quants import quantize_k
from lora_engine.reference.layer_norm import layer_norm
from lora_engine.reference.linear_cross_entropy import head_gradients, linear_cross_entropy
from lora_engine.reference.linear_divergence import linear_divergence
from lora_engine.reference.lora_embedding import lora_embedding
from lora_engine.reference.lora_linear import (
    dora_scale,
    lora_delta,
    lora_group,
    lora_linear,
    merged_weight,
)
from lora_engine.reference.mlp_block import mlp_block
from lora_engine.reference.rms_norm import rms_norm
from lora_engine.reference.rope import rope

__all__ = [
    "adamw_",
    "adamw_8bit_",
    "attention",
    "attention_block",
    "attention_decode",
    "cross_entropy",
    "dequantize_4bit",
    "dora_scale",
    "drop",
    "dropout_mask",
    "glu",
    "grad_norm",
    "head_gradients",
    "layer_norm",
    "linear_cross_entropy",
    "linear_divergence",
    "lora_delta",
    "lora_embedding",
    "lora_group",
    "lora_linear",
    "merged_weight",
    "mlp_block",
    "quantize_4bit",
    "quantize_k",
    "rms_norm",
    "rope",
]
