"""An accelerated model's layers on new tokens, with keys and values in a cache of ours."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_engine.errors import UserError
from lora_engine.models.attach.attention import AttentionForward
from lora_engine.models.attach.backbone import attention_of
from lora_engine.models.attach.decoder_layer import DecoderLayerForward
from lora_engine.models.attach.forwards import own_forward
from lora_engine.models.attach.head import Head, output_head, transformers_model, why_no_head
from lora_engine.models.families.modules import Backbone, CausalLm, DecoderLayer
from lora_engine.models.families.structure import BACKBONE_CLASSES, CHANGING_ROTATIONS
from lora_engine.models.peft.lora_state import base_layer, has_hooks, hooks_everywhere
from lora_engine.ops import CacheRows
from lora_engine.ops.layer.decode_stack import DecodeStack


class CachedLayer(NamedTuple):
    """A decoder layer, its number, and its replaced forwards."""

    number: int
    module: DecoderLayer
    attention: AttentionForward
    decoder: DecoderLayerForward

    @property
    def cache_width(self) -> int:
        """Elements of a token's keys, all heads side by side."""
        return base_layer(self.attention.module.k_proj).out_features


# (a layer, its q, k and v [T, heads D] of new tokens, not rotated, the rotation's cos and sin
# [T, D]) -> what q attends to, [T, Hq D]. It keeps k and v.
Attend = Callable[[CachedLayer, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class CachedLayers:
    """The layers of a Llama, Mistral, Qwen 2 or Qwen 3 that `accelerate` has replaced whole.

    Raises UserError, with the reason, for other models, and for one whose calls someone watches:
    the layers' own forward is what runs then.
    """

    def __init__(self, model: nn.Module) -> None:
        problem = why_not_cached(model)
        if problem is not None:
            raise UserError(f"generate: {type(transformers_model(model)).__name__}: {problem}")
        self.model = model
        inner = transformers_model(model)
        self.backbone = inner.base_model
        self.embed = self.backbone.get_input_embeddings()
        self.layers = [_cached_layer(i, layer) for i, layer in enumerate(self.backbone.layers)]
        weight = next(self.layers[0].module.input_layernorm.parameters())
        self.dtype, self.device = weight.dtype, weight.device

    def hidden_states(
        self,
        input_ids: Tensor,  # [T] int64
        positions: Tensor,  # [T] int64
        attend: Attend,
    ) -> Tensor:
        """The last hidden states [T, H], after the final norm."""
        x: Tensor = self.embed(input_ids)[None]
        cos, sin = self.rotation(positions)
        for layer in self.layers:
            module = layer.module
            q, k, v = layer.attention.project(module.input_layernorm(x))
            out = attend(layer, q[0], k[0], v[0], cos, sin)
            (y,) = layer.attention.output(out[None])
            x = x + y
            mixed = layer.decoder.mlp_half(x)
            if mixed is None:
                mixed = x + module.mlp(module.post_attention_layernorm(x))
            x = mixed
        normed: Tensor = self.backbone.norm(x)
        return normed[0]

    def stack(self, rows: int) -> DecodeStack | None:
        """The layers, as they are now, as prepared calls for up to `rows` tokens.

        None where a layer has to be run by its modules, or a weight is packed.
        """
        like = torch.empty(1, 0, dtype=self.dtype, device=self.device)
        layers = [layer.decoder.decoded(like) for layer in self.layers]
        found = [layer for layer in layers if layer is not None]
        return DecodeStack.prepared(found, rows) if len(found) == len(layers) else None

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [T, D] of the positions [T]."""
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        cos, sin = self.backbone.rotary_emb(like, positions[None])
        return cos[0], sin[0]

    def decode(
        self,
        stack: DecodeStack,
        input_ids: Tensor,  # [T] int64
        positions: Tensor,  # [T] int64
        caches: Sequence[CacheRows],
    ) -> Tensor:
        """`hidden_states` through prepared calls: each layer's cache says what tokens see."""
        x: Tensor = self.embed(input_ids)
        normed: Tensor = self.backbone.norm(stack(x, *self.rotation(positions), caches))
        return normed

    def head(self) -> Head:
        """The output head as it is now."""
        return output_head(self.model)


def why_not_cached(model: nn.Module) -> str | None:
    """Why `CachedLayers` would refuse the model; None if it would not."""
    inner: CausalLm = transformers_model(model)
    backbone: Backbone = inner.base_model
    if type(backbone).__name__ not in BACKBONE_CLASSES:
        return f"{type(backbone).__name__} is not one of {', '.join(sorted(BACKBONE_CLASSES))}"
    rotation = getattr(backbone.rotary_emb, "rope_type", "default")
    if rotation in CHANGING_ROTATIONS:
        return f"its rotation ({rotation}) changes with the length"
    for layer in backbone.layers:
        forwards = _forwards_of(layer)
        if forwards is None:
            return "a layer's forward is not lora_engine's: accelerate(model)"
        _, attention = forwards
        if not attention.intact():
            return "its attention or its linears were changed after accelerate(model)"
    watched = [m for m in (backbone, *backbone.layers) if has_hooks(m)]
    watched += [m for m in map(attention_of, backbone.layers) if has_hooks(m)]
    if watched or hooks_everywhere():
        return "its modules have hooks, which want the modules' own calls"
    return why_no_head(model)


def _forwards_of(layer: nn.Module) -> tuple[DecoderLayerForward, AttentionForward] | None:
    """The replaced forwards of a layer and of its attention; None if one is the class's."""
    decoder, attention = own_forward(layer), own_forward(attention_of(layer))
    if isinstance(decoder, DecoderLayerForward) and isinstance(attention, AttentionForward):
        return decoder, attention
    return None


def _cached_layer(number: int, layer: nn.Module) -> CachedLayer:
    forwards = _forwards_of(layer)
    assert forwards is not None
    decoder, attention = forwards
    return CachedLayer(number=number, module=decoder.module, attention=attention, decoder=decoder)
