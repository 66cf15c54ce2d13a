"""Decoder layers whose halves are single functions: norm, linears, core and residual together."""

from collections.abc import Callable, Mapping, Sequence
from contextvars import copy_context
from functools import partial
from typing import Literal, TypeAlias, TypeGuard

import torch
from torch import Tensor, nn

from lora_engine.distributed.token_parts import token_parts
from lora_engine.errors import UserError
from lora_engine.models.attach.attention import AttentionForward
from lora_engine.models.attach.forwards import (
    ReplacedForward,
    own_forward,
    uncompiled,
    unrecorded,
)
from lora_engine.models.attach.mlp import MlpForward
from lora_engine.models.attach.norm import RmsNormForward
from lora_engine.models.attach.sequences import NO_MASK, LayerInputs
from lora_engine.models.families.modules import Cache, DecoderLayer
from lora_engine.models.peft.lora_state import has_hooks
from lora_engine.models.peft.router import AdapterRouter
from lora_engine.ops.layer.attention_block import attention_block
from lora_engine.ops.layer.blocks import Branch, Rerun, runs_fused
from lora_engine.ops.layer.decode_stack import DecodedLayer
from lora_engine.ops.layer.mlp_block import mlp_block

# What a layer that runs again in the backward pass keeps: its input; its halves' inputs; its input
# and attention's output.
Keeps: TypeAlias = Literal["input", "inputs_of_halves", "input_and_attention"]


class DecoderLayerForward(ReplacedForward):
    """The forward of a layer of `families.structure.DECODER_CLASSES`.

    A half that cannot be fused runs its modules.

    The last layer takes `output_rows` [U], places in its rows: its MLP runs on these alone, and
    its result is [1, U, H]. Under gradient checkpointing a layer runs again in the backward pass;
    `keeps` says what it keeps until then. With `tile` the MLP half of a packed batch runs on that
    many rows at once, each of these tiles again by itself.
    """

    def __init__(self, module: DecoderLayer, router: AdapterRouter, *, last: bool) -> None:
        self.module, self.router, self.last = module, router, last
        self.keeps: Keeps = "input"
        self.tile = 0

    @uncompiled
    def __call__(
        self,
        hidden_states: Tensor,  # [B, L, H]
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        *,
        cu_seq_lens_q: Tensor | None = None,  # [S + 1] int32
        sequence_parents: Tensor | None = None,  # [S] int32
        max_length_q: int | None = None,
        output_rows: Tensor | None = None,  # [U] int64
        **others: object,
    ) -> Tensor:
        """As the layer's own forward; what is not ours to know goes to the attention module."""
        module = self.module
        inputs = LayerInputs(
            position_embeddings=position_embeddings,
            attention_mask=None if attention_mask is NO_MASK else attention_mask,
            past_key_values=past_key_values,
            cu_seq_lens_q=cu_seq_lens_q,
            sequence_parents=sequence_parents,
            max_length_q=max_length_q,
        )
        # transformers 5 checkpoints in the class's forward, which an instance's own replaces; its
        # first releases in __call__.
        if not (
            module.gradient_checkpointing
            and module.training
            and type(module).__call__ is nn.Module.__call__
        ):
            return self._run(hidden_states, inputs, output_rows, position_ids, use_cache, others)
        once = inputs._replace(past_key_values=None)  # a cache would be filled twice
        if self.keeps == "inputs_of_halves":
            x = self._again(
                hidden_states,
                lambda x, run: self._attended(x, once, position_ids, False, others, run),
                Rerun("attention_block"),
            )
            if self.tile > 0 and x.shape[0] == 1:
                return self._fed_in_tiles(x, output_rows)
            return self._again(x, lambda x, run: self._fed(x, output_rows, run), Rerun("mlp_block"))
        return self._again(
            hidden_states,
            lambda x, run: self._run(x, once, output_rows, position_ids, False, others, run),
            Rerun("mlp_block", keeps_attention=self.keeps == "input_and_attention"),
        )

    def _again(self, x: Tensor, run: Callable[[Tensor, Rerun], Tensor], rerun: Rerun) -> Tensor:
        """`run(x, rerun)`, which the backward pass calls a second time."""
        # What the call asks for stands in context variables, which are gone when it runs again.
        context = copy_context()
        first = True

        def call(x: Tensor) -> Tensor:
            nonlocal first
            rerun.again, first = not first, False
            with unrecorded():
                return context.run(run, x, rerun)

        return self.module._gradient_checkpointing_func(call, x)

    def _run(
        self,
        hidden_states: Tensor,  # [B, L, H]
        inputs: LayerInputs,
        output_rows: Tensor | None,  # [U] int64
        position_ids: Tensor | None,
        use_cache: bool | None,
        others: Mapping[str, object],
        rerun: Rerun | None = None,
    ) -> Tensor:
        x = self._attended(hidden_states, inputs, position_ids, use_cache, others, rerun)
        return self._fed(x, output_rows, rerun)

    def _attended(
        self,
        hidden_states: Tensor,  # [B, L, H]
        inputs: LayerInputs,
        position_ids: Tensor | None,
        use_cache: bool | None,
        others: Mapping[str, object],
        rerun: Rerun | None,
    ) -> Tensor:
        """The attention half."""
        module = self.module
        x = self._attention(hidden_states, inputs, rerun)
        if x is not None:
            return x
        if rerun is not None and rerun.keeps_attention:
            raise UserError(
                "checkpointing selective: attention's output can be kept only where attention and "
                "its projections run as one kernel (lora_engine.accelerate's report says why one "
                "layer's do not); take checkpointing layer or half"
            )
        attended, _ = module.self_attn(
            hidden_states=module.input_layernorm(hidden_states),
            use_cache=use_cache,
            position_ids=position_ids,
            **inputs.keywords(),
            **others,
        )
        return hidden_states + attended

    def _fed(
        self,
        x: Tensor,  # [B, L, H]
        output_rows: Tensor | None,  # [U] int64
        rerun: Rerun | None,
    ) -> Tensor:
        """The MLP half."""
        rows = output_rows if self.last else None
        if rows is not None:
            x = x.flatten(0, 1).index_select(0, rows)[None]
        return self._fed_rows(x, rows, rerun)

    def _fed_in_tiles(
        self,
        x: Tensor,  # [1, L, H]
        output_rows: Tensor | None,  # [U] int64
    ) -> Tensor:
        """The MLP half, a tile of rows after the other."""
        rows = output_rows if self.last else None
        if rows is not None:
            x = x.flatten(0, 1).index_select(0, rows)[None]
        elif self.router.rows is not None:
            rows = torch.arange(x.shape[1], device=x.device)
        pieces = x.split(self.tile, 1)
        indices: Sequence[Tensor | None] = [None] * len(pieces)
        if rows is not None:
            indices = rows.split(self.tile)
        tiles = [
            self._again(piece, partial(self._fed_tile, index), Rerun("mlp_block"))
            for piece, index in zip(pieces, indices, strict=True)
        ]
        return torch.cat(tiles, 1)

    def _fed_tile(self, rows: Tensor | None, x: Tensor, rerun: Rerun) -> Tensor:
        return self._fed_rows(x, rows, rerun)

    def _fed_rows(
        self,
        x: Tensor,  # [B, L, H]
        rows: Tensor | None,  # [L] int64, their places in the batch; None: all of it
        rerun: Rerun | None,
    ) -> Tensor:
        module = self.module
        with self.router.selecting(rows):
            y = self.mlp_half(x, rerun)
            return x + module.mlp(module.post_attention_layernorm(x)) if y is None else y

    def decoded(
        self,
        x: Tensor,  # [.., H], of the dtype that the layer is to be run in
    ) -> DecodedLayer | None:
        """What the layer computes with now; None where it has to be run by its modules."""
        module = self.module
        attention, mlp = _ours(module.self_attn), _ours(module.mlp)
        norms = _ours(module.input_layernorm), _ours(module.post_attention_layernorm)
        if not isinstance(attention, AttentionForward) or not isinstance(mlp, MlpForward):
            return None
        if not (_fits(norms[0], x) and _fits(norms[1], x)):
            return None
        if not (attention.intact() and mlp.intact()) or self.router.rows is not None:
            return None
        found = [group.alone(x) for group in (attention.qkv, attention.output)]
        found += [group.alone(x) for group in (mlp.gate_up, mlp.down)]
        qkv, output, gate_up, down = found
        if qkv is None or output is None or gate_up is None or down is None:
            return None
        head_norms = None
        if hasattr(module.self_attn, "q_norm"):
            q_norm, k_norm = _ours(module.self_attn.q_norm), _ours(module.self_attn.k_norm)
            if not (_fits(q_norm, x) and _fits(k_norm, x)):
                return None
            head_norms = q_norm.prenorm(), k_norm.prenorm()
        return DecodedLayer(
            attention_norm=norms[0].prenorm(),
            qkv=qkv,
            head_norms=head_norms,
            output=output,
            mlp_norm=norms[1].prenorm(),
            gate_up=gate_up,
            down=down,
            activation=mlp.activation,
            head_dim=module.self_attn.head_dim,
            softmax_scale=module.self_attn.scaling,
            window=attention.window,
        )

    def _attention(self, x: Tensor, inputs: LayerInputs, rerun: Rerun | None) -> Tensor | None:
        """The attention half as one function; None where it has to be run by its modules."""
        module = self.module
        forward, norm = _ours(module.self_attn), _ours(module.input_layernorm)
        if not isinstance(forward, AttentionForward) or not _fits(norm, x):
            return None
        if not (forward.intact() and forward.whole_sequences(inputs)):
            return None
        if token_parts() is not None:  # q, k and v leave for other processes
            return None
        qkv, output = forward.qkv.lora, forward.output.lora
        if qkv is None or output is None:
            return None
        if not runs_fused("attention_block", x, qkv, output, module.self_attn.head_dim):
            return None
        head_norms = None
        if hasattr(module.self_attn, "q_norm"):
            q_norm, k_norm = _ours(module.self_attn.q_norm), _ours(module.self_attn.k_norm)
            if not (_fits(q_norm, x) and _fits(k_norm, x)):
                return None
            head_norms = q_norm.prenorm(), k_norm.prenorm()
        if not (forward.qkv.ready(x) and forward.output.ready(x)):
            return None
        sequences = forward.find_sequences(x, inputs)
        if sequences.token_index is not None:
            return None
        mlp = _ours(module.mlp)
        branch = Branch(
            inner=qkv,
            outer=output,
            dropouts=(forward.qkv.dropout(), forward.output.dropout()),
            routes=forward.qkv.routes(x),
            # The gradient of x is that of the MLP of the layer before, a layer like this one.
            grad_padding_columns=mlp.down.padding_columns if isinstance(mlp, MlpForward) else 0,
            rerun=rerun,
        )
        return attention_block(
            x,
            norm.prenorm(),
            branch,
            sequences.cu_seqlens,
            sequences.cos,
            sequences.sin,
            head_dim=module.self_attn.head_dim,
            softmax_scale=module.self_attn.scaling,
            window=forward.window,
            parents=sequences.parents,
            equal_lengths=sequences.equal_lengths,
            head_norms=head_norms,
        )

    def mlp_half(self, x: Tensor, rerun: Rerun | None = None) -> Tensor | None:
        """The MLP half as one function; None where it has to be run by its modules."""
        module = self.module
        forward, norm = _ours(module.mlp), _ours(module.post_attention_layernorm)
        if not isinstance(forward, MlpForward) or not _fits(norm, x):
            return None
        if not forward.intact():
            return None
        gate_up, down = forward.gate_up.lora, forward.down.lora
        if gate_up is None or down is None:
            return None
        if not runs_fused("mlp_block", x, gate_up, down):
            return None
        if not (forward.gate_up.ready(x) and forward.down.ready(x)):
            return None
        attention = _ours(module.self_attn)
        branch = Branch(
            inner=gate_up,
            outer=down,
            dropouts=(forward.gate_up.dropout(), forward.down.dropout()),
            routes=forward.gate_up.routes(x),
            grad_padding_columns=attention.output.padding_columns
            if isinstance(attention, AttentionForward)
            else 0,
            rerun=rerun,
        )
        return mlp_block(x, norm.prenorm(), branch, activation=forward.activation)


def _fits(norm: object, x: Tensor) -> TypeGuard[RmsNormForward]:
    """Whether `norm` is a replaced forward that takes x."""
    return isinstance(norm, RmsNormForward) and norm.takes(x)


def _ours(module: nn.Module) -> object:
    """The forward we gave `module`; None if it has its own, or if someone watches its calls."""
    return None if has_hooks(module) else own_forward(module)
