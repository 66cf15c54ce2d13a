"""How OpenMP's threads wait for each other: asleep, so that a shared machine is shared fairly.

torch and the C++ kernels compute in teams of OpenMP threads. As the runtimes come, a thread that
waits at the end of a loop or for the next one spins for milliseconds. Where other programs are busy
as well, it spins away the processor time that the thread it waits for would need: with four busy
threads beside two of ours, training falls to a third of its fair share. Asleep, it gets its share,
and is as fast on a quiet machine.

A runtime reads OMP_WAIT_POLICY once, at the latest with its first team. `settle`, called when
lora_engine is imported, sets it, unless the user has said how threads wait. Where the runtime was
loaded before, `settle_late` does what still can be done.
"""

import os
import re
from collections.abc import Callable
from typing import NamedTuple

USERS_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
# GNU's, Intel's, LLVM's: libgomp.so.1, libgomp.so.1.0.0, and as wheels name their own copies.
RUNTIME = re.compile(r"lib(gomp|iomp5|omp)(-[0-9a-f]+)?\.so(\.[0-9]+)*")
MAPS = "/proc/self/maps"
MEND = "import lora_engine before torch, or set OMP_WAIT_POLICY=passive"


class Waiting(NamedTuple):
    """policy: "passive", asleep; "active", spinning; "the user's". mend: how to have it passive."""

    policy: str
    reason: str
    mend: str = ""

    def __str__(self) -> str:
        return f"{self.policy}: {self.reason}"


_ACTIVE = Waiting("active", "an OpenMP runtime was loaded before lora_engine", MEND)
_waiting: Waiting | None = None


def settle() -> None:
    """Has threads wait asleep, in this process and in those that it starts."""
    global _waiting
    if _waiting is not None:
        return
    for name in USERS_VARIABLES:
        if os.environ.get(name):
            _waiting = Waiting("the user's", f"{name}={os.environ[name]}")
            return
    os.environ["OMP_WAIT_POLICY"] = "passive"
    _waiting = _ACTIVE if loaded_runtimes() else Waiting("passive", "set by lora_engine")


def settle_late(crowd: Callable[[], bool]) -> None:
    """Has threads wait asleep although a runtime was loaded before `settle`, if possible.

    crowd: makes GNU's runtime hold more threads than there are processors, which it then lets
    sleep; whether it does. The others have a call for it, in force for the calling thread's teams.
    """
    global _waiting
    if _waiting is not _ACTIVE:
        return
    names = {path: os.path.basename(path) for path in loaded_runtimes()}
    gnus = [path for path, name in names.items() if name.startswith("libgomp")]
    others = [path for path in names if path not in gnus]
    if (not gnus or crowd()) and all(map(_block_at_once, others)):
        _waiting = Waiting("passive", "set by lora_engine after the OpenMP runtime was loaded")


def waiting() -> Waiting:
    """How OpenMP's threads wait in this process, and why."""
    settle()
    assert _waiting is not None
    return _waiting


def loaded_runtimes() -> list[str]:
    """Paths of the OpenMP runtimes that this process has loaded; [] where none is known."""
    try:
        with open(MAPS, encoding="utf-8", errors="surrogateescape") as file:
            paths = {line.rstrip("\n").partition("/")[2] for line in file}
    except OSError:
        return []
    return sorted(f"/{path}" for path in paths if RUNTIME.fullmatch(os.path.basename(path)))


def _block_at_once(runtime: str) -> bool:
    """Tells Intel's or LLVM's runtime to spin for 0 ms; whether it took the call."""
    import ctypes

    try:
        ctypes.CDLL(runtime).kmp_set_blocktime(0)
    except (OSError, AttributeError):
        return False
    return True
