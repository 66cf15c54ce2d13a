"""What a trainer is given beside its data, checked."""

import torch

from lora_engine.errors import UserError
from lora_engine.models.peft.routing import active_adapters
from lora_engine.objectives.base import Objective
from lora_engine.objectives.close_to_base import CloseToBase
from lora_engine.training.config import TrainConfig


def check_kinds(model: object, tokenizer: object, config: object) -> None:
    """Raises UserError for arguments in another's place."""
    expected = {
        "model": (model, isinstance(model, torch.nn.Module), "a model of transformers or PEFT"),
        "tokenizer": (tokenizer, not isinstance(tokenizer, torch.nn.Module), "its tokenizer"),
        "config": (config, isinstance(config, TrainConfig), "a lora_engine.TrainConfig"),
    }
    for name, (given, right, kind) in expected.items():
        if not right:
            raise UserError(
                f"Trainer: {name} is {type(given).__name__}, expected {kind}; the order is "
                "model, tokenizer, train_data, eval_data, config"
            )


def minimised(objective: Objective, config: TrainConfig, model: torch.nn.Module) -> Objective:
    """What a step minimises: the objective, with the term of config.kl_to_base."""
    if config.kl_to_base is None:
        return objective
    if not active_adapters(model):
        raise UserError(
            "train.kl_to_base: compares with the model without its adapter, and it has none; "
            "train an adapter, or use data.replay"
        )
    return CloseToBase(objective, config.kl_to_base)
