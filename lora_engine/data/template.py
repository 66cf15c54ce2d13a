"""Runs the tokenizer's chat template: a program out of a file, which may fail, or never end."""

import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Protocol, TypeAlias, TypedDict

from lora_engine.data.inputs import NO_INPUTS, TemplateInputs
from lora_engine.data.strings import surrogate_in
from lora_engine.errors import UserError

Message: TypeAlias = Mapping[str, object]

SECONDS = 20.0  # of the processor, for one rendering
LONGEST = 10_000_000  # characters of a rendering, unless the conversation is itself that long
_REASON = 200  # characters shown of what a template says


class AddedToken(Protocol):
    """A token that was added to a tokenizer's own; `str` gives its text."""

    special: bool
    lstrip: bool
    rstrip: bool
    single_word: bool
    normalized: bool


class Encoding(TypedDict):
    """What a tokenizer makes of a text."""

    input_ids: list[int]


class Tokenizer(Protocol):
    """What is used of a tokenizer of transformers, which is not imported here: it is slow."""

    chat_template: object
    bos_token: str
    bos_token_id: int | None
    eos_token: str
    eos_token_id: int | None
    unk_token_id: int | None
    all_special_tokens: Sequence[str]
    added_tokens_decoder: Mapping[int, AddedToken]
    special_tokens_map: Mapping[str, object]

    def __len__(self) -> int: ...
    def get_vocab(self) -> Mapping[str, int]: ...
    def save_pretrained(self, folder: Path) -> object: ...
    def __call__(
        self,
        text: str,
        *,
        add_special_tokens: bool = True,
        verbose: bool = True,
        split_special_tokens: bool = False,
    ) -> Encoding: ...
    def apply_chat_template(
        self,
        conversation: list[Message],
        *,
        tokenize: bool,
        add_generation_prompt: bool,
        **variables: object,
    ) -> object: ...
    def get_chat_template(
        self, chat_template: str | None = None, tools: list[object] | None = None
    ) -> str: ...
    def convert_tokens_to_ids(self, tokens: list[str]) -> list[int]: ...
    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]: ...
    def decode(self, ids: Sequence[int], *, clean_up_tokenization_spaces: bool = False) -> str: ...


class Undecided(UserError):
    """A record that the template cannot write, or whose learned tokens cannot be told apart."""


class _OutOfTime(Exception):
    """The template ran for longer than it may."""


def render(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    origin: str,
    *,
    generation_prompt: bool = False,
    inputs: TemplateInputs = NO_INPUTS,
    chat_template: str | None = None,
) -> str:
    """The conversation as the tokenizer's template writes it.

    generation_prompt: with the beginning of the assistant's next message.
    chat_template: in place of the tokenizer's.
    Raises UserError "origin: why" if the template is missing, fails in any way, takes more than
    SECONDS (in the main thread) or writes what no tokenizer takes; an Undecided where that may be
    this conversation's fault.
    """
    from jinja2.exceptions import TemplateError, TemplateSyntaxError

    if tokenizer.chat_template is None:
        raise UserError(
            f"{origin}: the tokenizer has no chat template for 'messages'; use a model that was "
            "trained to chat, or records with 'prompt' and 'completion', or 'text'"
        )
    given: dict[str, object] = dict(inputs.variables)
    if chat_template is not None:
        given["chat_template"] = chat_template
    if inputs.tools:
        given["tools"] = list(inputs.tools)
    if inputs.documents:
        given["documents"] = list(inputs.documents)
    try:
        with time_limit(SECONDS):
            text = tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=generation_prompt, **given
            )
    except TemplateSyntaxError as error:
        raise UserError(
            f"{origin}: the chat template is not valid Jinja: {_reason(error)} (its line "
            f"{error.lineno})"
        ) from error
    except TemplateError as error:
        raise Undecided(
            f"{origin}: the chat template refuses this conversation: {_reason(error)}"
        ) from error
    except Exception as error:  # whatever a program can raise
        raise Undecided(
            f"{origin}: the chat template fails on this conversation: {_reason(error)}"
        ) from error
    return _checked(text, messages, origin)


def try_render(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    *,
    generation_prompt: bool = False,
    inputs: TemplateInputs = NO_INPUTS,
) -> str | None:
    """The rendering of a changed conversation, or None where the template refuses it."""
    if not messages:
        return None
    try:
        return render(messages, tokenizer, "", generation_prompt=generation_prompt, inputs=inputs)
    except UserError:
        return None


def _checked(text: object, messages: Sequence[Message], origin: str) -> str:
    if not isinstance(text, str):
        raise UserError(f"{origin}: the chat template gives a {type(text).__name__}, not text")
    if len(text) > LONGEST and len(text) > 100 * len(str(messages)):
        raise UserError(
            f"{origin}: the chat template writes {len(text):,} characters for this conversation"
        )
    if half := surrogate_in(text):
        raise UserError(f"{origin}: the chat template writes half a character ({half})")
    return text


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())[:_REASON]
    from jinja2.exceptions import TemplateError

    if isinstance(error, TemplateError) and text:
        return text
    if isinstance(error, _OutOfTime):
        return f"it does not end within {SECONDS:.0f} seconds"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises _OutOfTime in the main thread once it has computed for `seconds`.

    The timer runs on the time of all the process' threads, so the handler looks at the thread's
    own and waits on if it is not the one that took it.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(
        signal, "setitimer"
    ):
        yield
        return
    end = time.thread_time() + seconds

    def ring(signum: int, frame: FrameType | None) -> None:
        if time.thread_time() >= end:
            raise _OutOfTime
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)

    earlier = signal.signal(signal.SIGVTALRM, ring)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, earlier)
