"""Causal language models without their logits: hidden states of packed batches, and the head."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lora_engine import ops
from lora_engine.errors import UserError
from lora_engine.models.lora_state import is_lora

# What some models do to their logits; the loss does not do it, so these models are refused.
_LOGIT_CHANGES = ("final_logit_softcapping", "logits_scaling", "logit_scale")


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


def transformers_model(model: Any) -> Any:
    """The transformers model inside a PEFT model, or `model` itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


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


def head_weight(model: Any) -> Tensor:
    """The output head's weight [V, H].

    UserError for heads that are not one plain linear layer without bias, and for models that change
    their logits afterwards: the loss would not be theirs.
    """
    problem = why_no_plain_head(model)
    if problem is not None:
        raise UserError(f"{type(transformers_model(model)).__name__}: {problem}")
    weight: Tensor = transformers_model(model).get_output_embeddings().weight
    return weight


def why_no_plain_head(model: Any) -> str | None:
    """Why the loss cannot be computed from the head's weight, or None."""
    inner = transformers_model(model)
    head = inner.get_output_embeddings()
    if head is None:
        return "the model has no output head"
    if is_lora(head) or not isinstance(head, nn.Linear):
        return f"the output head is {type(head).__name__}; leave it out of target_modules"
    if head.bias is not None:
        return "the output head has a bias"
    config = inner.config.get_text_config()
    for name in _LOGIT_CHANGES:
        if getattr(config, name, None) not in (None, 1, 1.0):
            return f"the model changes its logits (config.{name})"
    return None


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
        """As the model's own; with `labels` in training `logits` is None in the result."""
        if labels is None or not self.model.training or args:
            given = {"num_items_in_batch": num_items_in_batch, "return_dict": return_dict}
            kwargs.update({key: value for key, value in given.items() if value is not None})
            return self.original(*args, labels=labels, **kwargs)
        from transformers.modeling_outputs import CausalLMOutputWithPast

        kwargs.pop("logits_to_keep", None)
        kwargs.setdefault("use_cache", False)
        output = self.model.base_model(**kwargs)
        loss = shifted_loss(
            output.last_hidden_state, head_weight(self.model), labels, num_items_in_batch
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
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [B, L] int64
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """Mean cross-entropy of each position's next label, over supervised positions only.

    Divided by `num_items_in_batch` where given (transformers' gradient accumulation).
    """
    targets = labels[:, 1:]
    supervised = targets != -100
    rows = hidden[:, :-1][supervised]
    out = ops.linear_cross_entropy(rows, weight, targets[supervised], reduction="sum")
    if num_items_in_batch is None:
        return out.loss / supervised.sum().clamp(min=1)
    return out.loss / torch.as_tensor(num_items_in_batch, device=out.loss.device)
