"""Where a training run stands: everything a checkpoint's JSON remembers, and the result."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, TypedDict, cast

from lora_engine.data.stream import Place
from lora_engine.evaluation.heldout import HeldoutResult

Stopped = Literal["finished", "early_stopping", "interrupted"]


class Position(NamedTuple):
    """The next micro-batch: its epoch, and its index in that epoch's order.

    place: where the buffer begins that is the epoch, of a stream.
    """

    epoch: int = 0
    batch_index: int = 0
    place: Place | None = None


class SavedResult(TypedDict):
    """A `HeldoutResult` as JSON has it."""

    loss: float
    accuracy: float
    tokens: int
    targets: int
    metrics: dict[str, float]


class SavedState(TypedDict):
    """A `TrainState` as JSON has it."""

    step: int
    position: Sequence[object]
    train_tokens: int
    train_seconds: float
    before: SavedResult | None
    latest: SavedResult | None
    latest_step: int | None
    best: SavedResult | None
    best_step: int | None
    evals_since_best: int


@dataclass
class TrainState:
    """step: optimiser steps done. before, latest, best: held-out results at step 0, at
    latest_step and at best_step. evals_since_best: evaluations in a row without a new best."""

    step: int = 0
    position: Position = field(default_factory=Position)
    train_tokens: int = 0
    train_seconds: float = 0.0
    before: HeldoutResult | None = None
    latest: HeldoutResult | None = None
    latest_step: int | None = None
    best: HeldoutResult | None = None
    best_step: int | None = None
    evals_since_best: int = 0

    def record_heldout(self, result: HeldoutResult) -> None:
        """Note the result of evaluating the weights of the current step."""
        self.latest, self.latest_step = result, self.step
        if self.step == 0:
            self.before = result
        if self.best is None or result.loss < self.best.loss:
            self.best, self.best_step = result, self.step
            self.evals_since_best = 0
        else:
            self.evals_since_best += 1

    def to_json(self) -> SavedState:
        return cast(SavedState, asdict(self))

    @classmethod
    def from_json(cls, saved: SavedState) -> "TrainState":
        return cls(
            saved["step"],
            _position(saved["position"]),
            saved["train_tokens"],
            saved["train_seconds"],
            _result(saved["before"]),
            _result(saved["latest"]),
            saved["latest_step"],
            _result(saved["best"]),
            saved["best_step"],
            saved["evals_since_best"],
        )


def _result(saved: SavedResult | None) -> HeldoutResult | None:
    return None if saved is None else HeldoutResult(**saved)


def _position(saved: Sequence[object]) -> Position:
    epoch, batch_index, *rest = saved
    place = rest[0] if rest else None
    assert isinstance(epoch, int) and isinstance(batch_index, int)
    return Position(epoch, batch_index, None if place is None else Place.of(place))


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    train_tokens, train_seconds: real tokens in all steps, and the steps' wall time, without
        evaluation and checkpoints; of earlier sittings too if the run was resumed.
    heldout_*_before: before the first step. heldout_*_after: of the weights the run ends with.
        None without held-out data, and after an interruption that left them unmeasured.
    heldout_metrics_*: the objective's own, likewise; none where it has none.
    best_step: the step with the lowest held-out loss.
    stopped: why it ended. checkpoint_dir: the newest checkpoint.
    """

    steps: int
    train_tokens: int
    train_seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
    heldout_loss_before: float | None
    heldout_loss_after: float | None
    heldout_accuracy_before: float | None
    heldout_accuracy_after: float | None
    best_step: int | None
    stopped: Stopped
    checkpoint_dir: Path
    heldout_metrics_before: Mapping[str, float] = field(default_factory=dict)
    heldout_metrics_after: Mapping[str, float] = field(default_factory=dict)

    def summary(self) -> dict[str, object]:
        """The values as JSON, for summary.json."""
        return {**asdict(self), "checkpoint_dir": str(self.checkpoint_dir)}
