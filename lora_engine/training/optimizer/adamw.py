"""AdamW over flat parameters, with moments in float32 or in 8 bits."""

from collections.abc import Mapping
from typing import TypedDict

import torch

from lora_engine import ops
from lora_engine.training.config import TrainConfig
from lora_engine.training.optimizer.flat import FlatParameters
from lora_engine.training.optimizer.flat_state import Flat
from lora_engine.training.optimizer.optimizer import FlatOptimizer

BLOCK = ops.ADAMW_8BIT_BLOCK


class _Step(TypedDict):
    """What `ops.adamw_` takes beside tensors of the flat buffers."""

    step: int
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    grad_norm: torch.Tensor | None
    max_grad_norm: float | None


class FlatAdamW(FlatOptimizer):
    """AdamW (Loshchilov & Hutter 2019), clipping by global norm, one launch for each rate.

    exp_avg, exp_avg_sq [P] float32: the moments, laid out as `flat.data`. With the optimizer
        "adamw_8bit", uint8 codes, of which 256 in a row share a float32 in exp_avg_absmax and
        exp_avg_sq_absmax [ceil(P / 256)], whatever parameters they belong to.
    """

    def __init__(self, flat: FlatParameters, config: TrainConfig) -> None:
        super().__init__(flat, config)
        self.quantized = config.optimizer == "adamw_8bit"
        dtype = torch.uint8 if self.quantized else torch.float32
        self.exp_avg = self._zeros(flat.data.numel(), dtype)
        self.exp_avg_sq = self._zeros(flat.data.numel(), dtype)
        if self.quantized:
            blocks = -(-flat.data.numel() // BLOCK)
            self.exp_avg_absmax = self._zeros(blocks)
            self.exp_avg_sq_absmax = self._zeros(blocks)
            scales = (self.exp_avg_absmax, self.exp_avg_sq_absmax)
            self._keep(self.exp_avg, self.exp_avg_sq, *(Flat(scale, BLOCK) for scale in scales))
        else:
            self._keep(self.exp_avg, self.exp_avg_sq)

    def stored(self) -> Mapping[str, Mapping[str, torch.Tensor]]:
        """One tensor per parameter in float32; in 8 bits, where blocks take no notice of
        parameters, the flat codes and what scales them."""
        if self.quantized:
            return {
                "exp_avg": {"codes": self.exp_avg, "absmax": self.exp_avg_absmax},
                "exp_avg_sq": {"codes": self.exp_avg_sq, "absmax": self.exp_avg_sq_absmax},
            }
        moments = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        return {
            stem: {entry.name: entry.view(values) for entry in self.flat.entries}
            for stem, values in moments.items()
        }

    def buffers(self) -> list[torch.Tensor]:
        moments = [self.exp_avg, self.exp_avg_sq]
        return (
            [*moments, self.exp_avg_absmax, self.exp_avg_sq_absmax] if self.quantized else moments
        )

    def _update(
        self,
        part: slice,
        params: torch.Tensor,  # [n] float32
        grads: torch.Tensor,  # [n] float32
        learning_rate: float,
        norm: torch.Tensor | None,  # []
    ) -> None:
        config = self.config
        step: _Step = {
            "step": self.updates,
            "lr": learning_rate,
            "beta1": config.beta1,
            "beta2": config.beta2,
            "eps": config.eps,
            "weight_decay": config.weight_decay,
            "grad_norm": norm,
            "max_grad_norm": None if norm is None else config.max_grad_norm,
        }
        for own, moments in self._pieces(part):
            if self.quantized:
                ops.adamw_8bit_(params[own], grads[own], *moments, **step)
            else:
                ops.adamw_(params[own], grads[own], *moments, **step)
