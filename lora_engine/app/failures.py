"""What ended a command, as one line and an exit status: what, where, and how to mend it."""

import errno
import os
import re
import traceback
from dataclasses import dataclass
from pathlib import Path

from lora_engine.errors import (
    PeerLost,
    UnavailableError,
    UserError,
    is_out_of_memory,
    reason,
)
from lora_engine.files import system_error
from lora_engine.text import bytes_text, one_line

FAILED = 1
USER_MISTAKE = 2
INTERRUPTED = 130

# What the system's refusals are called, and how each is mended.
_REFUSALS = {
    errno.ENOSPC: ("the disk is full", "free some space, or take a folder on another disk"),
    errno.EDQUOT: ("the disk quota is used up", "free some space, or take another folder"),
    errno.EFBIG: ("the file would exceed the size limit", "raise it with ulimit -f"),
    errno.ENOTDIR: ("a file stands where a folder belongs", "move it away, or take another path"),
    errno.EISDIR: ("a folder stands where a file belongs", "move it away, or take another path"),
    errno.EEXIST: ("is in the way", "move it away, or take another path"),
    errno.ENOTEMPTY: ("is not an empty folder", "move it away, or take another path"),
    errno.EACCES: ("permission denied", "change its permissions, or take another path"),
    errno.EPERM: ("not permitted", "change its permissions, or take another path"),
    errno.EROFS: ("the file system is read-only", "take another folder"),
    errno.ELOOP: ("a loop of symbolic links", "remove the link that leads back"),
    errno.ENAMETOOLONG: ("the path is too long", "take a shorter one"),
    errno.ENOENT: ("no such file or folder", "check the path"),
    errno.EMFILE: ("too many open files", "raise the limit with ulimit -n"),
    errno.ENFILE: ("too many open files on this machine", "end other programs"),
    errno.EIO: ("the disk failed to read or write", "check it, or take another folder"),
    errno.EPIPE: ("its reader has gone", "let the program that reads it run to the end"),
    errno.ENOMEM: ("not enough memory", "end other programs, or take a smaller model"),
}
_BYTES_ASKED = re.compile(r"allocate (\d+) bytes|allocate ([\d.]+ [KMGT]i?B)", re.I)


class Interrupted(Exception):
    """Ctrl-C, or a signal the training loop ended for; the message says how to go on."""


class RunFailed(Exception):
    """A run ended for the error that is this one's __cause__.

    folder: of the run. hint: how to go on, or "".
    """

    def __init__(self, folder: Path, hint: str) -> None:
        super().__init__(hint)
        self.folder = folder
        self.hint = hint


@dataclass(frozen=True)
class Failure:
    """line: what to tell, without a line break (but where records are listed). status: of exit."""

    line: str
    status: int


def describe(error: BaseException) -> Failure:
    """The line and the exit status for whatever a command ended with.

    2 is the user's mistake, 130 an interruption, 1 a refusal of the machine or a bug of ours.
    """
    match error:
        case RunFailed(__cause__=BaseException() as cause):
            number = cause.errno if isinstance(cause, OSError) else system_error(cause)
            if number and getattr(cause, "filename", None) is None:
                cause = OSError(number, "", str(error.folder))
            failure = describe(cause)
            hint = f"; {error.hint}" if error.hint else ""
            return Failure(failure.line + hint, failure.status)
        case UserError():
            return Failure(str(error), USER_MISTAKE)
        case KeyboardInterrupt() | Interrupted():
            return Failure(str(error) or "interrupted", INTERRUPTED)
    return Failure(_refusal(error) or _bug(error), FAILED)


def _refusal(error: BaseException) -> str | None:
    """The line for what the machine refused; None if it did not."""
    text = str(error)
    if is_out_of_memory(error):
        return _no_memory(text)
    if isinstance(error, OSError) and error.errno is not None:
        path = error.filename2 if error.filename is None else error.filename
        return system_refusal(error.errno, None if path is None else os.fsdecode(path))
    if (number := system_error(error)) is not None:
        return system_refusal(number, None)
    if isinstance(error, OSError):
        return reason(error)
    if (isinstance(error, ValueError) and "null byte" in text) or "null character" in text:
        return "a path holds a NUL character, which no file's name can; take it out"
    if isinstance(error, RecursionError):
        return "what was given is nested too deeply to be read; make it flatter"
    if isinstance(error, UnavailableError | PeerLost):
        return reason(error)
    if isinstance(error, RuntimeError) and "CUDA error" in text:
        return f"the GPU failed: {reason(error)}; see nvidia-smi, or run with model.device=cpu"
    return None


def system_refusal(number: int, path: str | None) -> str:
    """The line for the system's error `number` (see errno) at `path`."""
    what, mend = _REFUSALS.get(number, (os.strerror(number).lower(), "see what holds it"))
    return f"{one_line(path) + ': ' if path else ''}{what}; {mend}"


def _no_memory(text: str) -> str:
    asked = _BYTES_ASKED.search(text)
    size = (
        f" ({bytes_text(int(asked[1])) if asked[1] else asked[2]} were asked for)" if asked else ""
    )
    return (
        f"not enough memory{size}; lower train.tokens_per_batch, data.max_length or lora.r, "
        "or take a smaller model"
    )


def _bug(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "lora_engine" in Path(f.filename).parts]
    last = (ours or list(frames))[-1:]
    where = f" at {Path(last[0].filename).name}:{last[0].lineno}" if last else ""
    said = f": {reason(error)}" if str(error).strip() else ""
    return (
        f"unexpected {type(error).__name__}{where}{said}; this is a bug of lora_engine: "
        "run again with --debug and report what it prints"
    )
