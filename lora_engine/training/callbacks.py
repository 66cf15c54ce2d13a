"""Who is told what a run is doing."""

from collections.abc import Callable, Sequence
from typing import Protocol

from lora_engine.evaluation.heldout import HeldoutResult
from lora_engine.training.metrics import StepMetrics
from lora_engine.training.state import TrainResult, TrainState


class Beginning(Protocol):
    """What of a trainer says where its run begins."""

    total_steps: int
    state: TrainState


class Callbacks:
    """Objects with any of the methods below; each is called for the events that it has one for."""

    def __init__(self, callbacks: Sequence[object]) -> None:
        on_start: list[Callable[[Beginning], None]]
        on_step: list[Callable[[StepMetrics], None]]
        on_eval: list[Callable[[int, HeldoutResult], None]]
        on_end: list[Callable[[TrainResult], None]]
        on_start = [each.on_start for each in callbacks if hasattr(each, "on_start")]
        on_step = [each.on_step for each in callbacks if hasattr(each, "on_step")]
        on_eval = [each.on_eval for each in callbacks if hasattr(each, "on_eval")]
        on_end = [each.on_end for each in callbacks if hasattr(each, "on_end")]
        self._on_start, self._on_step = on_start, on_step
        self._on_eval, self._on_end = on_eval, on_end

    def on_start(self, trainer: Beginning) -> None:
        """Training begins, or continues at trainer.state.step."""
        for call in self._on_start:
            call(trainer)

    def on_step(self, metrics: StepMetrics) -> None:
        """An optimiser step is done."""
        for call in self._on_step:
            call(metrics)

    def on_eval(self, step: int, result: HeldoutResult) -> None:
        """The held-out data were measured."""
        for call in self._on_eval:
            call(step, result)

    def on_end(self, result: TrainResult) -> None:
        """Training ended, for whatever reason."""
        for call in self._on_end:
            call(result)
