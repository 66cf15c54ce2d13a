"""The values of a JSON list, read a piece at a time, so that memory does not grow with the file."""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from lora_engine.errors import UserError

PIECE = 1 << 20  # bytes read at once; more where a value is longer
_BLANKS = " \t\r\n"
# An error so near to the end of what is read may go away with what follows.
_NEAR = 16


class JsonList:
    """The values of a list, each with the place where it begins.

    origin: of the value that is read, or that cannot be: the line where it begins and, where more
    stands before it in this line, its number, as lists are also written in one line. Raises
    UserError for what is no list, or no text in UTF-8; a ListError, or what `decoder` raises, at
    the first value that cannot be read: JSON has no mark to go on at.
    """

    def __init__(self, file: BinaryIO, path: Path, decoder: json.JSONDecoder) -> None:
        self._file, self._path, self._decoder = file, path, decoder
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._position, self._ended = "", 0, False
        self._line, self._counted, self._column = 1, 0, 0  # line ends before `_counted` are counted
        self._bytes = 0  # that are read
        self._ended_in = 1  # the line of the end of what stands before
        self.origin = f"{path}:1"

    def __iter__(self) -> Iterator[object]:
        if self._next() != "[":
            raise UserError(
                f"{self._path}:1: expected a JSON list of records; one per line is .jsonl"
            )
        self._passed(self._position + 1)
        number = 0
        while self._next() != "]":
            number += 1
            self._begin(number)
            yield self._value()
            separator = self._next()
            if separator == ",":
                self._position += 1
                self._next()
            elif separator != "]":
                raise ListError("is not followed by ',' or ']'")
        self._position += 1
        if self._next():
            self._begin()
            raise ListError("stands behind the end of the list")

    def _begin(self, number: int = 0) -> None:
        """A value begins at the position. number: its own, from 1; 0: it has none."""
        self._count()
        in_line = f" (record {number})" if number and self._line == self._ended_in else ""
        self.origin = f"{self._path}:{self._line}{in_line}"

    def _passed(self, position: int) -> None:
        """A value, or the list's bracket, ends at the position."""
        self._position = position
        self._count()
        self._ended_in = self._line

    def _next(self) -> str:
        """The next character that is no white space; "" at the end."""
        while True:
            text, position = self._text, self._position
            while position < len(text) and text[position] in _BLANKS:
                position += 1
            self._position = position
            if position < len(text) or not self._more(PIECE):
                return text[position : position + 1]

    def _value(self) -> object:
        size = PIECE
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._position)
                if end < len(self._text) or self._ended:  # a number may go on
                    self._passed(end)
                    return value
            except json.JSONDecodeError as error:
                may_go_on = error.pos + _NEAR > len(self._text) or error.msg.startswith("Untermin")
                if self._ended or not may_go_on:
                    raise ListError(
                        f"is not valid JSON: {error.msg} ({self._place(error.pos)})"
                    ) from error
            self._more(size)
            size *= 2

    def _place(self, position: int) -> str:
        line = self._line + self._text.count("\n", self._counted, position)
        begin = self._text.rfind("\n", 0, position) + 1
        return f"line {line}, column {position - begin + 1 + (0 if begin else self._column)}"

    def _count(self) -> None:
        self._line += self._text.count("\n", self._counted, self._position)
        self._counted = self._position

    def _more(self, size: int) -> bool:
        """Reads on, and forgets the text before the position; whether there was more."""
        if self._ended:
            return False
        read = self._file.read(size)
        try:
            added = self._utf8.decode(read, final=not read)
        except UnicodeDecodeError as error:
            line = self._line + self._text.count("\n", self._counted)
            line += error.object[: error.start].count(b"\n")
            byte = self._bytes + len(read) - len(error.object) + error.start + 1
            raise UserError(
                f"{self._path}:{line}: is not UTF-8 text (byte {byte} of the text)"
            ) from error
        self._bytes += len(read)
        self._count()
        gone = self._text[: self._position]
        self._column = (
            len(gone) - gone.rfind("\n") - 1 if "\n" in gone else self._column + len(gone)
        )
        self._text = self._text[self._position :] + added
        self._position = self._counted = 0
        self._ended = not read
        return bool(read)


class ListError(ValueError):
    """A value that cannot be read, and why."""
