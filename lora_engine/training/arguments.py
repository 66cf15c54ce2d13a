"""What a trainer is given, checked, and its data as tokens."""

import logging

import torch

from lora_engine.data.account import account, lines
from lora_engine.data.dataset import TokenizedDataset, prepare
from lora_engine.data.prompts import PromptDataset, prepare_prompts
from lora_engine.data.records import Source
from lora_engine.data.template import Tokenizer
from lora_engine.errors import UserError
from lora_engine.training.batches import fingerprint
from lora_engine.training.config import TrainConfig
from lora_engine.training.run.fingerprint import json_sha256

logger = logging.getLogger(__name__)


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


def tokenized_data(
    data: "Source | TokenizedDataset", tokenizer: Tokenizer | None, config: TrainConfig, what: str
) -> TokenizedDataset:
    if isinstance(data, TokenizedDataset):
        if config.max_length is not None:
            raise UserError(f"max_length has no effect on {what}, which is tokenised already")
        dataset = data
    elif tokenizer is None:
        raise UserError(f"{what} is not tokenised yet: give the trainer a tokenizer")
    else:
        dataset = _prepared(data, tokenizer, what, config.max_length)
    if not len(dataset):
        raise UserError(f"{what} has no examples to learn from")
    return dataset


def tokenized_prompts(
    data: "Source | TokenizedDataset", tokenizer: Tokenizer | None, config: TrainConfig, what: str
) -> TokenizedDataset:
    """Prompts alone, of an online run."""
    if isinstance(data, TokenizedDataset) and not isinstance(data, PromptDataset):
        raise UserError(
            f"{what} is tokenised for learning from answers; an online run takes prompts, as "
            "lora_engine.data.prepare_prompts makes them"
        )
    if tokenizer is None:
        raise UserError(f"{what}: an online run writes texts; give the trainer a tokenizer")
    if isinstance(data, PromptDataset):
        return data
    dataset = prepare_prompts(data, tokenizer, max_length=config.max_length)
    if said := lines([{**account(dataset), "name": what}]):
        logger.warning("%s", "\n".join(said))
    return dataset


def fingerprint_of(dataset: TokenizedDataset) -> str:
    """Of the tokens, and of the columns of prompts, which rewards read."""
    own = fingerprint(dataset)
    return own if not isinstance(dataset, PromptDataset) else json_sha256([own, *dataset.keys])


def _prepared(
    data: "Source", tokenizer: Tokenizer, what: str, max_length: int | None
) -> TokenizedDataset:
    """`prepare`, and a warning of what it dropped, cut or did not read; None: its max_length."""
    if max_length is None:
        dataset = prepare(data, tokenizer)
    else:
        dataset = prepare(data, tokenizer, max_length=max_length)
    said = lines([{**account(dataset), "name": what}])
    if said:
        logger.warning("%s", "\n".join(said))
    return dataset
