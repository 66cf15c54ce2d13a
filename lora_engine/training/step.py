"""One optimiser step: accumulate gradients over micro-batches, check them, apply them."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import NamedTuple, TypedDict, cast

import torch
from torch import nn

from lora_engine.data.batch import PackedBatch, part_of
from lora_engine.distributed.replicate import GradientSum
from lora_engine.distributed.token_parts import TokenParts, sharing_tokens
from lora_engine.distributed.world import ALONE, World
from lora_engine.evaluation.batch_loss import batch_loss, with_statistics
from lora_engine.evaluation.nonfinite import (
    NonFiniteError,
    first_nonfinite_layer,
    last_nonfinite_gradient,
)
from lora_engine.models.peft.routing import adapters_of
from lora_engine.objectives.answers import added, is_seen, mean_of, terms_of, weight_of
from lora_engine.objectives.base import Mean, Objective
from lora_engine.training import random_state
from lora_engine.training.optimizer.optimizer import FlatOptimizer
from lora_engine.training.signals import Interrupted, interrupting


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


class _OnDevice(NamedTuple):
    """What a micro-batch came to."""

    batch: PackedBatch
    terms: Mapping[str, torch.Tensor]
    metrics: Mapping[str, Mean]


class _OnHost(TypedDict):
    """Its results as JSON. terms: by the order of the weights. metrics: name, total and count."""

    terms: list[float]
    metrics: list[tuple[str, float, float]]


class _OfProcess(TypedDict):
    """What one process did of a step. stopped: the signal that it stopped for."""

    stopped: str | None
    micro: list[_OnHost]


class TrainStep:
    """Applies optimiser steps, each of them wholly or not at all.

    seed: of dropout. world: the processes that share the steps. All of them call a step with the
    same micro-batches, and each runs every `world.size`th of those that have weight, or its part of
    the tokens of each of them.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        optimizer: FlatOptimizer,
        *,
        seed: int = 0,
        world: World = ALONE,
    ) -> None:
        self.model = model
        self.objective = objective
        self.optimizer = optimizer
        self.seed = seed
        self.world = world
        # All processes must call collectives in one order. In step, a backward pass has collectives
        # of its own (weights gathered, gradients scattered, tokens exchanged): sums that autograd's
        # hooks began would come between these at other places in each process.
        large = [] if world.in_step else optimizer.flat.large()
        self._sum = GradientSum(world, optimizer.flat.grad, large)

    def __call__(
        self,
        step: int,
        batches: Sequence[PackedBatch],
        learning_rate: float,
        check: Callable[[], None],
    ) -> StepResult:
        """One step over `batches`, with the gradient of the loss over all their weight.

        check: called before every micro-batch; whatever it raises leaves the step unapplied and
            the random state as it was. What is Interrupted in one process is so in all.
        Raises NonFiniteError, likewise without a trace, if a loss, gradient or metric is not
        finite; where updates are layer-wise, a gradient or metric leaves `optimizer.torn`. Without
        any weight no update is made; loss and norm are then 0.
        """
        weights = [weight_of(self.objective, batch) for batch in batches]
        weight = added(weights)
        both = enumerate(zip(batches, weights, strict=True))
        weighty = [index for index, one in both if is_seen(self.objective, *one)]
        with random_state.restored_on_error():
            micro, stopped = self._accumulate(step, batches, weighty, weight, check, learning_rate)
            norm = self.optimizer.grad_norm()
            grad_norm, results = self._read(micro, list(weight), norm, stopped)
            self._check_finite(step, batches, weighty, grad_norm, results, micro)
        if weighty:
            self.optimizer.step(learning_rate, norm)
        tokens = sum(batch.num_tokens for batch in batches)
        targets = sum(batch.num_targets for batch in batches)
        loss = _loss_of(results, weight)
        return StepResult(
            loss=loss,
            grad_norm=grad_norm,
            tokens=tokens,
            supervised_tokens=targets,
            metrics=_means_of(results),
        )

    def try_out(self, batch: PackedBatch) -> None:
        """Both passes of a micro-batch, for the memory that they take; they leave no trace.

        Of this process alone, where processes share neither weights nor tokens.
        """
        weight = weight_of(self.objective, batch)
        if not is_seen(self.objective, batch, weight):
            return
        alone = TrainStep(self.model, self.objective, self.optimizer, seed=self.seed)
        before = random_state.capture()
        try:
            alone._accumulate(0, [batch], [0], weight, lambda: None, None)
        finally:
            self.optimizer.flat.zero_grad()
            random_state.restore(*before)

    def close(self) -> None:
        """No further step is made."""
        self._sum.close()

    def _accumulate(
        self,
        step: int,
        batches: Sequence[PackedBatch],
        weighty: Sequence[int],
        weight: Mapping[str, float],
        check: Callable[[], None],
        learning_rate: float | None,
    ) -> tuple[list[_OnDevice], str | None]:
        """Results of this process's micro-batches, and the signal that came between them, if any.

        On return the buffer holds the gradients summed over all processes. learning_rate: of
        layer-wise updates; None: there are no such updates.
        """
        flat, world = self.optimizer.flat, self.world
        flat.zero_grad()
        indices = weighty if world.shares_tokens else weighty[world.rank :: world.size]
        count = len(indices)
        if world.in_step and count < -(-len(weighty) // world.size):
            indices = [*indices, weighty[0]]  # a pass with the others, which counts nothing
        own = [batches[index] for index in indices]
        micro: list[_OnDevice] = []
        stopped = None
        counted = with_statistics(self.model, own, self.objective, check, world)
        for place, (index, batch) in enumerate(zip(indices, counted, strict=True)):
            if stopped is None:
                stopped = interrupting(check)
            if stopped is not None and not world.in_step:
                break
            random_state.seed_micro_batch(self.seed, step, index)
            parts = TokenParts(batch.num_rows, world) if world.shares_tokens else None
            own_part = batch if parts is None else part_of(batch, parts.own)
            on_device = own_part.to(flat.device)
            with sharing_tokens(parts):
                loss = batch_loss(self.model, on_device, self.objective)
            is_last = place == count - 1
            # Checkpointed layers run again, and need their adapters.
            with (
                adapters_of(self.model, on_device),
                self._sum.overlapped() if is_last else nullcontext(),
            ):
                # Dividing by the step's weight, not the micro-batch's, weights every token alike.
                mean = mean_of(self.objective, loss, weight)
                # A loss that would spoil weights before the step is checked: the host waits for it.
                if flat.gathered or mean.isfinite():
                    with self.optimizer.receiving(learning_rate):
                        (mean if place < count else mean * 0.0).backward()
            if place == count:
                break
            terms = {n: total.detach() for n, total in terms_of(loss).items()}
            metrics = {n: Mean(m.total.detach(), m.count) for n, m in loss.metrics.items()}
            micro.append(_OnDevice(on_device, terms, metrics))
        self._sum.finish()
        return micro, stopped

    def _read(
        self,
        micro: Sequence[_OnDevice],
        terms: Sequence[str],
        norm: torch.Tensor,
        stopped: str | None,
    ) -> tuple[float, list[_OnHost]]:
        """The gradient's norm, and what the micro-batches of all processes came to, in their order;
        with the step's only wait for the device. Raises Interrupted if one process stopped."""
        scalars = [norm]
        for result in micro:
            scalars += [result.terms[term] for term in terms]
            scalars += [mean.total for mean in result.metrics.values()]
        stacked = torch.stack([x.to(norm.device, torch.float32) for x in scalars])
        grad_norm, *values = stacked.tolist()
        value = iter(values)
        own: list[_OnHost] = [
            {
                "terms": [next(value) for _ in terms],
                "metrics": [(name, next(value), m.count) for name, m in result.metrics.items()],
            }
            for result in micro
        ]
        of_process: _OfProcess = {"stopped": stopped, "micro": own}
        parts = cast(list[_OfProcess], self.world.gather(of_process))
        for part in parts:
            if part["stopped"] is not None:
                raise Interrupted(part["stopped"])
        rounds = zip_longest(*(part["micro"] for part in parts))
        return grad_norm, [result for of_round in rounds for result in of_round if result]

    def _check_finite(
        self,
        step: int,
        batches: Sequence[PackedBatch],
        weighty: Sequence[int],
        grad_norm: float,
        results: Sequence[_OnHost],
        micro: Sequence[_OnDevice],
    ) -> None:
        """Raises NonFiniteError, in all processes, for what is not finite. micro: this one's."""
        each = self.world.size if self.world.shares_tokens else 1  # results of a micro-batch
        for number, result in enumerate(results):
            for value in result["terms"]:
                if not math.isfinite(value):
                    index = weighty[number // each]
                    layer = self._bad_layer(step, index, number, micro)
                    what = f"the loss is {value}"
                    raise NonFiniteError(what, step, batches[index].origins, layer)
        origins = [origin for index in weighty for origin in batches[index].origins]
        if not math.isfinite(grad_norm):
            flat = self.optimizer.flat
            layer = (
                last_nonfinite_gradient((e.name, e.view(flat.grad)) for e in flat.entries)
                if flat.gathered
                else self.optimizer.nonfinite_gradient()
            )
            raise NonFiniteError(f"the gradient's norm is {grad_norm}", step, origins, layer)
        for name, (total, _) in _sums_of(results).items():
            if not math.isfinite(total):
                raise NonFiniteError(f"{name} is {total}", step, origins, None)

    def _bad_layer(
        self, step: int, index: int, number: int, micro: Sequence[_OnDevice]
    ) -> str | None:
        """Where the loss of micro-batch `index`, the `number`th with weight, went wrong, by the
        process that ran it, with the same dropout; None where it cannot run the model alone."""
        place, owner = divmod(number, self.world.size)
        layer = None
        if self.world.rank == owner and not self.world.in_step:
            random_state.seed_micro_batch(self.seed, step, index)
            layer = first_nonfinite_layer(self.model, micro[place].batch, self.objective)
        return cast("list[str | None]", self.world.gather(layer))[owner]


def _loss_of(results: Sequence[_OnHost], weight: Mapping[str, float]) -> float:
    """The loss: of each term the sum over its weight."""
    return math.fsum(
        math.fsum(result["terms"][place] for result in results) / of_term
        for place, of_term in enumerate(weight.values())
        if of_term
    )


def _sums_of(results: Sequence[_OnHost]) -> dict[str, tuple[float, float]]:
    """Total and count of each metric."""
    named = [mean for result in results for mean in result["metrics"]]
    sums = {}
    for name in dict.fromkeys(name for name, _, _ in named):
        of_name = [(total, count) for n, total, count in named if n == name]
        total, count = (math.fsum(column) for column in zip(*of_name, strict=True))
        sums[name] = (total, count)
    return sums


def _means_of(results: Sequence[_OnHost]) -> dict[str, float]:
    return {name: total / count for name, (total, count) in _sums_of(results).items() if count}
