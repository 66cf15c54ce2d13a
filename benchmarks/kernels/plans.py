"""What to measure, in order of importance, where time may run out."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.common.registry import POINTWISE

# Each case's sizes, the most telling first. Cases that are not named here have DEFAULT_SIZES.
CASE_SIZES = {
    "rms_norm": tuple(POINTWISE),
    "layer_norm": tuple(POINTWISE),
    "glu": tuple(POINTWISE),
    "geglu": tuple(POINTWISE),
    "geglu_erf": tuple(POINTWISE),
    "rope": tuple(POINTWISE),
    "linear_cross_entropy": ("hopper", "smollm2"),
    "cross_entropy": ("hopper", "llama-8b"),
}
DEFAULT_SIZES = ("hopper", "llama-8b", "smollm2")


@dataclass(frozen=True)
class Item:
    """A case at a size. compile: torch.compile takes part, which costs seconds for each."""

    case: str
    size: str
    dtype: str
    compile: bool = False

    def fields(self) -> dict[str, Any]:
        return asdict(self)


def gpu_plan(cases: Iterable[str]) -> list[Item]:
    """Every case at its first size before any at its second; CASE_SIZES' order; then float32."""
    known = set(cases)
    ordered = [name for name in CASE_SIZES if name in known]
    ordered += sorted(known - set(ordered))
    sizes = {name: CASE_SIZES.get(name, DEFAULT_SIZES) for name in ordered}
    rounds = range(max(map(len, sizes.values()), default=0))
    items = [
        Item(name, sizes[name][i], "bfloat16", compile=i == 0)
        for i in rounds
        for name in ordered
        if i < len(sizes[name])
    ]
    return items + [Item(name, sizes[name][0], "float32") for name in ordered]


def dry_plan(cases: Iterable[str]) -> list[Item]:
    """The same path where there is no GPU: sizes that take no time."""
    return [Item(name, "tiny", "float32") for name in cases]


def plan_for(device: torch.device, cases: Iterable[str]) -> list[Item]:
    """`gpu_plan` on a GPU, `dry_plan` elsewhere."""
    return gpu_plan(cases) if device.type == "cuda" else dry_plan(list(cases))
