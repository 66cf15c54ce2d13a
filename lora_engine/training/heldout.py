"""Loss and token accuracy on held-out data."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from lora_engine.data.batch import PackedBatch
from lora_engine.errors import UserError
from lora_engine.training.nonfinite import NonFiniteError, first_nonfinite_layer
from lora_engine.training.objective import supervised_loss


@dataclass(frozen=True)
class HeldoutResult:
    """loss: mean over targets of −log p, in nats. accuracy: share of targets that are the most
    likely token. tokens: real tokens read. targets: supervised tokens among them."""

    loss: float
    accuracy: float
    tokens: int
    targets: int


def evaluate(
    model: nn.Module, batches: Iterable[PackedBatch], *, step: int | None = None
) -> HeldoutResult:
    """Token-weighted loss and accuracy over `batches`, without dropout.

    The result does not depend on how the examples are packed, beyond rounding. `step` is named
    in the NonFiniteError raised if a batch's loss is not finite. UserError if nothing in
    `batches` is supervised.
    """
    device = next(model.parameters()).device
    loss = torch.zeros((), dtype=torch.float64, device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    tokens = targets = 0
    with torch.no_grad(), _evaluating(model):
        for batch in batches:
            tokens += batch.num_tokens
            targets += batch.num_targets
            if not batch.num_targets:
                continue
            on_device = batch.to(device)
            output = supervised_loss(model, on_device)
            batch_loss = -output.logprobs.double().sum()
            if not math.isfinite(value := batch_loss.item()):
                raise NonFiniteError(
                    f"the held-out loss is {value}",
                    step,
                    batch.origins,
                    first_nonfinite_layer(model, on_device),
                )
            loss += batch_loss
            correct += output.correct.sum()
    if not targets:
        raise UserError("the held-out data have no supervised tokens to measure a loss on")
    return HeldoutResult(loss.item() / targets, correct.item() / targets, tokens, targets)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
