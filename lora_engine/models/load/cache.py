"""Folders of files that can be made again, in the user's cache."""

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from lora_engine.files import sync_file

_ABANDONED_AFTER_SECONDS = 24 * 3600


def cached_folder(folder: Path, build: Callable[[Path], None]) -> Path:
    """`folder`, made by `build(temporary folder)` if it is not there yet.

    The result appears by one rename, so that a folder that exists is complete. Of two processes
    that build at the same time, both finish and the first result stays.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder.parent)
    temporary = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
    try:
        build(temporary)
        for path in (*temporary.rglob("*"), temporary):
            # mkdtemp and safetensors make what they make private
            path.chmod(0o755 if path.is_dir() else 0o644)
            sync_file(path)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
        else:
            sync_file(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _remove_abandoned(folder: Path) -> None:
    """Remove what killed processes left; young ones may still be at work."""
    for path in folder.glob(".building-*"):
        try:
            age = time.time() - path.stat().st_mtime
        except FileNotFoundError:  # its builder has just finished
            continue
        if age > _ABANDONED_AFTER_SECONDS:
            shutil.rmtree(path, ignore_errors=True)
