"""What makes a run an online one: rewards, and how completions are written and used."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import cast

from torch import nn

from lora_engine.data.prompts import PromptDataset, columns_of
from lora_engine.data.template import Tokenizer
from lora_engine.errors import UserError
from lora_engine.evaluation.heldout import HeldoutResult
from lora_engine.evaluation.samples import TextTokenizer
from lora_engine.models.attach.head import positions_of
from lora_engine.models.peft.routing import active_adapters
from lora_engine.objectives.base import Objective
from lora_engine.objectives.online import OnlineObjective, as_online
from lora_engine.training import random_state
from lora_engine.training.config import TrainConfig
from lora_engine.training.online.config import RolloutConfig
from lora_engine.training.online.heldout import heldout_reward
from lora_engine.training.online.named import Named, rewards_of
from lora_engine.training.online.rollouts import Engine, OwnEngine, Rollouts, check_lengths
from lora_engine.training.online.source import OnlineSource
from lora_engine.training.online.trial import TrialOfPrompts
from lora_engine.training.online.vllm import VllmEngine
from lora_engine.training.run.folder import RunFolder


@dataclass(frozen=True)
class Online:
    """Of a Trainer: it learns from completions that its model writes for prompts.

    rewards: functions, "module:function", names of the package's own, or mappings of these with
        their settings (`named.rewards_of`).
    rollout: how completions are written and used.
    """

    rewards: Sequence[Named]
    rollout: RolloutConfig = field(default_factory=lambda: RolloutConfig.model_validate({}))


class OnlineRun:
    """The parts of an online run: objective, rollouts, and the source of its micro-batches."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        train: PromptDataset,
        heldout: PromptDataset | None,
        online: Online,
        objective: Objective,
        config: TrainConfig,
        folder: RunFolder,
    ) -> None:
        """Raises UserError for rewards and settings that do not fit."""
        self.objective = _online_objective(objective, online.rollout, config)
        self._heldout, self._online, self._config = heldout, online, config
        if len(active_adapters(model)) > 1:
            raise UserError(
                f"an online run trains one adapter, and {', '.join(active_adapters(model))} are "
                "active; activate one"
            )
        rewards = rewards_of(online.rewards)
        for prompts in (train, heldout):
            if prompts is not None:
                check_lengths(prompts, online.rollout, positions_of(model))
                for reward in rewards:
                    named = f"the model of the reward {reward.name}"
                    check_lengths(prompts, online.rollout, reward.positions, named)
        writes = cast(TextTokenizer, tokenizer)  # what decodes is a tokenizer of transformers
        engine: Engine = OwnEngine(model, writes)
        if online.rollout.engine == "vllm":
            engine = VllmEngine(model, writes, online.rollout)
        columns = columns_of(train, heldout)
        self._rollouts = Rollouts(model, writes, rewards, online.rollout, engine, columns)
        folder.reserve_completions()
        self.source = OnlineSource(
            train,
            self._rollouts,
            self.objective,
            config.tokens_per_batch,
            folder.completions,
            seed=config.seed,
        )

    def identity(self) -> dict[str, object]:
        """What decides the run's weights beside a TrainConfig, as JSON values."""
        rewards = []
        for reward in self._rollouts.rewards:
            own = "".join(f", {key} {value}" for key, value in sorted(reward.settings.items()))
            rewards.append(f"{reward.name} × {reward.weight:g}{own}")
        rollout = self._online.rollout.trajectory()
        return {"rewards": rewards, **{f"rollout.{key}": value for key, value in rollout.items()}}

    def tried(self) -> Objective:
        """The objective of the trial before the run."""
        return TrialOfPrompts(values=self.objective.reads.values_targets)

    def measure(self, check: Callable[[], None]) -> Callable[[int], HeldoutResult]:
        """Of the held-out prompts, by their rewards, with the weights of a step."""
        heldout = self._heldout
        assert heldout is not None

        def rewards(step: int) -> HeldoutResult:
            with random_state.restored_on_error():
                result, answers = heldout_reward(self._rollouts, heldout, self._config.seed, check)
            self.source.log(step, heldout, answers)
            return result

        return rewards


def _online_objective(
    objective: Objective, rollout: RolloutConfig, config: TrainConfig
) -> OnlineObjective:
    """The objective, at the rollout's temperature and length.

    Raises UserError for one that does not learn from rewards, or has settings that do not fit.
    """
    online = as_online(objective)
    if online is None:
        raise UserError(
            f"objective {objective.name} does not learn from rewards; give GRPO or PPO, or leave "
            "the rewards out"
        )
    if config.gradient_accumulation_steps != 1:
        raise UserError(
            "gradient_accumulation_steps has no effect on an online run, whose steps are of whole "
            "minibatches; leave it out and set rollout.minibatches"
        )
    if not online.measures and rollout.generations < 2:
        raise UserError(
            f"objective {objective.name} compares completions of a prompt; set "
            "rollout.generations to 2 or more"
        )
    decided = {"temperature": rollout.temperature, "max_completion_length": rollout.max_new_tokens}
    known = {own.name for own in fields(online)}
    return replace(online, **{key: x for key, x in decided.items() if key in known})
