"""What is measured of a run's weights at a step: the held-out data and the probe."""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

from torch import nn

from lora_engine.data.dataset import TokenizedDataset
from lora_engine.distributed.world import World
from lora_engine.evaluation.heldout import HeldoutResult, ProbeResult
from lora_engine.objectives.base import Objective
from lora_engine.objectives.sft import SFT
from lora_engine.training.batches import BatchSource
from lora_engine.training.together import measured_together

# With the weights of the step that it is given.
Measure: TypeAlias = Callable[[int], HeldoutResult]


class Measuring:
    """Makes the functions that measure all examples of a dataset, in their order.

    tokens: of a batch. shares: its examples share prefixes. check: is called before each batch.
    """

    def __init__(
        self,
        model: nn.Module,
        tokens: int,
        *,
        shares: bool,
        check: Callable[[], None],
        world: World,
    ) -> None:
        self._model = model
        self._tokens = tokens
        self._shares = shares
        self._check = check
        self._world = world

    def heldout(self, dataset: TokenizedDataset, objective: Objective) -> Measure:
        """The objective on held-out examples."""
        source = BatchSource(dataset, self._tokens, shuffle=False)
        source.share_prefixes = self._shares
        return measured_together(self._model, source, objective, self._check, self._world)

    def with_probe(self, heldout: Measure, dataset: TokenizedDataset) -> Measure:
        """`heldout`, and the probe beside it, by its cross-entropy whatever the objective is."""
        probe = self.heldout(dataset, SFT())

        def both(step: int) -> HeldoutResult:
            result = heldout(step)
            own = probe(step)
            assert own.accuracy is not None
            return replace(result, probe=ProbeResult(own.loss, own.accuracy, own.targets))

        return both
