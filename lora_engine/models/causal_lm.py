"""Causal language models without their logits: hidden states of packed batches, and the loss."""

from typing import Any, Protocol

import torch
from torch import Tensor

from lora_engine.models.head import Head, output_head, transformers_model, why_no_head


class PackedTokens(Protocol):
    """What of a batch the model sees (`lora_engine.data.batch.PackedBatch` has it)."""

    @property
    def input_ids(self) -> Tensor: ...  # [T] int64
    @property
    def position_ids(self) -> Tensor: ...  # [T] int64
    @property
    def cu_seqlens(self) -> Tensor: ...  # [S + 1] int32
    @property
    def max_seqlen(self) -> int: ...


def packed_hidden_states(model: Any, batch: PackedTokens) -> Tensor:
    """The last hidden states [T, H] of a packed batch, after the final norm; no logits.

    `model` is a transformers causal language model, plain, with PEFT adapters, or accelerated.
    Sequences do not see each other.
    """
    backbone = transformers_model(model).base_model
    output = backbone(
        input_ids=batch.input_ids[None],
        position_ids=batch.position_ids[None],
        use_cache=False,
        cu_seq_lens_q=batch.cu_seqlens,
        cu_seq_lens_k=batch.cu_seqlens,
        max_length_q=batch.max_seqlen,
        max_length_k=batch.max_seqlen,
    )
    hidden: Tensor = output.last_hidden_state[0]
    return hidden


class CausalLmForward:
    """The forward of a causal language model that, given labels in training, makes no logits."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.original = model.forward

    def __call__(
        self,
        *args: Any,
        labels: Tensor | None = None,  # [B, L] int64
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the model's own; with `labels` in training `logits` is None in the result.

        A head in a state that the loss does not cover (several adapters at once, say) runs as the
        model's own too.
        """
        if labels is None or not self.model.training or args or why_no_head(self.model):
            given = {"num_items_in_batch": num_items_in_batch, "return_dict": return_dict}
            kwargs.update({key: value for key, value in given.items() if value is not None})
            return self.original(*args, labels=labels, **kwargs)
        from transformers.modeling_outputs import CausalLMOutputWithPast

        kwargs.pop("logits_to_keep", None)
        kwargs.setdefault("use_cache", False)
        output = self.model.base_model(**kwargs)
        loss = shifted_loss(
            output.last_hidden_state, output_head(self.model), labels, num_items_in_batch
        )
        result = CausalLMOutputWithPast(
            loss=loss,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )
        return result.to_tuple() if return_dict is False else result


def shifted_loss(
    hidden: Tensor,  # [B, L, H]
    head: Head,
    labels: Tensor,  # [B, L] int64
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """Mean cross-entropy of each position's next label, over supervised positions only.

    Divided by `num_items_in_batch` where given (transformers' gradient accumulation).
    """
    targets = labels[:, 1:]
    supervised = targets != -100
    rows = hidden[:, :-1][supervised]
    out = head.cross_entropy(rows, targets[supervised], reduction="sum")
    if num_items_in_batch is None:
        return out.loss / supervised.sum().clamp(min=1)
    return out.loss / torch.as_tensor(num_items_in_batch, device=out.loss.device)
