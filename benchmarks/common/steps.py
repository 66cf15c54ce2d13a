"""One contender's steps, measured in a process of its own: time, processor time, memory, calls."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.common import measure


@dataclass(frozen=True)
class Step:
    """One step: wall time, fetching and preparing its batch included.

    cpu_seconds: processor time of all threads. Well under `seconds` times their number, either
        the step left cores idle or others had them.
    loss: or another number that shows that the step was right.
    """

    seconds: float
    cpu_seconds: float
    loss: float


@dataclass(frozen=True)
class Result:
    """steps: all steps, warm-up included.

    loaded_bytes: held once the model and its adapters are in memory.
    peak_bytes: most that was held, loading included.
    peak_training_bytes: most that was held from the first step on.
    calls: of torch's operators in the first step, or launches on a GPU; None: not counted.
    """

    contender: str
    steps: list[Step]
    loaded_bytes: int
    peak_bytes: int
    peak_training_bytes: int
    calls: int | None = None


class Stopwatch:
    """Measures step after step, and the peak of memory from its creation on.

    Bytes are the process's on a CPU, and those of tensors on a GPU.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cpu")
        self._peak_before = measure.peak_bytes(self.device)
        measure.reset_peak(self.device)
        self.calls: int | None = None
        self._last = self._times()

    def step(self, loss: float) -> Step:
        """The step since the last one, or since the creation."""
        (wall, cpu), self._last = self._last, self._times()
        return Step(self._last[0] - wall, self._last[1] - cpu, loss)

    def result(self, contender: str, steps: list[Step], loaded_bytes: int) -> Result:
        peak = measure.peak_bytes(self.device)
        highest = max(peak, self._peak_before)
        return Result(contender, steps, loaded_bytes, highest, peak, self.calls)

    def watch(self, losses: Iterable[float]) -> list[Step]:
        """A step for each loss that comes; the first step's calls are counted."""
        steps, source = [], iter(losses)
        while True:
            counter = measure.CallCounter() if not steps and self.device.type == "cpu" else None
            with counter or nullcontext():
                loss = next(source, None)
            if loss is None:
                return steps
            if counter is not None:
                self.calls = counter.calls
            steps.append(self.step(loss))

    def _times(self) -> tuple[float, float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter(), time.process_time()


def step_recorder(device: torch.device | None = None, *, count_calls: bool = True) -> Any:
    """A callback of transformers' trainers: `watch` is a Stopwatch from the start of training,
    `steps` what it measured."""
    from transformers import TrainerCallback

    class StepRecorder(TrainerCallback):
        def __init__(self) -> None:
            self.steps: list[Step] = []
            self.watch: Stopwatch
            self.counter: measure.CallCounter | None = None

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.watch = Stopwatch(device)

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if count_calls and not self.steps and self.watch.device.type == "cpu":
                self.counter = measure.CallCounter()
                self.counter.__enter__()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if self.counter is not None:
                self.counter.__exit__(None, None, None)
                self.watch.calls, self.counter = self.counter.calls, None

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" in logs:  # after every step; the summary at the end has another key
                self.steps.append(self.watch.step(logs["loss"]))

    return StepRecorder()


def repeated(step: Callable[[int], float], count: int) -> Iterator[float]:
    """What `step` gives for 0, 1, … count - 1."""
    for number in range(count):
        yield step(number)
