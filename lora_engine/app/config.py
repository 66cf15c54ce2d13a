"""The configuration of one fine-tuning run: what a YAML file may say, checked before any work.

`load_config` turns a file (or the name of a shipped config) and `key=value` overrides into a
`RunConfig`. Every mistake becomes one `UserError` line: where, which key, what is expected, and
the nearest valid name. `docs/configuration.md` is generated from these models.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    Field,
    ValidationError,
    model_validator,
)

from lora_engine.app.config_data import DataConfig, Section, Source
from lora_engine.app.config_model import ModelConfig
from lora_engine.app.config_yaml import parse_mapping, parse_value, read_config
from lora_engine.app.objectives import objective_of
from lora_engine.app.rewards import check_named
from lora_engine.config_schema import (
    FieldPath,
    describe_problems,
    find_switch_for_number,
)
from lora_engine.data.probe import SHIPPED
from lora_engine.errors import UserError, nearest
from lora_engine.models.peft.adapters import LoraConfig
from lora_engine.objectives.base import Objective
from lora_engine.objectives.close_to_base import CloseToBase
from lora_engine.objectives.online import as_online
from lora_engine.training.config import TrainConfig
from lora_engine.training.online.config import RolloutConfig


class SamplesConfig(Section):
    """What the model writes for a few held-out prompts, before and after."""

    count: int = Field(
        default=5, ge=0, le=10**4, description="Number of held-out prompts; 0 writes none."
    )
    max_new_tokens: int = Field(default=64, ge=1, le=10**5, description="Longest answer in tokens.")


class EvaluationConfig(Section):
    """What is measured besides the held-out examples."""

    probe: Source | None = Field(
        default=SHIPPED,
        description="Texts and chats that are not trained on, whose loss before, during and after "
        "training tells what is forgotten: a source like `data.train`, or `shipped`: general texts "
        "and questions that come with the package; `null` measures none.",
    )


class RunConfig(Section):
    """One fine-tuning run: `lora-engine train CONFIG.yaml`."""

    model: ModelConfig = Field(description="The language model to fine-tune.")
    data: DataConfig = Field(description="The examples to learn from and to measure by.")
    lora: LoraConfig | None = Field(
        default=LoraConfig(), description="The adapter; `null` trains all weights instead."
    )
    objective: str | dict[str, Any] = Field(
        default="sft",
        description="What is minimised: `sft`, `domain`, `dpo`, `orpo`, `simpo`, `cpo`, `kto`, "
        "`reward` or `distill`, or with `rewards` `grpo` or `ppo`; or a section of its `name` and "
        "settings (docs/objectives.md).",
    )
    rewards: list[str | dict[str, Any]] | None = Field(
        default=None,
        description="What judges the completions that the model writes for the prompts of `data`: "
        "`module:function`, a reward model's run, `exact_match`, `regex`, `format`, `length` or "
        "`json_valid`; or of each a section of it as `reward`, its `weight`, `name`, `timeout` and "
        "settings (docs/objectives.md).",
    )
    rollout: RolloutConfig = Field(
        default_factory=lambda: RolloutConfig.model_validate({}),
        description="How completions are written and used, with `rewards`.",
    )
    train: TrainConfig = Field(
        default_factory=lambda: TrainConfig.model_validate({}), description="The training loop."
    )
    evaluation: EvaluationConfig = Field(
        default=EvaluationConfig(), description="What is measured besides the held-out examples."
    )
    samples: SamplesConfig = Field(
        default=SamplesConfig(), description="What the model writes before and after."
    )
    accelerate: bool | Literal["strict"] = Field(
        default=True,
        description="Use the engine's kernels; `strict` stops if a layer is not covered, "
        "`false` runs plain PyTorch.",
    )

    def chosen_objective(self) -> Objective:
        """The objective, by its name where it has a teacher."""
        return objective_of(self.objective)

    @property
    def writes(self) -> bool:
        """Whether the model writes completions to learn from."""
        return as_online(self.chosen_objective()) is not None

    @model_validator(mode="after")
    def _objective_is_one(self) -> "RunConfig":
        objective = self.chosen_objective()
        if not objective.reads.predicts_tokens and self.lora is None:
            raise ValueError(
                f"lora: objective {objective.name} trains an adapter and a head; give lora"
            )
        return self

    @model_validator(mode="after")
    def _rewards_are_of_an_online_objective(self) -> "RunConfig":
        name = self.chosen_objective().name
        if not self.writes:
            if self.rewards is not None:
                raise ValueError(
                    f"rewards: objective {name} does not learn from rewards; set objective: grpo "
                    "or ppo, or leave rewards out"
                )
            if "rollout" in self.model_fields_set and self.rollout != RolloutConfig.model_validate(
                {}
            ):
                raise ValueError(f"rollout: objective {name} writes no completions; leave it out")
            return self
        if self.rewards is None:
            raise ValueError(
                f"objective: {name} learns from rewards, and there are none; give some"
            )
        try:
            check_named(self.rewards)
        except UserError as error:
            raise ValueError(str(error)) from error
        if self.data.stream or any(source.weight for source in self.data.sources()):
            raise ValueError(f"data.train: objective {name} takes neither streams nor weights")
        if self.data.replay is not None:
            raise ValueError(
                f"data.replay: objective {name} learns from what the model writes; leave it out"
            )
        if self.lora is None:
            raise ValueError(f"lora: objective {name} trains an adapter here; give lora")
        if self.lora.adapters is not None:
            raise ValueError(f"lora.adapters: objective {name} trains one adapter; leave it out")
        return self

    @model_validator(mode="after")
    def _an_adapter_is_gone_on_with(self) -> "RunConfig":
        if self.model.adapter is None:
            return self
        if self.lora is None:
            raise ValueError("lora: null trains all weights; model.adapter is trained, leave it")
        objective = self.chosen_objective()
        if not objective.reads.predicts_tokens:
            raise ValueError(
                f"model.adapter: objective {objective.name} begins with an adapter and head of its "
                "own; merge the adapter into the model first"
            )
        return self

    @model_validator(mode="after")
    def _forgetting_can_be_told(self) -> "RunConfig":
        if self.train.kl_to_base is not None:
            if self.lora is None:
                raise ValueError(
                    "train.kl_to_base: compares with the model without its adapter; give lora"
                )
            try:
                CloseToBase(self.chosen_objective(), self.train.kl_to_base)
            except UserError as error:
                raise ValueError(str(error)) from error
        if self.train.stop_on_forgetting is not None and self.evaluation.probe is None:
            raise ValueError("train.stop_on_forgetting: is told by evaluation.probe; give one")
        return self

    @model_validator(mode="after")
    def _a_stream_has_an_end(self) -> "RunConfig":
        if self.data.stream and self.train.max_steps is None:
            raise ValueError("train.max_steps: is required with data.stream, which has no end")
        return self

    @model_validator(mode="after")
    def _one_max_length(self) -> "RunConfig":
        if self.train.max_length is not None:
            raise ValueError("train.max_length: give data.max_length instead")
        return self

    @model_validator(mode="after")
    def _packed_weights_have_adapters(self) -> "RunConfig":
        if self.lora is None and self.model.shard:
            raise ValueError(
                "model.shard: weights in shards are frozen; give lora, or leave it out"
            )
        if self.lora is None and self.model.offload_folder is not None:
            raise ValueError(
                "model.offload_folder: weights on disk are frozen; give lora, or leave it out"
            )
        if self.lora is None and self.model.offload_host:
            raise ValueError(
                "model.offload_host: weights on the host are frozen; give lora, or leave it out"
            )
        if self.lora is None and (self.model.quantize is not None or self.model.keep_quantized):
            raise ValueError("lora: weights in packed bits are frozen; give lora, or leave them")
        return self

    def why_not_merge_aware(self) -> str | None:
        """Why the adapter cannot be merge-aware; None if it can, or is not to be."""
        if self.lora is None or not self.lora.merge_aware:
            return None
        model = self.model
        if model.quantize is None:
            return "lora.merge_aware: give the format that is served as model.quantize, nf4 say"
        if model.shard or model.offload_host or model.offload_folder is not None:
            return (
                "lora.merge_aware: weights are merged where they are computed with; leave "
                "model.shard, model.offload_host and model.offload_folder out"
            )
        if not self.chosen_objective().reads.predicts_tokens:
            return "lora.merge_aware: a model with a scalar head is not merged; leave it out"
        if self.rollout.engine == "vllm":
            return (
                "lora.merge_aware: vLLM would write with the adapter beside the base; set "
                "rollout.engine: lora_engine"
            )
        return None

    @model_validator(mode="after")
    def _merged_weights_are_packed(self) -> "RunConfig":
        if (problem := self.why_not_merge_aware()) is not None:
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _what_is_trained_is_one(self) -> "RunConfig":
        if self.lora is not None and self.train.trainable is not None:
            raise ValueError(
                "train.trainable: is for training without an adapter; set lora: null, or name "
                "modules in lora.modules_to_save"
            )
        return self

    @model_validator(mode="after")
    def _adapters_fit_the_rest(self) -> "RunConfig":
        adapters = (self.lora.adapters if self.lora else None) or {}
        if len(adapters) > 1 and not self.accelerate:
            raise ValueError("lora.adapters: several need the engine's kernels: accelerate: true")
        names = list(self.lora.of_adapters()) if self.lora else []
        for name in self.train.adapter_learning_rates:
            if name not in names:
                there_is = f"there is {', '.join(names)}" if names else "without lora there is none"
                close = nearest(name, names)
                raise ValueError(
                    f"train.adapter_learning_rates: no adapter {name!r}; "
                    + (f"did you mean {close}?" if close else there_is)
                )
            if name in adapters and adapters[name].learning_rate is not None:
                raise ValueError(
                    f"lora.adapters.{name}: give either learning_rate or "
                    f"train.adapter_learning_rates.{name}, not both"
                )
        return self

    def train_with_rates(self) -> TrainConfig:
        """`train`, with the adapters' own learning rates as multiples of its own."""
        adapters = (self.lora.adapters if self.lora else None) or {}
        rates = {
            name: adapter.learning_rate / self.train.learning_rate
            for name, adapter in adapters.items()
            if adapter.learning_rate is not None
        }
        both = {**self.train.adapter_learning_rates, **rates}
        return self.train.model_copy(update={"adapter_learning_rates": both})


def load_config(source: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The checked configuration in `source`, with `overrides` on top.

    source: a YAML file, or the name of a shipped config ("demo").
    overrides: "key=value" with a dotted key; the value is read as YAML ("train.max_steps=20").
    Raises UserError, one line, for whatever is wrong with either.
    """
    name, text = read_config(source)
    values, lines = parse_mapping(name, text)
    overridden = [_override(values, override) for override in overrides]
    if problem := find_switch_for_number(RunConfig, values):
        path, message = problem
        raise UserError(f"{_where(name, lines, overridden, path)}: {message}")
    try:
        return RunConfig.model_validate(values, context={"source": name})
    except ValidationError as error:
        path, message, more = describe_problems(RunConfig, error.errors())
        if not path:  # about several sections: the line begins with the key that is to change
            path = tuple(message.partition(": ")[0].split("."))
        suffix = f" ({more} more after this one)" if more else ""
        raise UserError(f"{_where(name, lines, overridden, path)}: {message}{suffix}") from error


def dump_config(config: RunConfig) -> str:
    """`config` as YAML with every key spelled out; `load_config` reads it back to the same."""
    return yaml.safe_dump(
        config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100
    )


def _override(values: dict[str, Any], override: str) -> FieldPath:
    """Set one "dotted.key=value" in the nested `values`; returns its path."""
    key, equals, text = override.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or not all(path):
        raise UserError(f"command line: {override!r}: expected key=value, e.g. train.max_steps=20")
    try:
        value = parse_value(text, path)
    except yaml.YAMLError as error:
        shown = text if len(text) <= 60 else f"{text[:57]}…"
        raise UserError(
            f"command line: {key}: {shown!r} is not a valid YAML value; quote it if it is text"
        ) from error
    section = values
    for depth, part in enumerate(path[:-1], start=1):
        inner = section.get(part)
        if inner is None:
            inner = section[part] = {}
        if not isinstance(inner, dict):
            raise UserError(
                f"command line: {key}: {'.'.join(path[:depth])} is a value, it has no keys; "
                f"give {'.'.join(path[:depth])}=VALUE"
            )
        section = inner
    section[path[-1]] = value
    return path


def _where(
    name: str, lines: dict[FieldPath, int], overridden: list[FieldPath], path: FieldPath
) -> str:
    """The file and line, or the command line, that gave the value at `path`."""
    if any(path[: len(given)] == given for given in overridden):
        return "command line"
    for depth in range(len(path), 0, -1):
        if path[:depth] in lines:
            return f"{name}:{lines[path[:depth]]}"
    return name
