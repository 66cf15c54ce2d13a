"""Plain texts, read a piece at a time, so that memory does not grow with the file."""

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from lora_engine.errors import UserError

# Characters of a piece, at least; a text of less than two is read as one.
PIECE = 1 << 20
NUL = "holds a NUL, which no text does; save it as UTF-8"
# Where a piece had best end, and how much of what is found there belongs to it.
_ENDS = (("\n\n", 2), ("\r\n\r\n", 4), ("\n", 1), (". ", 1), ("。", 1), (" ", 0))
# What part of a piece that is looked for in.
_SEARCHED = 4


class Document:
    """The pieces of a text in UTF-8, each with whether it is the last; nothing of it is lost.

    A piece ends at a paragraph, line, sentence or word. origin: of the piece that is read: the line
    where it begins, and the character of the text if that is inside a line. Raises UserError for
    what is no such text.
    """

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path = file, path
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._ended = "", False
        self._line = 1  # where `_text` begins
        self.origin = f"{path}:1"

    def __iter__(self) -> Iterator[tuple[str, bool]]:
        characters, begins_line, is_last = 0, True, False
        while not is_last:
            while len(self._text) < 2 * PIECE and not self._ended:
                self._more()
            is_last = len(self._text) < 2 * PIECE
            end = len(self._text) if is_last else _end(self._text)
            piece, self._text = self._text[:end], self._text[end:]
            inside = "" if begins_line else f" (character {characters + 1})"
            self.origin = f"{self._path}:{self._line}{inside}"
            self._line += piece.count("\n")
            yield piece, is_last
            characters, begins_line = characters + end, piece.endswith("\n")

    def _more(self) -> None:
        read = self._file.read(PIECE)
        try:
            added = self._utf8.decode(read, final=not read)
        except UnicodeDecodeError as error:
            before = error.object[: error.start]
            line = self._line + self._text.count("\n") + before.count(b"\n")
            raise UserError(f"{self._path}:{line}: is not UTF-8 text") from error
        if "\0" in added:
            line = self._line + (self._text + added).partition("\0")[0].count("\n")
            raise UserError(f"{self._path}:{line}: {NUL}")
        self._text += added
        self._ended = not read


def _end(text: str) -> int:
    """Where the first piece of a text ends that is two pieces long or longer."""
    for mark, belongs in _ENDS:
        if (place := text.find(mark, PIECE, PIECE + PIECE // _SEARCHED)) >= 0:
            return place + belongs
    return PIECE
