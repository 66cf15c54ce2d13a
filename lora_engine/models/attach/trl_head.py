"""TRL's fused output head, computed by lora_engine's.

With `fused_lm_head=True` TRL's trainers give the model a forward that returns log-probabilities and
other figures of each label. Which ones a trainer asked for is read from that function's closure.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FunctionType

import torch
from torch import Tensor, nn

from lora_engine.models.attach.attachment import attachment
from lora_engine.models.attach.causal_lm import are_of_tokens
from lora_engine.models.attach.forwards import ReplacedForward, own_forward, uncompiled
from lora_engine.models.attach.head import output_head, why_no_head
from lora_engine.models.attach.packed import hidden_rows
from lora_engine.models.attach.patches import Patches
from lora_engine.models.attach.supervised_padding import (
    LabelledForward,
    computes_supervised_padding,
)
from lora_engine.models.families.modules import CausalLm
from lora_engine.models.peft.lora_state import hooks_everywhere

_MODULE, _FUNCTION = "trl.trainer.utils", "_fused_forward"
_SERVED = frozenset({"log_probs", "entropy", "mean_logits", "is_top1"})


@dataclass(frozen=True)
class _Asked:
    """What a trainer asked of its fused head."""

    outputs: tuple[str, ...]
    temperature: float
    in_float32: bool
    changes_logits: bool  # by a factor
    result: Callable[..., object]  # the class of results


class TrlHeadForward(ReplacedForward):
    """A forward like TRL's whose log-probabilities are lora_engine's."""

    def __init__(self, model: CausalLm, theirs: Callable[..., object], asked: _Asked) -> None:
        self.model, self.theirs, self.asked = model, theirs, asked

    @uncompiled
    @computes_supervised_padding
    def __call__(
        self,
        *args: object,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,  # [B, L] int64
        shift_labels: Tensor | None = None,  # [B, L] int64
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: object,
    ) -> object:
        """As TRL's; what lora_engine's head does not compute runs as TRL's own."""
        any_labels = labels if shift_labels is None else shift_labels
        if (
            not fused_lm_head
            or args
            or any_labels is None
            or not are_of_tokens(any_labels, kwargs)
            or not self._serves(kwargs)
        ):
            options = {
                "fused_lm_head": fused_lm_head or None,
                "labels": labels,
                "shift_labels": shift_labels,
                "num_items_in_batch": num_items_in_batch,
            }
            kwargs |= {name: value for name, value in options.items() if value is not None}
            return self.theirs(*args, **kwargs)
        kwargs["use_cache"] = False
        targets = any_labels[:, 1:] if shift_labels is None else any_labels
        mask = targets != -100
        of_row = mask if shift_labels is not None else nn.functional.pad(mask, (0, 1))
        hidden = hidden_rows(self.model.base_model, of_row.flatten().nonzero()[:, 0], kwargs)
        asked = self.asked
        out = output_head(self.model).cross_entropy(
            hidden,
            targets[mask],
            reduction="none",
            temperature=asked.temperature,
            entropy="entropy" in asked.outputs,
            mean_logit="mean_logits" in asked.outputs,
        )
        log_probs = _spread(-out.loss, mask)
        count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return asked.result(
            loss=-log_probs.sum() / count,
            log_probs=log_probs,
            entropy=None if out.entropy is None else _spread(out.entropy, mask),
            mean_logits=None if out.mean_logit is None else _spread(out.mean_logit, mask),
            is_top1=_spread(out.correct, mask) if "is_top1" in asked.outputs else None,
            label_mask=mask,
        )

    def _serves(self, kwargs: Mapping[str, object]) -> bool:
        config, asked = self.model.config.get_text_config(), self.asked
        if why_no_head(self.model) is not None:
            return False
        return not (
            asked.changes_logits
            or not set(asked.outputs) <= _SERVED
            or (asked.in_float32 and output_head(self.model).weight.itemsize < 4)
            or (asked.temperature != 1 and getattr(config, "final_logit_softcapping", None))
            or kwargs.get("output_router_logits")
            or getattr(config, "output_router_logits", False)
            or kwargs.get("return_dict") is False
            or hooks_everywhere()
            or attachment(self.model) is None
        )


def adopt(model: CausalLm, patches: Patches) -> bool:
    """Serves TRL's fused head if there is one on the model; whether there is."""
    forward = own_forward(model)
    asked = _asked(forward)
    if asked is None or not callable(forward):
        return False
    patches.set_forward(model, TrlHeadForward(model, forward, asked))
    return True


class ModeSetter:
    """A model's `train`, which `eval` calls too: takes note of a forward that has come since.

    A trainer replaces the model's forward when it is made, after `accelerate` perhaps, and sets the
    mode before each step: a convenient moment to notice. A fused head of TRL's is then adopted;
    behind any other forward, labels on rows of padding make these be computed.
    """

    def __init__(self, model: CausalLm, patches: Patches) -> None:
        self.model, self.patches, self.original = model, patches, model.train

    def __call__(self, mode: bool = True) -> nn.Module:
        if not adopt(self.model, self.patches) and is_foreign(self.model):
            self.patches.set_forward(self.model, LabelledForward(self.model))
        return self.original(mode)


def is_foreign(model: nn.Module) -> bool:
    """Whether somebody gave the model a forward that is neither lora_engine's nor TRL's."""
    forward = own_forward(model)
    of_lora_engine = type(forward).__module__.startswith("lora_engine.")
    return forward is not None and not of_lora_engine and _asked(forward) is None


def _asked(forward: object) -> _Asked | None:
    """What a forward's trainer asked for; None for one that is not TRL's as we know it."""
    function: FunctionType | None = getattr(forward, "__func__", None)
    if not isinstance(function, FunctionType):
        return None
    if function.__code__.co_name != _FUNCTION or function.__globals__["__name__"] != _MODULE:
        return None
    held = inspect.getclosurevars(function).nonlocals
    result = function.__globals__.get("FusedCausalLMOutput")
    names = {"outputs", "temperature", "cast_lm_head_to_fp32", "logit_scale"}
    if result is None or not names <= set(held):
        return None
    return _Asked(
        outputs=tuple(held["outputs"]),
        temperature=held["temperature"],
        in_float32=held["cast_lm_head_to_fp32"],
        changes_logits=held["logit_scale"] != 1,
        result=result,
    )


def _spread(values: Tensor, mask: Tensor) -> Tensor:
    """`values` [U] where the mask [B, L] is true, and zero elsewhere."""
    spread: Tensor = torch.zeros_like(mask, dtype=values.dtype).masked_scatter(mask, values)
    return spread
