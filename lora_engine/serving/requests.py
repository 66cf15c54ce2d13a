"""A request's JSON, checked: what cannot be done is refused, never left out silently."""

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lora_engine.data.inputs import TemplateInputs, check_variables
from lora_engine.data.records import Record
from lora_engine.data.strings import check_strings
from lora_engine.errors import UserError, nearest
from lora_engine.generation.sampling import Sampling
from lora_engine.serving.errors import ApiError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

# Fields that change nothing of what is written.
_WITHOUT_EFFECT = frozenset(
    (
        *("user", "metadata", "store", "service_tier", "safety_identifier"),
        *("parallel_tool_calls", "prompt_cache_key", "prompt_cache_retention"),
    )
)
# Fields that this server does not know, and the values with which they ask for nothing.
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "suffix": ("",),
    "echo": (False,),
    "best_of": (1,),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}
_DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's own


Prompt: TypeAlias = Record | tuple[int, ...]


@dataclass(frozen=True)
class Limits:
    """body_bytes: of a request. new_tokens: of one answer. answers: prompts times `n` of one
    request. waiting: requests of which nothing is written yet; more are refused. body_seconds: in
    which a request has to have arrived."""

    body_bytes: int = 1 << 20
    new_tokens: int = 4096
    answers: int = 128
    waiting: int = 128
    body_seconds: float = 30.0


@dataclass(frozen=True)
class Asked:
    """A request that was read.

    prompts: records to be tokenised, or token ids. new_tokens: None: as many as there is room
    for; 0: the prompts are only read. logprobs: None: they are not told. echo: answers begin with
    their prompts.
    """

    chat: bool
    model: str
    prompts: tuple[Prompt, ...]
    sampling: Sampling
    new_tokens: int | None
    count: int
    stream: bool
    usage: bool
    logprobs: int | None
    echo: bool

    @property
    def only_read(self) -> bool:
        """Whether nothing is written after the prompts."""
        return self.new_tokens == 0


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class _Text(_Part):
    type: Literal["text"]
    text: str


class _Message(_Part):
    """The fields that must be null are those of an answer that a client hands back."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Text]
    name: str | None = None
    refusal: None = None
    annotations: Annotated[list[str], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[str], Field(max_length=0)] | None = None

    def said(self) -> dict[str, object]:
        """As chat templates take it."""
        parts = self.content
        text = parts if isinstance(parts, str) else "\n".join(part.text for part in parts)
        role = "system" if self.role == "developer" else self.role
        name = {} if self.name is None else {"name": self.name}
        return {"role": role, "content": text, **name}


class _StreamOptions(_Part):
    include_usage: bool = False
    include_obfuscation: bool = False


class _Body(_Part):
    model: str
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=10**6)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None


class _ChatBody(_Body):
    messages: Annotated[list[_Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    chat_template_kwargs: dict[str, object] | None = None


_Id = Annotated[int, Field(ge=0)]


class _CompletionBody(_Body):
    prompt: str | list[str] | list[_Id] | list[list[_Id]]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None


_NAMES = {
    name
    for form in (_ChatBody, _CompletionBody, _Message, _Text, _StreamOptions)
    for name in form.model_fields
}
Body = TypeVar("Body", bound=_Body)


def read_json(body: bytes) -> dict[str, object]:
    """The object that `body` spells. Raises ApiError for anything else."""
    try:
        value = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ApiError(400, "the body is not a JSON object")
    try:
        check_strings(value, "the body")
    except UserError as error:
        raise ApiError(400, str(error)) from error
    return value


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


def read_chat(body: Mapping[str, object], limits: Limits) -> Asked:
    """A request to /v1/chat/completions. Raises ApiError."""
    read = _checked(_ChatBody, body)
    if read.messages[-1].role == "assistant":
        raise ApiError(400, "messages: the last one is the assistant's already", param="messages")
    if read.top_logprobs and not read.logprobs:
        raise ApiError(400, "top_logprobs: needs logprobs: true", param="top_logprobs")
    both = {read.max_tokens, read.max_completion_tokens} - {None}
    if len(both) > 1:
        raise ApiError(400, "max_tokens: max_completion_tokens says another", param="max_tokens")
    variables = read.chat_template_kwargs or {}
    try:
        check_variables(variables, "chat_template_kwargs")
    except UserError as error:
        raise ApiError(400, str(error), param="chat_template_kwargs") from error
    record = Record(
        "messages",
        messages=tuple(message.said() for message in read.messages),
        given=TemplateInputs(variables=variables),
        origin="messages",
    )
    logprobs = (read.top_logprobs or 0) if read.logprobs else None
    return _asked(read, limits, (record,), next(iter(both), None), logprobs, chat=True)


def read_completion(body: Mapping[str, object], limits: Limits) -> Asked:
    """A request to /v1/completions. Raises ApiError."""
    read = _checked(_CompletionBody, body)
    prompts = _prompts(read.prompt)
    if not prompts:
        raise ApiError(400, "prompt: holds none", param="prompt")
    new = _DEFAULT_COMPLETION_TOKENS if read.max_tokens is None else read.max_tokens
    if new == 0 and not read.echo:
        raise ApiError(400, "max_tokens: 0 needs echo: true", param="max_tokens")
    echo = bool(read.echo)
    return _asked(read, limits, prompts, new, read.logprobs, chat=False, echo=echo)


def _prompts(given: str | list[str] | list[int] | list[list[int]]) -> tuple[Prompt, ...]:
    if isinstance(given, str):
        return (Record("prompt", prompt=given, origin="prompt"),)
    tokens = tuple(item for item in given if isinstance(item, int))
    if tokens:
        return (tokens,)
    return tuple(
        Record("prompt", prompt=item, origin="prompt") if isinstance(item, str) else tuple(item)
        for item in given
        if not isinstance(item, int)
    )


def _asked(
    read: _Body,
    limits: Limits,
    prompts: tuple[Prompt, ...],
    new_tokens: int | None,
    logprobs: int | None,
    *,
    chat: bool,
    echo: bool = False,
) -> Asked:
    count = 1 if read.n is None else read.n
    if len(prompts) * count > limits.answers:
        raise ApiError(
            400, f"n: {len(prompts) * count} answers, at most {limits.answers}", param="n"
        )
    if new_tokens is not None and new_tokens > limits.new_tokens:
        raise ApiError(
            400, f"max_tokens: {new_tokens}, at most {limits.new_tokens}", param="max_tokens"
        )
    if read.stream_options is not None and not read.stream:
        raise ApiError(400, "stream_options: needs stream: true", param="stream_options")
    temperature = 1.0 if read.temperature is None else read.temperature
    if 0 < temperature < 1e-3:  # logits divided by it would overflow
        raise ApiError(400, "temperature: expected 0, or at least 0.001", param="temperature")
    stop = (read.stop,) if isinstance(read.stop, str) else tuple(read.stop or ())
    if not all(stop) or any(len(text) > 1000 for text in stop):
        raise ApiError(400, "stop: expected texts of 1 to 1,000 characters", param="stop")
    seed = secrets.randbits(64) if read.seed is None else read.seed % 2**64
    sampling = Sampling(
        temperature=temperature,
        top_p=1.0 if read.top_p is None else read.top_p,
        top_k=max(read.top_k or 0, 0),
        min_p=read.min_p or 0.0,
        repetition_penalty=read.repetition_penalty or 1.0,
        presence_penalty=read.presence_penalty or 0.0,
        frequency_penalty=read.frequency_penalty or 0.0,
        stop=stop,
        seed=seed,
    )
    return Asked(
        chat=chat,
        model=read.model,
        prompts=prompts,
        sampling=replace(sampling, top_logprobs=logprobs or 0),
        new_tokens=new_tokens,
        count=count,
        stream=bool(read.stream),
        usage=read.stream_options is not None and read.stream_options.include_usage,
        logprobs=logprobs,
        echo=echo,
    )


def _checked(form: type[Body], body: Mapping[str, object]) -> Body:
    known = {}
    for name, value in body.items():
        if name in form.model_fields:
            known[name] = value
        elif name in _UNSUPPORTED:
            if value is not None and value not in _UNSUPPORTED[name]:
                raise ApiError(400, f"{name}: is not supported here; leave it out", param=name)
        elif name not in _WITHOUT_EFFECT:
            close = nearest(name, form.model_fields)
            hint = f"; did you mean {close}?" if close else ""
            raise ApiError(400, f"{name}: is unknown{hint}", param=name)
    try:
        return form.model_validate(known)
    except ValidationError as error:
        # Of a union's types, the one that was meant is read furthest.
        place, said = max((_place(one) for one in error.errors()), key=lambda found: len(found[0]))
        param = ".".join(place)
        raise ApiError(400, f"{param}: {said}", param=param) from error


def _place(error: "ErrorDetails") -> tuple[list[str], str]:
    """Where in the request, and what is wrong; pydantic's path has the names of types too."""
    path = error["loc"]
    place = [str(part) for part in path if isinstance(part, int) or part in _NAMES]
    if error["type"] == "extra_forbidden":
        return [*place, str(path[-1])], "is unknown"
    return place, error["msg"]
