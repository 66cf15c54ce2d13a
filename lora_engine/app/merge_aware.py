"""Merge-aware adapters as a run's configuration, or their own folder, says that they are."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lora_engine.app.config_model import ModelConfig
from lora_engine.export.packed import Packing
from lora_engine.models.load.load import DTYPES
from lora_engine.models.load.trained_over import TrainedOver
from lora_engine.models.peft.merge_aware import make_merge_aware
from lora_engine.models.quantized.quantize import SKIPPED

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class ServedAs:
    """What a merge-aware adapter learned over. dtype: that sums were rounded to before."""

    packing: Packing
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.packing.format}{' with double_quant' if self.packing.double_quant else ''}"

    @property
    def dtype_name(self) -> str:
        """As `load_model` takes it."""
        return str(self.dtype).removeprefix("torch.")

    def apply(self, model: "nn.Module") -> None:
        """Makes the adapter of `model`, a PeftModel over the base's own weights, merge-aware."""
        merge_aware(model, self.packing, self.dtype)


def merge_aware(model: "nn.Module", packing: Packing, dtype: torch.dtype | None = None) -> None:
    """`make_merge_aware` with a packing."""
    skip = SKIPPED if packing.skip is None else packing.skip
    make_merge_aware(
        model, packing.format, double_quant=packing.double_quant, skip=skip, dtype=dtype
    )


def packing_of(model: ModelConfig) -> Packing:
    """The packed bits that a configuration asks for."""
    assert model.quantize is not None, "the configuration was checked"
    return Packing(model.quantize, model.double_quant, model.quantize_skip)


def served_as(over: TrainedOver | None) -> ServedAs | None:
    """By what an adapter's folder says; None for one that is not merge-aware."""
    if over is None or not over.merge_aware or over.quantize is None:
        return None
    packing = Packing(over.quantize, over.double_quant, over.quantize_skip)
    return ServedAs(packing, DTYPES.get(over.dtype, torch.float32))
