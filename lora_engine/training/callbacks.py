"""Who is told what a run is doing."""

from collections.abc import Callable, Sequence
from inspect import isfunction
from typing import Protocol

from lora_engine.errors import UserError
from lora_engine.evaluation.heldout import HeldoutResult
from lora_engine.training.metrics import StepMetrics
from lora_engine.training.state import TrainResult, TrainState


class Beginning(Protocol):
    """What of a trainer says where its run begins."""

    total_steps: int
    state: TrainState


class Callbacks:
    """Objects with any of the methods below; each is called for the events that it has one for.

    Raises UserError for what is none.
    """

    def __init__(self, callbacks: Sequence[object]) -> None:
        _check(callbacks)
        self._on_start: list[Callable[[Beginning], None]] = _methods(callbacks, "on_start")
        self._on_step: list[Callable[[StepMetrics], None]] = _methods(callbacks, "on_step")
        self._on_eval: list[Callable[[int, HeldoutResult], None]] = _methods(callbacks, "on_eval")
        self._on_end: list[Callable[[TrainResult], None]] = _methods(callbacks, "on_end")

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


EVENTS = ("on_start", "on_step", "on_eval", "on_end")


def _methods(callbacks: Sequence[object], event: str) -> list[Callable[..., None]]:
    """Those that the callbacks have for the event; one whose attribute is None has none."""
    found = [getattr(each, event, None) for each in callbacks]
    return [method for method in found if method is not None]


def _check(callbacks: object) -> None:
    """Raises UserError where a callback is none, or would never be called."""
    if not isinstance(callbacks, Sequence) or isinstance(callbacks, str):
        raise UserError(f"callbacks is {type(callbacks).__name__}; give a list of callbacks")
    for each in callbacks:
        kind = each.__name__ if isinstance(each, type) else type(each).__name__
        if isinstance(each, type) and any(isfunction(vars(each).get(name)) for name in EVENTS):
            raise UserError(f"callback {kind} is a class; give an object of it, {kind}()")
        methods = [getattr(each, name, None) for name in EVENTS]
        if not any(callable(method) for method in methods):
            raise UserError(
                f"callback {kind} has no method {', '.join(EVENTS[:-1])} or {EVENTS[-1]}, so that "
                "it would never be called"
            )
