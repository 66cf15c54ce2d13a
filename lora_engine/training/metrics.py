"""What is measured while training, and the file it goes to."""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from lora_engine.errors import UserError
from lora_engine.files import naming

logger = logging.getLogger(__name__)

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


class Written(NamedTuple):
    """How much of metrics.jsonl a checkpoint has seen: its first `size` bytes, and their hash."""

    size: int = 0
    sha256: str = ""


class MetricsLog:
    """metrics.jsonl: one JSON object per line, handed to the system line by line.

    Lines of steps have the fields of StepMetrics; those of evaluations have step, heldout_loss,
    heldout_accuracy and the objective's metrics as heldout_NAME. What cannot be
    written raises OSError with the file's name.
    """

    def __init__(self, path: Path, written: Written | None = None) -> None:
        """Opens `path`, cut back to what was `written` at the checkpoint, if there is one.

        Of a file that was changed since, the whole lines that hold numbers of a step are kept, and
        a warning is logged.
        """
        self._path, written = path, written or Written()
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            with path.open("rb") as file:
                content = file.read(written.size)
            if written.size and hashlib.sha256(content).hexdigest() != written.sha256:
                content = b"".join(
                    x for x in content.splitlines(keepends=True) if _is_measurement(x)
                )
                logger.warning(
                    "%s: was changed after the checkpoint; %d of its lines can be read",
                    path,
                    content.count(b"\n"),
                )
                path.write_bytes(content)
            os.truncate(path, len(content))
            self._file = path.open("ab", buffering=0)
        self._sha256 = hashlib.sha256(content)

    def append_step(self, metrics: StepMetrics) -> None:
        own = asdict(metrics)
        self._append(own, own.pop("metrics"))

    def append_heldout(
        self, step: int, loss: float, accuracy: float, metrics: Mapping[str, float]
    ) -> None:
        own = {"step": step, "heldout_loss": loss, "heldout_accuracy": accuracy}
        self._append(own, {f"heldout_{name}": value for name, value in metrics.items()})

    def sync(self) -> Written:
        """Flush to the disk; returns what is there now."""
        with naming(self._path):
            os.fsync(self._file.fileno())
            return Written(os.fstat(self._file.fileno()).st_size, self._sha256.hexdigest())

    def close(self) -> None:
        self._file.close()

    def _append(self, own: Mapping[str, object], metrics: Mapping[str, float]) -> None:
        """metrics: an objective's; UserError for a name that is taken."""
        if taken := own.keys() & metrics.keys():
            raise UserError(
                f"the objective's metrics {', '.join(sorted(taken))}: every line of "
                f"{self._path.name} has its own of these; give them other names"
            )
        content = json.dumps({**own, **metrics}, allow_nan=False).encode() + b"\n"
        self._sha256.update(content)
        with naming(self._path):
            while content:  # the system may take a part of it, such as what is left of the disk
                content = content[self._file.write(content) :]


def _is_measurement(line: bytes) -> bool:
    """Whether a line, with its end, is one that a run may have written: numbers of a step."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return (
        line.endswith(b"\n")
        and isinstance(values, dict)
        and "step" in values
        and all(isinstance(x, int | float) and abs(x) < _LARGEST for x in values.values())
    )
