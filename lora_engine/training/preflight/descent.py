"""A step against the gradients that makes the loss fall, and what rounding comes to in a loss."""

import torch
from torch import Tensor, nn

from lora_engine.training.preflight.trial import Gradients, Trial, unit_of

# A step is to take this share off the loss, to first order, or what rounding cannot hide if that
# is more; if it does not, a quarter of it, …
_FALL = 0.05
_SHORTER = 0.25
# What a step has to take off, at least, of what it would to first order (Armijo's condition).
_SUFFICIENT = 0.2
# No value moves further: gradients so small are all rounding.
_FURTHEST = 10.0
# What Adam moves all values by in a first step at a usual learning rate.
_FIRST = 1e-3

# What rounding comes to in a loss, of it or of 1, whichever is more: at most, and usually.
# transformers' losses are float32 in models of float64, too.
_ROUNDING = {torch.float64: (1e-5, 3e-6), torch.float32: (1e-5, 3e-6)}
_ROUNDING_OF_FEWER_BITS = (2e-3, 1e-4)


def rounding(model: nn.Module, loss: float) -> tuple[float, float]:
    """What rounding comes to in a loss of the model: at most, and usually."""
    parameters = list(model.parameters())
    most, usual = max(_ROUNDING.get(p.dtype, _ROUNDING_OF_FEWER_BITS) for p in parameters)
    if torch.is_autocast_enabled(parameters[0].device.type):
        most, usual = _ROUNDING_OF_FEWER_BITS
    scale = max(abs(loss), 1.0)
    return most * scale, usual * scale


def descend(trial: Trial, before: float, gradients: Gradients, noise: float, ratio: float) -> float:
    """The loss after a step against the gradients that makes it fall, where the trial is left.

    before: the loss at the own values. Where no step shows, all is learned already: the loss is
    then that after a step of _FIRST. noise: what rounding comes to in the loss.
    ratio: the loss's slope over what the gradients say.
    gradients: without those that are zero. Steps go against the signs first, as Adam's first one
    does, then against the gradients.
    """
    most, _ = rounding(trial.model, before)
    longest = max(_FALL * abs(before), 10 * most)
    for by_sign in (True, False):
        units = {name: unit_of(gradient) for name, gradient in gradients.items()}
        slopes = [_slope(unit, largest, by_sign) for unit, largest in units.values()]
        sizes = {name: 1.0 if by_sign else largest for name, (_, largest) in units.items()}
        fall = longest
        while fall > 10 * noise:
            length = fall / (ratio * sum(slopes))
            if length * max(sizes.values()) < _FURTHEST:
                lengths = {name: length * size for name, size in sizes.items()}
                trial.move(gradients, lengths, by_sign=by_sign)
                change = trial.loss() - before
                least = most if fall == longest else 3 * noise
                if change < -max(least, _SUFFICIENT * fall):
                    return before + change
            fall *= _SHORTER
    trial.move(gradients, dict.fromkeys(gradients, _FIRST), by_sign=True)
    return trial.loss()


def _slope(unit: Tensor, largest: float, by_sign: bool) -> float:
    """How much of the loss a step of length 1 against a gradient, or its sign, takes off."""
    norm = float(torch.linalg.vector_norm(unit, 1 if by_sign else 2, dtype=torch.float64))
    return largest * norm if by_sign else (largest * norm) ** 2
