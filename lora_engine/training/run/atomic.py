"""Files and folders that are there whole or not at all, also after a crash or a power cut."""

import contextlib
import ctypes
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from lora_engine.files import sync_file

# Of Linux's renameat2: relative names begin at the working folder; two names change places.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def _finish_tree(folder: Path) -> None:
    """Flushes all files, and opens them to whoever may read `folder`: safetensors keeps its own
    private."""
    mode = folder.stat().st_mode & 0o666
    for parent, _, files in os.walk(folder):
        for name in files:
            Path(parent, name).chmod(mode)
            sync_file(Path(parent, name))
        sync_file(Path(parent))


def remove_folder(folder: Path) -> None:
    """Delete `folder` such that no moment shows it half deleted under its own name."""
    old = folder.with_name(f".old-{folder.name}-{os.getpid()}")
    shutil.rmtree(old, ignore_errors=True)
    folder.rename(old)
    shutil.rmtree(old)


def remove_leftovers(parent: Path, names: str) -> None:
    """Delete what killed processes left half written or half deleted in `parent`.

    names: a regular expression for the names of folders, and of files that `write_text` writes, or
    that are written as ".tmp-", the name, "-" and the process's number.
    """
    temporary_folder = re.compile(rf"\.(tmp|old)-({names})-\d+")
    temporary_file = re.compile(rf"\.tmp-({names})-(\d+|[a-z0-9_]{{8}})")
    for entry in parent.iterdir() if parent.is_dir() else ():
        if entry.is_symlink():
            continue
        if entry.is_dir() and temporary_folder.fullmatch(entry.name):
            shutil.rmtree(entry)
        elif entry.is_file() and temporary_file.fullmatch(entry.name):
            entry.unlink()


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yields an empty folder to fill; on success it is flushed and renamed to `target`.

    A `target` that exists is replaced: the names change places in one step where the system can, so
    that a kill leaves the old folder or the new. On an exception nothing but `target` as it was
    remains.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".tmp-{target.name}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        _finish_tree(temporary)
        if not _exchanged(temporary, target):
            if target.exists():
                remove_folder(target)
            temporary.rename(target)
        sync_file(target.parent)
        shutil.rmtree(temporary, ignore_errors=True)  # holds the folder that was replaced
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _exchanged(one: Path, other: Path) -> bool:
    """Whether the two folders now have each other's name; False where that cannot be done."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux, or an old C library
        return False
    names = (os.fsencode(one.absolute()), os.fsencode(other.absolute()))
    # A missing folder, or a file system without exchange, is answered with an error.
    return renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0
