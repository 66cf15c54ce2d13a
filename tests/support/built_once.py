"""What tests compile, made once by whichever process is first and kept under build/."""

import fcntl
import shutil
from collections.abc import Callable
from pathlib import Path


def built_once(path: Path, build: Callable[[Path], None]) -> Path:
    """`path`, a file or a folder, made by `build(unfinished path)` if it is not there yet.

    It appears by one rename, so that what exists is whole. Another process, or thread, that asks
    for it at the same time waits, and builds it only if the first one failed.
    """
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            unfinished = path.parent / f"{path.name}.unfinished"
            _remove(unfinished)  # of a killed process
            build(unfinished)
            unfinished.rename(path)
    return path


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
