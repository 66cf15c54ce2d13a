"""`train --nproc N`: starts the processes of a run on this machine, and ends them together.

Each process is `lora_engine.app.rank`, told by torchrun's variables which one it is. Signals are
passed on to all; a process that ends with an error ends the others.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from lora_engine.app.failures import FAILED

POLL = 0.1  # seconds
# What is left to a process to end by itself after another one failed, and after SIGTERM then.
# Together they are less than the 30 s in which a dead process ends the run.
PATIENCE = 8.0
INSISTENCE = 6.0

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def launch(count: int, arguments: Sequence[str]) -> tuple[int, str]:
    """Run the command line `arguments` in `count` processes.

    Returns the exit status, and a line about what no process could tell itself, or "".
    """
    processes: list[subprocess.Popen[bytes]] = []
    address = f"{_free_port()}"
    try:
        with _passed_on(processes) as came:
            processes += [_start(rank, count, address, arguments) for rank in range(count)]
            _wait(processes)
            killed = _end_others(processes)
    finally:
        for process in processes:
            process.kill()
    return _outcome([process.returncode for process in processes], killed, bool(came))


def _start(rank: int, count: int, port: str, arguments: Sequence[str]) -> "subprocess.Popen[bytes]":
    """One process. Its standard input ends when this one does, however that is."""
    threads = str(max(1, (os.cpu_count() or 1) // count))
    place = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads),
        # Of lost connections this program tells itself.
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
        "PYTHONSAFEPATH": "1",  # modules of the working folder hide none of Python's
    }
    return subprocess.Popen(
        [sys.executable, "-m", "lora_engine.app.rank", *arguments],
        stdin=subprocess.PIPE,
        env={**os.environ, **place},
        start_new_session=True,  # a terminal's Ctrl-C comes to this process, and once
    )


def _wait(processes: "Sequence[subprocess.Popen[bytes]]") -> None:
    """Until all have ended, or one has failed."""
    while any(process.poll() is None for process in processes):
        if any(process.returncode for process in processes):
            return
        time.sleep(POLL)


def _end_others(processes: "Sequence[subprocess.Popen[bytes]]") -> bool:
    """Waits for those that still run after a failure; whether any had to be killed."""
    for seconds, number in ((PATIENCE, signal.SIGTERM), (INSISTENCE, signal.SIGKILL)):
        until = time.monotonic() + seconds
        while any(process.poll() is None for process in processes) and time.monotonic() < until:
            time.sleep(POLL)
        running = [process for process in processes if process.poll() is None]
        for process in running:
            process.send_signal(number)
    for process in processes:
        process.wait()
    return bool(running)


def _outcome(codes: Sequence[int], killed: bool, interrupted: bool) -> tuple[int, str]:
    """The exit status: the first process's, which speaks for all, or that of one that failed."""
    dead = [rank for rank, code in enumerate(codes) if code < 0]
    line = ""
    if dead and not interrupted and (codes[0] < 0 or killed):
        name = signal.Signals(-codes[dead[0]]).name
        line = f"process {dead[0]} was ended by {name}, and the others with it"
    failed = [code for code in codes if code]
    status = codes[0] or (failed[0] if failed else 0)
    return (status if status >= 0 else FAILED), line


@contextmanager
def _passed_on(processes: "Sequence[subprocess.Popen[bytes]]") -> Iterator[list[int]]:
    """Within, signals go to the processes; yields the numbers of those that came."""
    came: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        came.append(number)
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    before = {n: signal.getsignal(n) for n in _FORWARDED}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, pass_on)
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])
