"""One optimiser step: accumulate gradients over micro-batches, check them, apply them."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from lora_engine.data.batch import PackedBatch
from lora_engine.evaluation.batch_loss import batch_loss, with_statistics
from lora_engine.evaluation.nonfinite import (
    NonFiniteError,
    first_nonfinite_layer,
    last_nonfinite_gradient,
)
from lora_engine.models.peft.routing import adapters_of
from lora_engine.objectives.answers import added, mean_of, terms_of, weight_of
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
    terms: Mapping[str, torch.Tensor]
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
        weight = added(weights)
        try:
            micro = self._accumulate(batches, weights, check)
            norm = self.optimizer.grad_norm()
            loss, grad_norm, metrics = self._read(step, micro, weight, norm)
        except BaseException:
            random_state.restore(*before)
            raise
        if micro:
            self.optimizer.step(learning_rate, norm)
        tokens = sum(batch.num_tokens for batch in batches)
        targets = sum(batch.num_targets for batch in batches)
        return StepResult(loss, grad_norm, tokens, targets, metrics)

    def _accumulate(
        self,
        batches: Sequence[PackedBatch],
        weights: Sequence[Mapping[str, float]],
        check: Callable[[], None],
    ) -> list[_MicroResult]:
        flat, weight = self.optimizer.flat, added(weights)
        flat.zero_grad()
        micro = []
        weighty = [b for b, w in zip(batches, weights, strict=True) if any(w.values())]
        for batch in with_statistics(self.model, weighty, self.objective, check):
            check()
            random_before = random_state.capture()
            on_device = batch.to(flat.device)
            loss = batch_loss(self.model, on_device, self.objective)
            # Checkpointed layers run again, and need their adapters.
            with adapters_of(self.model, on_device), flat.collecting():
                # Dividing by the step's weight, not the micro-batch's, weights every token alike.
                mean_of(self.objective, loss, weight).backward()
            terms = {n: total.detach() for n, total in terms_of(loss).items()}
            metrics = {n: Mean(m.total.detach(), m.count) for n, m in loss.metrics.items()}
            micro.append(_MicroResult(on_device, random_before, terms, metrics))
        return micro

    def _read(
        self,
        step: int,
        micro: Sequence[_MicroResult],
        weight: Mapping[str, float],
        norm: torch.Tensor,
    ) -> tuple[float, float, dict[str, float]]:
        """Loss, gradient norm and metrics on the host, with the step's only wait for the device."""
        if not micro:
            return 0.0, 0.0, {}
        terms = list(weight)
        named = [(name, mean) for result in micro for name, mean in result.metrics.items()]
        values = [
            norm,
            *(r.terms[term].to(norm.device, torch.float32) for r in micro for term in terms),
            *(mean.total.to(norm.device, torch.float32) for _, mean in named),
        ]
        grad_norm, *sums = torch.stack(values).tolist()
        of_losses = len(micro) * len(terms)
        loss_sums, totals = sums[:of_losses], sums[of_losses:]
        for number, value in enumerate(loss_sums):
            if not math.isfinite(value):
                result = micro[number // len(terms)]
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
        loss = math.fsum(
            math.fsum(loss_sums[place :: len(terms)]) / weight[term]
            for place, term in enumerate(terms)
            if weight[term]
        )
        return loss, grad_norm, metrics
