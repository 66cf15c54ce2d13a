"""A file of JSON lines that grows with a run, cut back to what a checkpoint has seen of it."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from lora_engine.files import naming

logger = logging.getLogger(__name__)


class Written(NamedTuple):
    """How much of a file a checkpoint has seen: its first `size` bytes, and their hash."""

    size: int = 0
    sha256: str = ""


class GrowingFile:
    """One JSON object per line, handed to the system line by line.

    What cannot be written raises OSError with the file's name.
    """

    def __init__(
        self, path: Path, written: Written | None = None, *, is_line: Callable[[bytes], bool]
    ) -> None:
        """Opens `path`, cut back to what was `written` at the checkpoint, if there is one.

        Of a file that was changed since, the whole lines that pass `is_line` are kept, and a
        warning is logged.
        """
        self._path, written = path, written or Written()
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            with path.open("rb") as file:
                content = file.read(written.size)
            if written.size and hashlib.sha256(content).hexdigest() != written.sha256:
                content = b"".join(x for x in content.splitlines(keepends=True) if is_line(x))
                logger.warning(
                    "%s: was changed after the checkpoint; %d of its lines can be read",
                    path,
                    content.count(b"\n"),
                )
                path.write_bytes(content)
            os.truncate(path, len(content))
            self._file = path.open("ab", buffering=0)
        self._sha256 = hashlib.sha256(content)

    def append(self, values: Mapping[str, object]) -> None:
        """One line more."""
        content = json.dumps(values, allow_nan=False).encode() + b"\n"
        self._sha256.update(content)
        with naming(self._path):
            while content:  # the system may take a part of it, such as what is left of the disk
                content = content[self._file.write(content) :]

    def sync(self) -> Written:
        """Flush to the disk; returns what is there now."""
        with naming(self._path):
            os.fsync(self._file.fileno())
            return Written(os.fstat(self._file.fileno()).st_size, self._sha256.hexdigest())

    def close(self) -> None:
        self._file.close()


def line_of(line: bytes) -> dict[str, object] | None:
    """The object in a line, with its end; None if it is none that a run may have written."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return values if line.endswith(b"\n") and isinstance(values, dict) else None
