"""The protocol of an objective: what it reads of a model, what it returns, how means are taken."""

from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, field
from typing import ClassVar, Literal, Protocol

from torch import Tensor, nn

from lora_engine.data.batch import PackedBatch

# The unit of a loss whose exponential is the perplexity.
NATS_PER_TARGET = "nats per supervised token"


# What the examples are: texts to learn, pairs of a chosen and a rejected answer, judged answers.
Kind = Literal["plain", "pairs", "labelled"]


class Teacher:
    """A model that another one learns from; whatever copies settings leaves it where it is.

    name: what messages and checkpoints call it; a run is resumed with a teacher of the same name.
    """

    def __init__(self, model: nn.Module, name: str = "") -> None:
        self.model = model
        self.name = name or type(model).__name__

    def __deepcopy__(self, memo: object) -> "Teacher":
        return self

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Divergence:
    """Of the model's distribution p over the vocabulary from a teacher's q, at each target.

    teacher: of the same vocabulary; or an adapter of the model's own by its name; or "", the model
        without its adapters.
    beta: 0 is the forward KL(q, p), 1 the reverse KL(p, q); between them, with the mixture
        m = beta q + (1 - beta) p, beta KL(q, m) + (1 - beta) KL(p, m) (arXiv:2306.13649).
    temperature: divides the logits of both.
    """

    teacher: Teacher | str = ""
    beta: float = 0.0
    temperature: float = 1.0


@dataclass(frozen=True)
class Reads:
    """What an objective reads of the model besides the sum of the targets' log-probabilities.

    each_logprob: it is differentiated in each log-probability. Otherwise in their sum alone; then a
        trained output head computes its logits once, not twice.
    entropy: of the softmax at each target, differentiable.
    reference: the targets' log-probabilities under the model without its adapters, in evaluation
        mode.
    temperature: divides the logits of the log-probabilities and of the entropy.
    examples: what kind of examples it learns from.
    divergence: from a teacher's distributions; None: it has no teacher.
    values: what the model's scalar head is read at: every target (the state before its token), the
        last token of every example, then instead of log-probabilities; or nothing.
    mismatched: how far the model has moved from its reference on answers to other prompts, as the
        batch's statistic "kl".
    weights: the batch's column of examples' weights, if it has one.
    """

    each_logprob: bool = False
    entropy: bool = False
    reference: bool = False
    temperature: float = 1.0
    examples: Kind = "plain"
    divergence: Divergence | None = None
    values: Literal["", "targets", "examples"] = ""
    mismatched: bool = False
    weights: bool = False

    @property
    def predicts_tokens(self) -> bool:
        """Whether examples have targets; otherwise the model says a value of each and no more."""
        return self.values != "examples"

    @property
    def values_targets(self) -> bool:
        """Whether the scalar head says a value of every target, beside its log-probability."""
        return self.values == "targets"

    @property
    def accuracy_of(self) -> str:
        """What the share of right ones is of, for people: "tokens", or "pairs" in their order."""
        return "tokens" if self.predicts_tokens else self.examples


@dataclass(frozen=True)
class TargetScores:
    """What a model says of a batch's U targets, or of its E examples where its values of them are
    read, which have no targets then. float32 in training, float64 in evaluation.

    logprobs: [U] log p(target); differentiable if the objective reads each_logprob, otherwise a
        gradient that arrives at them raises UserError.
    total: scalar, their sum, differentiable.
    correct: [U] bool, whether the target is the most likely token.
    entropy: [U] in nats, if the objective reads it.
    reference: [U], detached, if the objective reads it.
    divergence: scalar, the sum of the targets' divergences from the teacher, differentiable.
    values: [U] or [E], of the scalar head, differentiable.
    """

    logprobs: Tensor
    total: Tensor
    correct: Tensor
    entropy: Tensor | None = None
    reference: Tensor | None = None
    divergence: Tensor | None = None
    values: Tensor | None = None

    def double(self) -> "TargetScores":
        """The same in float64, `total` summed anew."""
        logprobs = self.logprobs.double()
        return TargetScores(
            logprobs=logprobs,
            total=logprobs.sum(),
            correct=self.correct,
            entropy=_doubled(self.entropy),
            reference=_doubled(self.reference),
            divergence=_doubled(self.divergence),
            values=_doubled(self.values),
        )


def _doubled(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.double()


@dataclass(frozen=True)
class Mean:
    """A metric of a batch, as a sum and what it is divided by: both add up over batches.

    total: scalar, on any device. count: 0 where the batch says nothing of it.
    """

    total: Tensor
    count: float


@dataclass(frozen=True)
class Loss:
    """total: scalar, differentiable; divided by the `weight` of all batches of a step it is what
    the step minimises. A loss of several terms has each by its name, and a weight of the same name
    for it. metrics: by the names that people chart."""

    total: Tensor | Mapping[str, Tensor]
    metrics: Mapping[str, Mean] = field(default_factory=dict)


class Objective(Protocol):
    """A pure function of log-probabilities and of fields of the batch.

    It draws no random numbers and keeps no state. A dataclass, whose fields are its settings: a run
    is resumed with the same ones.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[object]]]

    @property
    def name(self) -> str:
        """As messages and checkpoints have it."""

    @property
    def unit(self) -> str:
        """What the loss is counted in, for charts and model cards; "" for a bare number."""

    @property
    def reads(self) -> Reads:
        """What it reads of the model."""

    def weight(self, batch: PackedBatch) -> float | Mapping[str, float]:
        """What the batch contributes to the divisor of the loss: its targets, pairs, sequences.

        The batch is on the CPU. Where it is 0, or there are no targets, the model does not see the
        batch. Of a loss of several terms by the name of each.
        """

    def __call__(self, scores: TargetScores, batch: PackedBatch) -> Loss:
        """The batch's part of the loss; batch and scores are on the model's device."""


def settings_of(objective: Objective) -> dict[str, object]:
    """The objective's name and fields, as JSON values; a teacher by its name."""
    values = asdict(objective)
    named = {key: str(x) if isinstance(x, Teacher) else x for key, x in values.items()}
    return {"name": objective.name, **named}
