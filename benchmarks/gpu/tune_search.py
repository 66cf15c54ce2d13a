"""Which launch parameters the tuner tries, and when one line of the table gives way to another.

Needs nothing but Python.
"""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Parameters = dict[str, int]
Axes = Mapping[str, tuple[float, ...] | str]

# A parameter's values as multiples of what the table has.
_HALF, _QUARTER = 0.5, 0.25
_ABOUT = (_HALF, 1, 2)
_WARPS: Axes = {"num_warps": _ABOUT}
_ROWS: Axes = {"BLOCK_M": (_HALF, 1, 2, 4), "num_warps": (_QUARTER, _HALF, 1, 2)}
_ATTENTION: Axes = {
    "BLOCK_M": _ABOUT,
    "BLOCK_N": _ABOUT,
    "num_stages": "stages",
    "SPLIT": "flag",
    "TMA": "flag",
    **_WARPS,
}
_SUMS: Axes = {"BLOCK_M": _ABOUT, "num_stages": "stages", **_WARPS}
_PASS: Axes = {
    "BLOCK_M": _ABOUT,
    "BLOCK_N": _ABOUT,
    "NUM_STAGES": "stages",
    "maxnreg": "free",
    **_WARPS,
}
_PRODUCT: Axes = {
    "BLOCK_M": _ABOUT,
    "BLOCK_N": _ABOUT,
    "BLOCK_K": _ABOUT,
    "num_stages": "stages",
    "GROUP_M": (_HALF, 1, 2),
    **_WARPS,
}
# By kernel. What is not named stays: grad_norm, whose order of summation is the same on all GPUs,
# has no entry at all.
SEARCH: dict[str, Axes] = {
    "glu_fwd": {"BLOCK_M": (_QUARTER, _HALF, 1, 2), "BLOCK_N": _ABOUT, **_WARPS},
    "glu_bwd": {"BLOCK_M": (_QUARTER, _HALF, 1, 2), "BLOCK_N": _ABOUT, **_WARPS},
    "glu_lora_fwd": _PASS,
    "glu_lora_bwd": _PASS,
    "rms_norm_fwd": _ROWS,
    "rms_norm_bwd": {**_ROWS, "maxnreg": "free"},
    "rms_norm_bwd_dw": {"PROGRAMS": _ABOUT, "NUM_STAGES": "stages", "BLOCK_M": (1, 2), **_WARPS},
    "layer_norm_fwd": _ROWS,
    "layer_norm_bwd": {**_ROWS, "maxnreg": "free"},
    "rope": {"BLOCK_T": (_HALF, 1, 2, 4), "BLOCK_H": _ABOUT, **_WARPS},
    "cross_entropy": {"BLOCK_N": (_QUARTER, _HALF, 1, 2), "num_warps": (_QUARTER, _HALF, 1, 2)},
    "dequantize_4bit": {"BLOCK_M": (_QUARTER, _HALF, 1, 2), "BLOCK_N": _ABOUT, **_WARPS},
    "adamw": {"BLOCK": (_HALF, 1, 2, 4), "num_warps": _ABOUT},
    "adamw_8bit": {"BLOCKS": (_QUARTER, _HALF, 1, 2, 4), "num_warps": _ABOUT},
    "attention_fwd": _ATTENTION,
    "attention_bwd_dq": _ATTENTION,
    "attention_bwd_dkv": _ATTENTION,
    "lora_a_fwd": {**_SUMS, "BLOCK_K": _ABOUT},
    "lora_a_fwd_wide": {**_SUMS, "BLOCK_K": _ABOUT},
    "lora_a_bwd": {**_SUMS, "BLOCK_K": _ABOUT},
    "lora_a_bwd_wide": {**_SUMS, "BLOCK_K": _ABOUT},
    "lora_b_bwd": {**_SUMS, "BLOCK_N": _ABOUT},
    "lora_b_bwd_wide": {**_SUMS, "BLOCK_N": _ABOUT},
    "lora_sum_chunks": {"BLOCK_M": (_HALF, 1, 2, 4), "BLOCK_N": (_HALF, 1, 2), **_WARPS},
    "lora_linear_fwd": _PRODUCT,
    "lora_linear_dx": _PRODUCT,
    "lora_linear_dx_dropout": _PRODUCT,
}
# The least that Triton, a matrix instruction or a warp takes.
_LEAST = {"BLOCK_M": 1, "num_warps": 1, "num_stages": 1, "NUM_STAGES": 1}
_LEAST_OF_PRODUCTS = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16}
_MOST = {"num_warps": 32, "num_stages": 6, "NUM_STAGES": 4}
MOST_CANDIDATES = 24


def candidates(kernel: str, present: Parameters, most: int = MOST_CANDIDATES) -> list[Parameters]:
    """Other parameters for a line, those nearest to the present ones first."""
    axes = [
        [(name, value) for value in _values(kernel, name, steps, present)]
        for name, steps in SEARCH[kernel].items()
        if name in present
    ]
    found = []
    for choice in itertools.product(*axes):
        changed = {name: value for name, value in choice if value != present[name]}
        parameters = {k: v for k, v in {**present, **changed}.items() if v is not None}
        distance = sum(_distance(present[name], value) for name, value in changed.items())
        if changed:
            found.append((len(changed), distance, parameters))
    found.sort(key=lambda each: each[:2])  # stable: else in the order of the axes
    return [parameters for _, _, parameters in found[:most]]


def _values(
    kernel: str, name: str, steps: tuple[float, ...] | str, present: Parameters
) -> list[int | None]:
    value = present[name]
    if steps == "free":  # a limit on registers, or none
        return [value, None]
    if steps == "flag":
        return [value, 1 - value]
    if steps == "stages":
        found = [value, value + 1, value - 1]
    else:
        assert isinstance(steps, tuple)
        found = [value, *(int(value * step) for step in steps if step != 1)]
    products = kernel.startswith(("attention_", "lora_", "glu_lora_"))
    products = products and kernel != "lora_sum_chunks"
    least = _LEAST_OF_PRODUCTS.get(name, 1) if products else _LEAST.get(name, 1)
    return [x for x in found if least <= x <= _MOST.get(name, x)]


def _distance(present: int, value: int | None) -> float:
    """Powers of two between them; one step between a limit and none, and between 0 and 1."""
    return abs(math.log2(value / present)) if value and present else 1.0


# A gain counts if it is larger than this, and than twice what one line differs from itself.
LEAST_GAIN = 0.02
NOISE_FACTOR = 2.0


@dataclass(frozen=True)
class Measured:
    """Seconds of a line's launch at one size.

    before, again: with the present parameters, which take part twice. ceiling: of a copy of as many
    bytes, or of the products alone.
    """

    case: dict[str, Any]
    before: float
    again: float
    candidates: tuple[tuple[Parameters, float], ...]
    ceiling: float

    def noise(self) -> float:
        return abs(self.again / self.before - 1)

    def present(self) -> float:
        return math.sqrt(self.before * self.again)

    def seconds(self, parameters: Parameters) -> float | None:
        """None where it was not measured."""
        return next((s for p, s in self.candidates if p == parameters), None)


@dataclass(frozen=True)
class Decision:
    """What becomes of a line. after: None where it stays. gain: of all sizes together."""

    after: Parameters | None
    gain: float
    margin: float


def decide(measured: Sequence[Measured]) -> Decision:
    """The parameters that are fastest over all of a line's sizes, if they are faster for certain.

    The geometric mean of the gains has to exceed the margin, and no size may lose more than it.
    """
    margin = max([LEAST_GAIN, *(NOISE_FACTOR * m.noise() for m in measured)])
    best: tuple[float, Parameters] | None = None
    for parameters, _ in measured[0].candidates if measured else ():
        seconds = [m.seconds(parameters) for m in measured]
        gains = [m.present() / s for m, s in zip(measured, seconds, strict=True) if s]
        if len(gains) < len(measured) or min(gains) < 1 - margin:
            continue
        gain = statistics.geometric_mean(gains)
        if best is None or gain > best[0]:
            best = gain, parameters
    if best is None:
        return Decision(None, 1.0, margin)
    return Decision(best[1] if best[0] > 1 + margin else None, best[0], margin)


def shortlist(
    times: Sequence[tuple[float, Mapping[int, float]]], most: int, far: float = 1.1
) -> list[int]:
    """Numbers of the candidates that are fastest over some sizes, as first measured.

    times: of each size the present line's seconds and each candidate's. Those that take `far` times
    as long as the present line are not worth a second look.
    """
    numbers = [n for n in times[0][1] if all(n in each for _, each in times)] if times else []

    def ratio(number: int) -> float:
        return statistics.geometric_mean([each[number] / before for before, each in times])

    return [n for n in sorted(numbers, key=ratio)[:most] if ratio(n) < far]
