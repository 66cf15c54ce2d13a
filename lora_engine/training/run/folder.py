"""The run's folder: what is in it under which name, and what a checkpoint holds of a run."""

import errno
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, cast

from lora_engine.errors import UserError
from lora_engine.files import naming
from lora_engine.training import random_state
from lora_engine.training.optimizer.flat import FlatParameters
from lora_engine.training.optimizer.optimizer import FlatOptimizer
from lora_engine.training.run.atomic import remove_folder, remove_leftovers
from lora_engine.training.run.checkpoint import CheckpointStore
from lora_engine.training.run.identity import Identity, check_identity
from lora_engine.training.run.lines import Written
from lora_engine.training.run.lock import locked
from lora_engine.training.run.manifest import Manifest
from lora_engine.training.state import SavedState, TrainState

logger = logging.getLogger(__name__)


class Length(TypedDict):
    """How long a run is, and what says so."""

    total_steps: int
    max_steps: int | None
    epochs: int | None


class Rounding(TypedDict):
    """What decides how a run's numbers are rounded."""

    device: str
    accelerated: bool
    processes: int


class OfRun(TypedDict, total=False):
    """What a checkpoint says of the run as a whole; JSON."""

    identity: Identity
    length: Length
    rounding: Rounding


class _OfSource(TypedDict, total=False):
    """source: what a source of batches with a state of its own remembers."""

    source: Mapping[str, object]


class Saved(_OfSource):
    """What a checkpoint holds besides tensors; JSON. updates: of the optimiser."""

    of_run: OfRun
    train: SavedState
    updates: int
    random: random_state.Rest
    metrics: Written


@dataclass(frozen=True)
class Loaded:
    """What a checkpoint holds besides weights and moments. of_run, source: see `RunFolder.save`."""

    state: TrainState
    metrics: Written
    of_run: OfRun
    source: Mapping[str, object] | None = None


class RunFolder:
    """output_dir: metrics.jsonl, checkpoints/ and adapter/; after `reserve_results` and
    `reserve_completions` the other files as well. No other module knows their names.

    lock_file: there while a run is in the folder. manifest: lists the files that the run wrote.
    Nothing is ever replaced or deleted but what a run wrote.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = path / "metrics.jsonl"
        self.completions = path / "completions.jsonl"
        self.adapter = path / "adapter"
        self.checkpoints = CheckpointStore(path / "checkpoints")
        self.config = path / "config.yaml"
        self.samples_before = path / "samples_before.json"
        self.summary = path / "summary.json"
        self.report = path / "report.html"
        self.lock_file = path / ".lora-engine.lock"
        self.manifest = path / ".lora-engine.json"
        self._names = [self.metrics.name]

    def locked(self) -> AbstractContextManager[None]:
        """Keeps other runs out; see `lock.locked`. Raises UserError if the path is a file."""
        self._check_is_folder()
        return locked(self.lock_file)

    def reserve_results(self) -> None:
        """Says that the run writes config, samples_before, summary and report as well.

        Files of these names have to be an earlier run's; a new run removes them.
        """
        results = (self.config, self.samples_before, self.summary, self.report)
        self._names += [path.name for path in results]

    def reserve_completions(self) -> None:
        """Likewise, that the run writes completions."""
        self._names.append(self.completions.name)

    def holds_run(self) -> bool:
        """Whether a run has begun here, however far it came."""
        return self._manifest().exists or self.is_used()

    def is_used(self, resume: bool = False) -> bool:
        """Whether a run left something here that is worth keeping.

        resume: what a run left that ended before its first checkpoint does not count.
        """
        metrics = os.path.isfile(self.metrics) and self.metrics.stat().st_size > 0
        return self.checkpoints.any() or self.adapter.exists() or (metrics and not resume)

    def check_foreign(self) -> None:
        """Raises UserError if a new run would replace files that no run wrote."""
        with naming(self.path):
            self.checkpoints.check_removable()
            manifest = self._manifest()
            manifest.check_files(self._names)
            manifest.check_adapter()

    def check(self, identity: Identity, *, resume: bool, overwrite: bool) -> int | None:
        """Step of the checkpoint to go on from, or None for a new run; touches nothing.

        Raises UserError if the folder holds another run, or a run that is neither to be resumed
        nor overwritten, or if the run would replace files that no run wrote.
        """
        with naming(self.path):
            self._check_is_folder()
            self.checkpoints.check_removable()
            step = self.checkpoints.newest_sound() if resume else None
            if step is not None:
                folder = self.checkpoints.path(step)
                check_identity(folder, self.saved(step)["of_run"]["identity"], identity)
                self._manifest().check_adapter()
                return step
            if self.is_used(resume) and not overwrite:
                raise UserError(
                    f"{self.path} already holds a run{', but no checkpoint' if resume else ''}: "
                    f"{'' if resume else 'resume it, '}choose another output_dir, or set "
                    "overwrite to discard it"
                )
            self.check_foreign()
            if resume:
                begun = "ended before its first checkpoint" if self.holds_run() else "is not there"
                logger.warning(
                    "%s: the run to resume %s; starting from the beginning", self.path, begun
                )
            return None

    def begin(self, step: int | None) -> None:
        """Makes the folder ready for a new run, or one that goes on from the checkpoint of `step`.

        step: what `check` returned. For a new run the files of an earlier one are removed.
        """
        with naming(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self.checkpoints.remove_leftovers()
            names = (self.adapter.name, self.manifest.name, *self._names)
            remove_leftovers(self.path, "|".join(map(re.escape, names)))
            manifest = self._manifest()
            if step is None:
                # In this order a kill in between leaves no checkpoints without their metrics.
                if self.adapter.exists():
                    remove_folder(self.adapter)
                self.checkpoints.clear()
                for name in reversed(self._names):
                    (self.path / name).unlink(missing_ok=True)
            manifest.add_files(self._names)

    def save(
        self,
        flat: FlatParameters,
        optimizer: FlatOptimizer,
        state: TrainState,
        metrics: Written,
        of_run: OfRun,
        source: Mapping[str, object] | None = None,
    ) -> Path:
        """Write a checkpoint of everything that decides how the run goes on.

        source: what `BatchSource.saved` returned.
        """
        if not self.path.is_dir():
            gone = "the folder is gone, it was removed during the run"
            raise FileNotFoundError(errno.ENOENT, gone, str(self.path))
        random_tensors, random_rest = random_state.capture()
        tensors = {
            "weights": flat.named_copies(flat.data),
            **optimizer.tensors(),
            "random": random_tensors,
        }
        content: Saved = {
            "of_run": of_run,
            "train": state.to_json(),
            "updates": optimizer.updates,
            "random": random_rest,
            "metrics": metrics,
        }
        if source is not None:
            content["source"] = source
        return self.checkpoints.save(state.step, tensors, content)

    def saved(self, step: int) -> Saved:
        """The JSON of the checkpoint of `step`, which is complete."""
        return cast(Saved, self.checkpoints.state(step))

    def load(self, step: int, flat: FlatParameters, optimizer: FlatOptimizer) -> Loaded:
        """Bring back what `save` wrote, random state included."""
        content, folder = self.saved(step), self.checkpoints.path(step)
        try:
            flat.load_named(flat.data, self.checkpoints.tensors(step, "weights"))
            optimizer.load(lambda stem: self.checkpoints.tensors(step, stem))
        except UserError as error:
            raise UserError(f"{folder}: {error}") from error
        flat.publish()
        optimizer.updates = content["updates"]
        random_state.restore(self.checkpoints.tensors(step, "random"), content["random"])
        state = TrainState.from_json(content["train"])
        if state.best_step is not None and (problem := self.checkpoints.problem(state.best_step)):
            logger.warning(
                "%s: it was the best so far (step %d); looking for a new best",
                problem,
                state.best_step,
            )
            state.best = state.best_step = None
        written, source = Written(*content["metrics"]), content.get("source")
        return Loaded(state=state, metrics=written, of_run=content["of_run"], source=source)

    def load_weights(self, step: int, flat: FlatParameters) -> None:
        """Bring back the weights of a checkpoint. Raises UserError if it is damaged."""
        if problem := self.checkpoints.problem(step):
            raise UserError(f"{problem}: resume to end with other weights, or set final_weights")
        flat.load_named(flat.data, self.checkpoints.tensors(step, "weights"))
        flat.publish()

    @contextmanager
    def writing_adapter(self) -> Iterator[None]:
        """Within, the adapter's folder is written, or replaced."""
        with naming(self.adapter):
            manifest = self._manifest()
            manifest.adapter_begins()
            try:
                yield
            except BaseException:
                with suppress(OSError):
                    manifest.adapter_ends()
                raise
            manifest.adapter_ends()

    def _check_is_folder(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path}: is a file, output_dir must be a folder")

    def _manifest(self) -> Manifest:
        return Manifest(self.manifest, self.adapter)
