"""Whether the gradients are those of the loss, and not wrong, rounded away or scaled.

A probe compares the loss's change along the gradients, by a central difference, with the change
that the gradients predict. It moves all tensors of a group together, each by as much as should
lower the loss by the same amount c to first order: where one tensor's gradient is wrong, c or more
of the predicted fall is missing. c is chosen well above rounding; where one probe of all tensors
would then lower the loss too far, they are probed in several groups. A group with a missing fall is
halved until one tensor is left, which is judged by probes of several lengths, so that curvature is
not taken for a wrong gradient.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_engine.errors import UserError
from lora_engine.training.preflight.descent import rounding
from lora_engine.training.preflight.trial import PARTS, Trial, unit_of

# A tensor's share c of a probe's fall over the rounding of the loss. To reach it tensors are probed
# in several groups, _MOST_PROBES at most.
_SHARP = 16.0
_MOST_PROBES = 2
# A probe lowers the loss by this share of it at most. Of probes of several lengths the next one is
# a quarter as long.
_FALL = 0.04
_SHORTER = 0.25
_LENGTHS = 5
# A tensor moves by this share of its values at most (both as root mean squares; values smaller than
# _USUAL count as that).
_REACH = 0.2
_USUAL = 0.02
# A change of the loss counts if it is more than this many times the rounding.
_VISIBLE = 10.0
# The measured change over the predicted one that passes, …
_LEAST, _MOST = 0.3, 3.0
# … and the factor by which a gradient may be scaled if its direction is right: optimisers like Adam
# do not mind, and some methods scale the gradients of some parameters.
_SCALE = 1000.0


@dataclass(frozen=True)
class _Probe:
    """How far the loss falls by a step against the gradients, as a central difference.

    asked: to first order, of the steps asked for. expected: to first order, of the steps that the
        values took once they were rounded. actual: as measured.
    bend: the curvature's part: the mean change of the step and the step back.
    """

    asked: float
    expected: float
    actual: float
    bend: float

    @property
    def ratio(self) -> float:
        return self.actual / self.expected if self.expected else math.inf

    @property
    def missing(self) -> float:
        return self.expected - self.actual

    @property
    def is_right(self) -> bool:
        return _LEAST <= self.ratio <= _MOST

    @property
    def is_lost(self) -> bool:
        """Whether rounding the values in their dtype took away more than half of the steps."""
        return self.expected < self.asked / 2


def check_slopes(
    trial: Trial,
    here: float,
    gradients: Mapping[str, Tensor],
    together: Callable[[str], object],
    noise: float | None = None,
) -> tuple[float, float]:
    """Raises UserError where a gradient is not that of the loss at the trial's present values.

    here: the loss at these values. gradients: by parameter, none of them zero. together: a key of
    a parameter's name, by which the tensors are sorted before they are divided into groups.
    noise: the loss's change by rounding alone; measured if None.
    Returns the noise, and the loss's slope over the one that the gradients predict, which differs
    from 1 where they are scaled.
    """
    slopes = _Slopes(trial, here, gradients, noise)
    slopes.check(sorted(gradients, key=lambda name: str(together(name))))
    return slopes.noise, slopes.ratio


class _Slopes:
    def __init__(
        self, trial: Trial, here: float, gradients: Mapping[str, Tensor], noise: float | None
    ) -> None:
        self.trial, self.here, self.gradients = trial, here, gradients
        self.slope: dict[str, float] = {}
        self.reach: dict[str, float] = {}
        for name, gradient in gradients.items():
            unit, largest = unit_of(gradient)
            size = _norm(unit)
            values = _norm(trial.trained[name]) / math.sqrt(unit.numel())
            self.slope[name] = largest * size**2
            self.reach[name] = _REACH * max(values, _USUAL) * math.sqrt(unit.numel()) / size
        self.ratio = 1.0
        self.most, self.usual = rounding(trial.model, here)
        self.noise = self._noise() if noise is None else noise
        # Losses may begin at 0 and have a slope.
        self.fall = max(_FALL * abs(here), min(32 * _VISIBLE * self.noise, _FALL))

    def check(self, names: Sequence[str]) -> None:
        wanted = _SHARP * self.noise * len(names)
        probes = min(math.ceil(wanted / self.fall), _MOST_PROBES, len(names))
        size = math.ceil(len(names) / probes)
        for start in range(0, len(names), size):
            self._check_group(names[start : start + size])

    def _check_group(self, names: Sequence[str]) -> None:
        probe = self._probe_together(names)
        if not probe.is_right and self._is_visible(probe):
            self.ratio = 1 / self._judge(names)
        elif len(names) > 1 and self._misses(names, probe):
            # With steps twice as long a wrong gradient misses twice as much, terms of higher order
            # far more, and a jump of the loss, where tokens go to other experts, no more.
            twice = self._probe_together(names, 2.0)
            if 1.4 < twice.missing / probe.missing < 3:
                self._look_into(names)

    def _look_into(self, names: Sequence[str]) -> None:
        """Judges the tensor of the group whose part of the fall is missing, moved by halving; or
        several, where something is missing of all together but not of either half."""
        while len(names) > 1:
            half = len(names) // 2
            for part in (names[:half], names[half:]):
                if self._misses(part, self._probe_together(part)):
                    names = part
                    break
            else:
                break
        self._judge(names)

    def _probe_together(self, names: Sequence[str], scale: float = 1.0) -> _Probe:
        return self._probe(names, self._fall_of(names), scale)

    def _fall_of(self, names: Sequence[str]) -> float:
        return min(self.fall, _SHARP * self.noise * len(names))

    def _misses(self, names: Sequence[str], probe: _Probe) -> bool:
        """Whether half of one tensor's share of the fall is missing, or more.

        A fall that is too large is no mistake: the gradients may be scaled down on purpose, or the
        loss may jump.
        """
        share = self._fall_of(names) / len(names)
        return not probe.missing <= max(share / 2, 4 * self.noise)

    def _is_visible(self, probe: _Probe) -> bool:
        return max(probe.asked, abs(probe.actual)) > _VISIBLE * self.noise

    def _judge(self, names: Sequence[str]) -> float:
        """The scale of the gradients of `names`: 1, or another that is applied on purpose.

        Raises UserError if the loss does not fall as they predict by a step of any length whose
        change can be told from rounding.
        """
        seen = []
        for shorter in _shorter():
            probe = self._probe(names, self.fall, shorter)
            if shorter == 1 and probe.is_lost:
                return self._other_scale(names, probe)
            if not math.isfinite(probe.actual) or not self._is_visible(probe):
                continue
            if probe.is_right:
                return 1.0
            seen.append(probe)
        ratios = [p.ratio for p in seen if p.ratio < _LEAST and self._is_straight(p)]
        if len(ratios) >= 2 and _agree(ratios):
            return self._other_scale(names, seen[0])
        # The loss falls much further than predicted, and as much further in shorter steps: a slope
        # that the gradient lacks, not curvature.
        ratios = [p.ratio for p in seen[-2:]]
        if len(ratios) == 2 and min(p.ratio for p in seen) > _MOST and _agree(ratios):
            return self._other_scale(names, seen[-1])
        return 1.0

    def _is_straight(self, probe: _Probe) -> bool:
        """Whether the predicted fall is well above rounding and twice the curvature's part."""
        return probe.expected > 3 * self.most and abs(probe.bend) < 0.5 * probe.expected

    def _other_scale(self, names: Sequence[str], probe: _Probe) -> float:
        scale = self._scale(names)
        if scale is None and probe.ratio > _MOST:
            return 1.0  # the loss has a slope of another cause, such as jumps between experts
        if scale is None or not 1 / _SCALE < scale < _SCALE:
            raise UserError(self._problem(names, probe, scale))
        return scale

    def _scale(self, names: Sequence[str]) -> float | None:
        """The gradients over the loss's true ones, if both have the same direction; else None.

        They have if the measured change is the same multiple of the predicted one for each part of
        the elements: every PARTS-th one, from a different first one.
        """
        shorter = 1.0
        for _ in range(20):  # shorter until the change is no larger than that of a probe
            probe = self._probe(names, math.inf, shorter)
            if self._is_visible(probe) and abs(probe.actual) <= self.fall:
                break
            shorter *= _SHORTER
        parts = [self._probe(names, math.inf, shorter, part) for part in range(PARTS)]
        ratios = [part.ratio for part in parts if part.expected > 0]
        visible = all(abs(part.actual) > 2 * self.noise for part in parts)
        if not visible or not ratios or min(ratios) <= 0 or max(ratios) > 4 * min(ratios):
            return None
        return sum(part.expected for part in parts) / sum(part.actual for part in parts)

    def _probe(
        self, names: Sequence[str], fall: float, scale: float = 1.0, part: int | None = None
    ) -> _Probe:
        share = fall / len(names)
        lengths = {name: scale * min(share / self.slope[name], self.reach[name]) for name in names}
        sides = []
        for sign in (1, -1):
            steps = {name: sign * length for name, length in lengths.items()}
            change = self.trial.move(self.gradients, steps, part=part)
            sides.append((change, self.trial.loss() - self.here))
        (said_on, on), (said_back, back) = sides
        asked = sum(length * self.slope[name] for name, length in lengths.items())
        return _Probe(
            asked=asked,
            expected=(said_back - said_on) / 2,
            actual=(back - on) / 2,
            bend=(on + back) / 2,
        )

    def _noise(self) -> float:
        """How far the loss moves by rounding alone: by steps too short to change it otherwise."""
        lengths = {name: 1e-6 * reach for name, reach in self.reach.items()}
        moved = []
        for sign in (1, -1):
            self.trial.move(self.gradients, {n: sign * x for n, x in lengths.items()})
            moved.append(abs(self.trial.loss() - self.here))
        return max(self.usual / 3, *moved)

    def _problem(self, names: Sequence[str], probe: _Probe, scale: float | None) -> str:
        after = self.here - probe.actual
        if scale is not None:
            times = (
                f"{scale:.0e} times too large" if scale > 1 else f"{1 / scale:.0e} times too small"
            )
            return (
                f"preflight: {_of(names)} {times} for the loss; look for a scale of the loss that "
                "is not divided out again, or hooks on gradients"
            )
        if len(names) > 1 and probe.actual == probe.bend == 0:
            return (
                f"preflight: the loss stays {self.here:.6g} whatever the trained parameters are: "
                "the forward pass computes with other values; look for cached, merged or exported "
                "weights"
            )
        return (
            f"preflight: the loss does not fall on a repeated batch: {self.here:.6g} before, "
            f"{after:.6g} after a step that should take {probe.expected:.2g} off it; "
            f"{_of(names)} wrong: look for a backward pass, or hooks on gradients, of your own, or "
            "a forward pass that writes into what is trained"
        )


def _agree(ratios: Sequence[float]) -> bool:
    return max(ratios) - min(ratios) < 0.3 * (1 + max(map(abs, ratios)))


def _of(names: Sequence[str]) -> str:
    if len(names) == 1:
        return f"the gradient of {names[0]} is"
    return f"its gradients ({names[0]} and {len(names) - 1:,} more) are"


def _shorter() -> Iterator[float]:
    return (_SHORTER**power for power in range(_LENGTHS))


def _norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values.detach(), dtype=torch.float64))
