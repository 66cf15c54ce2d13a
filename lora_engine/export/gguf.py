"""GGUF files for llama.cpp, Ollama and LM Studio, written through the package gguf."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lora_engine import ops
from lora_engine.errors import UserError
from lora_engine.export.gguf_families import (
    add_settings,
    extra_tensors,
    family_of,
    interleave,
    restored,
    rotated_heads,
    stored,
)
from lora_engine.export.gguf_vocabulary import add_vocabulary
from lora_engine.export.weights import MergedWeights

if TYPE_CHECKING:
    from lora_engine.export.adapter import Adapter

# By the name asked for: the type of most matrices, and llama.cpp's number for such a file.
TYPES = {
    "f32": ("F32", 0),
    "f16": ("F16", 1),
    "bf16": ("BF16", 32),
    "q8_0": ("Q8_0", 7),
    "q4_0": ("Q4_0", 2),
    "q4_1": ("Q4_1", 3),
    "q5_0": ("Q5_0", 8),
    "q5_1": ("Q5_1", 9),
    "mxfp4": ("MXFP4", 38),
    "q4_k": ("Q4_K", 15),
    "q5_k": ("Q5_K", 17),
    "q6_k": ("Q6_K", 18),
}
_K = ("Q4_K", "Q5_K", "Q6_K")
# For rows that are no whole number of blocks of 256, which small models alone have.
_INSTEAD = "Q8_0"
# The most of |w| that a tensor's values can be off by, root mean squares: of codes with a scale for
# each block, half a step where a block is one large value, |w| sqrt(block), and small ones between
# two codes. Usual weights lose a third of it.
_LOSES = {
    "F32": 1e-6,
    "F16": 1e-3,
    "BF16": 4e-3,
    "Q8_0": 0.023,
    "Q6_K": 0.08,
    **dict.fromkeys(("Q5_K", "Q5_0", "Q5_1"), 0.18),
    **dict.fromkeys(("Q4_K", "Q4_0", "Q4_1"), 0.36),
    "MXFP4": 0.4,
}
_FINE = {"F32", "F16", "BF16", "Q8_0", "Q6_K"}


@dataclass(frozen=True)
class Written:
    """path: of the file. types: number of tensors by their type."""

    path: Path
    types: dict[str, int]


@dataclass(frozen=True)
class _Planned:
    """A tensor to be written: its name and type in the file, and what gives its values."""

    name: str
    kind: str
    shape: tuple[int, ...]
    values: Callable[[], Tensor]


def write_gguf(
    weights: MergedWeights,
    config: Any,
    tokenizer: Any,
    path: Path,
    kind: str,
    *,
    name: str,
    stops: Sequence[int] = (),
    values_of: Path | None = None,
) -> Written:
    """Write the model to the GGUF file `path`; one tensor is in memory at once.

    config: of transformers. kind: one of TYPES. name: of the model, for people. stops: tokens that
    end an answer. values_of: a file of the same model, whose values are written in place of the
    weights'. Raises UserError for a model that llama.cpp has no architecture for here.
    """
    import gguf

    family = family_of(config)
    main, file_type = TYPES[kind]
    names = weights.names()
    head_apart = any(n.endswith("lm_head.weight") for n in names)
    if family.tied_only and head_apart and weights.untied:
        raise UserError(
            f"the adapter parts head and embedding, which llama.cpp's {family.architecture} has as "
            "one; train with lora.ensure_weight_tying, or use --format hf"
        )
    writer = gguf.GGUFWriter(None, family.architecture)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    add_settings(writer, config, file_type)
    if kind not in ("f32", "f16", "bf16"):
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    rows = weights.shape(_embedding_name(names))[0]
    add_vocabulary(writer, tokenizer, rows, stops)

    mapped = gguf.get_tensor_name_map(_architecture(family.architecture), config.num_hidden_layers)
    unpacked = None if values_of is None else _Unpacked(values_of)
    planned = [_held(extra, tensor) for extra, tensor in extra_tensors(config)]
    for source in names:
        if family.tied_only and source.endswith("lm_head.weight"):
            continue
        target = mapped.get_name(source, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise UserError(
                f"tensor {source} has no place in llama.cpp's {family.architecture}; use "
                "--format hf"
            )
        shape = weights.shape(source)
        chosen = tensor_type(target, shape, main, config.num_hidden_layers, head_apart)
        values = partial(_stored, weights, source, config)
        if unpacked is not None:
            values = partial(unpacked.values, target)
        planned.append(_Planned(name=target, kind=chosen, shape=shape, values=values))
    types: dict[str, int] = {}
    for tensor in planned:
        types[tensor.kind] = types.get(tensor.kind, 0) + 1
    _write(writer, path, planned)
    return Written(path, types)


def tensor_type(name: str, shape: Sequence[int], main: str, layers: int, head_apart: bool) -> str:
    """The type of a tensor in a file whose matrices are mostly of the type `main`.

    Vectors and norms are float32. In files of 4 and 5 bits the head, or the embedding where it is
    the head, is Q6_K, and so are, with K types, the value and down projections of the first and
    last eighth of the layers and of every third between: their errors reach the result unaveraged.
    """
    if len(shape) < 2 or name.endswith("_norm.weight"):
        return "F32"
    chosen = main
    if main not in _FINE:
        head = "output.weight" if head_apart else "token_embd.weight"
        if name == head or (main == "MXFP4" and name == "token_embd.weight"):
            chosen = "Q6_K"
        elif main in _K and name.endswith(("attn_v.weight", "ffn_down.weight")):
            layer = int(name.split(".")[1])
            inner = layer - layers // 8
            if inner < 0 or layer >= layers - layers // 8 or inner % 3 == 2:
                chosen = "Q6_K"
    if chosen in _K and shape[-1] % 256:
        chosen = _INSTEAD
    if chosen not in ("F32", "F16", "BF16") and chosen not in _K and shape[-1] % 32:
        chosen = "F16"
    return chosen


def encode(tensor: Tensor, kind: str, name: str) -> np.ndarray:
    """The bytes of a float32 tensor [N, K] or [N] in one of GGUF's types.

    Raises UserError, with the tensor's `name`, for values that the type cannot hold.
    """
    import gguf

    if not torch.isfinite(tensor).all():
        raise UserError(f"tensor {name} holds values that are not finite; the weights are damaged")
    largest = tensor.abs().max() if tensor.numel() else 0.0
    if kind not in ("F32", "BF16") and largest > torch.finfo(torch.float16).max:
        raise UserError(f"tensor {name} holds values beyond float16's; use --type bf16")
    if kind in _K:
        return ops.quantize_k(tensor, kind).numpy()
    return gguf.quants.quantize(tensor.numpy(), gguf.GGMLQuantizationType[kind])


def write_gguf_adapter(adapter: "Adapter", config: Any, path: Path, *, name: str) -> Written:
    """A LoRA adapter as llama.cpp loads it beside its base's GGUF file, in float32.

    config: of the base, as transformers has it. Raises UserError for what such a file cannot hold:
    DoRA, modules trained in full, and scalings that differ between layers.
    """
    import gguf

    family = family_of(config)
    layers = adapter.low_rank
    if adapter.is_dora or adapter.whole or any(x.bias is not None for x in layers.values()):
        raise UserError(
            f"{adapter.folder}: llama.cpp's adapters hold LoRA matrices alone, no DoRA, biases or "
            "modules trained in full; use --format gguf, which merges them"
        )
    mapped = gguf.get_tensor_name_map(_architecture(family.architecture), config.num_hidden_layers)
    writer = gguf.GGUFWriter(None, family.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    # llama.cpp scales by alpha / r for each tensor: alpha 1, and B holds the rest.
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 1.0)
    planned = []
    for module, layer in layers.items():
        target = mapped.get_name(f"{module}.weight", try_suffixes=(".weight",))
        if target is None or layer.transposed:
            raise UserError(
                f"{adapter.folder}: {module} has no place in llama.cpp's adapters; use "
                "--format gguf, which merges it"
            )
        b = layer.b.float() * (layer.scaling * len(layer.a))
        heads = rotated_heads(f"{module}.weight", config)
        if heads is not None:
            b = interleave(b, heads)
        planned += [_held(f"{target}.lora_a", layer.a.float()), _held(f"{target}.lora_b", b)]
    _write(writer, path, planned)
    return Written(path, {"F32": len(planned)})


def check_values(path: Path, weights: MergedWeights, config: Any) -> tuple[str, float]:
    """The tensor of the GGUF file `path` that is farthest from the weights that it was written of,
    by what its type may lose, and how far: |file - weights| / |weights|, root mean squares.

    One tensor is in memory at once. Raises UserError for one that is farther than its type loses of
    any weights.
    """
    import gguf

    unpacked, worst, farthest = _Unpacked(path), ("", 0.0), 0.0
    family = family_of(config)
    mapped = gguf.get_tensor_name_map(_architecture(family.architecture), config.num_hidden_layers)
    for source in weights.names():
        name = mapped.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None or name not in unpacked:  # a head that is the embedding
            continue
        own, kind = _stored(weights, source, config).double(), unpacked.kind(name)
        off = (unpacked.values(name).reshape(own.shape).double() - own).norm()
        lost = float(off / own.norm()) if off else 0.0
        if not lost <= _LOSES[kind]:
            raise UserError(
                f"tensor {name}: its {kind} values are {lost:.2%} off the weights, "
                f"{_LOSES[kind]:.2%} at most are the type's; use --type bf16, or --format hf"
            )
        if lost / _LOSES[kind] > farthest:
            worst, farthest = (name, lost), lost / _LOSES[kind]
    return worst


def put_values(path: Path, model: Any) -> None:
    """Puts the values of the GGUF file `path` into the weights of transformers' `model`, which it
    was written of. A head that the file has apart from the embedding is so in the model too."""
    import gguf

    config, unpacked = model.config, _Unpacked(path)
    family = family_of(config)
    mapped = gguf.get_tensor_name_map(_architecture(family.architecture), config.num_hidden_layers)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head.weight is embedding.weight and "output.weight" in unpacked:
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = unpacked.values(mapped.get_name(name, try_suffixes=(".weight", ".bias")))
            parameter.copy_(restored(name, values.reshape(parameter.shape), config))


class _Unpacked:
    """The values of a file's tensors, in float32."""

    def __init__(self, path: Path) -> None:
        import gguf

        self._tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def kind(self, name: str) -> str:
        return str(self._tensors[name].tensor_type.name)

    def values(self, name: str) -> Tensor:
        import gguf

        tensor = self._tensors[name]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        return torch.from_numpy(np.array(values, dtype=np.float32))


def _architecture(name: str) -> Any:
    import gguf

    return next(arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == name)


def _embedding_name(names: Sequence[str]) -> str:
    found = next((n for n in names if n.endswith("embed_tokens.weight")), None)
    if found is None:
        raise UserError("the model's files hold no embedding, embed_tokens; get the complete model")
    return found


def _stored(weights: MergedWeights, source: str, config: Any) -> Tensor:
    return stored(source, weights.tensor(source), config)


def _held(name: str, tensor: Tensor) -> _Planned:
    return _Planned(name=name, kind="F32", shape=tuple(tensor.shape), values=lambda: tensor)


def _add_info(writer: Any, tensor: _Planned) -> None:
    import gguf

    qtype = gguf.GGMLQuantizationType[tensor.kind]
    if tensor.kind in ("F32", "F16"):
        dtype = np.dtype(np.float32 if tensor.kind == "F32" else np.float16)
        nbytes = int(np.prod(tensor.shape)) * dtype.itemsize
        writer.add_tensor_info(tensor.name, list(tensor.shape), dtype, nbytes, qtype)
        return
    in_bytes = gguf.quant_shape_to_byte_shape(tensor.shape, qtype)
    nbytes = int(np.prod(in_bytes))
    writer.add_tensor_info(tensor.name, in_bytes, np.dtype(np.uint8), nbytes, qtype)


def _write(writer: Any, path: Path, planned: Sequence[_Planned]) -> None:
    for tensor in planned:
        _add_info(writer, tensor)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    file = writer.fout[0]
    writer.write_padding(file, file.tell())
    for tensor in planned:
        content = encode(tensor.values(), tensor.kind, tensor.name)
        in_bytes = np.ascontiguousarray(content).view(np.uint8).reshape(-1)
        file.write(in_bytes.data)
        writer.write_padding(file, in_bytes.nbytes)
    writer.close()
