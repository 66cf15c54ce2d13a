"""Does a loss go down along its gradient? Told from rounding, and from having no way down."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_engine.errors import UserError
from lora_engine.training.trial import Gradients, Trial

# A step is to take this share off the loss, to first order, or what rounding cannot hide if it is
# not most of the loss; if it does not, a quarter of it, …
_FALL = 0.05
_MOST = 0.5
_SHORTER = 0.25
# What a step has to take off, at least, of what it would to first order (Armijo's condition).
_SUFFICIENT = 0.2
# A step that moves a value further than this shows nothing: gradients so small are all rounding.
_FURTHEST = 10.0

# What rounding comes to in a loss, of it or of 1, whichever is more: at most, and usually.
_ROUNDING = {torch.float64: (1e-10, 1e-12), torch.float32: (1e-5, 3e-6)}
_ROUNDING_OF_FEWER_BITS = (2e-3, 1e-4)


def rounding(model: nn.Module, loss: float) -> tuple[float, float]:
    """What rounding comes to in a loss of the model: at most, and usually."""
    parameters = list(model.parameters())
    most, usual = max(_ROUNDING.get(p.dtype, _ROUNDING_OF_FEWER_BITS) for p in parameters)
    if torch.is_autocast_enabled(parameters[0].device.type):
        most, usual = _ROUNDING_OF_FEWER_BITS
    scale = max(abs(loss), 1.0)
    return most * scale, usual * scale


def descend(trial: Trial, before: float, gradients: Gradients) -> float:
    """The loss after a step against the gradients that makes it fall, where the trial is left.

    before: the loss at the own values. It is returned where no step shows: all is learned already.
    Steps go against the signs first, as Adam's first one does, then against the gradients.
    Raises UserError where the loss goes another way than the gradients say.
    """
    return _Descent(trial, before, gradients).run()


@dataclass(frozen=True)
class _Sides:
    """The loss's change `fall` expects to be −fall, after a step on, and +fall after one back."""

    fall: float
    on: float
    back: float

    def denies(self, noise: float) -> bool:
        """Whether it moves, or not at all, and otherwise than the gradients say.

        Where it moves much more the loss is curved too much to say.
        """
        furthest = max(abs(self.on), abs(self.back))
        visible = furthest > 10 * noise or furthest == 0
        return visible and furthest <= 3 * self.fall and self.back - self.on < 0.2 * self.fall


class _Descent:
    def __init__(self, trial: Trial, before: float, gradients: Gradients) -> None:
        self.trial, self.before, self.gradients = trial, before, gradients
        self.most, self.usual = rounding(trial.model, before)
        self.slopes = {
            by_sign: sum(_slope(g, by_sign) for g in gradients.values() if g is not None)
            for by_sign in (True, False)
        }

    def run(self) -> float:
        size = abs(self.before)
        longest = min(max(_FALL * size, 10 * self.most), _MOST * size)
        change = self._change(longest, by_sign=True)
        if change < -max(self.most, _SUFFICIENT * longest):
            return self.before + change
        noise = self._noise()
        denials: list[_Sides | None] = []
        for by_sign in (True, False):
            denial = None
            for fall in _shorter(longest, 10 * noise):
                on = self._change(fall, by_sign=by_sign)
                if on < -max(3 * noise, _SUFFICIENT * fall):
                    return self.before + on
                conclusive = fall >= 10 * self.most and self._is_near(fall, by_sign=by_sign)
                if conclusive:  # in shorter steps the gradients' own rounding shows
                    sides = _Sides(fall, on, self._change(-fall, by_sign=by_sign))
                    denial = sides if sides.denies(noise) else denial
            denials.append(denial)
        if denials[0] is None or denials[1] is None:  # it curves up before a step can show
            return self.before
        raise UserError(self._problem(denials[0]))

    def _change(self, fall: float, *, by_sign: bool) -> float:
        """Of the loss, by a step that takes `fall` off it to first order."""
        self.trial.move(self.gradients, fall / self.slopes[by_sign], by_sign=by_sign)
        return self.trial.loss() - self.before

    def _is_near(self, fall: float, *, by_sign: bool) -> bool:
        """Whether no value moves far in a step that takes `fall` off the loss to first order."""
        largest = max(
            _norm(g, float("inf")) for g in self.gradients.values() if g is not None and g.numel()
        )
        return fall / self.slopes[by_sign] * (1.0 if by_sign else largest) <= _FURTHEST

    def _noise(self) -> float:
        """How far the loss moves by rounding alone, in steps too short to show."""
        short = 1e-7 * abs(self.before)
        changes = [self._change(fall, by_sign=False) for fall in (short, -short)]
        return max(self.usual, *map(abs, changes))

    def _problem(self, sides: _Sides) -> str:
        if sides.on == sides.back == 0:
            return (
                f"preflight: the loss stays {self.before:.6g} whatever the trained parameters "
                "are: the forward pass computes with other values; look for cached, merged or "
                "exported weights"
            )
        return (
            f"preflight: the loss does not fall on a repeated batch: {self.before:.6g} before, "
            f"{self.before + sides.on:.6g} after a step that should take {sides.fall:.2g} off it; "
            "its gradients are wrong: look for a backward pass, or hooks on gradients, of your own"
        )


def _shorter(fall: float, least: float) -> Iterator[float]:
    """`fall` and what is shorter, down to `least`."""
    while fall > least:
        yield fall
        fall *= _SHORTER


def _slope(gradient: Tensor, by_sign: bool) -> float:
    """How much of the loss a step of length 1 against the gradient, or its sign, takes off."""
    norm = _norm(gradient, 1 if by_sign else 2)
    return norm if by_sign else norm**2


def _norm(gradient: Tensor, order: float) -> float:
    wide = torch.promote_types(gradient.dtype, torch.float32)
    return float(torch.linalg.vector_norm(gradient, order, dtype=wide))
