"""Files that are whole or not there: written to a temporary name, flushed, then renamed."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write `text` (UTF-8) to `path`, atomically and durably; makes the folder if needed.

    A lone surrogate, which UTF-8 lacks, is written as "\\\\udc80", its escape in JSON and YAML.
    """
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError in here names `path`: not a temporary file, and not nothing, as writing does."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        if error.filename2 is not None:  # None, once set, would be printed
            del error.filename2
        raise


def user_path(path: str | Path) -> Path:
    """`path` with ~ as the home folder. Raises ValueError for what no path can be."""
    text = os.fspath(path)
    if not text.strip():
        raise ValueError("is empty, expected a path")
    if "\0" in text:
        raise ValueError("holds a NUL character, which no path can")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        name = text.partition("/")[0]
        raise ValueError(f"{name} is nobody's home folder here; write the path out") from error
