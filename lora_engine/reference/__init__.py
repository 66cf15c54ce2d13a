"""Plain PyTorch, imports nothing else of lora_engine: what says which answer is right.

Arithmetic is float32 (float64 for float64 inputs), rounded once to the input's dtype at the end.
Every function is differentiable by autograd.
"""

from lora_engine.reference.adamw import adamw_
from lora_engine.reference.attention import attention
from lora_engine.reference.cross_entropy import cross_entropy
from lora_engine.reference.glu import glu
from lora_engine.reference.linear_cross_entropy import linear_cross_entropy
from lora_engine.reference.lora_linear import lora_linear
from lora_engine.reference.rms_norm import rms_norm
from lora_engine.reference.rope import rope

__all__ = [
    "adamw_",
    "attention",
    "cross_entropy",
    "glu",
    "linear_cross_entropy",
    "lora_linear",
    "rms_norm",
    "rope",
]
