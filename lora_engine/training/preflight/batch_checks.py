"""Refuses batches that teach nothing or that the model cannot take, before they are tried."""

from collections.abc import Mapping

import numpy
import torch
from torch import Tensor, nn

from lora_engine.data.batch import PackedBatch
from lora_engine.errors import UserError
from lora_engine.models.attach.head import transformers_model
from lora_engine.objectives.answers import has_weight
from lora_engine.objectives.base import Objective
from lora_engine.ops.tensors import shape_of

_IGNORED = -100
# Arguments that models take as tensors alone; others, as the sizes of images, may be lists.
_OF_TOKENS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
_TENSORS = frozenset({*_OF_TOKENS, "labels", "shift_labels", "token_type_ids"})
# Fewer supervised labels may equal their neighbours by chance.
_TELLING = 4


def check_batch(
    model: nn.Module, batch: PackedBatch | Mapping[str, object], objective: Objective
) -> None:
    """Raises UserError where no token of the batch is supervised or seen, a packed batch has no
    weight for the objective, token ids or labels are beyond the model's vocabulary, or something
    in it is no tensor.

    Labels are checked for causal language models with transformers' own loss only: others may take
    labels of any kind.
    """
    inner = transformers_model(model)
    ids: Tensor | None
    labels: Tensor | None
    if isinstance(batch, PackedBatch):
        ids, labels, ignored = batch.input_ids, batch.target_ids, None
    else:
        ids, labels, ignored = _tokens(batch), _labels(inner, batch), _ignored(batch)
    if ids is not None and getattr(inner, "loss_type", None) == "ForCausalLM":
        _check_ids("input_ids", ids, inner, "get_input_embeddings", None)
    if labels is None:
        return
    _check_ids("labels", labels, inner, "get_output_embeddings", ignored)
    if labels.dtype != torch.int64:
        raise UserError(
            f"preflight: labels of the batch are {str(labels.dtype).removeprefix('torch.')}; give "
            "int64, the only type of which PyTorch takes the loss"
        )
    if labels.numel() == 0 or (ignored is not None and bool((labels == ignored).all())):
        if labels.numel() == 0:
            why = " (its rows hold one token, and none to be predicted from it)"
        else:
            why = f" (every label is {ignored})"
        raise UserError(
            f"preflight: no token of the batch is supervised{why}, so that it teaches nothing; "
            "look at what cuts or masks the examples, or give another batch"
        )
    if isinstance(batch, PackedBatch) and not has_weight(objective, batch.to("cpu")):
        raise UserError(
            f"preflight: {objective.name} has nothing to learn from in the batch; give one to "
            "which it gives weight"
        )
    if not isinstance(batch, PackedBatch) and ignored is not None:
        _check_shift(batch, ignored)


def _check_shift(batch: Mapping[str, object], ignored: int) -> None:
    """Raises UserError where labels are off by one token.

    A model shifts `labels` itself, so they equal input_ids; `shift_labels` it takes as they are.
    """
    shifts_itself = not isinstance(batch.get("shift_labels"), Tensor)
    name = "labels" if shifts_itself else "shift_labels"
    ids, labels = batch.get("input_ids"), batch[name]
    if not (isinstance(ids, Tensor) and isinstance(labels, Tensor)):
        return
    if ids.shape != labels.shape or ids.dim() != 2:
        return
    labels, own, following = labels[:, :-1], ids[:, :-1], ids[:, 1:]
    labelled = labels != ignored
    right, wrong = (own, following) if shifts_itself else (following, own)
    are_right, are_wrong = (
        float((labels == those)[labelled].float().mean()) for those in (right, wrong)
    )
    if int(labelled.sum()) >= _TELLING and are_wrong > 0.9 and are_right < 0.5:
        mend = (
            "each is the following token, and the model shifts them once more: give labels as "
            "input_ids are, -100 where nothing is learned"
            if shifts_itself
            else "each is the token itself, which the model sees: shift them by one"
        )
        raise UserError(f"preflight: {name} of the batch are off by one token; {mend}")


def why_not_taken(batch: Mapping[str, object], error: Exception) -> str:
    """The message for a batch of which the model's forward pass raised `error`."""
    tensors = {name: x for name, x in batch.items() if isinstance(x, Tensor)}
    given = ", ".join(f"{name} {shape_of(x)}" for name, x in tensors.items()) or "no tensors"
    first = f"{type(error).__name__}: {error}".partition("\n")[0]
    return f"preflight: the model does not take the batch, {given}: {_misfit(tensors) or first}"


def _misfit(batch: Mapping[str, Tensor]) -> str | None:
    """What is odd about the shapes of what describes tokens."""
    ids = batch.get("input_ids")
    if ids is None:
        return None
    if ids.dim() != 2:
        return "give input_ids as [batch, length], one row for one text"
    for name in _OF_TOKENS:
        x = batch.get(name)
        if x is not None and name != "inputs_embeds" and x.shape[-1:] != ids.shape[-1:]:
            return f"give {name} as long as input_ids"
    return None


def _tokens(batch: Mapping[str, object]) -> Tensor | None:
    for name, value in batch.items():
        is_list = name in _TENSORS and isinstance(value, list | tuple)
        if is_list or isinstance(value, numpy.ndarray):
            raise UserError(
                f"preflight: {name} of the batch is a {type(value).__name__}; give a tensor, "
                "as the data collator of the trainer makes it"
            )
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.numel() and not bool(mask.any()):
        raise UserError(
            "preflight: attention_mask of the batch is 0 everywhere, so that the model sees no "
            "token; give 1 for tokens and 0 for padding"
        )
    ids = batch.get("input_ids")
    empty = isinstance(ids, Tensor) and ids.numel() == 0
    if empty or not batch:
        raise UserError("preflight: the batch is empty; give one with tokens")
    return ids if isinstance(ids, Tensor) else None


def _labels(model: nn.Module, batch: Mapping[str, object]) -> Tensor | None:
    """The labels that a causal language model compares with its predictions, or None."""
    own_loss = "_loss_function" in vars(model)  # the property `loss_function` was assigned to
    if getattr(model, "loss_type", None) != "ForCausalLM" or own_loss:
        return None
    shifted, labels, ids = (batch.get(name) for name in ("shift_labels", "labels", "input_ids"))
    if isinstance(shifted, Tensor):
        return shifted
    if not isinstance(labels, Tensor):
        return None
    if isinstance(ids, Tensor) and ids.shape != labels.shape:
        raise UserError(
            f"preflight: labels have shape {list(labels.shape)} and input_ids "
            f"{list(ids.shape)}; give each token its label, -100 where nothing is learned"
        )
    return labels[..., 1:]  # nothing predicts the first one


def _ignored(batch: Mapping[str, object]) -> int:
    """The label of tokens that are not supervised."""
    index = batch.get("ignore_index")
    return index if isinstance(index, int) else _IGNORED


def _check_ids(name: str, ids: Tensor, model: nn.Module, layer: str, ignored: int | None) -> None:
    if ids.is_floating_point() or ids.is_complex():
        raise UserError(
            f"preflight: {name} of the batch are {str(ids.dtype).removeprefix('torch.')}; give "
            "token ids, int64"
        )
    rows = _rows(getattr(model, layer)())
    if rows is None or not ids.numel():
        return
    wrong = (ids < 0) | (ids >= rows)
    if ignored is not None:
        wrong &= ids != ignored
    if bool(wrong.any()):
        allowed = "" if ignored is None else f", or {ignored} where nothing is learned"
        raise UserError(
            f"preflight: {name} of the batch hold {int(ids[wrong][0])}, and the model's vocabulary "
            f"has {rows:,} rows; give ids from 0 to {rows - 1:,}{allowed}"
        )


def _rows(layer: nn.Module) -> int | None:
    """How many tokens an embedding or a head has; None where that cannot be read off it."""
    weight = getattr(layer, "weight", None)
    if isinstance(weight, Tensor) and weight.ndim == 2 and weight.is_floating_point():
        return weight.shape[0]
    layer = getattr(layer, "base_layer", layer)
    for name in ("num_embeddings", "out_features"):  # packed weights have another shape
        if isinstance(rows := getattr(layer, name, None), int):
            return rows
    return None
