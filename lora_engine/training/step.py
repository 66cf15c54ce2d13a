"""One optimiser step: accumulate gradients over micro-batches, check them, apply them."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from lora_engine.data.batch import PackedBatch
from lora_engine.evaluation.batch_loss import batch_loss
from lora_engine.evaluation.nonfinite import (
    NonFiniteError,
    first_nonfinite_layer,
    last_nonfinite_gradient,
)
from lora_engine.models.peft.routing import adapters_of
from lora_engine.objectives.answers import weight_of
from lora_engine.objectives.base import Mean, Objective
from lora_engine.training import random_state
from lora_engine.training.optimizer.optimizer import FlatAdamW

RandomState = tuple[dict[str, torch.Tensor], random_state.Rest]


@dataclass(frozen=True)
class StepResult:
    """loss: the objective's sum over its weight; of SFT the mean over the step's supervised tokens.
    grad_norm: of the loss's gradient, before clipping. tokens, supervised_tokens: over all
    micro-batches. metrics: the objective's own, means over all micro-batches."""

    loss: float
    grad_norm: float
    tokens: int
    supervised_tokens: int
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _MicroResult:
    batch: PackedBatch
    random_before: RandomState
    loss_sum: torch.Tensor
    metrics: Mapping[str, Mean]


class TrainStep:
    """Applies optimiser steps, each of them wholly or not at all."""

    def __init__(self, model: nn.Module, objective: Objective, optimizer: FlatAdamW) -> None:
        self.model = model
        self.objective = objective
        self.optimizer = optimizer

    def __call__(
        self,
        step: int,
        batches: Sequence[PackedBatch],
        learning_rate: float,
        check: Callable[[], None],
    ) -> StepResult:
        """One step over `batches`, with the gradient of the loss over all their weight.

        check: called before every micro-batch; whatever it raises leaves the step unapplied and
            the random state as it was.
        Raises NonFiniteError, likewise without a trace, if a loss, gradient or metric is not
        finite. Without any weight no update is made; loss and norm are then 0.
        """
        before = random_state.capture()
        weights = [weight_of(self.objective, batch) for batch in batches]
        weight = sum(weights)
        try:
            micro = self._accumulate(batches, weights, check)
            norm = self.optimizer.grad_norm()
            loss, grad_norm, metrics = self._read(step, micro, weight, norm)
        except BaseException:
            random_state.restore(*before)
            raise
        if weight:
            self.optimizer.step(learning_rate, norm)
        tokens = sum(batch.num_tokens for batch in batches)
        targets = sum(batch.num_targets for batch in batches)
        return StepResult(loss, grad_norm, tokens, targets, metrics)

    def _accumulate(
        self, batches: Sequence[PackedBatch], weights: Sequence[float], check: Callable[[], None]
    ) -> list[_MicroResult]:
        flat, weight = self.optimizer.flat, sum(weights)
        flat.zero_grad()
        micro = []
        for batch, of_batch in zip(batches, weights, strict=True):
            check()
            if not of_batch:
                continue
            random_before = random_state.capture()
            on_device = batch.to(flat.device)
            loss = batch_loss(self.model, on_device, self.objective)
            # Checkpointed layers run again, and need their adapters.
            with adapters_of(self.model, on_device), flat.collecting():
                # Dividing by the step's weight, not the micro-batch's, weights every token alike.
                (loss.total / weight).backward()
            metrics = {n: Mean(m.total.detach(), m.count) for n, m in loss.metrics.items()}
            micro.append(_MicroResult(on_device, random_before, loss.total.detach(), metrics))
        return micro

    def _read(
        self, step: int, micro: Sequence[_MicroResult], weight: float, norm: torch.Tensor
    ) -> tuple[float, float, dict[str, float]]:
        """Loss, gradient norm and metrics on the host, with the step's only wait for the device."""
        if not micro:
            return 0.0, 0.0, {}
        named = [(name, mean) for result in micro for name, mean in result.metrics.items()]
        values = [
            norm,
            *(result.loss_sum.to(norm.device, torch.float32) for result in micro),
            *(mean.total.to(norm.device, torch.float32) for _, mean in named),
        ]
        grad_norm, *sums = torch.stack(values).tolist()
        loss_sums, totals = sums[: len(micro)], sums[len(micro) :]
        for result, value in zip(micro, loss_sums, strict=True):
            if not math.isfinite(value):
                random_state.restore(*result.random_before)
                layer = first_nonfinite_layer(self.model, result.batch, self.objective)
                raise NonFiniteError(f"the loss is {value}", step, result.batch.origins, layer)
        origins = [origin for result in micro for origin in result.batch.origins]
        if not math.isfinite(grad_norm):
            flat = self.optimizer.flat
            layer = last_nonfinite_gradient((e.name, e.view(flat.grad)) for e in flat.entries)
            raise NonFiniteError(f"the gradient's norm is {grad_norm}", step, origins, layer)
        metrics: dict[str, float] = {}
        for name in dict(named):
            of_name = [(x, m.count) for (n, m), x in zip(named, totals, strict=True) if n == name]
            total, count = (math.fsum(column) for column in zip(*of_name, strict=True))
            if not math.isfinite(total):
                raise NonFiniteError(f"{name} is {total}", step, origins, None)
            if count:
                metrics[name] = total / count
        return math.fsum(loss_sums) / weight, grad_norm, metrics
