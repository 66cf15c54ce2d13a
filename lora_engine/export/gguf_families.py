"""What llama.cpp calls a model's tensors and settings, and what it expects of their values."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_engine.errors import UserError


@dataclass(frozen=True)
class Family:
    """How a model_type of transformers becomes an architecture of llama.cpp.

    interleaved: llama.cpp rotates neighbouring values of a head, transformers the halves: the rows
    of query and key projections are reordered. norm_offset: added to the norms' weights. tied_only:
    it has no head apart from the embedding. activation: of the MLP. biased: its linears may have
    biases that others of it have not.
    """

    architecture: str
    interleaved: bool = False
    norm_offset: float = 0.0
    tied_only: bool = False
    activation: tuple[str, ...] = ("silu", "swish")
    biased: bool = False


_GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu")
FAMILIES = {
    "llama": Family("llama", interleaved=True, biased=True),
    "mistral": Family("llama", interleaved=True, biased=True),
    "smollm3": Family("smollm3", interleaved=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "gemma2": Family("gemma2", norm_offset=1.0, tied_only=True, activation=_GELU),
    "gemma3_text": Family("gemma3", norm_offset=1.0, activation=_GELU),
}
# Layers of the one size of Gemma whose queries are scaled by another number than the head's width.
_GEMMA_SCALED_BY_HEADS = (46, 62)


def family_of(config: Any) -> Family:
    """Raises UserError for a model_type that no GGUF file is written for."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UserError(
            f"model_type {config.model_type} has no GGUF export here; it is there for "
            f"{', '.join(FAMILIES)}: use --format hf, and llama.cpp's own converter"
        )
    return family


def add_settings(writer: Any, config: Any, file_type: int) -> None:
    """Adds the architecture's metadata to a `gguf.GGUFWriter`.

    Raises UserError for settings that llama.cpp's architecture does not have.
    """
    _check_settings(config)
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(file_type)
    _add_rope(writer, config)
    if family_of(config).interleaved:
        writer.add_rope_dimension_count(head_dim)
    if config.model_type == "smollm3":
        _check_layers(config, "no_rope_layers", [int((i + 1) % 4 != 0) for i in _layers(config)])
    if config.model_type in ("gemma2", "gemma3_text"):
        _add_gemma(writer, config, head_dim)
    elif _has_windows(config):
        raise UserError(
            f"sliding_window is {config.sliding_window}, which llama.cpp's {config.model_type} has "
            "not; use --format hf"
        )


def _check_settings(config: Any) -> None:
    """Raises UserError for what llama.cpp computes otherwise, whatever the file says."""
    family = family_of(config)

    def check(fits: bool, field: str, value: object) -> None:
        if not fits:
            raise UserError(
                f"{field} is {value}, which llama.cpp's {family.architecture} has not; use "
                "--format hf"
            )

    gelu = getattr(config, "hidden_activation", None)
    activation = gelu or getattr(config, "hidden_act", None) or family.activation[0]
    check(activation in family.activation, "hidden_act", activation)
    for field in ("attention_bias", "mlp_bias"):
        value = getattr(config, field, False)
        check(family.biased or not value, field, value)
    llama3 = _rope(config).get("rope_type") == "llama3"
    check(not llama3 or family.architecture == "llama", "rope_type", "llama3")
    both_ways = getattr(config, "use_bidirectional_attention", False)
    check(not both_ways, "use_bidirectional_attention", both_ways)


def stored(name: str, tensor: Tensor, config: Any) -> Tensor:
    """The tensor `name` of transformers with the values that llama.cpp expects."""
    family = family_of(config)
    if family.norm_offset and name.endswith("norm.weight"):
        return tensor + family.norm_offset
    heads = rotated_heads(name, config)
    return tensor if heads is None else interleave(tensor, heads)


def restored(name: str, tensor: Tensor, config: Any) -> Tensor:
    """The tensor `name` of transformers from what `stored` returned."""
    family = family_of(config)
    if family.norm_offset and name.endswith("norm.weight"):
        return tensor - family.norm_offset
    heads = rotated_heads(name, config)
    return tensor if heads is None else _part(tensor, heads)


def rotated_heads(name: str, config: Any) -> int | None:
    """Heads of a projection whose rows are reordered, None for other tensors."""
    projection = name.rpartition(".")[0].rpartition(".")[2]
    if not family_of(config).interleaved or projection not in ("q_proj", "k_proj"):
        return None
    heads = int(config.num_attention_heads)
    if projection == "k_proj":
        heads = getattr(config, "num_key_value_heads", None) or heads
    return heads


def interleave(rows: Tensor, heads: int) -> Tensor:
    """[heads * d, …] with the rows of each head's two halves in turn."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def _part(rows: Tensor, heads: int) -> Tensor:
    """What `interleave` was given."""
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)


def extra_tensors(config: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors that transformers computes from settings: Llama 3's divisors of the frequencies."""
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return
    head_dim = getattr(config, "head_dim", None)
    head_dim = head_dim or config.hidden_size // config.num_attention_heads
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float32)
    wavelengths = 2 * math.pi * rope["rope_theta"] ** (pairs / head_dim)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] / wavelengths
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    yield "rope_freqs.weight", 1 / ((1 - smooth) / rope["factor"] + smooth)


def _rope(config: Any) -> dict[str, Any]:
    """The settings of the rotation, of the full attention where there are two kinds."""
    settings = dict(getattr(config, "rope_parameters", None) or {})
    return dict(settings.get("full_attention", settings))


def _add_rope(writer: Any, config: Any) -> None:
    import gguf

    rope = _rope(config)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    of_windows = (getattr(config, "rope_parameters", None) or {}).get("sliding_attention")
    if of_windows:
        writer.add_rope_freq_base_swa(float(of_windows["rope_theta"]))
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
        for ours, theirs in (("attention_factor", "attn_factor"), ("beta_fast", "beta_fast"),
                             ("beta_slow", "beta_slow")):  # fmt: skip
            if rope.get(ours) is not None:
                getattr(writer, f"add_rope_scaling_yarn_{theirs}")(float(rope[ours]))
    elif kind not in ("default", "llama3"):
        raise UserError(f"rope_type {kind} has no GGUF export here; use --format hf")


def _add_gemma(writer: Any, config: Any, head_dim: int) -> None:
    scalar, layers = config.query_pre_attn_scalar, config.num_hidden_layers
    by_heads = layers in _GEMMA_SCALED_BY_HEADS
    by_heads &= scalar == config.hidden_size // config.num_attention_heads
    if scalar != head_dim and not by_heads:
        raise UserError(
            f"query_pre_attn_scalar is {scalar}, where llama.cpp takes the head's width, "
            f"{head_dim}; use --format hf"
        )
    every = 2 if config.model_type == "gemma2" else 6
    kinds = [
        "full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(layers)
    ]
    _check_layers(config, "layer_types", kinds)
    writer.add_sliding_window(config.sliding_window)
    for field, add in (
        ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
        ("final_logit_softcapping", writer.add_final_logit_softcapping),
    ):
        if getattr(config, field, None):
            add(float(getattr(config, field)))


def _check_layers(config: Any, field: str, expected: list[Any]) -> None:
    if list(getattr(config, field)) != expected:
        raise UserError(
            f"{field} are not those of the published models, and llama.cpp's {config.model_type} "
            "has no others; use --format hf"
        )


def _layers(config: Any) -> range:
    return range(config.num_hidden_layers)


def _has_windows(config: Any) -> bool:
    """Whether some layer sees fewer tokens than the context has."""
    window = getattr(config, "sliding_window", None)
    used = getattr(config, "use_sliding_window", config.model_type == "mistral")
    return bool(window and used and window < config.max_position_embeddings)
