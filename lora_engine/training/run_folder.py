"""The run's folder, and what of a run a checkpoint holds."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_engine.errors import UserError
from lora_engine.training import random_state
from lora_engine.training.atomic import remove_folder, remove_leftovers
from lora_engine.training.checkpoint import CheckpointStore
from lora_engine.training.flat import FlatParameters
from lora_engine.training.optimizer import FlatAdamW
from lora_engine.training.state import TrainState

logger = logging.getLogger(__name__)


class RunFolder:
    """output_dir: metrics.jsonl, checkpoints/ and adapter/.

    identity: JSON values that a checkpoint must share for this run to continue from it.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        self.metrics = path / "metrics.jsonl"
        self.adapter = path / "adapter"
        self.checkpoints = CheckpointStore(path / "checkpoints")
        self._identity = identity

    def clear(self, overwrite: bool, resume: bool) -> None:
        """Make room for a new run. Raises UserError if one is here and overwrite is not set.

        resume: what a run leaves that ended before its first checkpoint is no obstacle.
        """
        metrics = self.metrics.exists() and self.metrics.stat().st_size > 0
        used = (
            self.checkpoints.latest() is not None
            or self.adapter.exists()
            or (metrics and not resume)
        )
        if used and not overwrite:
            raise UserError(
                f"{self.path} already holds a run: resume it, choose another output_dir, "
                "or set overwrite to discard it"
            )
        # In this order a kill in between never leaves checkpoints without their metrics.
        if self.adapter.exists():
            remove_folder(self.adapter)
        self.checkpoints.clear()
        self.metrics.unlink(missing_ok=True)

    def save(
        self, flat: FlatParameters, optimizer: FlatAdamW, state: TrainState, metrics_bytes: int
    ) -> Path:
        """Write a checkpoint of everything that decides how the run goes on."""
        random_tensors, random_rest = random_state.capture()
        tensors = {
            "weights": flat.named_copies(flat.data),
            **optimizer.tensors(),
            "random": random_tensors,
        }
        content = {
            "identity": self._identity,
            "train": state.to_json(),
            "updates": optimizer.updates,
            "random": random_rest,
            "metrics_bytes": metrics_bytes,
        }
        return self.checkpoints.save(state.step, tensors, content)

    def load(self, step: int, flat: FlatParameters, optimizer: FlatAdamW) -> tuple[TrainState, int]:
        """Bring back what `save` wrote, random state included; returns the state and the size
        of metrics.jsonl then. Raises UserError if the checkpoint is of another run."""
        self.checkpoints.remove_leftovers()
        remove_leftovers(self.path)
        content = self.checkpoints.state(step)
        folder = self.checkpoints.path(step)
        self._check_identity(folder, content["identity"])
        try:
            flat.load_named(flat.data, self.checkpoints.tensors(step, "weights"))
            optimizer.load(lambda stem: self.checkpoints.tensors(step, stem))
        except UserError as error:
            raise UserError(f"{folder}: {error}") from error
        flat.publish()
        optimizer.updates = content["updates"]
        random_state.restore(self.checkpoints.tensors(step, "random"), content["random"])
        state = TrainState.from_json(content["train"])
        if state.best_step is not None and state.best_step not in self.checkpoints.steps():
            logger.warning(
                "checkpoint of the best step %d is gone; looking for a new best", state.best_step
            )
            state.best = state.best_step = None
        return state, content["metrics_bytes"]

    def _check_identity(self, folder: Path, saved: Mapping[str, Any]) -> None:
        if saved == self._identity:
            return
        mend = "change it back to continue, or choose another output_dir"
        ours, theirs = self._identity["config"], saved["config"]
        for key in sorted(ours.keys() | theirs.keys()):
            if ours.get(key) != theirs.get(key):
                change = f"{key}={theirs.get(key)}, now {key}={ours.get(key)}"
                raise UserError(f"{folder}: made with {change}: {mend}")
        raise UserError(f"{folder}: made with other training data: {mend}")
