"""A model's shapes without its weights: what can be known before anything is loaded."""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from lora_engine.models.load.gguf import gguf_config
from lora_engine.models.load.load import model_config, resolve_source
from lora_engine.models.load.skeleton import empty_model
from lora_engine.models.load.streamed import stated_quantization


class Outline(NamedTuple):
    """model: of transformers, its parameters on meta. packed_bytes: what its files hold, where
    linears are in packed bits there; 0 where they are not, or are unpacked when they are read."""

    model: Any
    packed_bytes: int


def outline(source: str, dtype: torch.dtype, *, keep_quantized: bool = False) -> Outline:
    """Of the model that `load_model` would give. Raises UserError as that does."""
    resolved = resolve_source(source)
    if isinstance(resolved, Path):
        config, size = gguf_config(resolved), resolved.stat().st_size
        packed = size if keep_quantized else 0
    else:
        config = model_config(source, resolved)
        files = Path(resolved).glob("*.safetensors") if Path(resolved).is_dir() else ()
        packed = sum(file.stat().st_size for file in files) if stated_quantization(config) else 0
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return Outline(empty_model(config, dtype), packed)
