"""The trainer: data, model and settings in, a fine-tuned model and its files out."""

from collections.abc import Sequence
from typing import Any

import torch

from lora_engine.data.adapters import check_adapters
from lora_engine.data.dataset import TokenizedDataset, prepare
from lora_engine.errors import UserError
from lora_engine.models.packed import can_share_prefixes
from lora_engine.models.routing import active_adapters
from lora_engine.training.config import TrainConfig
from lora_engine.training.export import export_model
from lora_engine.training.flat import FlatParameters
from lora_engine.training.loop import TrainingLoop
from lora_engine.training.metrics import peak_memory_bytes, reset_peak_memory
from lora_engine.training.optimizer import check_rates, rate_of
from lora_engine.training.run_folder import RunFolder
from lora_engine.training.schedule import Schedule
from lora_engine.training.signals import InterruptGuard
from lora_engine.training.state import Stopped, TrainResult, TrainState
from lora_engine.training.stream import BatchStream, fingerprint


class Trainer:
    """Fine-tunes the trainable parameters of a causal language model.

    model: a transformers model or a PeftModel around one, accelerated or not. With several active
        adapters (`model.base_model.set_adapter([...])`) every record names the one that learns
        from it in its field `adapter`; the model has to be accelerated then.
    tokenizer: renders and tokenises data that are not tokenised yet; saved with a full model.
    train_data, eval_data: whatever `data.prepare` takes, or a TokenizedDataset. With eval_data
        None nothing is measured, and the last weights are the final ones.
    callbacks: objects with any of the methods on_start(trainer), on_step(StepMetrics),
        on_eval(step, HeldoutResult), on_end(TrainResult).

    The run's folder, config.output_dir, gets metrics.jsonl, checkpoints/ and adapter/.
    Raises UserError for data or settings that cannot be trained with.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        train_data: Any,
        eval_data: Any,
        config: TrainConfig,
        *,
        callbacks: Sequence[object] = (),
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        self.callbacks = tuple(callbacks)
        self.train_dataset = _tokenized(train_data, tokenizer, config, "train_data")
        self.eval_dataset = (
            None if eval_data is None else _tokenized(eval_data, tokenizer, config, "eval_data")
        )
        for dataset in (self.train_dataset, self.eval_dataset):
            if dataset is not None:
                check_adapters(dataset, active_adapters(model))
        check_rates(config, active_adapters(model))
        self._train_stream, self.total_steps = self._plan_steps()
        self.schedule = Schedule.from_config(config, self.total_steps)
        identity = {
            "config": config.trajectory(),
            "total_steps": self.total_steps,
            "data": fingerprint(self.train_dataset),
        }
        self.folder = RunFolder(config.output_dir, identity)
        self.state = TrainState()

    def fit(self, resume: bool = False) -> TrainResult:
        """Train until the steps are done, the held-out loss stalls, or SIGINT or SIGTERM comes.

        resume: continue from the newest complete checkpoint in output_dir, to bitwise the same
            weights as without the break; start from the beginning if there is none.

        Seeds the generators of torch, numpy and Python. On return the model holds the final
        weights (config.final_weights), which are also in output_dir/adapter. Raises
        NonFiniteError if a loss or gradient is not finite, with the state before that step in a
        checkpoint; UserError if output_dir holds a run already (when not resuming) or a
        checkpoint of another run (when resuming).
        """
        training_modules = [module for module in self.model.modules() if module.training]
        flat = FlatParameters(self.model.named_parameters(), rate_of(self.config))
        try:
            with InterruptGuard() as guard:
                stopped = self._train(flat, guard, resume)
        finally:
            flat.release()
            self.model.eval()
            for module in training_modules:
                module.training = True
        export_model(self.model, self.tokenizer, self.folder.adapter)
        result = self._result(stopped, flat.device)
        self._notify("on_end", result)
        return result

    def _train(self, flat: FlatParameters, guard: InterruptGuard, resume: bool) -> Stopped:
        reset_peak_memory(flat.device)
        train_stream, eval_stream = self._train_stream, self._eval_stream()
        train_stream.share_prefixes = self._shares_prefixes(training=True)
        if eval_stream is not None:
            eval_stream.share_prefixes = self._shares_prefixes(training=False)
        loop = TrainingLoop(
            self.model,
            flat,
            train_stream,
            eval_stream,
            self.config,
            self.schedule,
            self.folder,
            notify=self._notify,
            check=guard.check,
        )
        try:
            loop.start(resume)
            self.state = loop.state
            self._notify("on_start", self)
            self.model.train()
            stopped = loop.run()
            loop.load_final_weights()
            return stopped
        finally:
            loop.close()

    def _plan_steps(self) -> tuple[BatchStream, int]:
        """The training micro-batches and the number of optimiser steps."""
        config = self.config
        epochs = None if config.max_steps is not None else config.epochs or 1
        stream = BatchStream(
            self.train_dataset, config.tokens_per_batch, seed=config.seed, epochs=epochs
        )
        if epochs is None:
            assert config.max_steps is not None
            return stream, config.max_steps
        return stream, -(-stream.count(epochs) // config.gradient_accumulation_steps)

    def _eval_stream(self) -> BatchStream | None:
        if self.eval_dataset is None:
            return None
        return BatchStream(self.eval_dataset, self.config.tokens_per_batch, shuffle=False)

    def _shares_prefixes(self, *, training: bool) -> bool:
        return self.config.share_prefixes and can_share_prefixes(self.model, training=training)

    def _result(self, stopped: Stopped, device: torch.device) -> TrainResult:
        state = self.state
        after = state.latest if state.latest_step == state.step else None
        if self.config.final_weights == "best" and state.best is not None:
            after = state.best
        before, seconds = state.before, state.train_seconds
        return TrainResult(
            steps=state.step,
            train_tokens=state.train_tokens,
            train_seconds=seconds,
            tokens_per_second=state.train_tokens / seconds if seconds else 0.0,
            peak_memory_bytes=peak_memory_bytes(device),
            heldout_loss_before=before.loss if before else None,
            heldout_loss_after=after.loss if after else None,
            heldout_accuracy_before=before.accuracy if before else None,
            heldout_accuracy_after=after.accuracy if after else None,
            best_step=state.best_step,
            stopped=stopped,
            checkpoint_dir=self.folder.checkpoints.path(state.step),
        )

    def _notify(self, event: str, *args: Any) -> None:
        for callback in self.callbacks:
            method = getattr(callback, event, None)
            if method is not None:
                method(*args)


def _tokenized(data: Any, tokenizer: Any, config: TrainConfig, what: str) -> TokenizedDataset:
    if isinstance(data, TokenizedDataset):
        if config.max_length is not None:
            raise UserError(f"max_length has no effect on {what}, which is tokenised already")
        dataset = data
    elif config.max_length is not None:
        dataset = prepare(data, tokenizer, max_length=config.max_length)
    else:
        dataset = prepare(data, tokenizer)
    if not len(dataset):
        raise UserError(f"{what} has no examples to learn from")
    return dataset
