"""Held-out prompts, measured by the reward of what the model writes for them."""

import math
from collections.abc import Callable

from lora_engine.data.prompts import PromptDataset
from lora_engine.errors import UserError
from lora_engine.evaluation.heldout import HeldoutResult
from lora_engine.training.online.rollouts import Answer, Rollouts, reward_metrics


def heldout_reward(
    rollouts: Rollouts, prompts: PromptDataset, seed: int, check: Callable[[], None]
) -> tuple[HeldoutResult, list[Answer]]:
    """Rewards of completions of all `prompts`, the same random numbers at every call.

    The loss is minus the mean reward. Raises UserError where no reward says anything.
    """
    settings = rollouts.settings
    answers = rollouts.write(
        prompts,
        range(len(prompts)),
        seed=f"{seed}:heldout",
        count=settings.eval_generations,
        temperature=settings.eval_temperature,
        check=check,
    )
    metrics = reward_metrics(answers)
    if "reward" not in metrics or not math.isfinite(metrics["reward"]):
        raise UserError(
            f"{prompts.name}: no reward says anything of the completions; check the rewards"
        )
    written = sum(len(answer.token_ids) for answer in answers)
    read = sum(len(prompts[answer.prompt]) for answer in answers)
    return HeldoutResult(
        loss=0.0 - metrics["reward"],
        accuracy=None,
        tokens=read + written,
        targets=written,
        metrics=metrics,
    ), answers
