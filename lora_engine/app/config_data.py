"""The `data` section of a run's configuration: what to learn from, and how it is read."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from lora_engine.data.formats.columns import Layout
from lora_engine.data.formats.recognise import FIELDS, FormatName
from lora_engine.errors import UserError
from lora_engine.files import user_path


def _with_home(source: str) -> str:
    """A path or a hub id, ~ as the home folder."""
    path = user_path(source)
    return str(path) if source.startswith("~") else source


Source = Annotated[str, AfterValidator(_with_home)]


class Section(BaseModel):
    """A part of a configuration: it takes no other keys, and does not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class OneSource(Section):
    """A source of records, and how they are read.

    A format, columns or template of its own stands for all three of `data`.
    """

    path: Source = Field(description="A source as `data.train` takes it.")
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
    def _layout_is_one(self) -> "OneSource":
        _check_layout(self.layout() or Layout())
        return self


class DataSource(OneSource):
    """One of several sources of training examples."""

    weight: Annotated[float, Field(gt=0, le=10**6)] | None = Field(
        default=None, description="Its share of an epoch's examples, over the sum of the weights."
    )


class Replay(OneSource):
    """Records of what the model is not to forget, mixed into the training examples."""

    fraction: float = Field(
        gt=0,
        lt=1,
        description="Their share of an epoch's examples. All of the others stay; of these as many "
        "are drawn, or repeated, by `data.seed`.",
    )

    def source(self) -> DataSource:
        """Where the records are."""
        return DataSource.model_validate(self.model_dump(exclude={"fraction"}))


def _check_layout(layout: Layout) -> None:
    try:
        layout.check(FIELDS)
    except UserError as error:
        raise ValueError(str(error)) from error


class DataConfig(Section):
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
    replay: Replay | None = Field(
        default=None, description="Records of another kind to train on besides, against forgetting."
    )
    eval: Source | None = Field(
        default=None, description="Held-out examples, a source like `train`."
    )
    eval_split: str | None = Field(default=None, description="Split of a hub dataset to hold out.")
    eval_fraction: float = Field(
        default=0.05,
        gt=0,
        lt=1,
        description="Share of `train` to hold out when no `eval` is given: records, so whole "
        "documents; of a single document that makes several examples the last of these.",
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
        "holds out is measured by its part in the first buffer, or in as many, four at most, as "
        "hold out `eval_limit` records (64 where that is null).",
    )
    stream_buffer: int = Field(
        default=2048,
        ge=16,
        le=10**7,
        description="Records, of at most some 8 MB of the file, that are shuffled and packed "
        "among themselves, of a stream.",
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
    cache_gb: float = Field(
        default=20.0,
        gt=0,
        le=10**6,
        description="Most that this folder holds, in GB of 10⁹ bytes; what was read least "
        "recently goes first.",
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
