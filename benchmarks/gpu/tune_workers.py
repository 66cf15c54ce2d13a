"""Processes that the tuner gives its work to, so that none of it can end the tuner.

One process measures on the GPU. A kernel that accesses memory that is not its own takes the CUDA
context with it, and one may hang: such a process is replaced, and what it was asked is recorded as
failed. Many processes compile for the GPU without touching it, as kernels/check.py does; the GPU's
process finds their kernels in Triton's cache.
"""

import importlib
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.common import measure
from benchmarks.gpu import (
    gpu_timing,
    tune_attention,  # noqa: F401  (registers the cases)
    tune_lora,  # noqa: F401  (likewise)
    tune_pointwise,  # noqa: F401  (likewise)
)
from benchmarks.gpu.tune_cases import Call, Case

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
# Of compiling for a GPU that is not here.
ASSUMED = {"capability": 90, "multiprocessors": 132}
# Results may differ by a rounding to the dtype, and by the order of a sum over rows.
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 2**-6, torch.float16: 2**-8}


class WorkerError(RuntimeError):
    """What a process says it cannot do, or what became of it."""


class Worker:
    """A process that answers questions one by one; one that is lost is replaced at the next."""

    def __init__(self, make: Callable[..., Callable[[Any], Any]], *arguments: Any) -> None:
        self.make, self.arguments = make, arguments
        self.process: Any = None

    def ask(self, question: Any, seconds: float) -> Any:
        """The answer. Raises WorkerError where there is none, with the reason."""
        if self.process is None:
            self._start()
        try:
            self.connection.send(question)
            if not self.connection.poll(seconds):
                self.close()
                raise WorkerError(f"no answer after {seconds:.0f} s")
            kind, value = self.connection.recv()
        except (EOFError, OSError) as error:
            self.process.join(5)
            status = self.process.exitcode
            self.close()
            raise WorkerError(f"the process ended with status {status}") from error
        if kind != "answer":
            if kind == "lost":
                self.close()
            raise WorkerError(value)
        return value

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch"])
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(theirs, self.make, self.arguments), daemon=True
        )
        self.process.start()
        theirs.close()

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.connection.close()
        self.process = None


def _serve(
    connection: Any, make: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    answer = None
    while True:
        try:
            question = connection.recv()
        except EOFError:
            return
        try:
            answer = answer or make(*arguments)
            reply = ("answer", answer(question))
        except Exception as error:
            text = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
            reply = ("lost" if _gpu_is_lost() else "error", text)
        connection.send(reply)


def _gpu_is_lost() -> bool:
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
        torch.ones(1, device="cuda").item()
    except Exception:
        return True
    return False


class Launched:
    """The launch table with other parameters for one kernel, in this process for good."""

    def __init__(self) -> None:
        self.kernel = ""
        self.parameters: dict[str, int] = {}
        launch: Any = importlib.import_module("lora_engine.backends.triton.launch")
        shipped = launch.launch_parameters

        def chosen(kernel: str, *key: Any) -> dict[str, Any]:
            if kernel == self.kernel:
                return {"enable_fp_fusion": True, **self.parameters}
            found: dict[str, Any] = shipped(kernel, *key)
            return found

        launch.launch_parameters = chosen

    def use(self, kernel: str, parameters: Mapping[str, int]) -> None:
        self.kernel, self.parameters = kernel, dict(parameters)


class Prepared:
    """A case's call on a device, with its inputs as they were first."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.originals = [x.clone() for x in call.inplace]

    def results(self) -> tuple[Tensor, ...]:
        """What a launch writes, all of it by this launch."""
        for x in self.call.outputs:
            if x.is_floating_point():
                x.fill_(float("nan"))
        for x, original in zip(self.call.inplace, self.originals, strict=True):
            x.copy_(original)
        self.call.run()
        return self.call.outputs


def difference(found: Tensor, wanted: Tensor, looser: float = 1.0) -> str | None:
    """What is wrong with a result where it should be `wanted`; None if nothing is.

    looser: of the call.
    """
    if not wanted.is_floating_point():
        apart = (found.int() - wanted.int()).abs().max().item()  # codes: one is a rounding
        return f"codes up to {apart} apart" if apart > 1 else None
    tolerance = looser * TOLERANCE[wanted.dtype]
    a, b = found.float(), wanted.float()
    size = b.nan_to_num(0.0).square().mean().sqrt()
    off = (a - b).abs() - tolerance * b.abs()
    wrong = ~((off <= tolerance * size) | (a == b) | (a.isnan() & b.isnan()))
    if not wrong.any():
        return None
    return f"{wrong.sum().item()} of {wrong.numel()} values differ"


class Measuring:
    """Answers about launches on a device: whether parameters give the present results, and times.

    On a CPU the kernels run in Triton's interpreter, where only the path is worth anything.
    """

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        if self.device.type == "cpu":
            os.environ["TRITON_INTERPRET"] = "1"
        self.launched = Launched()
        self.gpu = gpu_timing.CudaGpu(self.device) if self.device.type == "cuda" else None
        self.case: Case | None = None

    def __call__(self, question: tuple[str, dict[str, Any]]) -> Any:
        name, arguments = question
        return getattr(self, name)(**arguments)

    def facts(self) -> dict[str, Any]:
        """What compiling for this device needs to know."""
        if self.device.type == "cpu":
            return dict(ASSUMED)
        properties = torch.cuda.get_device_properties(self.device)
        return {
            "capability": 10 * properties.major + properties.minor,
            "multiprocessors": properties.multi_processor_count,
        }

    def check(self, case: Case, present: dict[str, int], parameters: dict[str, int]) -> None:
        """ValueError unless a launch gives what it gives with the present parameters."""
        prepared = self._prepare(case, present)
        self.launched.use(case.kernel, parameters)
        for index, pair in enumerate(zip(prepared.results(), self.wanted, strict=True)):
            problem = difference(*pair, looser=prepared.call.looser)
            if problem:
                raise ValueError(f"result {index}: {problem}")

    def time(
        self,
        case: Case,
        present: dict[str, int],
        runs: dict[str, dict[str, int]],
        samples: int,
        ceiling: bool,
    ) -> dict[str, float]:
        """Seconds of a launch with each parameters, in turn; "ceiling" where it is asked for."""
        call = self._prepare(case, present).call
        thunks: dict[str, measure.Thunk] = {
            name: self._run(case, call, parameters) for name, parameters in runs.items()
        }
        if ceiling:
            thunks["ceiling"] = self._ceiling(case, call)
        if self.gpu is None:
            timings = measure.time_alternating(
                thunks, self.device, samples=samples, sample_seconds=1e-4
            )
            return {name: timing.median for name, timing in timings.items()}
        found = gpu_timing.time_alternating(thunks, self.gpu, samples=samples)
        return {name: statistics.median(seconds) for name, (seconds, _) in found.items()}

    def _run(self, case: Case, call: Call, parameters: dict[str, int]) -> measure.Thunk:
        def run() -> None:
            self.launched.use(case.kernel, parameters)
            call.run()

        return run

    def _ceiling(self, case: Case, call: Call) -> measure.Thunk:
        if call.matmuls:
            return measure.matmul_run(call.matmuls, getattr(torch, case.dtype), self.device)
        return measure.copy_run(call.bytes, self.device)

    def _prepare(self, case: Case, present: dict[str, int]) -> Prepared:
        """The case's tensors, made once while questions are about it, and its present results."""
        if self.case != case:
            self.case = self.prepared = None
            self.wanted: list[Tensor] = []
            if self.gpu is not None:
                torch.cuda.empty_cache()
            self.prepared = Prepared(case.call(self.device))
            self.launched.use(case.kernel, present)
            self.wanted = [x.clone() for x in self.prepared.results()]
            self.case = case
        assert self.prepared is not None
        return self.prepared


class Compiling:
    """Compiles a line's calls with other parameters, and says what kernels/check.py would."""

    def __init__(self, capability: int, multiprocessors: int) -> None:
        sys.path.insert(0, str(KERNELS))
        self.check = importlib.import_module("check_compile")
        self.check.load_kernels()
        self.capability, self.multiprocessors = capability, multiprocessors

    def __call__(self, question: tuple[list[Case], dict[str, int]]) -> list[str]:
        """The faults of these launches, each a line."""
        cases, parameters = question
        problems: dict[str, None] = {}
        for case in cases:
            call = case.call(torch.device("meta"))
            with (
                self._with(case.kernel, parameters),
                self.check.recorded(self.capability, compile=True) as recording,
            ):
                call.run()
            for launch in recording.launches:
                row = self.check.examine(launch, self.capability, matrix=None)
                problems |= dict.fromkeys(row.problems)
        return list(problems)

    @contextmanager
    def _with(self, kernel: str, parameters: dict[str, int]) -> Iterator[None]:
        """The kernel's line with these parameters, on as many multiprocessors as the GPU has."""
        tables = importlib.import_module("lora_engine.backends.tables")
        shipped = tables.launch_parameters

        def chosen(key: Any) -> dict[str, int]:
            if key.kernel == kernel:
                return {"enable_fp_fusion": True, **parameters}
            found: dict[str, int] = shipped(key)
            return found

        with mock.patch.object(tables, "launch_parameters", chosen):
            # How many programs share the rows is an argument, and its divisibility by 16 makes
            # another kernel. Modules import the function by its name.
            for name, module in list(sys.modules.items()):
                here = name.startswith("lora_engine.backends.triton.")
                if here and hasattr(module, "multiprocessors"):
                    vars(module)["multiprocessors"] = lambda device: self.multiprocessors
            yield
