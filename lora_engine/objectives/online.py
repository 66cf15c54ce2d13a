"""What an objective makes of completions that the model has written and that were rewarded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import Tensor

from lora_engine.objectives.base import Objective


@dataclass(frozen=True)
class Sampled:
    """n completions, those of a prompt in a row, under the policy that wrote them.

    rewards: float64 [n]; NaN for a completion without one.
    size: completions of each prompt.
    logprobs: of each completion's tokens, float32 [its tokens] each.
    values, reference: likewise, of the scalar head, where the objective `measures`, and of the
        model without its adapters, where it `compares`.
    """

    rewards: Tensor
    size: int
    logprobs: Sequence[Tensor]
    values: Sequence[Tensor] = ()
    reference: Sequence[Tensor] = ()


@dataclass(frozen=True)
class Judged:
    """columns: of each completion, for the batches that it is in. equal: float64 or bool [n],
    whether the rewards of its group are all the same. metrics: by the names that people chart."""

    columns: Sequence[Mapping[str, float | list[float]]]
    equal: Tensor
    metrics: Mapping[str, float] = field(default_factory=dict)


@runtime_checkable
class OnlineObjective(Objective, Protocol):
    """An objective of completions that the model writes while it is trained.

    temperature: of the softmax that completions are drawn from.
    """

    temperature: float

    @property
    def measures(self) -> bool:
        """Whether `judge` needs a pass of the model without gradients: its values, and its
        log-probabilities in the place of the sampler's."""

    @property
    def compares(self) -> bool:
        """Whether `judge` needs the reference too, where it measures."""

    def judge(self, sampled: Sampled) -> Judged:
        """Advantages, and what else its batches hold."""


def as_online(objective: Objective) -> OnlineObjective | None:
    """`objective`, if it is one of completions that the model writes."""
    return objective if isinstance(objective, OnlineObjective) else None
