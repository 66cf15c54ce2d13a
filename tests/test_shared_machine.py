"""Training beside other busy programs keeps its fair share of the processors.

Two threads train on two cores, first alone, then beside four that are always busy. The fair share
is what each of those four gets of a core, about a third: measured, since whatever else the machine
does takes its part as well.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import pytest

from lora_engine import openmp

BUSY = 4
LEAST = 0.7  # of the throughput that the fair share would give
TRIES = 3
SECONDS = 2.0

# Asked with a number of seconds, it answers with the steps it made in them and their time.
TRAINING = """
import sys, time
{imports}
torch.set_num_threads(2)
from lora_engine.testing import tiny_llama, with_lora
model = tiny_llama(hidden_size=256, intermediate_size=512, vocab_size=1000, dtype=torch.bfloat16)
model = with_lora(model)
lora_engine.accelerate(model)
ids = torch.arange(256).unsqueeze(0)

def step():
    model(input_ids=ids, labels=ids).loss.backward()

step()
print("ready", flush=True)
for line in sys.stdin:
    steps, begin = 0, time.perf_counter()
    while (passed := time.perf_counter() - begin) < float(line):
        step()
        steps += 1
    print(steps / passed, flush=True)
"""


@pytest.fixture
def two_cores() -> Iterator[None]:
    """This process, and those it starts, on two cores."""
    before = os.sched_getaffinity(0)
    if len(before) < 2:
        pytest.skip("needs two cores: on one the runtime lets threads sleep anyway")
    os.sched_setaffinity(0, sorted(before)[:2])
    yield
    os.sched_setaffinity(0, before)


@contextmanager
def training(imports: str) -> Iterator["subprocess.Popen[str]"]:
    kept = {k: v for k, v in os.environ.items() if k not in openmp.USERS_VARIABLES}
    with subprocess.Popen(
        [sys.executable, "-c", TRAINING.format(imports=imports)],
        env={**kept, "OMP_NUM_THREADS": "2"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert answer(process.stdout) == "ready"
            yield process
        finally:
            process.kill()


@contextmanager
def busy_threads(count: int) -> Iterator[list["subprocess.Popen[str]"]]:
    loop = [sys.executable, "-S", "-c", "print(flush=True)\nwhile True: pass"]
    processes = [subprocess.Popen(loop, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    try:
        for process in processes:
            answer(process.stdout)
        yield processes
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.communicate()


def answer(stream: IO[str] | None) -> str:
    assert stream is not None
    return stream.readline().strip()


def steps_per_second(process: "subprocess.Popen[str]") -> float:
    assert process.stdin is not None
    print(SECONDS, file=process.stdin, flush=True)
    return float(answer(process.stdout))


def processor_seconds(process: "subprocess.Popen[str]") -> float:
    """What a process without threads has used so far, in its own code."""
    with open(f"/proc/{process.pid}/stat", encoding="ascii") as file:
        user_ticks = int(file.read().rpartition(")")[2].split()[11])
    return user_ticks / os.sysconf("SC_CLK_TCK")


def beside_others(process: "subprocess.Popen[str]") -> tuple[float, float]:
    """Steps per second beside busy threads, and the part of a core that those got each."""
    with busy_threads(BUSY) as others:
        begin, used = time.perf_counter(), sum(map(processor_seconds, others))
        rate = steps_per_second(process)
        used = sum(map(processor_seconds, others)) - used
        return rate, used / BUSY / (time.perf_counter() - begin)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="binds threads to cores and reads /proc")
@pytest.mark.parametrize("imports", ["import lora_engine, torch", "import torch, lora_engine"])
def test_a_busy_machine_leaves_training_its_fair_share(two_cores, imports) -> None:
    alone, found = 0.0, []
    with training(imports) as process:
        for _ in range(TRIES):
            alone = max(alone, steps_per_second(process))
            rate, share = beside_others(process)
            found.append(rate / (alone * share))
            if found[-1] >= LEAST:
                return
    pytest.fail(f"beside {BUSY} busy threads, of the throughput that is fair: {found}")
