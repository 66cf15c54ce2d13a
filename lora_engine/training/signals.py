"""Ctrl-C, SIGTERM and a terminal that hangs up as requests to end at the next safe point."""

import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import TypeAlias

from lora_engine.distributed.world import World

_SIGNALS = [signal.SIGINT, signal.SIGTERM]
if sys.platform != "win32":
    _SIGNALS.append(signal.SIGHUP)

Handler: TypeAlias = Callable[[int, FrameType | None], object] | int | None


class Interrupted(Exception):
    """Raised at a safe point after a signal; never leaves the training loop."""


def check_together(world: World, check: Callable[[], None]) -> None:
    """Raises Interrupted in every process if `check` does in one; all of them call this."""
    for name in world.gather(interrupting(check)):
        if name is not None:
            raise Interrupted(name)


def interrupting(check: Callable[[], None]) -> str | None:
    """The signal for which `check` raises Interrupted; None if it does not."""
    try:
        check()
    except Interrupted as signal_name:
        return str(signal_name)
    return None


class InterruptGuard:
    """While active, the first SIGINT, SIGTERM or SIGHUP sets `requested` and does no more.

    From then on the handlers from before are back, so a second signal acts at once as it would
    have without the guard. Signals that the process ignores (SIGHUP under nohup) stay ignored.
    Outside the main thread, where Python allows no handlers, it does nothing.
    """

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self._previous: dict[signal.Signals, Handler] = {}

    def check(self) -> None:
        """Raises Interrupted if a signal came."""
        if self.requested is not None:
            raise Interrupted(self.requested.name)

    def __enter__(self) -> "InterruptGuard":
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                previous = signal.getsignal(number)
                # None: installed by C code, and not to be had back through Python.
                if previous not in (signal.SIG_IGN, None):
                    self._previous[number] = previous
                    signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        self._previous.clear()
