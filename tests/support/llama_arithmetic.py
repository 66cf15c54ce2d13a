"""The arithmetic of llama.cpp on a CPU: what a matrix multiplies is rounded as its type asks.

Blocks of 32 values get a float16 scale for their largest, blocks of 256 (K types) a float32 one;
the codes are whole numbers of 8 bits. Beside 16-bit matrices activations are 16-bit floats.
What Q4_1 and Q5_1 round besides, a sum of codes times the minimum, is not here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor, nn


def as_multiplied(x: Tensor, kind: str) -> Tensor:
    """What llama.cpp makes of activations [..., K] float32 before a matrix of type `kind`."""
    if kind in ("F32", "F16", "BF16"):
        return x.to({"F32": x.dtype, "F16": torch.half, "BF16": torch.bfloat16}[kind]).to(x.dtype)
    wide = kind.endswith("_K")
    blocks = x.unflatten(-1, (-1, 256 if wide else 32))
    scale = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
    real = blocks / scale
    if wide:  # a half goes away from zero, else to the even number
        return ((real.abs() + 0.5).floor() * real.sign() * scale).flatten(-2)
    return (real.round() * scale.half().float()).flatten(-2)


@contextmanager
def llama_arithmetic(model: Any, path: Path) -> Iterator[None]:
    """Within, `model` of transformers multiplies as llama.cpp does with the file `path` of it."""
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    architecture = next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == model.config.model_type)
    names = gguf.get_tensor_name_map(architecture, model.config.num_hidden_layers)
    hooks = []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            target = names.get_name(f"{name}.weight", try_suffixes=(".weight",))
            kind = kinds.get(target, kinds["token_embd.weight"])  # a head that is the embedding

            def rounding(_: nn.Module, inputs: tuple[Tensor], kind: str = kind) -> tuple[Tensor]:
                return (as_multiplied(inputs[0], kind),)

            hooks.append(layer.register_forward_pre_hook(rounding))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
