"""Learning rate as a function of the step."""

import math
from dataclasses import dataclass
from typing import Literal

from lora_engine.errors import UserError
from lora_engine.training.config import TrainConfig


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up to the peak, then cosine, linear or no decay.

    Steps count from 1 to total_steps. The rate is never 0 on a step unless asked for: warm-up
    reaches the peak on step warmup_steps + 1, and the decay would reach its floor one step after
    the last.
    """

    peak: float
    total_steps: int
    warmup_steps: int = 0
    kind: Literal["cosine", "linear", "constant"] = "cosine"
    min_ratio: float = 0.0

    @classmethod
    def from_config(cls, config: TrainConfig, total_steps: int) -> "Schedule":
        """Raises UserError if the warm-up would take all steps."""
        if config.warmup_ratio is not None:
            warmup = round(config.warmup_ratio * total_steps)
        else:
            warmup = config.warmup_steps or 0
        if warmup and warmup >= total_steps:
            raise UserError(
                f"warm-up of {warmup} steps must be shorter than the run of {total_steps} steps: "
                "lower warmup_steps or warmup_ratio, or train longer"
            )
        return cls(config.learning_rate, total_steps, warmup, config.schedule, config.min_lr_ratio)

    def __call__(self, step: int) -> float:
        """Learning rate of optimiser step `step`, 1-based."""
        if step <= self.warmup_steps:
            return self.peak * step / (self.warmup_steps + 1)
        if self.kind == "constant":
            return self.peak
        progress = (step - 1 - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        progress = min(progress, 1.0)
        if self.kind == "cosine":
            remaining = 0.5 * (1.0 + math.cos(math.pi * progress))
        else:
            remaining = 1.0 - progress
        return self.peak * (self.min_ratio + (1.0 - self.min_ratio) * remaining)
