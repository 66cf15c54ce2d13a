"""From a record to token ids and a mask of the tokens to learn from, with exact boundaries.

A record becomes segments of text, each supervised or not, and the segments become tokens such
that no token lies in two segments. For a chat, the supervised segment of an assistant message is
what the model has to write itself: from the end of the generation prompt up to and including the
token that ends the turn. Both ends are found by rendering, never by searching for the answer's
text, which could occur elsewhere in the conversation:

- start: the conversation before the message, rendered with the generation prompt, is a prefix of
  the whole rendering;
- end: the conversation rendered with the message's text replaced by a marker shares, from the
  marker on, its ending with the whole rendering. What directly follows is the end-of-turn token.

This also holds for templates that insert a default system prompt, strip or reformat the text, or
write earlier turns unlike the last one. Where neither gives an exact place, a UserError says so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Literal, TypeAlias

from lora_engine.data.records import Record
from lora_engine.errors import UserError

LossOn = Literal["assistant", "all"]
Message: TypeAlias = Mapping[str, Any]
# A tokenizer of transformers (PreTrainedTokenizerBase), which is not imported here: it is slow.
Tokenizer: TypeAlias = Any

# Stands for a message's text while looking for its place: no template changes or splits it.
_MARKER = "\ue000\ue001text\ue001\ue000"


@dataclass(frozen=True)
class Segment:
    """A piece of text, and whether the model learns to write it."""

    text: str
    supervised: bool


@dataclass(frozen=True)
class Example:
    """One tokenized record.

    input_ids: token ids, length n.
    supervised: length n; True where the token is a target of the loss. The first token of an
        example has no predecessor, so it never counts.
    origin: where the record stands.
    truncated: whether tokens were cut off its end.
    adapter: name of the adapter that learns from it ("": none named).
    """

    input_ids: list[int]
    supervised: list[bool]
    origin: str = ""
    truncated: bool = False
    adapter: str = ""

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_targets(self) -> int:
        """Number of tokens the loss is taken over."""
        return sum(self.supervised[1:])


def tokenize(
    record: Record,
    tokenizer: Tokenizer,
    *,
    max_length: int | None = None,
    loss_on: LossOn = "assistant",
) -> Example:
    """Token ids and mask of `record`, cut to its first `max_length` tokens (None: whole).

    loss_on: "assistant" learns from assistant messages and completions, "all" from every token.
    Raises UserError if the record cannot be rendered, or not masked exactly.
    """
    if record.kind == "messages":
        segments = chat_segments(record.messages, tokenizer, loss_on=loss_on, origin=record.origin)
        ids, supervised = encode_segments(segments, tokenizer, origin=record.origin)
    else:
        ids, supervised = _encode_plain(record, tokenizer, loss_on)
    end = len(ids) if max_length is None else max_length
    cut = len(ids) > end
    return Example(ids[:end], supervised[:end], record.origin, cut, record.adapter)


def chat_segments(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    *,
    loss_on: LossOn = "assistant",
    origin: str = "",
) -> list[Segment]:
    """The chat, rendered by the tokenizer's template and cut at the assistant's turns."""
    whole = _render(messages, tokenizer, origin)
    if loss_on == "all":
        return [Segment(whole, True)]
    segments: list[Segment] = []
    position = 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start, end = _turn_span(messages, index, whole, tokenizer, origin)
        if not position <= start <= end:
            raise _inexact(index, origin)
        segments += [Segment(whole[position:start], False), Segment(whole[start:end], True)]
        position = end
    segments.append(Segment(whole[position:], False))
    return [segment for segment in segments if segment.text]


def encode_segments(
    segments: Sequence[Segment], tokenizer: Tokenizer, *, origin: str = ""
) -> tuple[list[int], list[bool]]:
    """Token ids [n] and supervised [n]; no token lies in two segments.

    Each segment is encoded by itself, which is how generation encodes a prompt, if that spells
    the same text as encoding the whole. It does not for tokenizers that put a space before
    whatever they encode; there the whole is encoded, and cut where a token ends at the boundary.
    """
    parts = [_encode(segment.text, tokenizer) for segment in segments]
    if len(segments) > 1:
        whole = _encode("".join(segment.text for segment in segments), tokenizer)
        joined = [token for part in parts for token in part]
        if joined != whole and _spell(joined, tokenizer) != _spell(whole, tokenizer):
            parts = _cut(whole, segments, tokenizer, origin)
    ids = [token for part in parts for token in part]
    supervised = [
        segment.supervised for segment, part in zip(segments, parts, strict=True) for _ in part
    ]
    return ids, supervised


def _cut(
    whole: list[int], segments: Sequence[Segment], tokenizer: Tokenizer, origin: str
) -> list[list[int]]:
    """Cut the tokens of the whole text at the segments' boundaries.

    The token boundary is where the tokens so far spell what the text so far encodes to.
    """
    spellings = tokenizer.convert_ids_to_tokens(whole)
    token_ends = {end: i for i, end in enumerate(accumulate(map(len, spellings)), start=1)}
    spelled = "".join(spellings)
    text, cuts = "", [0]
    for segment in segments[:-1]:
        text += segment.text
        head = _spell(_encode(text, tokenizer), tokenizer)
        cut = token_ends.get(len(head))
        if cut is None or not spelled.startswith(head):
            raise UserError(
                f"{origin}: the tokenizer merges the end of {text[-20:]!r} with what follows, so "
                "the answer does not begin at a token; move a space at the end of the prompt to "
                "the start of the answer"
            )
        cuts.append(cut)
    cuts.append(len(whole))
    return [whole[start:end] for start, end in pairwise(cuts)]


def _encode_plain(
    record: Record, tokenizer: Tokenizer, loss_on: LossOn
) -> tuple[list[int], list[bool]]:
    """Plain text between the tokenizer's own beginning (if it writes one) and its end token."""
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{record.origin}: the tokenizer has no end-of-sequence token, so the model could not "
            "learn where to stop; set tokenizer.eos_token"
        )
    if record.kind == "completion":
        segments = [
            Segment(record.prompt, loss_on == "all"),
            Segment(record.completion, True),
        ]
    else:
        segments = [Segment(record.text, True)]
    segments = [segment for segment in segments if segment.text]
    ids, supervised = encode_segments(segments, tokenizer, origin=record.origin)
    if tokenizer("", verbose=False)["input_ids"][:1] == [tokenizer.bos_token_id] != ids[:1]:
        ids, supervised = [tokenizer.bos_token_id, *ids], [loss_on == "all", *supervised]
    if ids[-1:] != [tokenizer.eos_token_id]:
        ids, supervised = [*ids, tokenizer.eos_token_id], [*supervised, True]
    return ids, supervised


def _turn_span(
    messages: Sequence[Message], index: int, whole: str, tokenizer: Tokenizer, origin: str
) -> tuple[int, int]:
    """Characters [start, end) of `whole` that the assistant writes in message `index`."""
    around = _around_text(messages, index, whole, tokenizer)
    prompt = _try_render(messages[:index], tokenizer, generation_prompt=True)
    if prompt is not None and whole.startswith(prompt):
        start = len(prompt)
    elif around:
        start = around[0]
    else:
        raise _inexact(index, origin)
    if around:
        return start, around[1] + _end_of_turn(whole[around[1] :], tokenizer)
    turn = _try_render(messages[: index + 1], tokenizer)
    if turn is None or not whole.startswith(turn):
        raise _inexact(index, origin)
    # The whole turn, without the white space that templates write after its end token.
    end = len(turn.rstrip())
    ends_in_token = any(turn[:end].endswith(token) for token in _special_tokens(tokenizer))
    return start, end if ends_in_token else len(turn)


def _around_text(
    messages: Sequence[Message], index: int, whole: str, tokenizer: Tokenizer
) -> tuple[int, int] | None:
    """Where the text of message `index` begins and ends in `whole`, if the marker shows it.

    A message with tool calls is more than its text, so the text's end says nothing there.
    """
    if messages[index].get("tool_calls"):
        return None
    marked = [*messages[:index], {**messages[index], "content": _MARKER}, *messages[index + 1 :]]
    rendered = _try_render(marked, tokenizer)
    if rendered is None or rendered.count(_MARKER) != 1:
        return None
    before, after = rendered.split(_MARKER)
    end = len(whole) - len(after)
    if not whole.endswith(after) or not whole.startswith(before) or end < len(before):
        return None
    return len(before), end


def _end_of_turn(after: str, tokenizer: Tokenizer) -> int:
    """Length of the end-of-turn token at the start of `after`, the text behind an answer.

    It is the special token that directly follows; the tokenizer's end-of-sequence token also
    counts behind white space. Templates without such a token give 0, or the white space they
    end a turn with.
    """
    for token in _special_tokens(tokenizer):
        if after.startswith(token):
            return len(token)
    blank = len(after) - len(after.lstrip())
    if tokenizer.eos_token and after[blank:].startswith(tokenizer.eos_token):
        return blank + len(tokenizer.eos_token)
    return blank


def _special_tokens(tokenizer: Tokenizer) -> list[str]:
    """Special tokens, longest first, so that one that begins another does not hide it."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted({*tokenizer.all_special_tokens, *added}, key=len, reverse=True)


def _render(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    origin: str,
    *,
    generation_prompt: bool = False,
) -> str:
    from jinja2.exceptions import TemplateError

    if tokenizer.chat_template is None:
        raise UserError(
            f"{origin}: the tokenizer has no chat template for 'messages'; use a model that was "
            "trained to chat, or records with 'prompt' and 'completion', or 'text'"
        )
    try:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=generation_prompt
        )
    except TemplateError as error:
        raise UserError(
            f"{origin}: the chat template refuses this conversation: {error}"
        ) from error


def _try_render(
    messages: Sequence[Message], tokenizer: Tokenizer, *, generation_prompt: bool = False
) -> str | None:
    """The rendering of a changed conversation, or None where the template refuses it."""
    if not messages:
        return None
    try:
        return _render(messages, tokenizer, "", generation_prompt=generation_prompt)
    except UserError:
        return None


def _inexact(index: int, origin: str) -> UserError:
    return UserError(
        f"{origin}: the chat template rewrites message {index + 1} so that its tokens cannot be "
        "told from the rest; learn from all tokens (loss_on: all), or use records with 'prompt' "
        "and 'completion'"
    )


def _encode(text: str, tokenizer: Tokenizer) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _spell(ids: list[int], tokenizer: Tokenizer) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(ids))
