"""Metrics of written answers beside their references, with bootstrap intervals over the answers."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from lora_engine.errors import UserError, nearest
from lora_engine.evaluation.scores import interval, resampled_sums, with_ends
from lora_engine.user_code import function_of


@dataclass(frozen=True)
class OfCorpus:
    """A metric that is no mean of the answers' own.

    counts: [answers, …] of each answer. value: of the sums over all.
    """

    counts: np.ndarray
    value: Callable[[np.ndarray], float]


# (answers, references) -> a number for each answer, whose mean is the metric; what makes one of
# them all; or one number, which has no interval.
Metric: TypeAlias = Callable[[Sequence[str], Sequence[str]], "Sequence[float] | OfCorpus | float"]


def metric_of(name: str) -> Metric:
    """One of METRICS, or "module:function". Raises UserError for what is not there."""
    if name in METRICS:
        return METRICS[name]
    if ":" not in name:
        close = nearest(name, METRICS)
        hint = f"did you mean {close}?" if close else f"use {', '.join(METRICS)}, module:function"
        raise UserError(f"--metric {name}: is unknown; {hint}")
    try:
        return function_of(name)  # type: ignore[return-value]  # `measure` looks at what it gives
    except UserError as error:
        raise UserError(f"--metric {error}") from error


def measure(
    name: str, metric: Metric, answers: Sequence[str], references: Sequence[str]
) -> dict[str, float]:
    """The metric's "value", and, where it can be told, its interval from "low" to "high".

    Raises UserError where the metric fails, or gives neither a number nor one for each answer.
    """
    try:
        found = metric(list(answers), list(references))  # which are then its own to change
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"--metric {name}: {type(error).__name__}: {error}; mend it") from error
    if isinstance(found, OfCorpus):
        sums = resampled_sums(found.counts)
        return with_ends(found.value(found.counts.sum(0)), np.array([*map(found.value, sums)]))
    try:
        values = np.asarray(found, dtype=np.float64)
    except (RuntimeError, TypeError, ValueError):  # of torch the first: it needs a gradient
        values = np.array(math.nan)
    if values.shape not in ((), (len(answers),)) or not np.isfinite(values).all():
        raise UserError(
            f"--metric {name}: gave {found!r:.60}; expected a number, or one for each of the "
            f"{len(answers):,} answers"
        )
    if values.shape == ():
        return {"value": float(values)}
    return interval(values, np.ones(len(values)))


def exact_match(answers: Sequence[str], references: Sequence[str]) -> list[float]:
    """1 for an answer that is the reference, but for white space around them."""
    return [float(a.strip() == r.strip()) for a, r in zip(answers, references, strict=True)]


def word_f1(answers: Sequence[str], references: Sequence[str]) -> list[float]:
    """F1 of the words that answer and reference share (Rajpurkar et al. 2016)."""
    values = []
    for answer, reference in zip(answers, references, strict=True):
        ours, theirs = Counter(answer.split()), Counter(reference.split())
        shared = (ours & theirs).total()
        total = ours.total() + theirs.total()
        values.append(2 * shared / total if total else 1.0)
    return values


def bleu(answers: Sequence[str], references: Sequence[str]) -> OfCorpus:
    """Corpus BLEU of sacrebleu, 0 to 100. Raises UserError where that is not installed."""
    try:
        from sacrebleu.metrics import BLEU
    except ImportError as error:
        raise UserError("metric bleu needs sacrebleu; run: pip install sacrebleu") from error
    scorer = BLEU(effective_order=True)  # else it warns of single sentences; counts are the same
    rows = []
    for answer, reference in zip(answers, references, strict=True):
        one = scorer.sentence_score(answer, [reference])
        rows.append([*one.counts, *one.totals, one.sys_len, one.ref_len])
    orders = scorer.max_ngram_order

    def value(sums: np.ndarray) -> float:
        numbers = [int(number) for number in sums]
        return float(
            scorer.compute_bleu(
                numbers[:orders], numbers[orders : 2 * orders], *numbers[2 * orders :],
                smooth_method="exp",
            ).score
        )  # fmt: skip

    return OfCorpus(np.array(rows), value)


def rouge(kind: str) -> Callable[[Sequence[str], Sequence[str]], list[float]]:
    """The metric of rouge-score's kind "rouge1", "rouge2" or "rougeL": F-measures, 0 to 1, without
    stemming. It raises UserError where the package is not installed."""

    def measures(answers: Sequence[str], references: Sequence[str]) -> list[float]:
        try:
            from rouge_score.rouge_scorer import RougeScorer
        except ImportError as error:
            raise UserError(
                f"metric {kind} needs rouge-score; run: pip install rouge-score"
            ) from error
        scorer = RougeScorer([kind])
        pairs = zip(references, answers, strict=True)
        return [
            float(scorer.score(reference, answer)[kind].fmeasure) for reference, answer in pairs
        ]

    return measures


METRICS: dict[str, Metric] = {
    "exact_match": exact_match,
    "f1": word_f1,
    "bleu": bleu,
    "rouge1": rouge("rouge1"),
    "rouge2": rouge("rouge2"),
    "rougeL": rouge("rougeL"),
}
