"""The loop proper: step, measure, save, until there is a reason to stop."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import cast

from torch import nn

from lora_engine import backends
from lora_engine.data.batch import PackedBatch
from lora_engine.distributed.world import ALONE, World
from lora_engine.errors import PeerLost
from lora_engine.evaluation.heldout import HeldoutResult
from lora_engine.evaluation.nonfinite import NonFiniteError
from lora_engine.objectives.base import Objective
from lora_engine.training import random_state
from lora_engine.training.batches import BatchSource
from lora_engine.training.callbacks import Callbacks
from lora_engine.training.config import TrainConfig
from lora_engine.training.metrics import MetricsLog, StepMetrics
from lora_engine.training.optimizer.choice import flat_optimizer
from lora_engine.training.optimizer.flat import FlatParameters
from lora_engine.training.optimizer.schedule import Schedule
from lora_engine.training.run.folder import Loaded, OfRun, RunFolder
from lora_engine.training.signals import Interrupted
from lora_engine.training.state import SavedState, Stopped, TrainState
from lora_engine.training.step import TrainStep

logger = logging.getLogger(__name__)


class TrainingLoop:
    """One sitting of a run: from the beginning or a checkpoint to the end or an interruption.

    measure: of the held-out data, with the weights of the step that it is given; None: there are
        none.
    callbacks: are told of each step and each evaluation.
    check: called between micro-batches; raises Interrupted to end the run.
    of_run: what its checkpoints say of the run as a whole; see `RunFolder.save`.
    world: the processes that train together. The first reads and writes the folder alone, and is
        the one with callbacks.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        flat: FlatParameters,
        train_source: BatchSource,
        measure: Callable[[int], HeldoutResult] | None,
        config: TrainConfig,
        schedule: Schedule,
        folder: RunFolder,
        of_run: OfRun,
        *,
        callbacks: Callbacks,
        check: Callable[[], None],
        world: World = ALONE,
    ) -> None:
        self._flat = flat
        self._train_source = train_source
        self._measure = measure
        self._config = config
        self._schedule = schedule
        self._folder = folder
        self._of_run = of_run
        self._callbacks = callbacks
        self._check = check
        self._optimizer = flat_optimizer(flat, config)
        self._world = world
        self._step = TrainStep(model, objective, self._optimizer, seed=config.seed, world=world)
        self._saved_step: int | None = None
        self._log: MetricsLog | None = None
        self.state = TrainState()

    def start(self, step: int | None) -> Loaded | None:
        """Load the checkpoint of `step` and return what it says; without one seed everything."""
        loaded = None
        if step is None:
            random_state.seed_all(self._config.seed)
        elif self._world.is_first:
            loaded = self._folder.load(step, self._flat, self._optimizer)
            self.state, self._saved_step = loaded.state, step
            logger.info("continuing from step %d", step)
        source = None if loaded is None else loaded.source
        if self._world.is_first:
            written = None if loaded is None else loaded.metrics
            self._log = MetricsLog(self._folder.metrics, written)
        if self._world.size > 1:
            source = self._as_first(source)
        self._train_source.start(source)
        return loaded

    def _as_first(self, source: Mapping[str, object] | None) -> Mapping[str, object] | None:
        """Begin where the first process does; returns what its `source` remembers."""
        self._world.send_(self._flat.data)
        for values in self._optimizer.buffers():
            self._world.send_(values)
        self._flat.publish()
        state, self._optimizer.updates, of_first = cast(
            tuple[SavedState, int, Mapping[str, object] | None],
            self._world.of_first((self.state.to_json(), self._optimizer.updates, source)),
        )
        self.state = TrainState.from_json(state)
        return of_first

    def try_out(self, batch: PackedBatch) -> None:
        """As `TrainStep.try_out`."""
        self._step.try_out(batch)

    def run(self) -> Stopped:
        """Train until done. Whatever the reason to stop, the last good state is saved."""
        try:
            while True:
                self._evaluate_if_due()
                stopped = self._reason_to_stop()
                if stopped or self._save_is_due():
                    self._save()
                if stopped:
                    return stopped
                self._one_step()
        except Interrupted as signal_name:
            logger.info("%s: saving step %d and ending", signal_name, self.state.step)
            self._save()
            return "interrupted"
        except NonFiniteError as error:
            # A step that updated some weights leaves none to save: the last checkpoint is.
            torn = self._optimizer.torn
            error.checkpoint = self._last_saved() if torn else self._save()
            self._world.gather(None)  # a process that has ended would end the one that saves
            raise
        except PeerLost:
            self._save()
            raise

    def load_final_weights(self) -> None:
        """Bring back the best weights, if configured and known."""
        best, state = self._config.final_weights == "best", self.state
        if best and state.best_step is not None and state.best_step != state.step:
            if self._world.is_first:
                self._folder.load_weights(state.best_step, self._flat)
            self._world.send_(self._flat.data)
            self._flat.publish()

    def close(self) -> None:
        self._step.close()
        self._train_source.close()
        if self._log is not None:
            self._log.close()

    def _one_step(self) -> None:
        state = self.state
        started = time.perf_counter()
        step = state.step + 1
        with self._saving_first():  # a stream may come to records that it cannot read
            batches, position = self._train_source.take(
                state.position, self._config.gradient_accumulation_steps
            )
        learning_rate = self._schedule(step)
        result = self._step(step, batches, learning_rate, self._check)
        seconds = time.perf_counter() - started
        state.step, state.position = step, position
        state.loss_sum += result.loss
        state.loss_count += 1
        state.train_tokens += result.tokens
        state.train_seconds += seconds
        metrics = StepMetrics(
            step=step,
            loss=result.loss,
            learning_rate=learning_rate,
            grad_norm=result.grad_norm,
            tokens=result.tokens,
            supervised_tokens=result.supervised_tokens,
            tokens_per_second=result.tokens / seconds,
            peak_memory_bytes=backends.peak_memory_bytes(self._flat.device),
            metrics={**self._train_source.metrics(position), **result.metrics},
        )
        if self._log is not None:
            self._log.append_step(metrics)
        with self._saving_first():
            self._callbacks.on_step(metrics)

    def _evaluate_if_due(self) -> None:
        state, every = self.state, self._config.eval_every
        at_either_end = state.step in (0, self._schedule.total_steps)
        due = at_either_end or (every is not None and state.step % every == 0)
        if self._measure is None or not due or state.latest_step == state.step:
            return
        # A reward may raise; before the first step there is nothing to lose.
        with self._saving_first() if state.step else nullcontext():
            result = self._measure(state.step)
        config = self._config
        state.record_heldout(result, by=config.best_by, most_forgotten=config.stop_on_forgetting)
        if self._log is not None:
            self._log.append_heldout(state.step, result)
        with self._saving_first():
            self._callbacks.on_eval(state.step, result)
        self._warn()

    def _warn(self) -> None:
        """Of what the evaluation tells of the run as a whole."""
        state, config = self.state, self._config
        said = []
        if (parted := state.newly_parted()) is not None:
            said.append(str(parted))
        if state.has_forgotten(config.stop_on_forgetting):
            said.append(_why_forgetting(state, config))
        for line in said if self._log is not None else ():  # one of the processes says so
            logger.warning("%s", line)
        state.warnings += said

    @contextmanager
    def _saving_first(self) -> Iterator[None]:
        """What a callback raises within ends the run, after the step has been saved."""
        try:
            yield
        except BaseException:  # sys.exit, too
            if self._world.size == 1:  # others could not be told
                self._check()  # a terminal that hung up cannot be written to: that is the reason
            self._save()
            raise

    def _reason_to_stop(self) -> Stopped | None:
        patience = self._config.early_stopping_patience
        if self.state.has_forgotten(self._config.stop_on_forgetting):
            return "forgetting"
        if self.state.step >= self._schedule.total_steps:
            return "finished"
        if patience is not None and self.state.evals_since_best >= patience:
            return "early_stopping"
        return None

    def _save_is_due(self) -> bool:
        step, every = self.state.step, self._config.save_every
        scheduled = every is not None and step % every == 0
        return scheduled or step == 0 or step == self.state.best_step

    def _save(self) -> Path:
        """Checkpoint the current step unless that is on disk already; returns its folder.

        Every process holds all of it, so that the first does this without the others.
        """
        step, checkpoints = self.state.step, self._folder.checkpoints
        if self._log is not None and self._saved_step != step:
            written = self._log.sync()
            source = self._train_source.saved(self.state.position)
            self._folder.save(
                self._flat, self._optimizer, self.state, written, self._of_run, source
            )
            self._saved_step = step
            best = self.state.best_step
            also = () if best is None else (best,)
            checkpoints.prune(step, self._config.keep_checkpoints, also)
        return checkpoints.path(step)

    def _last_saved(self) -> Path | None:
        """The newest checkpoint of this run."""
        step = self._folder.checkpoints.latest() if self._log is not None else None
        return None if step is None else self._folder.checkpoints.path(step)


def _why_forgetting(state: TrainState, config: TrainConfig) -> str:
    """The line about a run that ends because the probe's loss has risen too far."""
    assert state.before and state.before.probe and state.latest and state.latest.probe
    before, now = state.before.probe, state.latest.probe
    kept = state.best_step if config.final_weights == "best" else state.step
    return (
        f"stopped at step {state.step:,}: the probe's loss rose by {now.rise_over(before):.1%}, "
        f"from {before.loss:.4g} to {now.loss:.4g}, more than train.stop_on_forgetting "
        f"({config.stop_on_forgetting:g}); the run ends with the weights of step {kept:,}"
    )
