"""Who is told what a run is doing."""

from collections.abc import Callable, Sequence
from inspect import getattr_static, isfunction
from typing import NamedTuple, Protocol

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
        methods = [_methods_of(each) for each in callbacks]
        self._on_start = [m.on_start for m in methods if m.on_start is not None]
        self._on_step = [m.on_step for m in methods if m.on_step is not None]
        self._on_eval = [m.on_eval for m in methods if m.on_eval is not None]
        self._on_end = [m.on_end for m in methods if m.on_end is not None]

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


class _Methods(NamedTuple):
    """A callback's methods; None where it has none, or None in its place."""

    on_start: Callable[[Beginning], None] | None
    on_step: Callable[[StepMetrics], None] | None
    on_eval: Callable[[int, HeldoutResult], None] | None
    on_end: Callable[[TrainResult], None] | None


def _methods_of(callback: object) -> _Methods:
    return _Methods(
        on_start=getattr(callback, "on_start", None),
        on_step=getattr(callback, "on_step", None),
        on_eval=getattr(callback, "on_eval", None),
        on_end=getattr(callback, "on_end", None),
    )


def _needs_an_object(kind: type) -> bool:
    """Whether one of the class's methods takes self: not so for static methods of a class."""
    declared = (
        getattr_static(kind, "on_start", None),
        getattr_static(kind, "on_step", None),
        getattr_static(kind, "on_eval", None),
        getattr_static(kind, "on_end", None),
    )
    return any(map(isfunction, declared))


def _check(callbacks: object) -> None:
    """Raises UserError where a callback is none, or would never be called."""
    if not isinstance(callbacks, Sequence) or isinstance(callbacks, str):
        raise UserError(f"callbacks is {type(callbacks).__name__}; give a list of callbacks")
    for each in callbacks:
        kind = each.__name__ if isinstance(each, type) else type(each).__name__
        if isinstance(each, type) and _needs_an_object(each):
            raise UserError(f"callback {kind} is a class; give an object of it, {kind}()")
        if not any(map(callable, _methods_of(each))):
            raise UserError(
                f"callback {kind} has no method on_start, on_step, on_eval or on_end, so that it "
                "would never be called"
            )
