"""Each held-out example by itself: loss and accuracy with bootstrap intervals, by group, paired.

Intervals are the 2.5th and 97.5th percentile over resamples of the examples (Efron 1979): examples
are drawn, not tokens, because the tokens of one example are not independent.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
from torch import nn

from lora_engine.data.batch import collate
from lora_engine.data.render import Example
from lora_engine.errors import UserError
from lora_engine.evaluation.batch_loss import target_scores
from lora_engine.evaluation.modes import inference
from lora_engine.evaluation.nonfinite import NonFiniteError, first_nonfinite_layer
from lora_engine.objectives.sft import SFT

RESAMPLES = 1000
_LARGEST_LOSS = 700.0  # exp of more is beyond float64


@dataclass(frozen=True)
class Score:
    """One example. nats: −Σ log p of its `targets` supervised tokens. correct: how many of them are
    the likeliest token."""

    origin: str
    targets: int
    nats: float
    correct: int


def score_examples(
    model: nn.Module, examples: Sequence[Example], *, tokens: int = 2048
) -> list[Score]:
    """The score of each example, in their order, without dropout.

    tokens: read at once; the logits of no more than their targets are in memory. Raises UserError
    if the examples have no supervised token, and NonFiniteError, naming example and layer, for a
    loss that is NaN or infinite.
    """
    device = next(model.parameters()).device
    scores: list[Score] = []
    with inference(model):
        for part in _packs(examples, tokens):
            batch = collate(part).to(device)
            if not batch.num_targets:
                scores += [
                    Score(origin=example.origin, targets=0, nats=0.0, correct=0) for example in part
                ]
                continue
            result = target_scores(model, batch, SFT())
            counts = batch.target_counts
            nats = result.logprobs.double().neg().cpu().split(counts)
            correct = result.correct.cpu().split(counts)
            for example, count, loss, right in zip(part, counts, nats, correct, strict=True):
                if not math.isfinite(total := float(loss.sum())):
                    layer = first_nonfinite_layer(model, batch, SFT())
                    raise NonFiniteError(f"the loss is {total}", None, [example.origin], layer)
                scores.append(
                    Score(
                        origin=example.origin, targets=count, nats=total, correct=int(right.sum())
                    )
                )
    if not any(score.targets for score in scores):
        raise UserError("the held-out data have no supervised token to measure a loss on")
    return scores


class Summary(TypedDict):
    """Loss in nats per target, perplexity and accuracy, each {"value", "low", "high"}."""

    examples: int
    targets: int
    loss: dict[str, float]
    perplexity: dict[str, float]
    accuracy: dict[str, float]


def summary(scores: Sequence[Score]) -> Summary:
    """The loss and accuracy of these examples together."""
    counts = np.array([s.targets for s in scores], dtype=np.float64)
    loss = interval(np.array([s.nats for s in scores]), counts)
    ends = {name: math.exp(min(value, _LARGEST_LOSS)) for name, value in loss.items()}
    return {
        "examples": len(scores),
        "targets": int(counts.sum()),
        "loss": loss,
        "perplexity": ends,
        "accuracy": interval(np.array([s.correct for s in scores], dtype=np.float64), counts),
    }


def difference(scores: Sequence[Score], others: Sequence[Score]) -> dict[str, float]:
    """The loss of `scores` minus that of `others`, of the same examples, with its interval: the
    same examples are drawn of both."""
    nats = np.array([a.nats - b.nats for a, b in zip(scores, others, strict=True)])
    return interval(nats, np.array([s.targets for s in scores], dtype=np.float64))


def by_group(scores: Sequence[Score], groups: Sequence[str]) -> dict[str, Summary]:
    """The summary of the examples of each group that have targets; groups: of each example."""
    names = dict.fromkeys(groups)
    members = {n: [s for s, g in zip(scores, groups, strict=True) if g == n] for n in names}
    return {n: summary(part) for n, part in members.items() if any(s.targets for s in part)}


def interval(totals: np.ndarray, counts: np.ndarray) -> dict[str, float]:
    """Σ totals / Σ counts over examples, and the ends of its 95 % interval."""
    value = float(totals.sum() / counts.sum())
    sums, of = resampled_sums(np.stack([totals, counts], axis=1)).T
    return with_ends(value, sums[of > 0] / of[of > 0])


def resampled_sums(values: np.ndarray) -> np.ndarray:
    """[RESAMPLES, ...]: of `values` [examples, ...] the sum over as many examples as there are,
    drawn with replacement, the same ones each time. One resample is in memory at once."""
    random, count = np.random.default_rng(0), len(values)
    drawn = (random.integers(count, size=count) for _ in range(RESAMPLES))
    return np.array([values[numbers].sum(0) for numbers in drawn])


def with_ends(value: float, resampled: np.ndarray) -> dict[str, float]:
    """The value and its 95 % interval, by what it is over resamples."""
    low, high = np.percentile(resampled, [2.5, 97.5])
    return {"value": value, "low": float(low), "high": float(high)}


def _packs(examples: Sequence[Example], tokens: int) -> Iterator[list[Example]]:
    part: list[Example] = []
    size = 0
    for example in examples:
        if part and size + len(example.input_ids) > tokens:
            yield part
            part, size = [], 0
        part.append(example)
        size += len(example.input_ids)
    if part:
        yield part
