"""What a trainer is given, checked, and its data as tokens."""

import logging
from dataclasses import replace

import torch

from lora_engine.data.account import account, lines
from lora_engine.data.dataset import TokenizedDataset, prepare
from lora_engine.data.pairs import check_roles
from lora_engine.data.prompts import PromptDataset, prepare_prompts
from lora_engine.data.records import Source
from lora_engine.data.template import Tokenizer
from lora_engine.data.vocabulary import check_vocabulary
from lora_engine.errors import UserError
from lora_engine.models.attach.head import transformers_model
from lora_engine.models.peft.routing import active_adapters
from lora_engine.objectives.base import Objective
from lora_engine.objectives.close_to_base import CloseToBase
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


def probe_data(
    source: "Source | TokenizedDataset",
    model: torch.nn.Module,
    tokenizer: Tokenizer | None,
    config: TrainConfig,
    objective: Objective,
) -> TokenizedDataset:
    """The probe's examples, of several adapters for each of them."""
    if objective.reads.values == "examples":
        raise UserError(f"probe: objective {objective.name} predicts no tokens; leave it out")
    dataset = tokenized_data(source, tokenizer, config, "probe")
    check_roles(dataset.examples, "plain", "sft", dataset.name)
    check_vocabulary(dataset, transformers_model(model), tokenizer)
    if len(names := active_adapters(model)) < 2:
        return dataset
    each = [replace(example, adapter=name) for example in dataset for name in names]
    return replace(dataset, examples=each)


def check_probe(
    config: TrainConfig, probe: TokenizedDataset | None, heldout: TokenizedDataset | None
) -> None:
    """Raises UserError where a probe is asked for that would not be measured."""
    if probe is not None and heldout is None:
        raise UserError("probe: is measured with the held-out data; give eval_data too")
    if probe is None and config.stop_on_forgetting is not None:
        raise UserError("train.stop_on_forgetting: there is no probe to tell it by; give one")


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
