"""Where a training run stands: everything a checkpoint's JSON remembers, and the result."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, TypedDict, cast

from lora_engine.data.stream import Place
from lora_engine.evaluation.heldout import HeldoutResult, ProbeResult
from lora_engine.evaluation.overfitting import Measured, Parting, parting

Stopped = Literal["finished", "early_stopping", "forgetting", "interrupted"]


class Position(NamedTuple):
    """The next micro-batch: its epoch, and its index in that epoch's order.

    place: where the buffer begins that is the epoch, of a stream.
    """

    epoch: int = 0
    batch_index: int = 0
    place: Place | None = None


class SavedProbe(TypedDict):
    """A `ProbeResult` as JSON has it."""

    loss: float
    accuracy: float
    targets: int


class SavedResult(TypedDict):
    """A `HeldoutResult` as JSON has it."""

    loss: float
    accuracy: float
    tokens: int
    targets: int
    metrics: dict[str, float]
    probe: SavedProbe | None  # missing in checkpoints of runs without one


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
    loss_sum: float  # these five are missing in older checkpoints
    loss_count: int
    curve: Sequence[tuple[int, float | None, float]]
    parted_at: int | None
    warnings: Sequence[str]


@dataclass
class TrainState:
    """step: optimiser steps done. before, latest, best: held-out results at step 0, at
    latest_step and at best_step; of equally good ones the best is the latest. evals_since_best:
    evaluations in a row that were not better than all before.
    loss_sum, loss_count: of the steps since the latest evaluation. curve: of each evaluation what
    tells whether the model overfits. parted_at: the step since which it does, once that was told.
    warnings: what was told of the run as a whole."""

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
    loss_sum: float = 0.0
    loss_count: int = 0
    curve: list[Measured] = field(default_factory=list)
    parted_at: int | None = None
    warnings: list[str] = field(default_factory=list)

    def record_heldout(
        self, result: HeldoutResult, *, by: str = "loss", most_forgotten: float | None = None
    ) -> None:
        """Note the result of evaluating the weights of the current step.

        by: what the best is told by, see `HeldoutResult.badness`. most_forgotten: of weights whose
        probe has risen by more none is the best. Of equally good weights the latest are the best,
        so that a reward that no held-out prompt earns yet does not undo the training.
        """
        self.latest, self.latest_step = result, self.step
        if self.step == 0:
            self.before = result
        badness = result.badness(by)
        gain = math.inf if self.best is None else self.best.badness(by) - badness
        kept = not self.has_forgotten(most_forgotten)
        if gain >= 0 and kept:
            self.best, self.best_step = result, self.step
        self.evals_since_best = 0 if gain > 0 and kept else self.evals_since_best + 1
        if result.accuracy is not None:  # rewards are no loss that training takes
            mean = self.loss_sum / self.loss_count if self.loss_count else None
            self.curve.append(Measured(self.step, mean, result.loss))
        self.loss_sum, self.loss_count = 0.0, 0

    @property
    def forgotten(self) -> float | None:
        """The probe's relative rise over before training, at the latest evaluation."""
        before = self.before.probe if self.before else None
        latest = self.latest.probe if self.latest else None
        return None if before is None or latest is None else latest.rise_over(before)

    def has_forgotten(self, most: float | None) -> bool:
        """Whether the probe has risen by more than `most`, None being no limit."""
        return most is not None and self.forgotten is not None and self.forgotten > most

    def newly_parted(self) -> Parting | None:
        """Where training and held-out loss part, when that is seen for the first time."""
        seen = None if self.parted_at is not None else parting(self.curve)
        if seen is not None:
            self.parted_at = seen.step
        return seen

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
            saved.get("loss_sum", 0.0),
            saved.get("loss_count", 0),
            [Measured(*each) for each in saved.get("curve", ())],
            saved.get("parted_at"),
            list(saved.get("warnings", ())),
        )


def _result(saved: SavedResult | None) -> HeldoutResult | None:
    if saved is None:
        return None
    probe = saved.get("probe")
    return HeldoutResult(
        loss=saved["loss"],
        accuracy=saved["accuracy"],
        tokens=saved["tokens"],
        targets=saved["targets"],
        metrics=saved["metrics"],
        probe=None if probe is None else ProbeResult(**probe),
    )


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
    best_step: the step with the best held-out result, see `TrainConfig.best_by`.
    stopped: why it ended. checkpoint_dir: the newest checkpoint.
    probe_*_before, probe_*_after: of the probe, likewise; None without one.
    parted_at: the step since which the held-out loss rises while the training loss falls, if it
        does. warnings: what was told of that and of forgetting.
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
    probe_loss_before: float | None = None
    probe_loss_after: float | None = None
    probe_accuracy_before: float | None = None
    probe_accuracy_after: float | None = None
    parted_at: int | None = None
    warnings: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        state: TrainState,
        stopped: Stopped,
        *,
        ends_with_best: bool,
        peak_memory_bytes: int,
        checkpoint_dir: Path,
    ) -> "TrainResult":
        """What a run in that state came to, with the best weights or with the last ones."""
        before = state.before
        after = state.latest if state.latest_step == state.step else None
        if ends_with_best and state.best is not None:
            after = state.best
        probes = [result.probe if result else None for result in (before, after)]
        seconds = state.train_seconds
        return cls(
            steps=state.step,
            train_tokens=state.train_tokens,
            train_seconds=seconds,
            tokens_per_second=state.train_tokens / seconds if seconds else 0.0,
            peak_memory_bytes=peak_memory_bytes,
            heldout_loss_before=before.loss if before else None,
            heldout_loss_after=after.loss if after else None,
            heldout_accuracy_before=before.accuracy if before else None,
            heldout_accuracy_after=after.accuracy if after else None,
            best_step=state.best_step,
            stopped=stopped,
            checkpoint_dir=checkpoint_dir,
            heldout_metrics_before=before.metrics if before else {},
            heldout_metrics_after=after.metrics if after else {},
            probe_loss_before=probes[0].loss if probes[0] else None,
            probe_loss_after=probes[1].loss if probes[1] else None,
            probe_accuracy_before=probes[0].accuracy if probes[0] else None,
            probe_accuracy_after=probes[1].accuracy if probes[1] else None,
            parted_at=state.parted_at,
            warnings=tuple(state.warnings),
        )

    def summary(self) -> dict[str, object]:
        """The values as JSON, for summary.json."""
        as_json = {"checkpoint_dir": str(self.checkpoint_dir), "warnings": list(self.warnings)}
        return {**asdict(self), **as_json}
