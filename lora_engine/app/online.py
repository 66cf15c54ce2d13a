"""The online part of a run from its configuration: rewards, rollouts, prompts to show."""

from collections.abc import Callable
from typing import Any

import torch

from lora_engine.app.config import RunConfig
from lora_engine.app.reward_model import made_rewards
from lora_engine.data import TokenizedDataset
from lora_engine.data.prompts import PromptDataset
from lora_engine.evaluation.samples import Prompt, choose_prompts
from lora_engine.training.online.online import Online


def online_of(
    config: RunConfig, tokenizer: Any, device: torch.device, tell: Callable[[str], None]
) -> Online | None:
    """The rewards and the rollout of an online objective; None for another one.

    tokenizer: of the model that writes.
    """
    if config.rewards is None:
        return None
    tell("loading the rewards")
    return Online(made_rewards(config.rewards, tokenizer, device), config.rollout)


def shown_prompts(dataset: TokenizedDataset, tokenizer: Any, count: int) -> list[Prompt]:
    """Held-out prompts that samples are written for; of prompts alone the first ones.

    Their reference is the record's `answer`, where it has one.
    """
    if not isinstance(dataset, PromptDataset):
        return choose_prompts(dataset, tokenizer, count)
    made = []
    for example, prompt in list(zip(dataset, dataset.prompts, strict=True))[:count]:
        text = tokenizer.decode(list(example.input_ids), skip_special_tokens=True).strip()
        answer = str(prompt.columns.get("answer", ""))
        made.append(
            Prompt(
                input_ids=tuple(example.input_ids),
                origin=example.origin,
                text=text,
                reference=answer,
            )
        )
    return made
