"""The protocol of an objective: what it reads of a model, what it returns, how means are taken."""

from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, field
from typing import ClassVar, Protocol

from torch import Tensor

from lora_engine.data.batch import PackedBatch

# The unit of a loss whose exponential is the perplexity.
NATS_PER_TARGET = "nats per supervised token"


@dataclass(frozen=True)
class Reads:
    """What an objective reads of the model besides the sum of the targets' log-probabilities.

    each_logprob: it is differentiated in each log-probability. Otherwise in their sum alone; then a
        trained output head computes its logits once, not twice.
    entropy: of the softmax at each target, differentiable.
    reference: the targets' log-probabilities under the model without its adapters, in evaluation
        mode.
    """

    each_logprob: bool = False
    entropy: bool = False
    reference: bool = False


@dataclass(frozen=True)
class TargetScores:
    """What a model says of a batch's U targets. float32 in training, float64 in evaluation.

    logprobs: [U] log p(target); differentiable if the objective reads each_logprob, otherwise a
        gradient that arrives at them raises UserError.
    total: scalar, their sum, differentiable.
    correct: [U] bool, whether the target is the most likely token.
    entropy: [U] in nats, if the objective reads it.
    reference: [U], detached, if the objective reads it.
    """

    logprobs: Tensor
    total: Tensor
    correct: Tensor
    entropy: Tensor | None = None
    reference: Tensor | None = None

    def double(self) -> "TargetScores":
        """The same in float64, `total` summed anew."""
        logprobs = self.logprobs.double()
        entropy = None if self.entropy is None else self.entropy.double()
        reference = None if self.reference is None else self.reference.double()
        return TargetScores(logprobs, logprobs.sum(), self.correct, entropy, reference)


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
    the step minimises. metrics: by the names that people chart."""

    total: Tensor
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

    def weight(self, batch: PackedBatch) -> float:
        """What the batch contributes to the divisor of the loss: its targets, pairs, sequences.

        The batch is on the CPU. Where it is 0 the model does not see the batch.
        """

    def __call__(self, scores: TargetScores, batch: PackedBatch) -> Loss:
        """The batch's part of the loss; batch and scores are on the model's device."""


def settings_of(objective: Objective) -> dict[str, object]:
    """The objective's name and fields, as JSON values."""
    return {"name": objective.name, **asdict(objective)}
