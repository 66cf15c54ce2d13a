"""What is learned of a chat, known from an earlier one of the same shape and checked by rendering.

Finding what is learned (see `turns`) takes many renderings. Chats of one shape, the same roles in
the same order, differ in what they say alone. If every rendering that decided where the turns of
the earlier one begin and end is written for this one with the texts exchanged, and otherwise alike,
so are the places. That is known of a template that only writes texts (see `text_flow`); by any
other the renderings are made, and where one differs the turns are found anew.
"""

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

from lora_engine.data.control import ControlTokens
from lora_engine.data.inputs import TemplateInputs
from lora_engine.data.marks import END_OF_REASONING
from lora_engine.data.segments import Segment, Text
from lora_engine.data.template import Message, Tokenizer
from lora_engine.data.writing import Writing

_HEAD, _TAIL = "31622776601683793319", "98851043"
_MARK = re.compile(f"{_HEAD}([0-9]{{6}}){_TAIL}")
_SHAPES = 2000  # of which plans are kept
_FAILURES = 5  # of a plan, after which it is not tried any more
_READ = frozenset(("role", "content", "weight"))


class Look(NamedTuple):
    """A rendering that was looked at: of messages, by the tokenizer's template or another."""

    messages: Sequence[Message]
    generation_prompt: bool = False
    chat_template: str | None = None


class _Rendering(NamedTuple):
    """A look at the first `length` messages and `behind`, as it is with any texts.

    pieces: what is written between texts. texts: the message of each text, one fewer.
    """

    length: int
    behind: Sequence[Message]
    generation_prompt: bool
    chat_template: str | None
    pieces: Sequence[str]
    texts: Sequence[int]

    def of(self, said: Sequence[str]) -> str:
        """It with these texts of messages."""
        made = [self.pieces[0]]
        for message, piece in zip(self.texts, self.pieces[1:], strict=True):
            made += (said[message], piece)
        return "".join(made)


@dataclass
class _Plan:
    """whole: the rendering that is cut. cuts: of segments, as (piece, characters of it).

    added: a segment behind the whole. renderings: those that have to be made again.
    """

    whole: _Rendering
    renderings: Sequence[_Rendering]
    cuts: Sequence[tuple[int, int]]
    segments: Sequence[Segment]
    added: Sequence[Segment]
    found: Text
    failures: int = 0


class Plans:
    """Plans of one tokenizer with its template and what that is given."""

    def __init__(
        self, tokenizer: Tokenizer, control: ControlTokens, inputs: TemplateInputs
    ) -> None:
        self._tokenizer, self._control, self._inputs = tokenizer, control, inputs
        self._plans: dict[Hashable, _Plan | None] = {}  # None: a chat of the shape was seen
        self._only_writes: dict[str | None, bool] = {}  # by template; None: the tokenizer's

    @cached_property
    def _writing(self) -> Writing:
        return Writing(self._tokenizer, self._inputs)

    def shape(self, messages: Sequence[Message], *rest: Hashable) -> Hashable | None:
        """What chats have in common that differ in what they say; None: there is no plan for it.

        rest: what else decides what is learned.
        """
        shapes: list[Hashable] = []
        for message in messages:
            content = message.get("content")
            if not isinstance(content, str) or not _READ.issuperset(message):
                return None
            if END_OF_REASONING.search(content) or self._control.found_in(content):
                return None
            text = content.strip()
            edges = content.partition(text) if text else (content, "", "")
            shapes.append((message["role"], edges[0], bool(text), edges[2]))
        return (*shapes, *rest)

    def text(self, shape: Hashable, messages: Sequence[Message]) -> Text | None:
        """What the plan for the shape makes of the messages; None if there is none, or it fails."""
        plan = self._plans.get(shape)
        if plan is None or plan.failures > _FAILURES:
            return None
        said = [str(message["content"]).strip() for message in messages]
        if not all(self._is_as(rendering, messages, said) for rendering in plan.renderings):
            plan.failures += 1
            return None
        whole = plan.whole
        starts = [0]
        for message, piece in zip(whole.texts, whole.pieces, strict=False):
            starts.append(starts[-1] + len(piece) + len(said[message]))
        text, begin = whole.of(said), 0
        segments = []
        for segment, (number, offset) in zip(plan.segments, plan.cuts, strict=True):
            end = starts[number] + offset
            segments.append(
                Segment(
                    text=text[begin:end],
                    supervised=segment.supervised,
                    weight=segment.weight,
                    target=segment.target,
                )
            )
            begin = end
        return replace(plan.found, segments=[*segments, *plan.added])

    def learn(
        self, shape: Hashable, messages: Sequence[Message], looks: Sequence[Look], found: Text
    ) -> None:
        """Makes a plan of what was found by looking, of the second chat of a shape."""
        if shape not in self._plans:
            if len(self._plans) >= _SHAPES:
                self._plans.clear()
            self._plans[shape] = None
        elif self._plans[shape] is None:
            self._plans[shape] = self._plan(messages, looks, found)

    def _plan(
        self, messages: Sequence[Message], looks: Sequence[Look], found: Text
    ) -> "_Plan | None":
        said = [str(message["content"]).strip() for message in messages]
        whole = Look(messages)
        renderings = []
        for look in (whole, *looks):
            rendering = self._rendering(look, messages, said)
            if rendering is None:
                return None
            if rendering not in renderings:
                renderings.append(rendering)
        text = renderings[0].of(said)
        ends = list(accumulate(len(segment.text) for segment in found.segments))
        inside = [
            segment for segment, end in zip(found.segments, ends, strict=True) if end <= len(text)
        ]
        cuts = _cuts(renderings[0], said, ends[: len(inside)])
        if cuts is None or "".join(segment.text for segment in inside) != text:
            return None
        unsure = [r for r in renderings if not self._is_known(r.chat_template)]
        added = found.segments[len(inside) :]
        return _Plan(
            whole=renderings[0],
            renderings=unsure,
            cuts=cuts,
            segments=inside,
            added=added,
            found=found,
        )

    def _is_known(self, template: str | None) -> bool:
        if template not in self._only_writes:
            self._only_writes[template] = self._writing.only_writes_texts(template)
        return self._only_writes[template]

    def _rendering(
        self, look: Look, messages: Sequence[Message], said: Sequence[str]
    ) -> _Rendering | None:
        """The look as it is with any texts; None if it is not what it was with these."""
        count = 0
        while (
            count < min(len(look.messages), len(messages))
            and look.messages[count] is messages[count]
        ):
            count += 1
        behind = look.messages[count:]
        marked = [
            {**message, "content": _marked(str(message["content"]), text, number)}
            for number, (message, text) in enumerate(zip(messages[:count], said, strict=False))
        ]
        pieces = _MARK.split(
            self._render([*marked, *behind], look.generation_prompt, look.chat_template)
        )
        made = _Rendering(
            length=count,
            behind=behind,
            generation_prompt=look.generation_prompt,
            chat_template=look.chat_template,
            pieces=pieces[::2],
            texts=[int(number) for number in pieces[1::2]],
        )
        return made if self._is_as(made, messages, said) else None

    def _is_as(
        self, rendering: _Rendering, messages: Sequence[Message], said: Sequence[str]
    ) -> bool:
        """Whether the rendering of the messages is as planned."""
        of = [*messages[: rendering.length], *rendering.behind]
        rendered = self._render(of, rendering.generation_prompt, rendering.chat_template)
        return rendered == rendering.of(said)

    def _render(self, messages: Sequence[Message], prompt: bool, template: str | None) -> str:
        try:
            return self._writing.render(messages, prompt, template)
        except Exception:  # whatever a template can raise; what is found anew says it
            return ""


def _marked(content: str, text: str, number: int) -> str:
    """The content with a mark in place of its text."""
    return content.replace(text, f"{_HEAD}{number:06}{_TAIL}", 1) if text else content


def _cuts(
    whole: _Rendering, said: Sequence[str], ends: Sequence[int]
) -> list[tuple[int, int]] | None:
    """Places in the whole as (piece, characters of it); None if one is within a text."""
    cuts: list[tuple[int, int]] = []
    start = piece = 0
    for end in ends:
        while start + len(whole.pieces[piece]) < end:
            start += len(whole.pieces[piece]) + len(said[whole.texts[piece]])
            piece += 1
        if end < start:
            return None
        cuts.append((piece, end - start))
    return cuts
