"""A model whose linears are in the packed bits of a GGUF file, as llama.cpp will serve them.

Codes are read as they stand in the file. Of Llama's q and k, llama.cpp's converter has put the rows
in another order (the two halves of a head interleaved, as its rotation takes them): they are put
back, whole rows of codes at a time. Embeddings, heads and norms are unpacked.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_engine.errors import UserError
from lora_engine.models.load.gguf import gguf_config, state_special_tokens
from lora_engine.models.load.gguf_tensors import GgufFile, number
from lora_engine.models.load.skeleton import Place, empty_model, put, tensors
from lora_engine.models.load.streamed import replace
from lora_engine.models.quantized.linear import QuantizedLinear
from lora_engine.models.quantized.record import record_quantization
from lora_engine.ops import QuantizedWeight
from lora_engine.quantization.gguf import Gguf

# Architectures whose tensors are transformers' one by one, but for the order of q's and k's rows.
ARCHITECTURES = ("llama", "qwen2", "qwen3")
_INTERLEAVED = ("llama",)

_MODULES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LAYER = "model.layers."
_FREQUENCIES = "rope_freqs.weight"


def packed_gguf_model(
    path: Path,
    tokenizer: Any,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> Any:
    """The model in the GGUF file at `path`, on `device`, its linears packed and decoding to dtype.

    tokenizer: the file's. progress: called with the bytes read so far and all of them.

    Raises UserError, with file and tensor, for another architecture or type, and for whatever is
    wrong.
    """
    file = GgufFile(path)
    architecture = file.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError(
            f"{path}: is a {architecture}, trained on packed are {known}; leave "
            "model.keep_quantized out"
        )
    config = gguf_config(path)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.tie_word_embeddings = "output.weight" not in file.tensors
    model = empty_model(config, dtype)
    # Biases first: a packed linear takes its bias along.
    every = sorted(tensors(model), key=lambda found: found[0].child != "bias")
    names = {place.name: _gguf_name(place.name) for place, _ in every}
    if missing := [name for name in names.values() if name not in file.tensors]:
        raise UserError(f"{path}: lacks {missing[0]}; get the complete GGUF file")
    if beyond := sorted(set(file.tensors) - {*names.values(), _FREQUENCIES}):
        raise UserError(
            f"{path}: {beyond[0]} has no place in a {architecture} of transformers; leave "
            "model.keep_quantized out"
        )
    heads = {
        "q_proj": number(file.metadata, f"{architecture}.attention.head_count"),
        "k_proj": config.num_key_value_heads,
    }
    done, total = 0, sum(tensor.nbytes for tensor in file.tensors.values())
    for place, expected in every:
        name = names[place.name]
        linear = place.parent
        interleaved = None
        if architecture in _INTERLEAVED and (module := place.name.split(".")[-2]) in heads:
            interleaved = heads[module]
        value = _read(file, name, expected, dtype, interleaved)
        if isinstance(value, QuantizedWeight) and _stays_packed(model, place):
            assert isinstance(linear, nn.Linear)
            replace(model, linear, QuantizedLinear(value.to(device), linear.bias))
        else:
            dense = value if isinstance(value, Tensor) else value.dequantize()
            put(place, expected, dense.to(device))
        done += file.tensors[name].nbytes
        if progress is not None:
            progress(done, total)
    if _FREQUENCIES in file.tensors:
        _divide_frequencies(model, file.read(_FREQUENCIES))
    model.tie_weights()
    record_quantization(model)
    state_special_tokens(model, tokenizer)
    model.name_or_path = model.config.name_or_path = str(path)
    return model.to(device)


def _gguf_name(name: str) -> str:
    """The file's name of a tensor of transformers' model."""
    module, _, leaf = name.rpartition(".")
    if module.startswith(_LAYER):
        layer, _, module = module.removeprefix(_LAYER).partition(".")
        return f"blk.{layer}.{_MODULES.get(module, module)}.{leaf}"
    return f"{_MODULES.get(module, module)}.{leaf}"


def _stays_packed(model: Any, place: Place) -> bool:
    head = model.get_output_embeddings()
    return type(place.parent) is nn.Linear and place.child == "weight" and place.parent is not head


def _read(
    file: GgufFile, name: str, expected: Tensor, dtype: torch.dtype, heads: int | None
) -> Tensor | QuantizedWeight:
    stored = file.tensors[name]
    if stored.shape != tuple(expected.shape):
        raise UserError(
            f"{file.path}: {name} is {list(stored.shape)}, its metadata says "
            f"{list(expected.shape)}; get the complete GGUF file"
        )
    value = file.read(name)
    if heads is not None:
        value = value[_uninterleaved(len(value), heads)]
    if isinstance(stored.type, torch.dtype):
        finite = bool(value.isfinite().all())
        packed = None
    else:
        shape = (stored.shape[0], stored.shape[1])
        packed = QuantizedWeight(
            format=Gguf(stored.type), tensors={"codes": value}, shape=shape, dtype=dtype
        )
        finite = packed.is_finite
    if not finite:
        raise UserError(f"{file.path}: {name} has values that are not finite; get another file")
    return value if packed is None else packed


def _uninterleaved(rows: int, heads: int) -> Tensor:
    """[rows]: which of the file's rows each of transformers' is."""
    return torch.arange(rows).view(heads, -1, 2).transpose(1, 2).reshape(-1)


def _divide_frequencies(model: nn.Module, factors: Tensor) -> None:
    """Llama 3's rotation at long range, which the file has as factors of its wavelengths."""
    for module in model.modules():
        for name in ("inv_freq", "original_inv_freq"):
            frequencies = getattr(module, name, None)
            if isinstance(frequencies, Tensor) and frequencies.shape == factors.shape:
                setattr(module, name, frequencies / factors.to(frequencies))
