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

What a message, a prompt or a completion says is text: where it spells a control token, it is
encoded as plain text (see `control`). A `text` is the whole that the model sees, so control tokens
in it keep their meaning. A text, a completion or an assistant's message that ends in an end token
gets no second one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from lora_engine.data.control import MARKER, ControlTokens
from lora_engine.data.encode import Encoder, Segment
from lora_engine.data.records import Record
from lora_engine.data.strings import field_name
from lora_engine.data.template import Message, Tokenizer, render, try_render
from lora_engine.errors import UserError

LossOn = Literal["assistant", "all"]
# The keys of a message that are not told of when a template leaves them out.
_COMMON_KEYS = frozenset(("role", "content", "weight"))


@dataclass(frozen=True)
class Example:
    """One tokenized record.

    input_ids: token ids, length n.
    supervised: length n; True where the token is a target of the loss. The first token of an
        example has no predecessor, so it never counts.
    origin: where the record stands.
    truncated: whether tokens were cut off its end.
    adapter: name of the adapter that learns from it ("": none named).
    notes: what was done with its text that its author may not expect.
    ignored: keys of its messages, "messages.KEY", that the chat template does not read.
    role: what it is to an objective: "chosen" or "rejected" of a pair, "desirable" or
        "undesirable", "mismatched"; "" where it is learned from as it is.
    others: what has to be in the same batch: the rejected answer to a chosen one, an answer to
        another prompt for one that is judged.
    columns: numbers for the objective by name, one for the example or one for each target.
    """

    input_ids: list[int]
    supervised: list[bool]
    origin: str = ""
    truncated: bool = False
    adapter: str = ""
    notes: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    role: str = ""
    others: tuple["Example", ...] = ()
    columns: Mapping[str, float | Sequence[float]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def sequences(self) -> tuple["Example", ...]:
        """The example and its `others`."""
        return (self, *self.others)

    @property
    def num_tokens(self) -> int:
        """Tokens of all its sequences."""
        return sum(len(sequence) for sequence in self.sequences)

    @property
    def num_targets(self) -> int:
        """Number of tokens the loss is taken over."""
        return sum(self.supervised[1:])


@dataclass(frozen=True)
class Text:
    """A record's text in segments, and what `Example` tells of it."""

    segments: list[Segment]
    notes: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


def tokenize(
    record: Record,
    tokenizer: Tokenizer,
    *,
    max_length: int | None = None,
    loss_on: LossOn = "assistant",
    encoder: Encoder | None = None,
    asked: int = 0,
) -> Example:
    """Token ids and mask of `record`, cut to its first `max_length` tokens (None: whole).

    loss_on: "assistant" learns from assistant messages and completions, "all" from every token.
    asked: how many messages of a chat are the prompt, from which nothing is learned.
    encoder: the tokenizer's, made once for many records.
    Raises UserError if the record cannot be rendered, or not masked exactly.
    """
    encoder = encoder or Encoder(tokenizer)
    if record.kind == "tokens":
        text, ids, supervised = Text([]), list(record.tokens), list(record.supervised)
    elif record.kind == "messages":
        text = _chat(record.messages, tokenizer, encoder.control, loss_on, record.origin, asked)
        ids, supervised = encoder.encode_segments(text.segments, origin=record.origin)
    else:
        text, ids, supervised = _encode_plain(record, encoder, loss_on)
    end = len(ids) if max_length is None else max_length
    return Example(
        ids[:end],
        supervised[:end],
        record.origin,
        len(ids) > end,
        record.adapter,
        text.notes,
        text.ignored,
    )


def _chat(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    control: ControlTokens,
    loss_on: LossOn,
    origin: str,
    asked: int = 0,
) -> Text:
    """The chat, rendered by the tokenizer's template and cut at the assistant's turns."""
    messages, marked, notes = _prepared(messages, control)
    whole = render(messages, tokenizer, origin)
    if marked is not None:
        rendered = render(marked, tokenizer, origin)
        spelled = control.marked_in(rendered)
        if spelled and not _takes_out_control(whole, rendered, control):
            messages, whole = marked, rendered
            notes = (*notes, _spelled_note(spelled))
    return Text(
        _chat_segments(messages, whole, tokenizer, control, loss_on, origin, asked),
        notes,
        _unread_keys(messages, whole, tokenizer),
    )


def _prepared(
    messages: Sequence[Message], control: ControlTokens
) -> tuple[Sequence[Message], Sequence[Message] | None, tuple[str, ...]]:
    """(messages, the same with stand-ins or None if there are none, notes).

    An assistant's end tokens go, if the template writes one. Otherwise they stay control tokens.
    """
    own, marked = list(messages), list(messages)
    all_ends: dict[str, None] = {}
    for i, message in enumerate(messages):
        marked[i] = control.mark_message(message)
        content = message.get("content")
        if message["role"] != "assistant" or not isinstance(content, str):
            continue
        said, ends = control.split_end(content)
        if not ends:
            continue
        kept = "" if control.turn_end else "".join(ends)
        own[i] = {**message, "content": said + kept}
        marked[i] = {**marked[i], "content": control.mark(said) + kept}
        all_ends.update(dict.fromkeys(ends))
    notes = (_ended_note(tuple(all_ends)),) if all_ends else ()
    return own, marked if control.found_in(messages) else None, notes


def _takes_out_control(whole: str, marked: str, control: ControlTokens) -> bool:
    """Whether the template itself keeps what messages say from becoming control tokens.

    whole: the rendering. marked: that of the messages with stand-ins. A template that looks at
    the text writes the two differently; it takes them out if both hold as many control tokens.
    """
    return control.unmark(marked) != whole and len(control.pattern.findall(whole)) == len(
        control.pattern.findall(marked)
    )


def _unread_keys(messages: Sequence[Message], whole: str, tokenizer: Tokenizer) -> tuple[str, ...]:
    """The keys of messages, "messages.KEY", without which the rendering is the same."""
    extra = dict.fromkeys(key for message in messages for key in message if key not in _COMMON_KEYS)
    if not extra:
        return ()

    def is_same_without(keys: Sequence[str]) -> bool:
        fewer = [{k: v for k, v in m.items() if k not in keys} for m in messages]
        return try_render(fewer, tokenizer) == whole

    if is_same_without(list(extra)):
        unread = list(extra)
    else:
        unread = [key for key in extra if is_same_without([key])]
    return tuple(f"messages.{field_name(key)}" for key in unread)


def _spelled_note(tokens: Sequence[str]) -> str:
    return (
        f"{', '.join(map(repr, tokens))} in its text encoded as plain text, not as control tokens"
    )


def _ended_note(tokens: Sequence[str]) -> str:
    return f"already ends in {' '.join(map(repr, tokens))}, gets no second end"


def _chat_segments(
    messages: Sequence[Message],
    whole: str,
    tokenizer: Tokenizer,
    control: ControlTokens,
    loss_on: LossOn,
    origin: str,
    asked: int = 0,
) -> list[Segment]:
    if loss_on == "all":
        return [Segment(whole, True)]
    segments: list[Segment] = []
    position = 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index < asked or message.get("weight") == 0:
            continue
        start, end = _turn_span(messages, index, whole, tokenizer, control, origin)
        if not position <= start <= end:
            raise _inexact(index, origin)
        segments += [Segment(whole[position:start], False), Segment(whole[start:end], True)]
        position = end
    segments.append(Segment(whole[position:], False))
    return [segment for segment in segments if segment.text]


def _encode_plain(
    record: Record, encoder: Encoder, loss_on: LossOn
) -> tuple[Text, list[int], list[bool]]:
    """Plain text between the tokenizer's own beginning (if it writes one) and its end token."""
    tokenizer, control = encoder.tokenizer, encoder.control
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{record.origin}: the tokenizer has no end-of-sequence token, so the model could not "
            "learn where to stop; set tokenizer.eos_token"
        )
    eos, bos = tokenizer.eos_token, tokenizer.bos_token if control.writes_bos else ""
    if record.kind == "completion":
        text, ends = _completion(record, control, eos, bos, loss_on)
    else:
        text, ends = _text(record, control, eos, bos)
    ids, supervised = encoder.encode_segments(text.segments, origin=record.origin)
    first = tokenizer.bos_token_id if control.writes_bos else None
    if first is not None and ids[:1] != [first]:
        ids, supervised = [first, *ids], [loss_on == "all", *supervised]
    learns = any(part.supervised and part.text.strip() for part in text.segments)
    if ids[-1:] != [tokenizer.eos_token_id]:
        ids += tokenizer.convert_tokens_to_ids(ends)
        supervised += [learns] * len(ends)
    return text, ids, supervised


def _completion(
    record: Record, control: ControlTokens, eos: str, bos: str, loss_on: LossOn
) -> tuple[Text, list[str]]:
    """Prompt and completion, and the tokens that end them."""
    assert isinstance(record.prompt, str) and isinstance(record.completion, str)
    prompt = record.prompt.removeprefix(bos)
    completion, ends = control.split_end(record.completion)
    notes = [_ended_note(ends)] if ends else []
    if spelled := control.found_in([prompt, completion]):
        rendered = "; a conversation rendered already belongs in 'messages' or 'text'"
        notes.append(_spelled_note(spelled) + rendered)
    segments = [Segment(prompt, loss_on == "all"), Segment(completion, True)]
    marked = [replace(part, text=control.mark(part.text)) for part in segments if part.text]
    return Text(marked, tuple(notes)), list(ends or [eos])


def _text(record: Record, control: ControlTokens, eos: str, bos: str) -> tuple[Text, list[str]]:
    """A text as it stands, and the token that ends it if it does not say so itself."""
    body, ends = control.split_end(record.text)
    notes = [_ended_note(ends)] if ends else []
    if spelled := control.found_in(body.removeprefix(bos)):
        notes.append(f"{', '.join(map(repr, spelled))} in its text kept as control tokens")
    segments = [Segment(record.text, True)] if record.text else []
    return Text(segments, tuple(notes)), [] if ends else [eos]


def _turn_span(
    messages: Sequence[Message],
    index: int,
    whole: str,
    tokenizer: Tokenizer,
    control: ControlTokens,
    origin: str,
) -> tuple[int, int]:
    """Characters [start, end) of `whole` that the assistant writes in message `index`."""
    around = _around_text(messages, index, whole, tokenizer)
    prompt = try_render(messages[:index], tokenizer, generation_prompt=True)
    if prompt is not None and whole.startswith(prompt):
        start = len(prompt)
    elif around:
        start = around[0]
    else:
        raise _inexact(index, origin)
    if around:
        return start, around[1] + _end_of_turn(whole[around[1] :], tokenizer, control)
    turn = try_render(messages[: index + 1], tokenizer)
    if turn is None or not whole.startswith(turn):
        raise _inexact(index, origin)
    # The whole turn, without the white space that templates write after its end token.
    end = len(turn.rstrip())
    ends_in_token = turn[:end].endswith(control.special)
    return start, end if ends_in_token else len(turn)


def _around_text(
    messages: Sequence[Message], index: int, whole: str, tokenizer: Tokenizer
) -> tuple[int, int] | None:
    """Where the text of message `index` begins and ends in `whole`, if the marker shows it.

    A message with tool calls is more than its text, so the text's end says nothing there.
    """
    if messages[index].get("tool_calls"):
        return None
    marked = [*messages[:index], {**messages[index], "content": MARKER}, *messages[index + 1 :]]
    rendered = try_render(marked, tokenizer)
    if rendered is None or rendered.count(MARKER) != 1:
        return None
    before, after = rendered.split(MARKER)
    end = len(whole) - len(after)
    if not whole.endswith(after) or not whole.startswith(before) or end < len(before):
        return None
    return len(before), end


def _end_of_turn(after: str, tokenizer: Tokenizer, control: ControlTokens) -> int:
    """Length of the end-of-turn token at the start of `after`, the text behind an answer.

    It is the special token that directly follows; the tokenizer's end-of-sequence token also
    counts behind white space. Templates without such a token give 0, or the white space they
    end a turn with.
    """
    for token in control.special:
        if after.startswith(token):
            return len(token)
    blank = len(after) - len(after.lstrip())
    if tokenizer.eos_token and after[blank:].startswith(tokenizer.eos_token):
        return blank + len(tokenizer.eos_token)
    return blank


def _inexact(index: int, origin: str) -> UserError:
    return UserError(
        f"{origin}: the chat template rewrites message {index + 1} so that its tokens cannot be "
        "told from the rest; learn from all tokens (loss_on: all), or use records with 'prompt' "
        "and 'completion'"
    )
