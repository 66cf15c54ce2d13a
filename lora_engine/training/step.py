"""One optimiser step: accumulate gradients over micro-batches, check them, apply them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lora_engine.data.batch import PackedBatch
from lora_engine.training import random_state
from lora_engine.training.nonfinite import (
    NonFiniteError,
    first_nonfinite_layer,
    last_nonfinite_gradient,
)
from lora_engine.training.objective import adapters_of, supervised_loss
from lora_engine.training.optimizer.optimizer import FlatAdamW

RandomState = tuple[dict[str, torch.Tensor], dict[str, object]]


@dataclass(frozen=True)
class StepResult:
    """loss: mean over the step's supervised tokens. grad_norm: of that mean's gradient, before
    clipping. tokens, supervised_tokens: over all micro-batches."""

    loss: float
    grad_norm: float
    tokens: int
    supervised_tokens: int


@dataclass(frozen=True)
class _MicroResult:
    batch: PackedBatch
    random_before: RandomState
    loss_sum: torch.Tensor


class TrainStep:
    """Applies optimiser steps, each of them wholly or not at all."""

    def __init__(self, model: nn.Module, optimizer: FlatAdamW) -> None:
        self.model = model
        self.optimizer = optimizer

    def __call__(
        self,
        step: int,
        batches: Sequence[PackedBatch],
        learning_rate: float,
        check: Callable[[], None],
    ) -> StepResult:
        """One step over `batches`, with the gradient of the mean loss of all their targets.

        check: called before every micro-batch; whatever it raises leaves the step unapplied and
            the random state as it was.
        Raises NonFiniteError, likewise without a trace, if a loss or gradient is not finite.
        Without any target no update is made; loss and norm are then 0.
        """
        before = random_state.capture()
        targets = sum(batch.num_targets for batch in batches)
        try:
            micro = self._accumulate(batches, targets, check)
            loss, grad_norm = self._read(step, micro, targets)
        except BaseException:
            random_state.restore(*before)
            raise
        if targets:
            self.optimizer.step(learning_rate, grad_norm)
        tokens = sum(batch.num_tokens for batch in batches)
        return StepResult(loss, grad_norm, tokens, targets)

    def _accumulate(
        self, batches: Sequence[PackedBatch], targets: int, check: Callable[[], None]
    ) -> list[_MicroResult]:
        flat = self.optimizer.flat
        flat.zero_grad()
        micro = []
        for batch in batches:
            check()
            if not batch.num_targets:
                continue
            random_before = random_state.capture()
            on_device = batch.to(flat.device)
            loss_sum = supervised_loss(self.model, on_device).loss
            with adapters_of(self.model, on_device):  # checkpointed layers run again
                # Dividing by the step's targets, not the micro-batch's, weights every token alike.
                (loss_sum / targets).backward()
            micro.append(_MicroResult(on_device, random_before, loss_sum.detach()))
        return micro

    def _read(self, step: int, micro: Sequence[_MicroResult], targets: int) -> tuple[float, float]:
        """Loss and gradient norm on the host, with the step's only wait for the device."""
        if not micro:
            return 0.0, 0.0
        values = [*(m.loss_sum.float() for m in micro), self.optimizer.grad_norm()]
        *loss_sums, grad_norm = torch.stack(values).tolist()
        for result, value in zip(micro, loss_sums, strict=True):
            if not math.isfinite(value):
                random_state.restore(*result.random_before)
                layer = first_nonfinite_layer(self.model, result.batch)
                raise NonFiniteError(f"the loss is {value}", step, result.batch.origins, layer)
        if not math.isfinite(grad_norm):
            origins = [origin for result in micro for origin in result.batch.origins]
            layer = last_nonfinite_gradient(self.optimizer.flat)
            raise NonFiniteError(f"the gradient's norm is {grad_norm}", step, origins, layer)
        return math.fsum(loss_sums) / targets, grad_norm
