"""The optimiser of a configuration."""

from lora_engine.training.config import TrainConfig
from lora_engine.training.optimizer.adafactor import FlatAdafactor
from lora_engine.training.optimizer.adamw import FlatAdamW
from lora_engine.training.optimizer.flat import FlatParameters
from lora_engine.training.optimizer.lion import FlatLion
from lora_engine.training.optimizer.optimizer import FlatOptimizer

_CLASSES: dict[str, type[FlatOptimizer]] = {
    "adamw": FlatAdamW,
    "adamw_8bit": FlatAdamW,
    "lion": FlatLion,
    "adafactor": FlatAdafactor,
}


def flat_optimizer(flat: FlatParameters, config: TrainConfig) -> FlatOptimizer:
    """Of `config.optimizer`, over these parameters."""
    return _CLASSES[config.optimizer](flat, config)
