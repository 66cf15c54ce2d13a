"""The trainer: data, model and settings in, a fine-tuned model and its files out."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import chain
from typing import cast

import torch
from torch import nn

from lora_engine import backends
from lora_engine.data.batch import PackedBatch
from lora_engine.data.dataset import TokenizedDataset
from lora_engine.data.prompts import PromptDataset
from lora_engine.data.records import Source
from lora_engine.data.template import Tokenizer
from lora_engine.distributed.world import check_same, current
from lora_engine.errors import UserError
from lora_engine.memory.checkpointing import checkpointing
from lora_engine.memory.offload import ActivationStore, activation_store
from lora_engine.models.attach.accelerate import is_accelerated
from lora_engine.models.attach.packed import can_share_prefixes
from lora_engine.models.peft.routing import active_adapters
from lora_engine.models.proof.packed_proof import check_packed_training
from lora_engine.objectives.answers import check_objective, has_weight
from lora_engine.objectives.base import Objective
from lora_engine.objectives.sft import SFT
from lora_engine.training.arguments import check_kinds, minimised
from lora_engine.training.batches import BatchSource
from lora_engine.training.callbacks import Callbacks
from lora_engine.training.config import TrainConfig
from lora_engine.training.fitting import first_policy, fitting_policy
from lora_engine.training.length import check_length, tell_extension
from lora_engine.training.loop import TrainingLoop
from lora_engine.training.measure import Measure, Measuring
from lora_engine.training.online.online import Online, OnlineRun
from lora_engine.training.optimizer.flat import FlatParameters
from lora_engine.training.optimizer.rates import check_rates, rate_of
from lora_engine.training.optimizer.schedule import Schedule
from lora_engine.training.preflight.preflight import PreflightReport, preflight
from lora_engine.training.preflight.trial import with_values
from lora_engine.training.run.card import CardFacts
from lora_engine.training.run.export import export_model
from lora_engine.training.run.fingerprint import json_sha256
from lora_engine.training.run.folder import OfRun, RunFolder
from lora_engine.training.run.identity import run_identity, tell_rounding
from lora_engine.training.run_data import RunData
from lora_engine.training.signals import InterruptGuard
from lora_engine.training.state import Stopped, TrainResult, TrainState
from lora_engine.training.stream_source import StreamSource
from lora_engine.training.together import check_share, check_shared_tokens, in_step
from lora_engine.training.trackers import Tracking
from lora_engine.training.trainable import train_only

logger = logging.getLogger(__name__)

PREFLIGHT_TOKENS = 128


class Trainer:
    """Fine-tunes the trainable parameters of a causal language model.

    model: a transformers model or a PeftModel around one, accelerated or not. With several active
        adapters (`model.base_model.set_adapter([...])`) every record names the one that learns
        from it in its field `adapter`; the model has to be accelerated then.
    tokenizer: renders and tokenises data that are not tokenised yet; saved with the weights.
    train_data, eval_data: whatever `data.prepare` takes, or a TokenizedDataset. With eval_data
        None nothing is measured, and the last weights are the final ones.
    objective: what is minimised; supervised fine-tuning unless given, weighted where records or
        messages have a weight. A run is resumed with the same one.
    probe: texts that the run does not train on, measured whenever the held-out data are, to see
        what is forgotten: whatever `data.prepare` takes, or a TokenizedDataset. With several
        adapters each is measured on all of them.
    online: rewards, and how completions are written: the data are prompts, the model writes the
        completions that it learns from, and held-out prompts are measured by their rewards. The
        objective is GRPO or PPO then.
    callbacks: objects with any of the methods on_start(trainer), on_step(StepMetrics),
        on_eval(step, HeldoutResult), on_end(TrainResult).
    origin: what the model was made from, JSON values by name that a run must share to be resumed.
        "weights", a hash, stands for those of the model before adapters and training; without it
        the parameters that are not trained are hashed (about a second for each GB and core).

    Several processes train together within `distributed.world.joined`: each makes a Trainer of the
    same model, data and settings, and calls the same methods. The first alone uses the folder and
    has callbacks.

    The run's folder, config.output_dir, gets metrics.jsonl, checkpoints/ and adapter/.
    Raises UserError for data or settings that cannot be trained with, and for a model whose loss on
    packed batches would not be its own.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer | None,
        train_data: "Source | TokenizedDataset",
        eval_data: "Source | TokenizedDataset | None",
        config: TrainConfig,
        *,
        objective: Objective = SFT(),
        probe: "Source | TokenizedDataset | None" = None,
        online: Online | None = None,
        callbacks: Sequence[object] = (),
        origin: Mapping[str, object] | None = None,
    ) -> None:
        check_kinds(model, tokenizer, config)
        check_objective(objective, "Trainer")
        if config.trainable is not None:
            train_only(model, config.trainable)
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        self.objective = objective
        has_origin = origin is not None and "weights" in origin
        self._world = in_step(current(), model, objective, config, has_origin)
        check_share(self._world, config, writes=online is not None)
        self._tracking = Tracking(config, objective.name)
        self.callbacks = Callbacks(callbacks if self._world.is_first else ())
        if config.log_to and self._world.is_first:
            self.callbacks = Callbacks((*callbacks, self._tracking))
        self._data = RunData(
            model, tokenizer, config, train_data, eval_data, writes=online is not None
        )
        self.folder = RunFolder(config.output_dir)
        self._online = None if online is None else self._online_run(online)
        self.objective = self._data.weighted(self.objective)
        self._minimised = minimised(self.objective, config, model)
        check_shared_tokens(self._world, model, self._minimised)
        self._data.take_probe(probe, self.objective)
        check_packed_training(model)
        check_rates(config, active_adapters(model))
        self._train_source, self.total_steps = self._plan_steps()
        self.schedule = Schedule.from_config(config, self.total_steps)
        self._origin = origin
        self._of_run = OfRun()
        self._opened: tuple[int | None] | None = None
        self.state = TrainState()

    def check_folder(self, resume: bool = False) -> int | None:
        """Step of the checkpoint that `fit(resume)` begins from, None at the beginning.

        Touches nothing. Raises UserError where `fit` would because of output_dir.
        """
        config = self.config
        self._of_run = {
            "identity": run_identity(
                self.model,
                self.tokenizer,
                {**config.trajectory(), **(self._online.identity() if self._online else {})},
                self.objective,
                self._data.identity(),
                self._origin,
            ),
            "length": {
                "total_steps": self.total_steps,
                "max_steps": config.max_steps,
                "epochs": config.epochs,
            },
        }
        identity = self._of_run["identity"]
        check_same(self._world, {name: json_sha256(part) for name, part in identity.items()})
        step = None
        if self._world.is_first:
            step = self.folder.check(identity, resume=resume, overwrite=config.overwrite)
        if step is not None:
            length = self.folder.saved(step)["of_run"]["length"]
            check_length(self.folder.checkpoints.path(step), length, self._of_run["length"])
        return cast("int | None", self._world.of_first(step))

    def preflight(self, step: int | None) -> PreflightReport | None:
        """`lora_engine.preflight` on the first examples that teach anything, with the weights that
        the run goes on from; None where config.preflight is off, where config.layerwise_update
        is on (it would hold all gradients), or no step is left to do.

        step: what `check_folder` returned. Raises UserError where the run would learn nothing.
        """
        if not self.config.preflight or step == self.total_steps:
            return None
        if self.config.layerwise_update:
            logger.info("preflight: left out, it would hold all gradients at once")
            return None
        if not (self._world.is_first or self._world.in_step):
            return None
        self._train_source.share_prefixes = self._shares_prefixes(training=True)
        tokens = min(self.config.tokens_per_batch, PREFLIGHT_TOKENS)
        weights = {} if step is None else self.folder.checkpoints.tensors(step, "weights")
        policy = checkpointing(self.model, first_policy(self.model, self.config))
        with with_values(self.model, weights), policy:
            objective = self._minimised if self._online is None else self._online.tried()
            report = preflight(self.model, self._first_batch(tokens), objective=objective)
        logger.info("preflight: %s", report)
        return report

    def open_folder(self, step: int | None) -> None:
        """Make output_dir ready for `fit`, which does all three itself otherwise.

        Removes the run that config.overwrite gives up. step: what `check_folder` returned.
        """
        if self._world.is_first:
            self.folder.begin(step)
        self._opened = (step,)

    def fit(self, resume: bool = False) -> TrainResult:
        """Train until the steps are done, the held-out result stalls, too much is forgotten, or a
        signal comes (SIGINT, SIGTERM, SIGHUP).

        resume: continue from the newest sound checkpoint in output_dir, to bitwise the same
            weights as without the break; start from the beginning, and log so, if there is none.
            With more steps than the run had, it is extended: see `length`.

        Seeds the generators of torch, numpy and Python. On return the model holds the final
        weights (config.final_weights), which are also in output_dir/adapter. Raises
        NonFiniteError if a loss or gradient is not finite, with the state before that step in a
        checkpoint; UserError if the run would learn nothing (see `preflight`), if output_dir holds
        a run already (when not resuming), a checkpoint
        of another run (when resuming), or is in use by another process; OSError, naming the file,
        for what cannot be written, with the last checkpoint as it was.
        """
        try:
            return self._fit(resume)
        finally:
            self._tracking.close()

    def _fit(self, resume: bool) -> TrainResult:
        training_modules = [module for module in self.model.modules() if module.training]
        first = self._world.is_first
        with self.folder.locked() if first else nullcontext():
            if self._opened is None:
                begin = self.check_folder(resume)
                self.preflight(begin)
            flat = FlatParameters(
                self.model.named_parameters(),
                rate_of(self.config),
                masters=self.config.rounding is None,
                gathered=not self.config.layerwise_update,
            )
            try:
                if self._opened is None:
                    self.open_folder(begin)
                assert self._opened is not None
                (step,), self._opened = self._opened, None
                with InterruptGuard() as guard:
                    stopped = self._train(flat, guard, step)
            finally:
                if (stream := self._data.stream) is not None:
                    stream.close()
                flat.release()
                self.model.eval()
                for module in training_modules:
                    module.training = True
            result = self._result(stopped, flat.device)
            if first:
                with self.folder.writing_adapter():
                    facts = self._card_facts(result)
                    export_model(self.model, self.tokenizer, self.folder.adapter, facts)
        self.callbacks.on_end(result)
        return result

    def _train(self, flat: FlatParameters, guard: InterruptGuard, step: int | None) -> Stopped:
        backends.reset_peak_memory(flat.device)
        train_source = self._train_source
        train_source.share_prefixes = self._shares_prefixes(training=True)
        if self._online is not None:
            self._online.source.check = guard.check
        self._of_run["rounding"] = {
            "device": flat.device.type,
            "accelerated": is_accelerated(self.model),
            "processes": self._world.size,
        }
        loop = TrainingLoop(
            self.model,
            self._minimised,
            flat,
            train_source,
            self._measure(guard.check),
            self.config,
            self.schedule,
            self.folder,
            self._of_run,
            callbacks=self.callbacks,
            check=guard.check,
            world=self._world,
        )
        try:
            loaded = loop.start(step)
            if loaded is not None:
                tell_rounding(loaded.of_run["rounding"], self._of_run["rounding"])
                tell_extension(loaded, self.config, self.schedule, self._train_source)
            self.state = loop.state
            self.callbacks.on_start(self)
            self.model.train()
            offloading = partial(
                activation_store, self.config.offload_activations, self.folder.path, flat.device
            )
            policy = self._fitting_policy(loop, offloading)
            with offloading() as store, checkpointing(self.model, policy, store):
                stopped = loop.run()
            loop.load_final_weights()
            return stopped
        finally:
            loop.close()

    def _fitting_policy(
        self,
        loop: TrainingLoop,
        offloading: Callable[[], AbstractContextManager[ActivationStore | None]],
    ) -> str | None:
        """The checkpointing policy with which the largest batches are within config.memory."""
        config = self.config
        if config.memory is None or self._online is not None:
            return config.checkpointing
        heldout = None
        if self._data.heldout is not None:
            source = BatchSource(self._data.heldout, config.tokens_per_batch, shuffle=False)
            source.share_prefixes = self._shares_prefixes(training=False)
            heldout = source.largest()
        largest = self._train_source.largest()
        return fitting_policy(
            *(self.model, config, loop.try_out, largest, heldout, self.objective),
            offloading,
            self._world,
        )

    def _first_batch(self, tokens: int) -> PackedBatch:
        """The first examples, up to `tokens`, or batch of the run that the objective gives weight;
        the first examples that have targets where it gives weight to none."""
        first = self._train_source.first(tokens)
        if self._online is not None:
            return first
        batches = chain([first], self._train_source.one_epoch())
        return next((batch for batch in batches if has_weight(self.objective, batch)), first)

    def _online_run(self, online: Online) -> OnlineRun:
        """Its parts; the objective is at the rollout's temperature from here on."""
        train, heldout = self._data.train, self._data.heldout
        assert isinstance(train, PromptDataset) and isinstance(heldout, PromptDataset | None)
        assert self.tokenizer is not None, "prompts are tokenised"
        made = OnlineRun(
            *(self.model, self.tokenizer, train, heldout),
            online,
            self.objective,
            self.config,
            self.folder,
        )
        self.objective = made.objective
        return made

    def _plan_steps(self) -> tuple[BatchSource, int]:
        """The training micro-batches and the number of optimiser steps."""
        config = self.config
        if self._online is not None:
            writing = self._online.source
            return writing, config.max_steps or writing.count(config.epochs or 1)
        if (stream := self._data.stream) is not None:
            if config.max_steps is None:
                raise UserError("a stream has no end that is known: give train.max_steps")
            return StreamSource(stream, config.tokens_per_batch, seed=config.seed), config.max_steps
        epochs = None if config.max_steps is not None else config.epochs or 1
        source = BatchSource(
            self._data.train, config.tokens_per_batch, seed=config.seed, epochs=epochs
        )
        if epochs is None:
            assert config.max_steps is not None
            return source, config.max_steps
        return source, -(-source.count(epochs) // config.gradient_accumulation_steps)

    def _measure(self, check: Callable[[], None]) -> Measure | None:
        """Of the held-out data and the probe; None without any."""
        if self._data.heldout is None:
            return None
        measuring = Measuring(
            self.model,
            self.config.tokens_per_batch,
            shares=self._shares_prefixes(training=False),
            check=check,
            world=self._world,
        )
        if self._online is not None:
            heldout = self._online.measure(check)
        else:
            heldout = measuring.heldout(self._data.heldout, self.objective)
        if self._data.probe is None:
            return heldout
        return measuring.with_probe(heldout, self._data.probe)

    def _shares_prefixes(self, *, training: bool) -> bool:
        return self.config.share_prefixes and can_share_prefixes(self.model, training=training)

    def _result(self, stopped: Stopped, device: torch.device) -> TrainResult:
        return TrainResult.of(
            self.state,
            stopped,
            ends_with_best=self.config.final_weights == "best",
            peak_memory_bytes=backends.peak_memory_bytes(device),
            checkpoint_dir=self.folder.checkpoints.path(self.state.step),
        )

    def _card_facts(self, result: TrainResult) -> CardFacts:
        return CardFacts(
            config=self.config,
            result=result,
            total_steps=self.total_steps,
            loss_unit=self.objective.unit,
            train=self._data.train,
            heldout=self._data.heldout,
        )
