"""Learning rates of parameters, by their names."""

from collections.abc import Callable, Sequence
from itertools import pairwise

from lora_engine.errors import UserError, nearest
from lora_engine.training.config import TrainConfig


def rate_of(config: TrainConfig) -> Callable[[str], float]:
    """What multiplies the learning rate of a parameter, by its name in a PEFT model."""

    def rate(name: str) -> float:
        parts = name.split(".")
        is_b = any(part in ("lora_B", "lora_embedding_B") for part in parts)
        own = config.adapter_learning_rates
        # An adapter's name follows that of the PEFT container that holds its tensors.
        held = (b for a, b in pairwise(parts) if a.startswith("lora_") or a == "modules_to_save")
        adapter = next((own[part] for part in held if part in own), 1.0)
        return (config.loraplus_lr_ratio if is_b else 1.0) * adapter

    return rate


def check_rates(config: TrainConfig, adapters: Sequence[str]) -> None:
    """Raises UserError if a learning rate is for an adapter that is not among the trained ones."""
    for name in config.adapter_learning_rates:
        if name not in adapters:
            close = nearest(name, adapters)
            there_is = f"there is {', '.join(adapters)}" if adapters else "no adapter is trained"
            raise UserError(
                f"adapter_learning_rates: no adapter {name!r}; "
                + (f"did you mean {close}?" if close else there_is)
            )
