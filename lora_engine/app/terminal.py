"""Output that no terminal, pipe or text can break."""

import codecs
import io
import logging
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from lora_engine.errors import EngineWarning
from lora_engine.text import one_line, visible

# What this program prints beyond ASCII, as a terminal without it can show it.
_PLAIN = {
    "…": "...", "·": "-", "→": "->", "×": "x", "√": "sqrt ", "≥": ">=", "≤": "<=", "✓": "+",
    "✗": "x", "−": "-", "–": "-", "—": "-", "█": "#", "━": "-", "╸": "-", "╺": "-", "─": "-",
    "│": "|", "╭": "+", "╮": "+", "╰": "+", "╯": "+", "┌": "+", "┐": "+", "└": "+", "┘": "+",
    "“": '"', "”": '"', "‘": "'", "’": "'",
}  # fmt: skip
_ERRORS = "lora_engine.plain"


class SafeConsole(Console):
    """A rich console that takes text as it is: no markup, and control characters made visible."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """As in rich; what is no part of a line is spelled out before its width is taken."""
        return super().render_str(visible(text), **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """As in rich; text that would move the cursor or turn the line around is spelled out."""
        for segment in super().render(renderable, options):
            if segment.control is None and (shown := visible(segment.text)) != segment.text:
                segment = Segment(shown, segment.style)
            yield segment


class Output(io.TextIOBase):
    """Text output whose reader may go away, or whose disk may fill up, without ending a run.

    failure: the first error in writing, after which nothing more is written.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self.failure: OSError | None = None

    def write(self, text: str) -> int:
        if self.failure is None:
            try:
                return self._file.write(text)
            except OSError as error:
                self.failure = error
        return len(text)

    def flush(self) -> None:
        if self.failure is None:
            try:
                self._file.flush()
            except OSError as error:
                self.failure = error

    def isatty(self) -> bool:
        return self._file.isatty()

    def fileno(self) -> int:
        return self._file.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._file.encoding


@contextmanager
def guarded_output() -> Iterator[Output]:
    """sys.stdout as an `Output` that yields; it and sys.stderr take every character."""
    before = sys.stdout
    degrade(sys.stdout)
    degrade(sys.stderr)
    sys.stdout = output = Output(before)
    try:
        yield output
    finally:
        sys.stdout = before


@contextmanager
def shown_warnings() -> Iterator[None]:
    """What lora_engine warns of and logs as a line of sys.stderr each, the same warning once.

    What libraries warn their developers of is not shown.
    """
    logger, handler = logging.getLogger("lora_engine"), _Lines(logging.WARNING)
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("once", EngineWarning)
            warnings.showwarning = lambda message, *place: _warn(str(message))
            yield
    finally:
        logger.removeHandler(handler)


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _warn(record.getMessage())


def _warn(text: str) -> None:
    with suppress(OSError):  # standard error is closed: the run goes on without the line
        print(f"lora-engine: warning: {one_line(text)}", file=sys.stderr, flush=True)


def degrade(file: TextIO) -> None:
    """Makes the output write what its encoding lacks in ASCII: "→" as "->", "é" as "\\xe9"."""
    codecs.register_error(_ERRORS, _plain)
    if isinstance(file, io.TextIOWrapper):
        file.reconfigure(errors=_ERRORS)


def _plain(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end]
    plain = "".join(_PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in text)
    return plain, error.end
