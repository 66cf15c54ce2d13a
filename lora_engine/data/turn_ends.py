"""What a chat template writes between turns, and how two renderings are compared."""

import re
from collections.abc import Iterator
from functools import cached_property

from lora_engine.data.control import MARKER, ControlTokens
from lora_engine.data.marks import TAG
from lora_engine.data.template import Message, Tokenizer, try_render

ASKED: Message = {"role": "user", "content": "?"}
_ANSWERED: Message = {"role": "assistant", "content": MARKER}


class TurnEnds:
    """What a template writes between turns, found once for a tokenizer with its template."""

    def __init__(self, tokenizer: Tokenizer, control: ControlTokens) -> None:
        self._tokenizer, self._control = tokenizer, control

    @cached_property
    def header(self) -> str:
        """What the generation prompt adds behind a question."""
        prompt = try_render([ASKED], self._tokenizer, generation_prompt=True)
        asked = try_render([ASKED], self._tokenizer)
        return "" if prompt is None or asked is None else self.added_to(asked, prompt)

    @cached_property
    def closing(self) -> str:
        """What stands behind an answer, whatever follows."""
        if self._around_answer is None:
            return ""
        before, last, followed = self._around_answer
        return self.without_opening(self.common(last, followed) or last, before)

    @cached_property
    def next_mark(self) -> str:
        """The control token that a question behind an answer begins with, where nothing ends it."""
        return self.mark_at(self._around_answer[2]) if self._around_answer else ""

    @cached_property
    def are_written(self) -> bool:
        """Whether the template ends a turn by a text of its own, which is not white space.

        True too where it does not write a question and an answer by themselves.
        """
        return bool(self.closing.strip()) or self._around_answer is None

    @cached_property
    def _around_answer(self) -> tuple[str, str, str] | None:
        """What stands before an answer, behind it as the last message, and where one follows.

        None: the template does not write these.
        """
        found = []
        for messages in ([ASKED, _ANSWERED], [ASKED, _ANSWERED, ASKED]):
            rendered = try_render(messages, self._tokenizer)
            known = rendered is not None and rendered.count(MARKER) == 1
            found.append(rendered.split(MARKER) if rendered and known else None)
        if found[0] is None:
            return None
        return found[0][0], found[0][1], (found[1] or found[0])[1]

    def without_opening(self, end: str, whole: str) -> str:
        """`end` up to what begins the rendering `whole`, and so each turn.

        Some templates begin the next turn even where nothing follows.
        """
        bos, length = self._tokenizer.bos_token, 0
        opening = next((p for p in self.pieces(whole) if p.strip() and p != bos), "")
        if len(opening) < 2:
            return end
        for piece in self.pieces(end):
            if piece == opening and end[:length].strip():
                return end[:length]
            length += len(piece)
        return end

    def mark_at(self, text: str) -> str:
        """The control token that `text` begins with, white space before it included, or ""."""
        found = self._mark.match(text)
        return found[0] if found else ""

    def common(self, one: str, other: str) -> str:
        """What both begin with, in whole tags, tokens and words."""
        if other.startswith(one):
            return one
        length = 0
        for a, b in zip(self.pieces(one), self.pieces(other), strict=False):
            if a != b:
                break
            length += len(a)
        return one[:length]

    def added_to(self, text: str, longer: str) -> str:
        """What `longer` goes on with where `text` does not."""
        return longer[len(self.common(text, longer)) :]

    def pieces(self, text: str) -> Iterator[str]:
        """Control tokens, tags, words and single characters."""
        return (found[0] for found in self._piece.finditer(text))

    def is_optional(self, text: str) -> bool:
        """Whether a generation prompt may write `text` where a turn does not: tags, white space."""
        first = next(self.pieces(text.lstrip()), "")
        return not first or TAG.fullmatch(first) is not None or first in self._control.texts

    @cached_property
    def _piece(self) -> re.Pattern[str]:
        tokens = [re.escape(token) for token in self._control.texts]
        return re.compile("|".join([*tokens, TAG.pattern, r"\w+", "."]), re.DOTALL)

    @cached_property
    def _mark(self) -> re.Pattern[str]:
        tokens = [re.escape(token) for token in self._control.texts]
        return re.compile(rf"\s*(?:{'|'.join(tokens)})" if tokens else "(?!)")
