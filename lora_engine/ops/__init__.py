"""The operations: shape checks, gradients, and the choice of what runs.

Each takes `impl` ("reference", "cpu", "triton" or "cuda") to force one implementation; None lets
`lora_engine.backends` choose.
"""

from lora_engine.ops.adamw import adamw_, grad_norm
from lora_engine.ops.adamw_8bit import ADAMW_8BIT_BLOCK, adamw_8bit_
from lora_engine.ops.attention import attention
from lora_engine.ops.attention_decode import CacheRows, attention_decode
from lora_engine.ops.blockwise_4bit import dequantize_4bit_, quantize_4bit
from lora_engine.ops.cross_entropy import cross_entropy
from lora_engine.ops.exchange import to_heads, to_tokens
from lora_engine.ops.glu import glu
from lora_engine.ops.head.linear_cross_entropy import LinearCrossEntropy, linear_cross_entropy
from lora_engine.ops.head.linear_divergence import (
    HeadInput,
    LinearDivergence,
    linear_divergence,
)
from lora_engine.ops.k_quants import quantize_k
from lora_engine.ops.layer_norm import layer_norm
from lora_engine.ops.lora.added import adding_gradients
from lora_engine.ops.lora.base import BaseWeight, DenseBase
from lora_engine.ops.lora.embedding import lora_embedding
from lora_engine.ops.lora.few_rows import linear as linear_few_rows
from lora_engine.ops.lora.group import LoraGroup
from lora_engine.ops.lora.linear import lora_linear
from lora_engine.ops.lora.quantized_base import QuantizedBase
from lora_engine.ops.lora.storage import Weight, base_of, has_base
from lora_engine.ops.mergeable_weight import MergeableWeight
from lora_engine.ops.quantized_weight import QuantizedWeight, quantize_weight
from lora_engine.ops.rms_norm import rms_norm
from lora_engine.ops.rope import rope
from lora_engine.ops.sharded_weight import ShardedWeight, shard_weight
from lora_engine.ops.stored_weight import HostMemory, StoredWeight, store_weight
from lora_engine.values import Dropout, LoraFactors, PreNorm

__all__ = [
    "ADAMW_8BIT_BLOCK",
    "BaseWeight",
    "CacheRows",
    "DenseBase",
    "Dropout",
    "HeadInput",
    "HostMemory",
    "LinearCrossEntropy",
    "LinearDivergence",
    "LoraFactors",
    "LoraGroup",
    "MergeableWeight",
    "PreNorm",
    "QuantizedBase",
    "QuantizedWeight",
    "ShardedWeight",
    "StoredWeight",
    "Weight",
    "adamw_",
    "adamw_8bit_",
    "adding_gradients",
    "attention",
    "attention_decode",
    "base_of",
    "cross_entropy",
    "dequantize_4bit_",
    "glu",
    "grad_norm",
    "has_base",
    "layer_norm",
    "linear_cross_entropy",
    "linear_divergence",
    "linear_few_rows",
    "lora_embedding",
    "lora_linear",
    "quantize_4bit",
    "quantize_k",
    "quantize_weight",
    "rms_norm",
    "rope",
    "shard_weight",
    "store_weight",
    "to_heads",
    "to_tokens",
]
