"""A step against the gradients that lowers the loss, and how far rounding moves a loss."""

import torch
from torch import Tensor, nn

from lora_engine.training.preflight.trial import Gradients, Trial, unit_of

# The first step should lower the loss by this share of it to first order, or by ten times the
# rounding if that is more. Where a step fails, the next one is a quarter as long.
_FALL = 0.05
_SHORTER = 0.25
# The share of the first-order fall that a step has to reach (Armijo's condition).
_SUFFICIENT = 0.2
# The furthest that a value may move: gradients that ask for more are nothing but rounding.
_FURTHEST = 10.0
# How far Adam moves every value in a first step at a usual learning rate.
_FIRST = 1e-3

# How far rounding moves a loss, at most and usually, relative to the loss or to 1 if that is more.
# transformers computes losses in float32 for float64 models as well.
_ROUNDING = {torch.float64: (1e-5, 3e-6), torch.float32: (1e-5, 3e-6)}
_ROUNDING_OF_FEWER_BITS = (2e-3, 1e-4)


def rounding(model: nn.Module, loss: float) -> tuple[float, float]:
    """How far rounding moves a loss of the model: at most, and usually."""
    parameters = list(model.parameters())
    most, usual = max(_ROUNDING.get(p.dtype, _ROUNDING_OF_FEWER_BITS) for p in parameters)
    if torch.is_autocast_enabled(parameters[0].device.type):
        most, usual = _ROUNDING_OF_FEWER_BITS
    scale = max(abs(loss), 1.0)
    return most * scale, usual * scale


def descend(trial: Trial, before: float, gradients: Gradients, noise: float, ratio: float) -> float:
    """The loss after a step against the gradients that lowers it; the trial keeps these values.

    Steps along the gradients' signs are tried first, as Adam's first one is, then along the
    gradients. Where no step lowers the loss visibly, all is learned already, and the loss is that
    after a step of _FIRST.

    before: the loss at the model's own values. gradients: none of them zero. noise, ratio: as
    `check_slopes` returns them.
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
    """How far a step of length 1 along a gradient, or its sign, lowers the loss to first order."""
    norm = float(torch.linalg.vector_norm(unit, 1 if by_sign else 2, dtype=torch.float64))
    return largest * norm if by_sign else (largest * norm) ** 2
