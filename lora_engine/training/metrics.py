"""What is measured while training, and the file it goes to."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lora_engine.errors import UserError
from lora_engine.evaluation.heldout import HeldoutResult
from lora_engine.training.run.lines import GrowingFile, Written, line_of

_LARGEST = 1e300  # not infinite, and no trouble to draw


@dataclass(frozen=True)
class StepMetrics:
    """One optimiser step, one line of metrics.jsonl.

    loss: the objective's, over its weight, in its unit; of SFT the mean over supervised tokens.
    grad_norm: before clipping.
    tokens, supervised_tokens: real tokens of this step; there is no padding to count.
    tokens_per_second: tokens over the step's wall time, evaluation and checkpoints excluded.
    peak_memory_bytes: see `backends.peak_memory_bytes`.
    metrics: the objective's own, by name; fields of the line beside the others.
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    supervised_tokens: int
    tokens_per_second: float
    peak_memory_bytes: int
    metrics: Mapping[str, float] = field(default_factory=dict)


class MetricsLog(GrowingFile):
    """metrics.jsonl.

    Lines of steps have the fields of StepMetrics; those of evaluations have step, heldout_loss,
    heldout_accuracy (where tokens are predicted), probe_loss and probe_accuracy (where the run has
    a probe) and the objective's metrics as heldout_NAME.
    """

    def __init__(self, path: Path, written: Written | None = None) -> None:
        super().__init__(path, written, is_line=is_measurement)

    def append_step(self, metrics: StepMetrics) -> None:
        own = asdict(metrics)
        self._append(own, own.pop("metrics"))

    def append_heldout(self, step: int, result: HeldoutResult) -> None:
        own = {"step": step, "heldout_loss": result.loss}
        if result.accuracy is not None:
            own["heldout_accuracy"] = result.accuracy
        if result.probe is not None:
            own["probe_loss"] = result.probe.loss
            own["probe_accuracy"] = result.probe.accuracy
        self._append(own, {f"heldout_{name}": value for name, value in result.metrics.items()})

    def _append(self, own: Mapping[str, object], metrics: Mapping[str, float]) -> None:
        """metrics: an objective's; UserError for a name that is taken."""
        if taken := own.keys() & metrics.keys():
            raise UserError(
                f"the objective's metrics {', '.join(sorted(taken))}: every line of "
                f"{self._path.name} has its own of these; give them other names"
            )
        self.append({**own, **metrics})


def is_measurement(line: bytes) -> bool:
    """Whether a line, with its end, is one that a run may have written: numbers of a step."""
    values = line_of(line)
    return (
        values is not None
        and "step" in values
        and all(isinstance(x, int | float) and abs(x) < _LARGEST for x in values.values())
    )
