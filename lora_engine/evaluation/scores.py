"""Each held-out example by itself: loss and accuracy with bootstrap intervals, by group, paired.

Intervals are the 2.5th and 97.5th percentile over resamples of the examples (Efron 1979): examples
are drawn, not tokens, because the tokens of one example are not independent.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
from torch import nn

from lora_engine.data.batch import collate
from lora_engine.data.render import Example
from lora_engine.errors import UserError
from lora_engine.evaluation.batch_loss import target_scores
from lora_engine.evaluation.modes import inference
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
    if the examples have no supervised token.
    """
    device = next(model.parameters()).device
    scores: list[Score] = []
    with inference(model):
        for part in _packs(examples, tokens):
            batch = collate(part).to(device)
            if not batch.num_targets:
                scores += [Score(example.origin, 0, 0.0, 0) for example in part]
                continue
            result = target_scores(model, batch, SFT())
            counts = batch.target_counts
            nats = result.logprobs.double().neg().cpu().split(counts)
            correct = result.correct.cpu().split(counts)
            for example, count, loss, right in zip(part, counts, nats, correct, strict=True):
                scores.append(Score(example.origin, count, float(loss.sum()), int(right.sum())))
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
    random = np.random.default_rng(0)
    drawn = random.integers(len(counts), size=(RESAMPLES, len(counts)))
    sums = counts[drawn].sum(1)
    means = totals[drawn].sum(1)[sums > 0] / sums[sums > 0]
    low, high = np.percentile(means, [2.5, 97.5])
    return {"value": value, "low": float(low), "high": float(high)}


def exact_match(answers: Sequence[str], references: Sequence[str]) -> float:
    """Share of answers that are the reference, but for white space around them."""
    same = [a.strip() == r.strip() for a, r in zip(answers, references, strict=True)]
    return sum(same) / len(same)


def word_f1(answers: Sequence[str], references: Sequence[str]) -> float:
    """Mean F1 of the words that answer and reference share (Rajpurkar et al. 2016)."""
    values = []
    for answer, reference in zip(answers, references, strict=True):
        ours, theirs = Counter(answer.split()), Counter(reference.split())
        shared = (ours & theirs).total()
        total = ours.total() + theirs.total()
        values.append(2 * shared / total if total else 1.0)
    return sum(values) / len(values)


def bleu(answers: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU of sacrebleu, 0 to 100. Raises UserError where that is not installed."""
    try:
        import sacrebleu
    except ImportError as error:
        raise UserError("metric bleu needs sacrebleu; run: pip install sacrebleu") from error
    return float(sacrebleu.corpus_bleu(list(answers), [list(references)]).score)


def rouge(kind: str) -> Callable[[Sequence[str], Sequence[str]], float]:
    """The metric of rouge-score's kind "rouge1", "rouge2" or "rougeL": the mean F-measure, 0 to 1,
    without stemming. It raises UserError where the package is not installed."""

    def mean(answers: Sequence[str], references: Sequence[str]) -> float:
        try:
            from rouge_score.rouge_scorer import RougeScorer
        except ImportError as error:
            raise UserError(
                f"metric {kind} needs rouge-score; run: pip install rouge-score"
            ) from error
        scorer = RougeScorer([kind])
        pairs = zip(references, answers, strict=True)
        values = [scorer.score(reference, answer)[kind].fmeasure for reference, answer in pairs]
        return float(sum(values) / len(values))

    return mean


METRICS: dict[str, Callable[[Sequence[str], Sequence[str]], float]] = {
    "exact_match": exact_match,
    "f1": word_f1,
    "bleu": bleu,
    "rouge1": rouge("rouge1"),
    "rouge2": rouge("rouge2"),
    "rougeL": rouge("rougeL"),
}


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
