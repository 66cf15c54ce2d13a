"""A tiny model that learns from what it writes, and a reward that it can raise."""

import json
import os
import signal

import torch

import lora_engine
from lora_engine import TrainConfig, Trainer
from lora_engine.objectives.grpo import GRPO
from lora_engine.testing import byte_tokenizer, tiny_llama, with_lora
from lora_engine.training.online.config import RolloutConfig
from lora_engine.training.online.online import Online

TOKENIZER = byte_tokenizer()
PROMPTS = [{"prompt": f"number {i} is", "answer": str(i)} for i in range(10)]
ROUND = {"prompts": 4, "generations": 4, "max_new_tokens": 6}


def vowels(completions):
    return [sum(letter in "aeiou" for letter in text) / 6 for text in completions]


def killed_in_a_rollout(folder, call):
    """A run whose process is killed at that call of its reward."""
    calls = []

    def killing(completions):
        calls.append(len(completions))
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return vowels(completions)

    killing.__name__ = vowels.__name__
    rollout = {"passes": 2}
    online_trainer(folder, rewards=[killing], rollout=rollout, save_every=1, held_out=None).fit()


def writer(accelerate=True, value_head=False, **lora):
    """Its distribution is far enough from uniform for some tokens to be likelier than others."""
    model = tiny_llama(vocab_size=len(TOKENIZER))
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    model = with_lora(model, **lora)
    if value_head:
        torch.manual_seed(1)
        head = torch.nn.Linear(32, 1)
        model.get_base_model().value_head = head
    if accelerate:
        lora_engine.accelerate(model)
    return model


def online_trainer(
    folder,
    *,
    model=None,
    objective=None,
    rewards=(vowels,),
    callbacks=(),
    rollout=None,
    held_out=PROMPTS[8:],
    train=PROMPTS[:8],
    **config,
):
    settings = {"max_steps": 4, "learning_rate": 5e-3, "preflight": False, **config}
    return Trainer(
        writer() if model is None else model,
        TOKENIZER,
        train,
        held_out,
        TrainConfig(output_dir=folder, **settings),
        objective=GRPO() if objective is None else objective,
        online=Online(list(rewards), RolloutConfig(**{**ROUND, **(rollout or {})})),
        callbacks=callbacks,
    )


def completions(folder):
    return [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
