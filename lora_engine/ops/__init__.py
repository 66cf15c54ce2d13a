"""The operations: shape checks, gradients, and the choice of what runs.

Each takes `impl` ("reference" or "cpu") to force one implementation; None lets
`lora_engine.backends` choose.
"""

from lora_engine.ops.adamw import adamw_
from lora_engine.ops.attention import attention
from lora_engine.ops.cross_entropy import cross_entropy
from lora_engine.ops.glu import glu, swiglu
from lora_engine.ops.linear_cross_entropy import LinearCrossEntropy, linear_cross_entropy
from lora_engine.ops.lora_linear import AugmentedWeight, LoraFactors, lora_linear
from lora_engine.ops.rms_norm import rms_norm
from lora_engine.ops.rope import rope, rope_

__all__ = [
    "AugmentedWeight",
    "LinearCrossEntropy",
    "LoraFactors",
    "adamw_",
    "attention",
    "cross_entropy",
    "glu",
    "linear_cross_entropy",
    "lora_linear",
    "rms_norm",
    "rope",
    "rope_",
    "swiglu",
]
