"""A chat as the tokenizer's template writes it, in segments that are learned or not."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from lora_engine.data.control import ControlTokens
from lora_engine.data.encode import Encoder
from lora_engine.data.forms import Written, write, write_as_is
from lora_engine.data.generation_blocks import (
    Block,
    find_blocks,
    template_with_blocks,
    with_marks,
)
from lora_engine.data.inputs import TemplateInputs
from lora_engine.data.plans import Look
from lora_engine.data.segments import Segment, Text
from lora_engine.data.strings import field_name
from lora_engine.data.template import Message, Undecided, render, try_render
from lora_engine.data.turns import Turns
from lora_engine.data.weights import message_weights

LossOn = Literal["assistant", "last_assistant", "completion", "all"]
# The keys of a message that are not told of when a template leaves them out.
_COMMON_KEYS = frozenset(("role", "content", "weight"))


@dataclass(frozen=True)
class Learning:
    """What is learned of a chat behind its first `asked` messages: see `render.tokenize`."""

    loss_on: LossOn = "assistant"
    reasoning: bool = True
    tool_calls: bool = True
    asked: int = 0

    def messages(self, messages: Sequence[Message], weights: Sequence[float]) -> list[int]:
        """The assistant's messages that are learned, by number; a weight of 0 leaves one out."""
        roles = [message["role"] for message in messages]
        answers = [i for i in range(self.asked, len(roles)) if roles[i] == "assistant"]
        if self.loss_on == "last_assistant":
            answers = answers[-1:]
        elif self.loss_on == "completion":
            asked = max((i for i, role in enumerate(roles) if role == "user"), default=-1)
            answers = [i for i in answers if i > asked]
        return [i for i in answers if not weights or weights[i]]


class Span(NamedTuple):
    """Characters [start, end) of a rendering that are learned, and the message they are of.

    target: see `Segment`.
    """

    start: int
    end: int
    message: int
    target: str = ""


@dataclass(frozen=True)
class Chat:
    """Makes segments of chats that are given the same `inputs`."""

    encoder: Encoder
    inputs: TemplateInputs
    learning: Learning
    origin: str

    def text(self, messages: Sequence[Message], weights: Sequence[float] = ()) -> Text:
        """The chat, rendered and cut at what is learned. Raises as `render.tokenize`.

        weights: of each message; none: those that the messages have in `weight`, 1 by default.
        """
        weights = weights or message_weights(messages, self.origin)
        plans, shape = self.encoder.plans, None
        if self.inputs is self.encoder.inputs:
            shape = plans.shape(messages, tuple(weights), self.learning)
        if shape is None:
            return self._found(messages, weights, [])
        text = plans.text(shape, messages)
        if text is None:
            looks: list[Look] = []
            text = self._found(messages, weights, looks)
            plans.learn(shape, messages, looks, text)
        return text

    def _found(
        self, messages: Sequence[Message], weights: Sequence[float], looks: list[Look]
    ) -> Text:
        """The same by looking at renderings, which are added to `looks`."""
        learned = self.learning.messages(messages, weights)
        tokenizer, control = self.encoder.tokenizer, self.encoder.control
        messages, ends = _without_ends(messages, control)
        notes = [ended_note(ends)] if ends else []
        written, inputs = write(messages, tokenizer, self.inputs, self.origin), self.inputs
        unread = tuple(self._unread(written))
        if control.found_in([list(messages), inputs.tools, inputs.documents]):
            written, inputs, spelled = self._with_stand_ins(written)
            notes += [spelled_note(spelled)] if spelled else []
        self._check_inputs(written, inputs)
        if self.learning.loss_on == "all":
            return Text([Segment(written.whole, True)], tuple(notes), unread)
        self._check_said(written)
        spans, more, added = self._spans(written, inputs, learned, looks)
        segments = _cut(written.whole, spans, weights)
        if added:
            segments.append(Segment(added, True, weights[learned[-1]] if weights else 1.0))
        return Text(segments, tuple(dict.fromkeys((*notes, *more))), unread)

    def _with_stand_ins(self, written: Written) -> tuple[Written, TemplateInputs, tuple[str, ...]]:
        """(the chat with stand-ins for control tokens that it spells, what goes with it, those).

        As it was, and none, where the template keeps them from becoming control tokens itself.
        """
        control, tokenizer = self.encoder.control, self.encoder.tokenizer
        inputs = TemplateInputs(
            control.mark_values(self.inputs.tools),
            control.mark_values(self.inputs.documents),
            self.inputs.variables,
        )
        marked = [_with_ends_kept(message, control) for message in written.messages]
        rendered = render(marked, tokenizer, self.origin, inputs=inputs)
        spelled = control.marked_in(rendered)
        if not spelled or _takes_out_control(written.whole, rendered, control):
            return written, self.inputs, ()
        return write_as_is(marked, tokenizer, inputs, self.origin), inputs, spelled

    def _check_said(self, written: Written) -> None:
        """Raises Undecided where the template leaves out what the model is to answer to."""
        for leaf in written.unwritten():
            if leaf.part == "text" and written.messages[leaf.message]["role"] != "assistant":
                raise Undecided(
                    f"{self.origin}: the chat template does not write what message "
                    f"{leaf.message + 1} says; take the message out, or give another "
                    "data.chat_template"
                )

    def _check_inputs(self, written: Written, inputs: TemplateInputs) -> None:
        """Raises Undecided where the template leaves out tools or documents."""
        for name, fewer in _without_each(inputs):
            if try_render(written.messages, self.encoder.tokenizer, inputs=fewer) == written.whole:
                raise Undecided(
                    f"{self.origin}: the chat template does not write the record's {name}; take "
                    "them out, or give a data.chat_template that does"
                )

    def _spans(
        self,
        written: Written,
        inputs: TemplateInputs,
        learned: Sequence[int],
        looks: list[Look],
    ) -> tuple[list[Span], tuple[str, ...], str]:
        """(what is learned, notes, text to learn that is added at the end)."""
        encoder, tokenizer = self.encoder, self.encoder.tokenizer
        turns = Turns(
            written=written,
            tokenizer=tokenizer,
            inputs=inputs,
            ends=encoder.ends,
            origin=self.origin,
            needs_reasoning=self.learning.reasoning,
            looks=looks,
        )
        template = template_with_blocks(tokenizer, inputs)
        if template is None:
            found = turns.find(learned)
            spans = []
            for index, turn in zip(learned, found, strict=True):
                of_turn = self._parts(turn.start, turn.end, turn.reasoning_end, turn.calls)
                spans += [Span(start=start, end=end, message=index) for start, end in of_turn]
                if turn.instead is not None and self._learns_end(turn.calls, turn.end):
                    spans.append(
                        Span(
                            start=turn.end,
                            end=turn.instead[0],
                            message=index,
                            target=turn.instead[1],
                        )
                    )
            added = "".join(turn.added for turn in found if self._learns_end(turn.calls, turn.end))
            return spans, tuple(note for turn in found for note in turn.notes), added
        blocks = find_blocks(template, written, tokenizer, inputs, self.origin)
        looks.append(Look(written.messages, chat_template=with_marks(template)))
        spans, notes = [], dict[str, None]()
        for index in learned:
            of_message = [block for block in blocks if block.message == index]
            turns.check(index)
            if not of_message:
                raise Undecided(
                    f"{self.origin}: no {{% generation %}} block of the chat template writes "
                    f"message {index + 1}; put one around what an assistant says"
                )
            for block in of_message:
                start = turns.after_prompt(index, block.start, block.end)
                parts = self._parts(start, block.end, *turns.parts(index, start, block.end))
                spans += [Span(start=begin, end=end, message=index) for begin, end in parts]
            if self._lacks_end(of_message[-1], written.whole):
                notes[
                    f"its {{% generation %}} blocks leave out {encoder.ends.closing.strip()!r}, so "
                    "the model does not learn to end a turn"
                ] = None
        return spans, tuple(notes), ""

    def _parts(
        self, start: int, end: int, reasoning_end: int, calls: tuple[int, int]
    ) -> Iterator[tuple[int, int]]:
        """What is learned of [start, end)."""
        if not self.learning.reasoning:
            start = max(start, reasoning_end)
        if self.learning.tool_calls:
            yield start, end
        else:
            yield start, max(start, calls[0])
            yield max(start, calls[1]), end

    def _learns_end(self, calls: tuple[int, int], end: int) -> bool:
        return self.learning.tool_calls or calls[1] < end or calls[0] == calls[1]

    def _lacks_end(self, block: Block, whole: str) -> bool:
        closing = self.encoder.ends.closing.strip()
        return bool(closing) and whole[block.end :].lstrip().startswith(closing)

    def _unread(self, written: Written) -> Iterator[str]:
        """Keys of messages, and variables, without which the rendering is the same."""
        messages, tokenizer = written.messages, self.encoder.tokenizer
        extra = dict.fromkeys(key for m in messages for key in m if key not in _COMMON_KEYS)

        def is_same_without(keys: Sequence[str]) -> bool:
            fewer = [{k: v for k, v in m.items() if k not in keys} for m in messages]
            return try_render(fewer, tokenizer, inputs=self.inputs) == written.whole

        if extra:
            all_unread = is_same_without(list(extra))
            for key in extra:
                if all_unread or is_same_without([key]):
                    yield f"messages.{field_name(key)}"
        for name in self.inputs.variables:
            fewer = {k: v for k, v in self.inputs.variables.items() if k != name}
            inputs = TemplateInputs(self.inputs.tools, self.inputs.documents, fewer)
            if self._is_same_with(inputs, written):
                yield f"chat_template_kwargs.{field_name(name)}"

    def _is_same_with(self, inputs: TemplateInputs, written: Written) -> bool:
        """Whether the template writes the same, with the generation prompt too."""
        messages, tokenizer = written.messages, self.encoder.tokenizer
        return try_render(messages, tokenizer, inputs=inputs) == written.whole and try_render(
            messages, tokenizer, inputs=inputs, generation_prompt=True
        ) == try_render(messages, tokenizer, inputs=self.inputs, generation_prompt=True)


def spelled_note(tokens: Sequence[str]) -> str:
    """What is said of control tokens that a text spells."""
    return (
        f"{', '.join(map(repr, tokens))} in its text encoded as plain text, not as control tokens"
    )


def ended_note(tokens: Sequence[str]) -> str:
    """What is said of a text that ends itself."""
    return f"already ends in {' '.join(map(repr, tokens))}, gets no second end"


def _without_ends(
    messages: Sequence[Message], control: ControlTokens
) -> tuple[list[Message], tuple[str, ...]]:
    """(messages, end tokens that the assistant's ended in), if the template writes one itself."""
    made, all_ends = list(messages), dict[str, None]()
    for i, message in enumerate(messages):
        content = message.get("content")
        if message["role"] == "assistant" and isinstance(content, str):
            said, ends = control.split_end(content)
            if ends:
                made[i] = {**message, "content": said + ("" if control.turn_end else "".join(ends))}
                all_ends.update(dict.fromkeys(ends))
    return made, tuple(all_ends)


def _with_ends_kept(message: Message, control: ControlTokens) -> Message:
    """The message with stand-ins, but for the end tokens that an assistant's ends in."""
    content, marked = message.get("content"), control.mark_message(message)
    if message["role"] == "assistant" and isinstance(content, str):
        said, ends = control.split_end(content)
        if ends:
            return {**marked, "content": control.mark(said) + "".join(ends)}
    return marked


def _takes_out_control(whole: str, marked: str, control: ControlTokens) -> bool:
    """Whether the template itself keeps what messages say from becoming control tokens.

    whole: the rendering. marked: that of the messages with stand-ins. A template that looks at
    the text writes the two differently; it takes them out if both hold as many control tokens.
    """
    return control.unmark(marked) != whole and len(control.pattern.findall(whole)) == len(
        control.pattern.findall(marked)
    )


def _without_each(inputs: TemplateInputs) -> Iterator[tuple[str, TemplateInputs]]:
    """(name of what is left out, the rest)."""
    if inputs.tools:
        yield "tools", TemplateInputs((), inputs.documents, inputs.variables)
    if inputs.documents:
        yield "documents", TemplateInputs(inputs.tools, (), inputs.variables)


def _cut(whole: str, spans: Sequence[Span], weights: Sequence[float]) -> list[Segment]:
    """`whole` in segments, of which those in `spans` are learned; spans that touch are one, if they
    weigh the same. weights: of each message; none: 1."""
    learned: list[tuple[int, int, float, str]] = []
    for start, end, message, target in spans:
        weight = weights[message] if weights else 1.0
        if start >= end:
            continue
        if learned and learned[-1][1:] == (start, weight, target):
            start = learned.pop()[0]
        learned.append((start, end, weight, target))
    segments: list[Segment] = []
    position = 0
    for start, end, weight, target in learned:
        segments.append(Segment(whole[position:start], False))
        segments.append(
            Segment(text=whole[start:end], supervised=True, weight=weight, target=target)
        )
        position = end
    segments.append(Segment(whole[position:], False))
    return [segment for segment in segments if segment.text]
