"""What `drop_in_grid.py` asks of a model: one function a cell, and how two answers are compared.

Kinds of models, beside those that are named for their heads: "codebooks" takes and predicts several
codes a token; "depth" has a head for each place and none for the first.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.drop_in.drop_in_models import LENGTH, LONG

Answer = dict[str, Tensor]
PADDING = 9
RESTART = 14
TOLERANCE = 5e-4  # float32, of the largest value; a gradient's also of a hundredth of the largest


def _batch(kind: str, padding: str, length: int = LENGTH) -> dict[str, Tensor]:
    """Two rows of ordinary tokens; the second padded on one side."""
    ids = 3 + torch.arange(2 * length).view(2, length) * 7 % 90
    batch = {"input_ids": ids}
    if padding:
        mask = torch.ones_like(ids)
        where = slice(None, PADDING) if padding == "left" else slice(-PADDING, None)
        mask[1, where] = 0
        batch = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
    if kind == "seq2seq":
        batch["decoder_input_ids"] = ids.flip(1)[:, : length // 2].contiguous()
    if kind == "codebooks":  # two codes a token, each a row
        batch["input_ids"] = torch.stack((ids, ids.flip(1)), dim=1).flatten(0, 1)
    return batch


def evaluate(model: Any, kind: str, padding: str, length: int = LENGTH) -> Answer:
    """Logits of the rows that are no padding."""
    batch = _batch(kind, padding, length)
    with torch.no_grad():
        logits = model.eval()(**batch).logits
    if padding and kind in ("causal", "masked", "codebooks", "depth"):
        tokens = batch["attention_mask"].bool()
        tokens = tokens.repeat_interleave(len(logits) // len(tokens), dim=0)
        logits = logits[tokens[:, tokens.shape[1] - logits.shape[1] :]]
    return {"logits": logits}


def train(model: Any, kind: str, padding: str) -> Answer:
    """The loss of labels that are no padding, nor predicted from it, and all gradients."""
    batch = _batch(kind, padding)
    if kind == "classification":
        return _gradients(model, batch | {"labels": torch.tensor([0, 1])})
    if kind == "seq2seq":
        return _gradients(model, batch | {"labels": batch.pop("decoder_input_ids").contiguous()})
    labels = batch["input_ids"].clone()
    if kind == "codebooks":
        labels = labels.unflatten(0, (2, 2)).transpose(1, 2).contiguous()
    if padding:
        without = batch["attention_mask"] == 0
        if kind in ("causal", "depth"):
            without[:, 1:] |= without[:, :-1].clone()
        labels[without] = -100
    return _gradients(model, batch | {"labels": labels})


def packed(model: Any, kind: str, training: bool) -> Answer:
    """One row of two sequences, told apart by their positions alone."""
    ids = _batch(kind, "")["input_ids"][:1]
    positions = torch.cat((torch.arange(RESTART), torch.arange(LENGTH - RESTART)))[None]
    batch = {"input_ids": ids, "position_ids": positions}
    if not training:
        with torch.no_grad():
            return {"logits": model.eval()(**batch).logits}
    labels = ids.clone()
    labels[0, RESTART] = -100
    return _gradients(model, batch | {"labels": labels, "use_cache": False})


def checkpointed(model: Any, kind: str) -> Answer:
    """As `train`, with gradient checkpointing."""
    model.gradient_checkpointing_enable()
    try:
        return train(model, kind, "")
    finally:
        model.gradient_checkpointing_disable()


def generate(model: Any, kind: str, beams: int) -> Answer:
    """Six tokens for two prompts, one of them padded on its left, and the scores of each."""
    batch = _batch("causal", "left")
    options: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    output = model.eval().generate(
        **batch,
        **options,
        num_beams=beams,
        output_scores=True,
        return_dict_in_generate=True,
    )
    if beams > 1:
        return {"tokens": output.sequences, "scores": output.sequences_scores}
    return {"tokens": output.sequences, "scores": torch.stack(output.scores)}


def _gradients(model: Any, batch: dict[str, Any]) -> Answer:
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    loss = model.train()(**batch).loss
    grads = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    named = zip(trained.items(), grads, strict=True)
    answer = {n: torch.zeros_like(p) if g is None else g for (n, p), g in named}
    return answer | {"loss": loss.detach()}


Cell = Callable[[Any, str], Answer]
CELLS: dict[str, Cell] = {
    "eval": lambda model, kind: evaluate(model, kind, ""),
    "eval, left": lambda model, kind: evaluate(model, kind, "left"),
    "eval, right": lambda model, kind: evaluate(model, kind, "right"),
    "eval, long": lambda model, kind: evaluate(model, kind, "", LONG),
    "train": lambda model, kind: train(model, kind, ""),
    "train, left": lambda model, kind: train(model, kind, "left"),
    "train, right": lambda model, kind: train(model, kind, "right"),
    "packed": lambda model, kind: packed(model, kind, True),
    "packed, eval": lambda model, kind: packed(model, kind, False),
    "checkpointing": checkpointed,
    "greedy": lambda model, kind: generate(model, kind, 1),
    "beams": lambda model, kind: generate(model, kind, 3),
}


def of_kind(cell: str, kind: str) -> bool:
    """Whether a cell is asked of models of this kind."""
    if cell.startswith("packed"):
        return kind == "causal"
    if cell in ("greedy", "beams"):
        return kind in ("causal", "seq2seq")
    return True


def distance(ours: Answer, theirs: Answer) -> tuple[float, str]:
    """The largest difference, of the largest value of each, and where it is."""
    largest = max((float(x.abs().max()) for x in theirs.values()), default=0.0)
    worst = 0.0, ""
    for name, expected in theirs.items():
        actual = ours[name]
        if actual.shape != expected.shape:
            return float("inf"), name
        if not expected.numel():
            continue
        expected, actual = expected.double(), actual.double()
        infinite = ~expected.isfinite()
        if not torch.equal(infinite, ~actual.isfinite()):
            return float("inf"), name
        expected, actual = (x.masked_fill(infinite, 0.0) for x in (expected, actual))
        floor = 1e-9 if name in ("loss", "logits", "scores", "tokens") else 1e-2 * largest
        scale = max(float(expected.abs().max()), floor, 1e-12)
        found = float((actual - expected).abs().max()) / scale
        worst = max(worst, (found, name))
    return worst
