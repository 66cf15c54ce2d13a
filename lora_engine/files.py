"""Files that are whole or not there: written to a temporary name, flushed, then renamed."""

import os
import re
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
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".tmp-{path.name[:100]}-")
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


def sync_file(path: Path) -> None:
    """Waits until the content of the file, or of the folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def user_cache_dir() -> Path:
    """The user's folder of files that can be made again.

    $XDG_CACHE_HOME/lora_engine, or ~/.cache/lora_engine.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lora_engine"


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Within, an OSError names `path`, or a file in that folder.

    It would name a temporary file otherwise, whose name begins with a dot, or, for a failed write,
    none. An error of the system that a library in Rust, such as safetensors, wraps in one of its
    own becomes such an OSError as well.
    """
    try:
        yield
    except OSError as error:
        if not _is_visible_below(error.filename, path):
            error.filename = str(path)
        if error.filename2 is not None:  # None, once set, would be printed
            del error.filename2
        raise
    except Exception as error:
        if (number := system_error(error)) is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def _is_visible_below(name: object, folder: Path) -> bool:
    try:
        parts = Path(os.fsdecode(name)).relative_to(folder).parts  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    return not any(part.startswith(".") for part in parts)


def system_error(error: BaseException) -> int | None:
    """The system's error number (see errno) in what a library says; None if it says none."""
    match = re.search(r"\(os error (\d+)\)", str(error))
    return int(match[1]) if match else None


def user_path(path: str | Path) -> Path:
    """`path` with ~ as the home folder. Raises ValueError for what no path can be."""
    text = os.fspath(path)
    if not text.strip():
        raise ValueError("is empty, expected a path")
    if "\0" in text:
        raise ValueError("holds a NUL character, which no path can; take it out")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        name = text.partition("/")[0]
        raise ValueError(f"{name} is nobody's home folder here; write the path out") from error
