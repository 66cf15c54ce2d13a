"""Processes that are killed, and disks that fill up."""

import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def in_a_child(work: Callable[[], object]) -> int:
    """The exit status of a process that does `work`."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1]


def killed_at(event: int, work: Callable[[], object]) -> int:
    """The same of one that is killed at its n-th call of the system that may change a file."""
    count = 0

    def hook(name: str, args: tuple[object, ...]) -> None:
        nonlocal count
        if name == "open" or name.startswith(("os.", "shutil.", "ctypes.")):
            count += 1
            if count == event:
                os.kill(os.getpid(), signal.SIGKILL)

    def watched() -> None:
        sys.addaudithook(hook)
        work()

    return in_a_child(watched)


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Files can grow to `size` bytes, as on a disk that is full then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
