"""Attention layers: q, k and v as one product, attention within sequences.

Without a cache, attention rotates q and k itself and the output projection reads its buffer in
place. With a cache (generation) attention is transformers' (`attention_function.attend`).
"""

import sys
from typing import Any

from torch import Tensor

from lora_engine import ops
from lora_engine.errors import UserError
from lora_engine.models.attach.attention_function import attend, check_window, unpad
from lora_engine.models.attach.linear_group import LinearGroup
from lora_engine.models.attach.sequences import SequenceFinder, Sequences


class AttentionForward:
    """The forward of one attention layer of `families.structure.ATTENTION_CLASSES`."""

    def __init__(
        self, module: Any, qkv: LinearGroup, output: LinearGroup, finder: SequenceFinder
    ) -> None:
        self.module, self.qkv, self.output, self.finder = module, qkv, output, finder
        self.original = module.forward

    def __call__(
        self,
        hidden_states: Tensor,  # [B, L, H]
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        module = self.module
        arguments = {
            "position_embeddings": position_embeddings,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            **kwargs,
        }
        if not self.intact():
            left: tuple[Tensor, Tensor | None] = self.original(hidden_states, **arguments)
            return left
        if not self.whole_sequences(**arguments):
            if self.qkv.router.rows is not None:
                raise UserError("rows cannot be routed by adapter with a cache: use_cache=False")
            if kwargs.get("sequence_parents") is not None:
                raise UserError("sequences cannot share prefixes with a cache or dropout")
            if past_key_values is not None and position_embeddings is not None:
                return self._with_cache(hidden_states, **arguments)
            # PyTorch's linear copies the weight for each row of a batch that is not contiguous.
            result: tuple[Tensor, Tensor | None] = self.original(
                hidden_states.contiguous(), **arguments
            )
            return result
        batch, length = hidden_states.shape[:2]
        sequences = self.find_sequences(hidden_states, **arguments)
        q, k, v = self._project(hidden_states)
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
            tail=self.output.tail,
            grad_tail=self.qkv.tail,
        )
        if sequences.token_index is not None:
            out = unpad(out, sequences.token_index, batch * length).view(batch, length, -1)
        (y,) = self.output(out)
        return y, None

    def _with_cache(
        self,
        hidden_states: Tensor,  # [B, L, H]
        *,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As the layer's own forward, with q, k and v as one product."""
        module = self.module
        q, k, v = (
            x.unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
            for x in self._project(hidden_states)
        )
        rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb
        q, k = rotate(q, k, *position_embeddings)
        k, v = past_key_values.update(k, v, module.layer_idx)
        out, weights = attend(
            module,
            q,
            k,
            v,
            attention_mask,
            scaling=module.scaling,
            dropout=module.attention_dropout if module.training else 0.0,
            sliding_window=self.window or None,
            **kwargs,
        )
        (y,) = self.output(out.flatten(2))
        return y, weights

    @property
    def window(self) -> int:
        """How many tokens a token sees, itself included; 0: all before it."""
        # Qwen sets the layer's window on the layer; Mistral reads it from the config.
        holder = self.module if hasattr(self.module, "sliding_window") else self.module.config
        return getattr(holder, "sliding_window", None) or 0

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
        check_window(self.module, attention_mask, self.window)
        return self.finder(
            (batch, length),
            position_embeddings,
            attention_mask,
            kwargs.get("cu_seq_lens_q"),
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
