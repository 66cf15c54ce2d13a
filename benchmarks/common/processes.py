"""Contenders of whole steps as processes: started, waited for, and what became of them."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from lora_engine import openmp

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).parent / "worker"
OF_THE_RUNTIME = "300000"  # turns that a thread of GNU's OpenMP spins unless told otherwise
OVER = "the time was over; --minutes gives more"
SECONDS_OF_LOOKING = 0.5
MOST_USED_BY_OTHERS = 20.0  # per cent of all cores, on a machine that counts as idle


class FailedError(Exception):
    """A contender's process ended with an error; the message says which."""


class OutOfTimeError(Exception):
    """A contender had not begun, or not ended, when the time was over."""


def run(
    job: str, name: str, point: str, folder: Path, given: Mapping[str, str], deadline: float
) -> Any:
    """What a contender's process measured.

    given: its environment. deadline: monotonic; it is stopped then.
    """
    left = deadline - time.monotonic()
    if left <= 0:
        raise OutOfTimeError(f"not measured, {OVER}")
    out = folder / "result.json"
    out.unlink(missing_ok=True)
    paths = [ROOT, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    more = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [sys.executable, str(WORKER), job, name, str(folder), point]
    try:
        done = subprocess.run(
            command,
            env={**given, **more},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=left if math.isfinite(left) else None,
        )
    except subprocess.TimeoutExpired:
        raise OutOfTimeError(f"stopped, {OVER}") from None
    if done.returncode < 0:
        raise FailedError(_of_signal(-done.returncode))
    found = json.loads(out.read_text()) if out.exists() else {}
    if done.returncode or not found:
        raise FailedError(found.get("failed") or _last_line(done.stderr, done.returncode))
    return found


def _of_signal(number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    why = ", as where memory runs out" if number == signal.SIGKILL else ""
    return f"its process was killed by {name}{why}"


def _last_line(said: str, status: int) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return (lines[-1] if lines else f"exit status {status}")[:300]


def environment_of_peers() -> tuple[dict[str, str], str]:
    """Variables for the processes of peers, and a note for the page where they are not the usual.

    On an idle machine they wait as their users have it: GNU's OpenMP spins for milliseconds by
    itself. Beside other programs that would cost them most of their time (lora_engine/openmp.py):
    there they wait as ours do, and so does everybody where the user has said how.
    """
    if openmp.waiting().policy != "brief":
        return dict(os.environ), f"threads of all: {openmp.waiting()}"
    if psutil.cpu_percent(interval=SECONDS_OF_LOOKING) > MOST_USED_BY_OTHERS:
        return dict(os.environ), "other programs were busy: threads of peers wait as ours do"
    others = {name: value for name, value in os.environ.items() if name not in openmp.OURS}
    others["GOMP_SPINCOUNT"] = OF_THE_RUNTIME
    return others, ""
