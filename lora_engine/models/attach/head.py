"""The output head of a transformers model, with or without PEFT, as the loss sees it."""

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from lora_engine import ops
from lora_engine.errors import UserError
from lora_engine.models.attach.linear_group import are_altered
from lora_engine.models.families.modules import CausalLm, LoraLinear, PeftCausalLm, PeftTuner
from lora_engine.models.families.structure import logit_factor
from lora_engine.models.peft import lora_state
from lora_engine.models.peft.lora_state import base_layer, is_lora, is_saved_whole


@dataclass(frozen=True)
class Head:
    """What the logits are made of: `softcap(hidden weightᵀ + bias + LoRA)`."""

    weight: Tensor  # [V, H], the embedding's own where they are tied
    bias: Tensor | None = None  # [V], an adapter's included
    lora: ops.LoraFactors | None = None
    softcap: float | None = None

    def cross_entropy(
        self,
        hidden: Tensor,  # [U, H]
        target: Tensor,  # [U] int64
        *,
        reduction: str = "mean",
        temperature: float = 1.0,
        entropy: bool = False,
        mean_logit: bool = False,
    ) -> ops.LinearCrossEntropy:
        """`ops.linear_cross_entropy` of this head's logits."""
        return ops.linear_cross_entropy(
            hidden.to(self.weight.dtype),
            self.weight,
            target,
            bias=self.bias,
            lora=self.lora,
            softcap=self.softcap,
            reduction=reduction,
            temperature=temperature,
            entropy=entropy,
            mean_logit=mean_logit,
        )

    def put_to(
        self,
        hidden: Tensor,  # [U, H]
    ) -> ops.HeadInput:
        """This head and rows of hidden states, as `ops.linear_divergence` takes them."""
        return ops.HeadInput(
            hidden=hidden.to(self.weight.dtype),
            weight=self.weight,
            bias=self.bias,
            lora=self.lora,
            softcap=self.softcap,
        )

    @property
    def is_trained(self) -> bool:
        """Whether anything the logits are made of requires a gradient."""
        adapter = () if self.lora is None else (self.lora.lora_a, self.lora.lora_b)
        parts = (self.weight, self.bias, *adapter)
        return any(part is not None and part.requires_grad for part in parts)

    def logits(
        self,
        hidden: Tensor,  # [..., H]
    ) -> Tensor:
        """The logits [..., V] that the loss is taken of, in hidden's dtype."""
        logits = ops.linear_few_rows(hidden, self.weight, self.bias, self.lora)
        if logits is None:
            logits = nn.functional.linear(hidden, self.weight, self.bias)
            if self.lora is not None:
                lora_a, lora_b = (x.to(hidden.dtype) for x in (self.lora.lora_a, self.lora.lora_b))
                logits = logits + self.lora.scaling * (hidden @ lora_a.t()) @ lora_b.t()
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


def transformers_model(model: nn.Module) -> CausalLm:
    """The transformers model inside one of PEFT's, or `model` itself."""
    if hasattr(model, "get_base_model"):
        return cast(PeftCausalLm, model).get_base_model()
    tuner = peft_tuner(model)
    return cast(CausalLm, model) if tuner is None else tuner.model


def positions_of(model: nn.Module) -> int | None:
    """How many tokens the model was made for; None where its configuration does not say."""
    config = transformers_model(model).config.get_text_config()
    positions: int | None = getattr(config, "max_position_embeddings", None)
    return positions


def peft_tuner(model: nn.Module) -> PeftTuner | None:
    """PEFT's tuner, which puts adapters into layers: `model` or directly inside; or None."""
    from peft.tuners.tuners_utils import BaseTuner

    around = (model, getattr(model, "base_model", None))
    return next((each for each in around if isinstance(each, BaseTuner)), None)


def output_head(model: nn.Module) -> Head:
    """The output head as it is now: PEFT's adapters may be switched, merged or disabled later.

    A linear layer, with a bias or not, frozen, trained (also as one of PEFT's `modules_to_save`),
    tied to the embedding, or with LoRA; and Gemma's logit soft-cap. UserError for other heads, and
    for models that change their logits afterwards: the loss would not be theirs.
    """
    problem = why_no_head(model)
    if problem is not None:
        raise UserError(f"{type(transformers_model(model)).__name__}: {problem}")
    inner = transformers_model(model)
    head = _trained_copy(inner.get_output_embeddings())
    assert head is not None
    lora = next(iter(lora_state.active_factors(head, ())), None)
    linear = base_layer(head)
    bias: Tensor | None = linear.bias
    if lora is not None and lora.bias is not None:
        own = (lora.scaling * lora.bias).to(linear.weight.dtype)
        bias = own if bias is None else bias + own
        lora = replace(lora, bias=None)
    softcap = getattr(inner.config.get_text_config(), "final_logit_softcapping", None)
    return Head(weight=linear.weight, bias=bias, lora=lora, softcap=softcap)


def why_no_head(model: nn.Module) -> str | None:
    """Why `output_head` would refuse the model, or None."""
    inner = transformers_model(model)
    around = inner.get_output_embeddings()
    head = _trained_copy(around)
    if around is None or head is None:
        return "the model has no output head"
    if is_lora(head):
        problem = _why_not_lora(head)
        if problem is not None:
            return f"LoRA on the output head: {problem}"
        head = head.get_base_layer()
    if type(head) is not nn.Linear:
        return f"the output head is {type(head).__name__}; leave it out of target_modules"
    if are_altered(around.modules()):
        return "the output head, or a part of it, has hooks or was given another forward"
    factor = logit_factor(inner.config.get_text_config())  # which the loss here does not apply
    return None if factor is None else f"the model changes its logits (config.{factor})"


def _why_not_lora(head: LoraLinear) -> str | None:
    factors = lora_state.active_factors(head, ())
    if len(factors) > 1:
        return "several adapters are active at once"
    if any(one.magnitude is not None for one in factors):
        return "DoRA"
    if any(lora_state.adapter_state(head).dropout):
        return "lora_dropout > 0"
    return lora_state.why_not_active(head)


def _trained_copy(head: nn.Module | None) -> nn.Module | None:
    """What runs for a head under PEFT's `modules_to_save`: the active copy, or the original."""
    if head is None or not is_saved_whole(head):
        return head
    if head.disable_adapters or not head.active_adapters:
        return head.original_module
    return head.modules_to_save[head.active_adapters[0]]
