"""What lora_engine uses of the modules of transformers, PEFT and bitsandbytes, as types.

None of these classes is ever instantiated: a module that was recognised (by `families.structure`,
`is_lora` and the like) is looked at as one of them. What stands here is all that is relied on.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Literal, Protocol

import torch
from torch import Tensor, nn


class BackboneOutput(Protocol):
    """What the layers under a head return."""

    last_hidden_state: Tensor  # [B, L, H]
    past_key_values: "Cache | None"
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None


class Cache(Protocol):
    """Keys and values of the tokens before."""

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]: ...


class Config(Protocol):
    """A model's settings."""

    output_hidden_states: bool
    output_attentions: bool
    pad_token_id: int | None
    quantization_config: object
    _attn_implementation: str
    _name_or_path: str

    def get_text_config(self) -> "Config": ...
    def to_dict(self) -> dict[str, object]: ...


class Attention(nn.Module):
    """An attention layer of `families.structure.ATTENTION_CLASSES`; some norm their heads."""

    config: Config
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module
    head_dim: int
    scaling: float
    attention_dropout: float
    layer_idx: int


class GatedMlp(nn.Module):
    """`down_proj(act_fn(gate_proj(x)) * up_proj(x))`."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: Callable[[Tensor], Tensor]


class RmsNorm(nn.Module):
    """A norm with one weight, and its eps by either name."""

    weight: nn.Parameter  # [H]
    variance_epsilon: float
    eps: float


class DecoderLayer(nn.Module):
    """A layer of `families.structure.DECODER_CLASSES`."""

    input_layernorm: nn.Module
    self_attn: Attention
    post_attention_layernorm: nn.Module
    mlp: nn.Module
    gradient_checkpointing: bool
    _gradient_checkpointing_func: Callable[..., Tensor]


class Backbone(nn.Module):
    """The layers under a causal language model's head."""

    config: Config
    layers: nn.ModuleList
    norm: nn.Module
    # (a tensor of the result's dtype, positions [B, L]) -> cos and sin [B, L, D]
    rotary_emb: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

    get_input_embeddings: Callable[[], nn.Module]


class CausalLm(nn.Module):
    """A causal language model of transformers."""

    config: Config
    base_model: Backbone

    get_input_embeddings: Callable[[], nn.Module]
    get_output_embeddings: Callable[[], nn.Module | None]
    set_attn_implementation: Callable[[str], None]
    save_pretrained: Callable[..., object]

    device: torch.device
    dtype: torch.dtype
    generation_config: object
    generate: Callable[..., Tensor]  # [B, L] int64
    generate_batch: Callable[..., object]


class Magnitude(nn.Module):
    """DoRA's magnitudes of a linear."""

    weight: nn.Parameter  # [N]


class LoraLinear(nn.Module):
    """PEFT's LoRA layer around a linear. Its adapters are known by their names."""

    lora_A: Mapping[str, nn.Linear]
    lora_B: Mapping[str, nn.Linear]
    lora_bias: Mapping[str, bool]
    lora_dropout: Mapping[str, nn.Module]
    lora_magnitude_vector: Mapping[str, Magnitude]
    lora_variant: Mapping[str, object]
    r: Mapping[str, int]
    scaling: Mapping[str, float]
    active_adapters: Sequence[str]
    disable_adapters: bool
    fan_in_fan_out: bool
    merged: bool

    get_base_layer: Callable[[], nn.Linear]


class LoraEmbedding(nn.Module):
    """PEFT's LoRA layer around an embedding."""

    lora_embedding_A: Mapping[str, nn.Parameter]  # [r, V]
    lora_embedding_B: Mapping[str, nn.Parameter]  # [H, r]
    lora_variant: Mapping[str, object]
    scaling: Mapping[str, float]
    active_adapters: Sequence[str]
    disable_adapters: bool
    merged: bool

    get_base_layer: Callable[[], nn.Embedding]


class SavedWhole(nn.Module):
    """PEFT's wrapper around a module that is trained in full (`modules_to_save`)."""

    original_module: nn.Module
    modules_to_save: Mapping[str, nn.Module]
    active_adapters: Sequence[str]
    disable_adapters: bool


class AdapterConfig(Protocol):
    """PEFT's settings of an adapter."""

    peft_type: object

    def to_dict(self) -> dict[str, object]: ...


class PeftTuner(nn.Module):
    """What puts PEFT's adapters into the layers of a model."""

    model: CausalLm
    set_adapter: Callable[[str | Sequence[str]], None]


class PeftCausalLm(nn.Module):
    """PEFT's model around a causal language model."""

    active_adapters: Sequence[str]
    base_model: PeftTuner
    peft_config: Mapping[str, AdapterConfig]

    add_adapter: Callable[[str, object], None]
    load_adapter: Callable[..., object]
    set_adapter: Callable[[str], None]
    save_pretrained: Callable[..., object]
    get_base_model: Callable[[], CausalLm]
    disable_adapter: Callable[[], AbstractContextManager[None]]


class QuantState(Protocol):
    """What bitsandbytes knows of a weight that it packed in 4 bits."""

    shape: Sequence[int]
    dtype: torch.dtype
    quant_type: Literal["nf4", "fp4"]
    blocksize: int
    nested: bool
    absmax: Tensor
    code: Tensor
    offset: Tensor  # [], of a nested one
    state2: "QuantState"  # of the scales of a nested one


class PackedParameter(nn.Parameter):
    """bitsandbytes' parameter of packed codes; without a state before it is quantised."""

    quant_state: QuantState


class Int8Parameter(nn.Parameter):
    """bitsandbytes' parameter of codes in 8 bits. SCB: each row's largest magnitude, or None."""

    SCB: Tensor | None


class Int8State(Protocol):
    """What bitsandbytes keeps beside a weight in 8 bits."""

    SCB: Tensor | None


class Int8Linear(nn.Linear):
    """bitsandbytes' linear with a weight in 8 bits."""

    weight: Int8Parameter
    state: Int8State


class Fp8Linear(nn.Linear):
    """transformers' linear in FP8. block_size: rows and columns that share a scale; None: all."""

    weight_scale_inv: Tensor
    block_size: tuple[int, int] | None


class PackedLinear(nn.Linear):
    """bitsandbytes' linear with a weight in 4 bits."""

    weight: PackedParameter
    compute_dtype: torch.dtype | None
    support_avx512bf16_for_cpu: bool
