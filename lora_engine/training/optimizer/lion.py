"""Lion over flat parameters: one moment, and steps of the sign alone."""

from collections.abc import Mapping

import torch

from lora_engine.training.config import TrainConfig
from lora_engine.training.optimizer.flat import FlatParameters
from lora_engine.training.optimizer.optimizer import FlatOptimizer


class FlatLion(FlatOptimizer):
    """Lion (Chen and others 2023, arXiv:2302.06675).

    exp_avg [P] float32: the moment m, laid out as `flat.data`. With gradient g:

        w ← w (1 − lr · weight_decay) − lr · sign(β1 m + (1 − β1) g)
        m ← β2 m + (1 − β2) g
    """

    def __init__(self, flat: FlatParameters, config: TrainConfig) -> None:
        super().__init__(flat, config)
        self.exp_avg = self._zeros(flat.data.numel())
        self._keep(self.exp_avg)

    def stored(self) -> Mapping[str, Mapping[str, torch.Tensor]]:
        """One tensor per parameter."""
        return {"exp_avg": {entry.name: entry.view(self.exp_avg) for entry in self.flat.entries}}

    def buffers(self) -> list[torch.Tensor]:
        return [self.exp_avg]

    def _update(
        self,
        part: slice,
        params: torch.Tensor,  # [n] float32
        grads: torch.Tensor,  # [n] float32
        learning_rate: float,
        norm: torch.Tensor | None,  # []
    ) -> None:
        config, clipping = self.config, self._clipping(norm)
        for own, (moment,) in self._pieces(part):
            of_w, of_g = params[own], grads[own]
            for start in range(0, moment.numel(), self.chunk):
                piece = slice(start, start + self.chunk)
                g, m, w = of_g[piece] * clipping, moment[piece], of_w[piece]
                direction = torch.lerp(m, g, 1 - config.beta1).sign_()
                m.lerp_(g, 1 - config.beta2)
                w.mul_(1 - learning_rate * config.weight_decay)
                w.add_(direction, alpha=-learning_rate)
