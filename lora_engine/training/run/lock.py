"""One run at a time in a folder."""

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

from lora_engine.errors import UserError
from lora_engine.files import naming

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

_OPEN = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)

_holders: dict[str, int] = {}  # files that this process has locked, and the thread that did


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Within, no other process and no other thread of this one holds the lock.

    path: the file to lock, made here and removed at the end.
    Makes the folder where it is missing, and removes the folders it made that are still empty. The
    system releases the lock of a process that is killed. A thread that holds it may enter again. On
    a file system without locks a warning is logged instead. Raises UserError naming the process
    that holds it.
    """
    folder = path.parent
    key = os.path.join(os.path.realpath(folder), path.name)
    holder = _holders.get(key)
    if holder == threading.get_ident():
        yield
        return
    if holder is not None:
        raise UserError(_in_use(folder, "another thread of this process"))
    made = [parent for parent in path.parents if not os.path.lexists(parent)]
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = _acquire(path)
        _holders[key] = threading.get_ident()
        try:
            yield
        finally:
            del _holders[key]
            path.unlink(missing_ok=True)  # before another process can lock it
            os.close(descriptor)
    finally:
        with contextlib.suppress(OSError):  # not empty
            for parent in made:
                parent.rmdir()


def _acquire(path: Path) -> int:
    """The descriptor of the locked file."""
    while True:
        with naming(path):
            descriptor = os.open(path, _OPEN, 0o644)
        try:
            if not _lock(descriptor, path.parent) or _is_at(descriptor, path):
                _name_holder(descriptor, path)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the holder before has removed the file since it was opened


def _name_holder(descriptor: int, path: Path) -> None:
    """Writes who has locked the file. Removes it where that fails, as on a full disk."""
    holder = f"process {os.getpid()} on {socket.gethostname()}"
    try:
        with naming(path):
            os.truncate(descriptor, 0)
            os.write(descriptor, holder.encode())
    except BaseException:
        path.unlink(missing_ok=True)  # before another process can lock it
        raise


def _lock(descriptor: int, folder: Path) -> bool:
    """Whether the file system can lock. Raises UserError if another process has the lock."""
    try:
        if fcntl is None:
            raise OSError("this system has no file locks")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.read(descriptor, 200).decode("utf-8", "replace").strip()
        raise UserError(_in_use(folder, holder or "another process")) from error
    except OSError as error:
        logger.warning(
            "%s: cannot be locked (%s): see to it that no second run is started in it",
            folder,
            error.strerror or error,
        )
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _in_use(folder: Path, holder: str) -> str:
    return (
        f"{folder}: {holder} is running in it: wait for its end, stop it, or write somewhere else"
    )
