"""How OpenMP's threads wait for each other: spinning briefly, then asleep.

torch and the C++ kernels compute in teams of OpenMP threads. As the runtimes come, a thread that
waits at the end of a loop or for the next one spins for milliseconds. Where other programs are busy
as well, it spins away the processor time that the thread it waits for would need: with four busy
threads beside two of ours, training falls to a third of its fair share. Asleep at once, it gets its
share, but to wake a thread takes longer than most loops of a small step or of a written token, and
than what Python does between two: a step takes a sixth longer, writing half as long again. Some
microseconds of spinning bridge that, and are too few to be missed by others.

A runtime reads its variables once, at the latest with its first team. `settle`, called when
lora_engine is imported, sets them, unless the user has said how threads wait. GNU's runtime, which
torch brings, counts turns of its loop; the others know milliseconds only and sleep at once. Where
the runtime was loaded before, `settle_late` does what still can be done: GNU's then spins for 100
turns.
"""

import os
import re
from collections.abc import Callable
from typing import NamedTuple

USERS_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
# GNU's, Intel's, LLVM's: libgomp.so.1, libgomp.so.1.0.0, and as wheels name their own copies.
RUNTIME = re.compile(r"lib(gomp|iomp5|omp)(-[0-9a-f]+)?\.so(\.[0-9]+)*")
MAPS = "/proc/self/maps"
OURS = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "2000"}  # turns: 30 to 100 microseconds
MEND = "import lora_engine before torch, or set " + " ".join(map("=".join, OURS.items()))


class Waiting(NamedTuple):
    """policy: "brief", spinning, then asleep; "passive", asleep; "active", spinning; "the user's".

    mend: how to have the best.
    """

    policy: str
    reason: str
    mend: str = ""

    def __str__(self) -> str:
        return f"{self.policy}: {self.reason}"


_ACTIVE = Waiting("active", "an OpenMP runtime was loaded before lora_engine", MEND)
_BRIEF = Waiting("brief", "set by lora_engine")
_waiting: Waiting | None = None


def settle() -> None:
    """Has threads spin briefly and then sleep, in this process and in those that it starts."""
    global _waiting
    if _waiting is not None:
        return
    said = {name: value for name in USERS_VARIABLES if (value := os.environ.get(name))}
    if said == OURS:  # a process that started this one settled it
        _waiting = _BRIEF
    elif said:
        name, value = next(iter(said.items()))
        _waiting = Waiting("the user's", f"{name}={value}")
    else:
        os.environ.update(OURS)
        _waiting = _ACTIVE if loaded_runtimes() else _BRIEF


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
        _waiting = Waiting("passive", "the OpenMP runtime was loaded before lora_engine", MEND)


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
