"""Files and folders that are there whole or not at all, also after a crash or a power cut."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

_TEMPORARY = (".tmp-", ".old-")


def sync_file(path: Path) -> None:
    """Wait until the file's, or the folder's, content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    for parent, _, files in os.walk(folder):
        for name in files:
            sync_file(Path(parent, name))
        sync_file(Path(parent))


def remove_folder(folder: Path) -> None:
    """Delete `folder` such that no moment shows it half deleted under its own name."""
    old = folder.with_name(f".old-{folder.name}-{os.getpid()}")
    shutil.rmtree(old, ignore_errors=True)
    folder.rename(old)
    shutil.rmtree(old)


def remove_leftovers(parent: Path) -> None:
    """Delete what killed processes left half written or half deleted in `parent`."""
    if parent.is_dir():
        for entry in parent.iterdir():
            if entry.name.startswith(_TEMPORARY) and entry.is_dir():
                shutil.rmtree(entry)


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yields an empty folder to fill; on success it is flushed and renamed to `target`.

    A `target` that exists is replaced. On an exception nothing but `target` as it was remains.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".tmp-{target.name}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        _sync_tree(temporary)
        if target.exists():
            remove_folder(target)
        temporary.rename(target)
        sync_file(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
