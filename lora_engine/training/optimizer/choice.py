"""The optimiser of a configuration."""

from lora_engine.training.config import TrainConfig
from lora_engine.training.optimizer.adafactor import FlatAdafactor
from lora_engine.training.optimizer.adamw import FlatAdamW
from lora_engine.training.optimizer.flat import FlatParameters
from lora_engine.training.optimizer.lion import FlatLion
from lora_engine.training.optimizer.optimizer import FlatOptimizer


def flat_optimizer(flat: FlatParameters, config: TrainConfig) -> FlatOptimizer:
    """Of `config.optimizer`, over these parameters."""
    match config.optimizer:
        case "adamw" | "adamw_8bit":
            return FlatAdamW(flat, config)
        case "lion":
            return FlatLion(flat, config)
        case "adafactor":
            return FlatAdafactor(flat, config)
