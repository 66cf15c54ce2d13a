"""Rows of padding that a model's head reads: they are computed as the model itself would.

Attention leaves rows of padding out. Where a loss is taken of them (labels that go on over padding,
padding between virtual tokens and a text), that would be another loss than the model's own; so
would the class of a sequence that is read off one of them, or what is generated behind one.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor, nn

from lora_engine.models.attach.attachment import attachment
from lora_engine.models.attach.attention_function import weights_if_asked, whole_masks
from lora_engine.models.attach.forwards import ReplacedForward, uncompiled
from lora_engine.models.families.modules import CausalLm


class _OfModel(Protocol):
    """A forward of ours, of a whole model."""

    model: CausalLm


S = TypeVar("S", bound=_OfModel)
P = ParamSpec("P")
R = TypeVar("R")


def computes_supervised_padding(
    call: Callable[Concatenate[S, P], R],
) -> Callable[Concatenate[S, P], R]:
    """Makes the `__call__` of a model's replaced forward compute padding that its head reads."""

    @functools.wraps(call)
    def run(self: S, *args: P.args, **kwargs: P.kwargs) -> R:
        with _computing_supervised_padding(self.model, args, kwargs):
            return call(self, *args, **kwargs)

    return run


class LabelledForward(ReplacedForward):
    """The forward of a model whose loss, if it has one, is its own."""

    def __init__(self, model: CausalLm) -> None:
        self.model = model
        self.original: Callable[..., object] = model.forward

    @uncompiled
    @computes_supervised_padding
    def __call__(self, *args: object, **kwargs: object) -> object:
        """As the model's own."""
        return self.original(*args, **kwargs)


def _has_head(model: CausalLm) -> bool:
    """Whether a model does something with hidden states: it is more than its layers."""
    labels = "labels" in inspect.signature(model.forward).parameters
    return labels or model.base_model is not model


@contextmanager
def _computing_supervised_padding(
    model: CausalLm, args: tuple[object, ...], kwargs: Mapping[str, object]
) -> Iterator[None]:
    attached = attachment(model)
    own = None if attached is None else attached.own_attention
    if args:
        names = inspect.signature(model.forward).parameters
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
    with weights_if_asked(model.config, own, kwargs):
        if own is None or not _has_read_padding(model, own, kwargs):
            yield
            return
        with whole_masks("eager" if own == "eager" else "sdpa"):
            yield


def _has_read_padding(model: CausalLm, own: str, arguments: Mapping[str, object]) -> bool:
    mask = arguments.get("attention_mask")  # [B, L]
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return False
    padding = mask == 0
    if own == "sdpa":  # of a row that sees nothing it makes zeros, as lora_engine's attention does
        padding &= (mask != 0).cumsum(1) > 0
    read = _read(model, arguments, mask)
    return read is not None and bool((padding & read).any())


def _read(model: CausalLm, arguments: Mapping[str, object], mask: Tensor) -> Tensor | None:
    """[B, L] bool, the rows of which a model's head makes something; None for none."""
    if not _has_head(model):
        return None
    kind = next(c.__name__ for c in type(model).__mro__ if "forward" in vars(c))
    if model.get_output_embeddings() is not None or kind.endswith("ForTokenClassification"):
        return _supervised(model, arguments, mask)
    if kind.endswith("ForSequenceClassification"):
        return _classified(model, arguments, mask)
    return torch.ones_like(mask, dtype=torch.bool)


def _classified(model: CausalLm, arguments: Mapping[str, object], mask: Tensor) -> Tensor:
    """[B, L] bool, the row of each sequence's class: transformers goes by ids, not by the mask."""
    ids, padding = arguments.get("input_ids"), model.config.get_text_config().pad_token_id
    last = torch.full((len(mask),), mask.shape[1] - 1, device=mask.device)
    if isinstance(ids, Tensor) and padding is not None and ids.shape == mask.shape:
        places = torch.arange(ids.shape[1], device=ids.device)
        last = ((ids != padding) * places).argmax(1).to(mask.device)
    read: Tensor = nn.functional.one_hot(last, mask.shape[1]).bool()
    return read


def _supervised(model: CausalLm, arguments: Mapping[str, object], mask: Tensor) -> Tensor | None:
    """[B, L] bool, the rows of which a loss may be taken, or a next token; None for none."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    labels, shifted = arguments.get("labels"), arguments.get("shift_labels")
    ignored = arguments.get("ignore_index")
    ignored = ignored if isinstance(ignored, int) else -100
    supervised = None
    kept = arguments.get("logits_to_keep")
    if isinstance(kept, int) and kept == 1:  # generation goes on behind each row's last token
        supervised = torch.zeros_like(mask, dtype=torch.bool)
        supervised[:, -1] = True
    is_known = _is_of_transformers(getattr(model, "loss_function", None))
    for targets, shift in ((labels, 1), (shifted, 0)):
        if isinstance(targets, Tensor) and (targets.dim() != mask.dim() or not is_known):
            # Labels laid out otherwise, or a loss of somebody's, which may read any row.
            supervised = torch.ones_like(mask, dtype=torch.bool)
        elif isinstance(targets, Tensor) and targets.shape == mask.shape:
            counted = (targets != ignored).to(mask.device)
            rows = nn.functional.pad(counted, (0, shift))[:, shift:]
            if shift and getattr(model, "loss_function", None) is not ForCausalLMLoss:
                rows = rows | counted
            supervised = rows if supervised is None else supervised | rows
    return supervised


def _is_of_transformers(loss: object) -> bool:
    """Whether a model's loss is one that transformers brings, or it has none of its own."""
    return loss is None or getattr(loss, "__module__", "").startswith("transformers.")
