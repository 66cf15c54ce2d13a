"""Whether an accelerated model computes what it computed before, tried on small batches.

Structure shows what a model probably does; its own results on a padded and on a packed batch show
whether that is so. What differs is left to transformers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_engine.models.attention import proving
from lora_engine.models.head import output_head

# What rounding may come to, of the largest logit.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}
LENGTH = 9
LONGEST = 72  # windows and chunks up to about so long are tried; longer ones would take too long
_SPANS = ("sliding_window", "attention_chunk_size", "local_attention", "attention_window_size")


@dataclass(frozen=True)
class Results:
    """What a model makes of the probes: an error instead where it makes nothing of them.

    logits: of the rows that are no padding; hidden states where the model has no logits of tokens.
    """

    logits: tuple[Tensor, ...]
    loss: Tensor | None
    error: str = ""


def own_results(model: Any) -> Results:
    """Of a model as transformers has it: logits, and the loss that it takes of labels."""
    if any(p.device.type == "meta" for p in model.parameters()):
        return Results((), None, "its weights have no values yet")
    try:
        with _measuring(model):
            return Results(*_logits(model), _loss(model))
    except Exception as error:  # whatever a model needs beyond token ids
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        return Results((), None, f"it cannot be tried on token ids ({reason})")


def same_logits(model: Any, own: Results) -> str | None:
    """Why the accelerated model's logits are not its own; None if they are."""
    if own.error:
        return own.error
    try:
        with _measuring(model), proving():
            logits = _logits(model)[0]
    except Exception as error:
        return f"a try raises {type(error).__name__}: {error}"
    worst = max(_distance(*pair) for pair in zip(logits, own.logits, strict=True))
    if worst <= TOLERANCE.get(own.logits[0].dtype, 0.0):
        return None
    return f"a try gives other logits than the model's own, by {worst:.1e} of the largest"


def same_loss(model: Any, own: Results) -> str | None:
    """Why the accelerated model's loss in training is not its own; None if it is."""
    if own.error:
        return own.error
    if own.loss is None:
        return "the model takes no labels"
    try:
        with _measuring(model):
            of_head = _logits_of_head(model)
            model.training = True  # the model alone: its parts drop nothing out
            loss = _loss(model)
    except Exception as error:
        return f"a try raises {type(error).__name__}: {error}"
    assert loss is not None
    tolerance = TOLERANCE.get(own.logits[0].dtype, 0.0)
    if _distance(of_head, own.logits[0]) > tolerance:
        return "the model's logits are more than its head's product with the hidden states"
    if _distance(loss, own.loss) <= tolerance / 10:  # a mean: rounding cancels
        return None
    return f"a try gives a loss of {loss.item():.5g}, the model's own is {own.loss.item():.5g}"


def _distance(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, of the largest value; infinite where a value is not finite."""
    if ours.shape != theirs.shape or not (ours.isfinite().all() and theirs.isfinite().all()):
        return float("inf")
    scale = theirs.abs().max().float().clamp(min=1e-12)
    return float((ours.float() - theirs.float()).abs().max() / scale)


@contextmanager
def _measuring(model: nn.Module) -> Iterator[None]:
    """Nothing is dropped out, no generator moves, no gradient is kept."""
    training = {part: part.training for part in model.modules()}
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            yield
    finally:
        for part, before in training.items():
            part.training = before


def _logits(model: Any) -> tuple[tuple[Tensor, ...]]:
    found = []
    for batch in (_padded(model), _packed(model)):
        rows = _of_each_token(model, batch)
        mask = batch.get("attention_mask")
        found.append(rows if mask is None else rows[mask.bool()])
    return (tuple(found),)


def _of_each_token(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Logits [B, L, V], or hidden states [B, L, H] where the model's logits are not of tokens."""
    output = model(**batch, use_cache=False)
    if "logits" in output and output["logits"].shape[:-1] == batch["input_ids"].shape:
        return output["logits"]
    if "last_hidden_state" not in output:  # a classifier of whole sequences
        output = model.base_model(**batch, use_cache=False)
    return output["last_hidden_state"]


def _loss(model: Any) -> Tensor | None:
    if model.get_output_embeddings() is None:  # its labels, if it takes any, are no tokens
        return None
    batch = _padded(model)
    padding = batch["attention_mask"] == 0
    padding[:, 1:] |= padding[:, :-1].clone()  # nor what a padding token would predict
    labels = batch["input_ids"].masked_fill(padding, -100)
    try:
        output = model(**batch, labels=labels, use_cache=False)
    except TypeError:  # a model without a loss
        return None
    loss: Tensor | None = getattr(output, "loss", None)
    return loss


def _logits_of_head(model: Any) -> Tensor:
    """The padded batch's logits as the loss takes them, without padding."""
    batch = _padded(model)
    hidden = model.base_model(**batch, use_cache=False).last_hidden_state
    return output_head(model).logits(hidden[batch["attention_mask"].bool()])


def _length(model: Any) -> int:
    config = model.config.get_text_config()
    spans = [getattr(config, name, None) for name in _SPANS]
    short = [span for span in spans if isinstance(span, int) and LENGTH <= span + 3 <= LONGEST]
    return max([LENGTH, *(span + 3 for span in short)])


def _tokens(model: Any, rows: int) -> Tensor:
    """[rows, length] int64: different ordinary tokens."""
    embeddings = model.get_input_embeddings()
    length = _length(model)
    ids = 3 + torch.arange(rows * length) * 7 % max(1, embeddings.weight.shape[0] - 3)
    return ids.view(rows, length).to(embeddings.weight.device)


def _padded(model: Any) -> dict[str, Tensor]:
    """A whole row, one with padding on its left, one with padding on its right."""
    ids = _tokens(model, 3)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    mask[2, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _packed(model: Any) -> dict[str, Tensor]:
    """One row without padding."""
    return {"input_ids": _tokens(model, 1)}
