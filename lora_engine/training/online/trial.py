"""What a trial step before an online run learns from: the prompts' own tokens."""

from dataclasses import dataclass, replace
from typing import ClassVar

from lora_engine.data.batch import PackedBatch, collate
from lora_engine.data.prompts import PromptDataset
from lora_engine.data.render import Example
from lora_engine.objectives.base import Loss, Reads, TargetScores


@dataclass(frozen=True)
class TrialOfPrompts:
    """−Σ log p(target), and where a scalar head is trained (v − 1)²/2, over the targets.

    It reaches what the run's objective reaches, and needs no completions.
    """

    values: bool = False
    name: ClassVar[str] = "trial"
    unit: ClassVar[str] = "nats per token of a prompt"

    @property
    def reads(self) -> Reads:
        return Reads(values="targets" if self.values else "")

    def weight(self, batch: PackedBatch) -> int:
        """Its targets."""
        return batch.num_targets

    def __call__(self, scores: TargetScores, batch: PackedBatch) -> Loss:
        """In nats, and the square of what a value is worth."""
        total = -scores.total
        if scores.values is not None:
            total = total + (scores.values - 1).square().sum() / 2
        return Loss(total)


def trial_batch(prompts: PromptDataset, tokens: int) -> PackedBatch:
    """The first prompts of more than one token, up to `tokens`, all but their first ones targets.

    At least one; what is longer is cut.
    """
    chosen: list[Example] = []
    taken = 0
    for example in prompts:
        if len(example) < 2:
            continue
        if chosen and taken + len(example) > tokens:
            break
        ids = list(example.input_ids)[:tokens]
        chosen.append(replace(example, input_ids=ids, supervised=[True] * len(ids), role=""))
        taken += len(ids)
    return collate(chosen or list(prompts)[:1])
