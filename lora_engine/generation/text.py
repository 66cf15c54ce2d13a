"""A continuation's text while it is being written."""

from typing import Protocol


class Detokenizer(Protocol):
    """What of a tokenizer turns tokens into text."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str: ...


class TextStream:
    """Text of tokens as they come, cut at the first of the texts that end it.

    A piece is text that no later token will change: a character whose bytes are not all there, and
    the beginning of a text that would end the continuation, are kept back.

    special: whether special tokens are text too.
    """

    def __init__(
        self, tokenizer: Detokenizer, stop: tuple[str, ...] = (), *, special: bool = False
    ) -> None:
        self.tokenizer, self.stop, self.special = tokenizer, stop, special
        self.stopped = False
        self._ids: list[int] = []
        self._shown, self._read = 0, 0  # tokens before which the text is settled, and is decoded
        self._text, self._given = "", 0

    def push(self, token: int) -> str:
        """The piece that the token settles, often none."""
        self._ids.append(token)
        before = self._decode(self._ids[self._shown : self._read])
        after = self._decode(self._ids[self._shown :])
        if len(after) > len(before) and not after.endswith("\ufffd"):
            self._append(after[len(before) :])
            self._shown, self._read = self._read, len(self._ids)
        return self._settled(self._held_back())

    def finish(self) -> str:
        """The last piece: what was kept back."""
        if not self.stopped:
            before = self._decode(self._ids[self._shown : self._read])
            self._append(self._decode(self._ids[self._shown :])[len(before) :])
        return self._settled(0)

    @property
    def text(self) -> str:
        """All that was settled so far."""
        return self._text[: self._given]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=not self.special)

    def _append(self, piece: str) -> None:
        start = len(self._text)
        self._text += piece
        longest = max(map(len, self.stop), default=0)
        places = [self._text.find(text, max(0, start - longest)) for text in self.stop]
        ends = [place for place in places if place >= 0]
        if ends:
            self._text, self.stopped = self._text[: min(ends)], True

    def _settled(self, kept: int) -> str:
        end = max(self._given, len(self._text) - kept)
        piece, self._given = self._text[self._given : end], end
        return piece

    def _held_back(self) -> int:
        """Characters at the end that may be the beginning of a text that ends it."""
        if self.stopped:
            return 0
        longest = max(map(len, self.stop), default=1) - 1
        for count in range(min(longest, len(self._text)), 0, -1):
            if any(text.startswith(self._text[-count:]) for text in self.stop):
                return count
        return 0
