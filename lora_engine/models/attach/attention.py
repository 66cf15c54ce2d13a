"""Attention layers: q, k and v as one product, attention within sequences.

Without a cache, attention rotates q and k itself and the output projection reads its buffer in
place. With a cache (generation) attention is transformers' (`attention_function.attend`). Where
attention has no kernel (without Triton) transformers' runs with and without a cache, after our
rotation.
"""

from collections.abc import Callable

from torch import Tensor, nn

from lora_engine import ops
from lora_engine.distributed.token_parts import TokenParts, token_parts
from lora_engine.errors import UserError
from lora_engine.models.attach.attention_function import (
    IMPLEMENTATION,
    attend,
    check_window,
    unpad,
)
from lora_engine.models.attach.forwards import ReplacedForward, uncompiled
from lora_engine.models.attach.linear_group import LinearGroup
from lora_engine.models.attach.sequences import NO_MASK, LayerInputs, SequenceFinder, Sequences
from lora_engine.models.families.modules import Attention, Cache
from lora_engine.models.families.own_functions import (
    AttentionFunction,
    Rotation,
    attention_function_of,
    rotation_of,
)


class _ProjectedAttention(ReplacedForward):
    """A layer of `families.structure.ATTENTION_CLASSES` with q, k and v as one product."""

    def __init__(self, module: Attention, qkv: LinearGroup, output: LinearGroup) -> None:
        self.module, self.qkv, self.output = module, qkv, output
        self.original: Callable[..., tuple[Tensor, Tensor | None]] = module.forward

    def intact(self) -> bool:
        """Whether the layer's linears are those that this forward was made of."""
        module = self.module
        return self.qkv.stands_for(
            module.q_proj, module.k_proj, module.v_proj
        ) and self.output.stands_for(module.o_proj)

    @property
    def window(self) -> int:
        """How many tokens a token sees, itself included; 0: all before it."""
        return window_of(self.module)

    def _by_heads(
        self,
        hidden_states: Tensor,  # [B, L, H]
        rotate: Rotation,
        interface: AttentionFunction,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        **others: object,
    ) -> tuple[Tensor, Tensor | None]:
        """As the layer's own forward, with q, k and v as one product.

        rotate: takes q [B, Hq, L, D], k [B, Hkv, L, D], cos and sin [B, L, D].
        interface: attention as transformers' AttentionInterface has it.
        """
        module = self.module
        q, k, v = (
            x.unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
            for x in self.project(hidden_states)
        )
        q, k = rotate(q, k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, module.layer_idx)
        out, weights = interface(
            module,
            q,
            k,
            v,
            attention_mask,
            scaling=module.scaling,
            dropout=module.attention_dropout if module.training else 0.0,
            sliding_window=self.window or None,
            **others,
        )
        (y,) = self.output(out.flatten(2))
        return y, weights

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of hidden states [.., H], their heads normed where they are."""
        module = self.module
        q, k, v = self.qkv(hidden_states)
        if hasattr(module, "q_norm"):
            q, k = (
                norm(x.unflatten(-1, (-1, module.head_dim))).flatten(-2)
                for norm, x in ((module.q_norm, q), (module.k_norm, k))
            )
        return q, k, v


class AttentionForward(_ProjectedAttention):
    """The forward of an attention layer on `ops.attention`."""

    def __init__(
        self, module: Attention, qkv: LinearGroup, output: LinearGroup, finder: SequenceFinder
    ) -> None:
        super().__init__(module, qkv, output)
        self.finder, self.rotation = finder, rotation_of(module)

    def intact(self) -> bool:
        """Also whether nobody has chosen another attention (`model.set_attn_implementation`) or
        rotation (`modeling_llama.apply_rotary_pos_emb`), nor lets tokens see later ones
        (`is_causal`)."""
        module = self.module
        return (
            module.config._attn_implementation == IMPLEMENTATION
            and rotation_of(module) is self.rotation
            and bool(getattr(module, "is_causal", True))
            and super().intact()
        )

    @uncompiled
    def __call__(
        self,
        hidden_states: Tensor,  # [B, L, H]
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        cu_seq_lens_q: Tensor | None = None,  # [S + 1] int32
        sequence_parents: Tensor | None = None,  # [S] int32
        max_length_q: int | None = None,
        **others: object,
    ) -> tuple[Tensor, Tensor | None]:
        module = self.module
        inputs = LayerInputs(
            position_embeddings=position_embeddings,
            attention_mask=None if attention_mask is NO_MASK else attention_mask,
            past_key_values=past_key_values,
            cu_seq_lens_q=cu_seq_lens_q,
            sequence_parents=sequence_parents,
            max_length_q=max_length_q,
        )
        whole = self.intact() and self.whole_sequences(inputs)
        if token_parts() is not None and not whole:
            raise UserError(
                "processes can share a batch's tokens only where every layer runs lora_engine's "
                "attention, without a cache or dropout; leave train.sequence_parallel out"
            )
        if not self.intact():
            return self.original(hidden_states, **inputs.keywords(), **others)
        if not whole:
            if self.qkv.router.rows is not None:
                raise UserError("rows cannot be routed by adapter with a cache: use_cache=False")
            if sequence_parents is not None:
                raise UserError("sequences cannot share prefixes with a cache or dropout")
            if past_key_values is not None and position_embeddings is not None:
                return self._by_heads(
                    hidden_states,
                    rotation_of(module),
                    attend,
                    position_embeddings,
                    attention_mask,
                    past_key_values,
                    cu_seq_lens_q=cu_seq_lens_q,
                    max_length_q=max_length_q,
                    **others,
                )
            # PyTorch's linear copies the weight for each row of a batch that is not contiguous.
            return self.original(hidden_states.contiguous(), **inputs.keywords(), **others)
        batch, length = hidden_states.shape[:2]
        sequences = self.find_sequences(hidden_states, inputs)
        q, k, v = self.project(hidden_states)
        if (parts := token_parts()) is not None:
            (y,) = self.output(self._of_own_heads(q[0], k[0], v[0], sequences, parts)[None])
            return y, None
        if sequences.token_index is not None:
            q, k, v = (x.reshape(batch * length, -1)[sequences.token_index] for x in (q, k, v))
        out = ops.attention(
            q,
            k,
            v,
            sequences.cu_seqlens,
            head_dim=module.head_dim,
            cos=sequences.cos,
            sin=sequences.sin,
            softmax_scale=module.scaling,
            window=self.window,
            parents=sequences.parents,
            equal_lengths=sequences.equal_lengths,
            padding_columns=self.output.padding_columns,
            grad_padding_columns=self.qkv.padding_columns,
        )
        if sequences.token_index is not None:
            out = unpad(out, sequences.token_index, batch * length).view(batch, length, -1)
        (y,) = self.output(out)
        return y, None

    def _of_own_heads(
        self,
        q: Tensor,  # [t, Hq D], of this process's tokens
        k: Tensor,  # [t, Hkv D]
        v: Tensor,  # [t, Hkv D]
        sequences: Sequences,
        parts: TokenParts,
    ) -> Tensor:
        """Attention's output [t, Hq D]: each process attends with a part of the heads over all
        tokens."""
        dim = self.module.head_dim
        turned_q, turned_k = ops.rope(
            q.unflatten(1, (-1, dim)), k.unflatten(1, (-1, dim)), sequences.cos, sequences.sin
        )
        q, k, v = ops.to_heads([turned_q.flatten(1), turned_k.flatten(1), v], parts)
        out = ops.attention(
            q,
            k,
            v,
            sequences.cu_seqlens,
            head_dim=dim,
            softmax_scale=self.module.scaling,
            window=self.window,
            parents=sequences.parents,
        )
        return ops.to_tokens(out, parts)

    def find_sequences(
        self,
        hidden_states: Tensor,  # [B, L, H]
        inputs: LayerInputs,
    ) -> Sequences:
        """The packed sequences of a batch, of a call about whole sequences."""
        batch, length = hidden_states.shape[:2]
        check_window(self.module, inputs.attention_mask, self.window)
        assert inputs.position_embeddings is not None
        return self.finder(
            (batch, length),
            inputs.position_embeddings,
            inputs.attention_mask,
            inputs.cu_seq_lens_q,
            inputs.sequence_parents,
            inputs.max_length_q,
        )

    def whole_sequences(self, inputs: LayerInputs) -> bool:
        """Whether a call is about whole sequences: no cache, no dropout, no mask but padding's."""
        module, mask = self.module, inputs.attention_mask
        return (
            inputs.position_embeddings is not None
            and inputs.past_key_values is None
            and not (module.training and module.attention_dropout > 0)
            and (mask is None or mask.dim() == 2)
        )


class RotatedAttention(_ProjectedAttention):
    """The forward where rotation has a kernel and attention has none."""

    @uncompiled
    def __call__(
        self,
        hidden_states: Tensor,  # [B, L, H]
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **others: object,
    ) -> tuple[Tensor, Tensor | None]:
        if position_embeddings is None or not self.intact():
            return self.original(
                hidden_states,
                position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **others,
            )
        return self._by_heads(
            hidden_states,
            _rotate,
            attention_function_of(self.module),
            position_embeddings,
            attention_mask,
            past_key_values,
            **others,
        )


def window_of(attention: nn.Module) -> int:
    """How many tokens a token of an attention layer sees, itself included; 0: all before it."""
    # Qwen sets the layer's window on the layer; Mistral reads it from the config.
    on_layer = hasattr(attention, "sliding_window")
    holder = attention if on_layer else getattr(attention, "config", None)
    return getattr(holder, "sliding_window", None) or 0


def _rotate(
    q: Tensor,  # [B, Hq, L, D]
    k: Tensor,  # [B, Hkv, L, D]
    cos: Tensor,  # [B or 1, L, D]
    sin: Tensor,  # as cos
) -> tuple[Tensor, Tensor]:
    batch, _, length, _ = q.shape
    tables = (x.expand(batch, -1, -1).flatten(0, 1) for x in (cos, sin))
    heads = (x.transpose(1, 2).flatten(0, 1) for x in (q, k))
    turned_q, turned_k = (
        x.unflatten(0, (batch, length)).transpose(1, 2) for x in ops.rope(*heads, *tables)
    )
    return turned_q, turned_k
