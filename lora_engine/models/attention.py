"""Attention layers: q, k, v as one product, attention within sequences, transformers' interface.

Without a cache the whole layer runs here: one product for q, k and v, rotation inside attention,
and the output projection reading attention's buffer in place. With a cache (generation) the
layer's own forward runs, and its attention goes through `attend`, registered with transformers.
"""

from typing import Any

from torch import Tensor, nn

from lora_engine import ops
from lora_engine.errors import UserError
from lora_engine.models.linear_group import LinearGroup
from lora_engine.models.sequences import SequenceFinder, Sequences

IMPLEMENTATION = "lora_engine"

# Layers whose forward is: project to q, k, v; normalise heads where there is q_norm; rotate all of
# each head (half-rotated); attend, with a window where the layer has one; project.
ATTENTION_CLASSES = frozenset(
    {"LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention"}
)


def register() -> None:
    """Makes `attn_implementation="lora_engine"` known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, attend)
    AttentionMaskInterface.register(IMPLEMENTATION, padding_mask)


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The padding mask [B, L], or None without padding; with a filled cache sdpa's [B, 1, Q, K]."""
    from transformers.masking_utils import sdpa_mask

    if q_length != kv_length:
        return sdpa_mask(batch_size, q_length, kv_length, attention_mask=attention_mask, **kwargs)
    if attention_mask is None or bool(attention_mask.all()):
        return None
    return attention_mask


def attend(
    module: nn.Module,
    query: Tensor,  # [B, Hq, Q, D]
    key: Tensor,  # [B, Hkv, K, D]
    value: Tensor,  # [B, Hkv, K, D]
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers' AttentionInterface wants it, [B, Q, Hq, D].

    Whole sequences run on `ops.attention`. New tokens against a filled cache, 4-D masks and
    dropout go to transformers' sdpa.
    """
    whole = query.shape[2] == key.shape[2] and kwargs.get("is_causal") is not False
    if not whole or dropout or (attention_mask is not None and attention_mask.dim() == 4):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        result: tuple[Tensor, None] = sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            **kwargs,
        )
        return result
    batch, heads, length, head_dim = query.shape
    no_rotation = query.new_zeros(1, length, 0)
    found = SequenceFinder()(
        (batch, length),
        (no_rotation, no_rotation),
        attention_mask,
        kwargs.get("cu_seq_lens_q"),
        kwargs.get("position_ids"),
        kwargs.get("sequence_parents"),
    )
    q, k, v = (x.transpose(1, 2).reshape(batch * length, -1) for x in (query, key, value))
    if found.token_index is not None:
        q, k, v = (x[found.token_index] for x in (q, k, v))
    out = ops.attention(
        q,
        k,
        v,
        found.cu_seqlens,
        head_dim=head_dim,
        softmax_scale=scaling,
        window=kwargs.get("sliding_window") or 0,
        parents=found.parents,
    )
    return _unpad(out, found.token_index, batch * length).view(batch, length, heads, head_dim), None


def _unpad(out: Tensor, index: Tensor | None, rows: int) -> Tensor:
    if index is None:
        return out
    return out.new_zeros(rows, out.shape[-1]).index_copy(0, index, out)


class AttentionForward:
    """The forward of one attention layer of ATTENTION_CLASSES."""

    def __init__(
        self, module: Any, qkv: LinearGroup, output: LinearGroup, finder: SequenceFinder
    ) -> None:
        self.module, self.qkv, self.output, self.finder = module, qkv, output, finder
        self.original = module.forward
        # Qwen sets the layer's window on the layer; Mistral reads it from the config.
        holder = module if hasattr(module, "sliding_window") else module.config
        self.window = getattr(holder, "sliding_window", None) or 0

    def __call__(
        self,
        hidden_states: Tensor,  # [B, L, H]
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        module = self.module
        given = {
            "position_embeddings": position_embeddings,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            **kwargs,
        }
        if not self.intact():
            left: tuple[Tensor, None] = self.original(hidden_states, **given)
            return left
        if not self.whole_sequences(**given):
            if self.qkv.router.rows is not None:
                raise UserError("rows cannot be routed by adapter with a cache: use_cache=False")
            if kwargs.get("sequence_parents") is not None:
                raise UserError("sequences cannot share prefixes with a cache or dropout")
            result: tuple[Tensor, None] = self.original(hidden_states, **given)
            return result
        batch, length = hidden_states.shape[:2]
        found = self.find_sequences(hidden_states, **given)
        q, k, v = self._project(hidden_states)
        if found.token_index is not None:
            q, k, v = (x.reshape(batch * length, -1)[found.token_index] for x in (q, k, v))
        out = ops.attention(
            q,
            k,
            v,
            found.cu_seqlens,
            head_dim=module.head_dim,
            cos=found.cos,
            sin=found.sin,
            softmax_scale=module.scaling,
            window=self.window,
            parents=found.parents,
            tail=self.output.tail,
            grad_tail=self.qkv.tail,
        )
        if found.token_index is not None:
            out = _unpad(out, found.token_index, batch * length).view(batch, length, -1)
        (y,) = self.output(out)
        return y, None

    def intact(self) -> bool:
        """Whether the layer's linears are those that this forward was made of."""
        module = self.module
        return self.qkv.stands_for(
            module.q_proj, module.k_proj, module.v_proj
        ) and self.output.stands_for(module.o_proj)

    def find_sequences(
        self,
        hidden_states: Tensor,  # [B, L, H]
        *,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Sequences:
        """The packed sequences of a batch."""
        batch, length = hidden_states.shape[:2]
        return self.finder(
            (batch, length),
            position_embeddings,
            attention_mask,
            kwargs.get("cu_seq_lens_q"),
            kwargs.get("position_ids"),
            kwargs.get("sequence_parents"),
        )

    def whole_sequences(
        self,
        *,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> bool:
        """Whether a call is about whole sequences: no cache, no dropout, no mask but padding's."""
        module = self.module
        return (
            position_embeddings is not None
            and past_key_values is None
            and not (module.training and module.attention_dropout > 0)
            and (attention_mask is None or attention_mask.dim() == 2)
        )

    def _project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        module = self.module
        q, k, v = self.qkv(hidden_states)
        if hasattr(module, "q_norm"):
            q, k = (
                norm(x.unflatten(-1, (-1, module.head_dim))).flatten(-2)
                for norm, x in ((module.q_norm, q), (module.k_norm, k))
            )
        return q, k, v
