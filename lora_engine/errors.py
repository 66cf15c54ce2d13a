"""Errors that are the user's to mend: one line that says what, where and how."""

import difflib
import re
from collections.abc import Iterable

_LONGEST_REASON = 300


class UserError(Exception):
    """A mistake in what the user gave (a file, a key, a shape), not in the program.

    The message is one line naming what is wrong, where, and how to mend it. The command line
    prints it without a traceback.
    """


class EngineWarning(UserWarning):
    """What lora_engine warns of: something runs otherwise than its user may expect.

    The command line shows these, and not what libraries tell their developers.
    """


class UnavailableError(RuntimeError):
    """A backend was asked for by name and cannot run here; the message says why."""


class PeerLost(RuntimeError):
    """Another process of a run is gone, or cannot be reached; the message says why, if it can."""


def nearest(name: str, choices: Iterable[str], likeness: float = 0.6) -> str | None:
    """The choice most like `name`, or None if none is close (1 is the same text)."""
    matches = difflib.get_close_matches(name, list(choices), n=1, cutoff=likeness)
    return matches[0] if matches else None


_MEMORY = re.compile(r"not enough memory|out of memory|std::bad_alloc|cannot allocate memory", re.I)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the computer had no memory left: torch's errors of it differ."""
    if isinstance(error, MemoryError):
        return True
    said = _MEMORY.search(str(error)) is not None
    return said and isinstance(error, RuntimeError | OSError)


def reason(error: BaseException) -> str:
    """The first line of what an error says, of a length to be read."""
    lines = str(error).strip().splitlines()
    first = lines[0] if lines else type(error).__name__
    return first if len(first) <= _LONGEST_REASON else first[: _LONGEST_REASON - 1] + "…"
