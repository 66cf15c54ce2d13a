"""One training step on a GPU: ours beside transformers and PEFT, with weights drawn on the GPU.

    python -m benchmarks.gpu.train_step --out results/train_step --minutes 3
    python -m benchmarks.gpu.train_step --jobs llama-8b:lora:rows --contenders ours,peft

A job is a model, a method and a batch, in order of importance by default. Its contenders train the
same weights on the same batch one after the other, and have to have the same losses. Results are
on the disk as they come; with --append what the file says was begun is left out. Exit status 1 if
a contender failed or losses differ, 3 if the GPU was lost to the process: run it again for what is
left.
"""

import argparse
import gc
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.common import measure, output
from benchmarks.common.journal import Journal, read, started
from benchmarks.gpu import step_models, step_packed, step_profile, step_report
from benchmarks.gpu.step_contenders import NAMES, Contender, Job, contenders_of
from benchmarks.train import train_flops

DEVICE_LOST = 3
JOBS = (
    "llama-1b:lora:rows",
    "llama-8b:lora:rows",
    "llama-8b:qlora:rows",
    "llama-1b:full:rows",
    "llama-1b:lora:mixed",
    "llama-8b:lora:mixed",
    "qwen3-0.6b:lora:rows",
)
DRY_JOBS = ("tiny:lora:tiny", "tiny:lora:tiny-mixed", "tiny:qlora:tiny", "tiny:full:tiny")
LONGEST_MESSAGE = 400


class Name(NamedTuple):
    """A job's parts, as in llama-8b:lora:rows."""

    model: str
    method: str
    batch: str

    @staticmethod
    def of(text: str) -> "Name":
        parts = text.split(":")
        if len(parts) != len(Name._fields):
            raise ValueError(f"{text} is not MODEL:METHOD:BATCH")
        name = Name(*parts)
        if name.model not in step_models.MODELS or name.batch not in step_models.BATCHES:
            raise ValueError(
                f"{text}: models are {', '.join(step_models.MODELS)}, "
                f"batches {', '.join(step_models.BATCHES)}"
            )
        if name.method not in ("lora", "qlora", "full"):
            raise ValueError(f"{text}: the method is lora, qlora or full")
        return name


class DeviceLostError(RuntimeError):
    """The GPU answers this process no longer."""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=_jobs, help=f"of {', '.join(JOBS)} (default: all)")
    parser.add_argument("--model", help="only jobs of these models, by commas")
    parser.add_argument("--contenders", type=_contenders, help="by commas (default: all)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="timed steps")
    parser.add_argument("--rounds", type=int, default=1, help="turns of each contender")
    parser.add_argument("--minutes", type=float, default=60.0, help="nothing begins after them")
    parser.add_argument("--append", type=Path, metavar="FILE", help="results as they come")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    parser.add_argument(
        "--no-host", action="store_true", help="leave out the host's time, which compiles kernels"
    )
    parser.add_argument("--profile", action="store_true", help="print each step's kernels by time")
    args = parser.parse_args(argv)
    if args.jobs is None:
        args.jobs = [Name.of(x) for x in (JOBS if args.device.startswith("cuda") else DRY_JOBS)]
    if args.model:
        args.jobs = [job for job in args.jobs if job.model in args.model.split(",")]
    return args


def _jobs(text: str) -> list[Name]:
    try:
        return [Name.of(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _contenders(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in NAMES]:
        raise argparse.ArgumentTypeError(f"no contender {', '.join(unknown)}; there are {NAMES}")
    return names


class Run:
    """One run of the benchmark: what it has done, and how much time is left."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, torch.device(args.device)
        self.log, self.done = Journal(args.append), started(args.append)
        self.ends = time.monotonic() + 60 * args.minutes
        self.entries: list[dict[str, Any]] = [] if args.append is None else read(args.append)
        self.add("context", **output.context())

    def add(self, event: str, **fields: Any) -> None:
        self.log.add(event, **fields)
        self.entries.append({"event": event, **fields})

    def job(self, name: Name) -> None:
        """All contenders of a job that were not begun yet."""
        batch = step_models.make_batch(
            name.batch, step_models.MODELS[name.model].vocab, self.device
        )
        contenders = contenders_of(name.method, batch)
        wanted = self.args.contenders or list(contenders)
        turns = [
            (contender, {**name._asdict(), "contender": contender, "round": number})
            for number in range(1, self.args.rounds + 1)
            for contender in contenders
            if contender in wanted
        ]
        turns = [(contender, item) for contender, item in turns if item not in self.done]
        job: Job | None = None
        for contender, item in turns:
            if time.monotonic() > self.ends:
                return
            try:
                job = job or self._build(name, batch)
                self._turn(item, contenders[contender], job, name)
            except torch.OutOfMemoryError:
                self._unfit(item, "does not fit into the GPU's memory")
            except ModuleNotFoundError as error:
                if error.name != "bitsandbytes":
                    raise
                self._unfit(item, "bitsandbytes is not installed")
            except Exception as error:
                self._failed(item, error)
            if self.device.type == "cuda":
                _collect()
        job = None
        if self.device.type == "cuda":
            _collect()

    def _build(self, name: Name, batch: step_models.Batch) -> Job:
        begun = time.monotonic()

        def make() -> Any:
            model = step_models.make_model(name.model, self.device)
            if name.method == "qlora":
                step_packed.round_to_nf4(model)
            return model if name.method == "full" else step_models.add_adapters(model)

        model = make()
        _synchronize(self.device)
        seconds = time.monotonic() - begun
        rate = self._gemm_rate(name, batch)
        job = Job(name.method, make, model, step_models.Snapshot(model), batch)
        facts = step_models.facts(name.model, batch)
        self.add("job", job=name._asdict(), build_seconds=seconds, gemm_rate=rate, **facts)
        return job

    def _gemm_rate(self, name: Name, batch: step_models.Batch) -> float:
        """Operations a second of torch.mm on the model's frozen products, at its best."""
        shape = step_models.MODELS[name.model]
        layer = train_flops.layer_matmuls(shape, batch.tokens)
        timing = measure.time_alternating(
            {"": measure.matmul_run(layer, torch.bfloat16, self.device)}, self.device, samples=5
        )[""]
        return sum(matmul.flops for matmul in layer) / timing.median

    def _turn(self, item: dict[str, Any], contender: Contender, job: Job, name: Name) -> None:
        self.add("start", item=item)
        begun = time.monotonic()
        host_batch = None
        if not self.args.no_host and item["round"] == 1:
            vocab = step_models.MODELS[name.model].vocab
            host_batch = step_models.make_batch("host", vocab, self.device)
        row = measure_steps(
            contender,
            job,
            self.device,
            warmup=self.args.warmup,
            steps=self.args.steps,
            host_batch=host_batch,
            profiled=item["round"] == 1,
        )
        self.add("row", item=item, flops=_flops(name, job.batch), **row)
        self.add("end", item=item)
        print(
            f"{_text(item)}: {row['wall_seconds'] * 1e3:.1f} ms a step, "
            f"{time.monotonic() - begun:.0f} s in all",
            file=sys.stderr,
        )
        if self.args.profile and row.get("profile"):
            print(step_profile.render(row["profile"]))

    def _unfit(self, item: dict[str, Any], message: str) -> None:
        self.add("unfit", item=item, message=message)
        print(f"{_text(item)}: {message}", file=sys.stderr)

    def _failed(self, item: dict[str, Any], error: Exception) -> None:
        message = _message(error)
        where = "".join(traceback.format_exception(error))[-3000:]
        self.add("failure", item=item, message=message, traceback=where)
        print(f"{_text(item)}: {where}", file=sys.stderr)
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize()
            except RuntimeError as lost:
                raise DeviceLostError(f"{_text(item)}: {lost}") from lost


def measure_steps(
    contender: Contender,
    job: Job,
    device: torch.device,
    *,
    warmup: int,
    steps: int,
    host_batch: step_models.Batch | None = None,
    profiled: bool = True,
) -> dict[str, Any]:
    """A contender's steps: time, memory, losses; on a GPU also its kernels and the host's time.

    wall_seconds: a step's share of the time from the first to the end of the last. gpu_seconds: of
    each, between events on the GPU. peak_bytes: most memory that tensors took, from the set-up on;
    held_bytes: before it. host_seconds: a step of few tokens, for which the GPU waits for the host.
    """
    gpu, begun = device.type == "cuda", time.perf_counter()
    if gpu:
        torch.cuda.synchronize()
    with contender.setup(job) as step:
        _synchronize(device)
        row: dict[str, Any] = {"setup_seconds": time.perf_counter() - begun}
        if gpu:
            row["held_bytes"] = torch.cuda.memory_allocated() - job.start.nbytes
            torch.cuda.reset_peak_memory_stats()
        results = [step()]
        _synchronize(device)
        row["first_step_seconds"] = time.perf_counter() - begun - row["setup_seconds"]
        results += [step() for _ in range(warmup - 1)]
        _synchronize(device)
        events = [_event()] if gpu else []
        start = time.perf_counter()
        for _ in range(steps):
            results.append(step())
            if gpu:
                events.append(_event())
        _synchronize(device)
        row["wall_seconds"] = (time.perf_counter() - start) / steps
        row["gpu_seconds"] = [a.elapsed_time(b) / 1e3 for a, b in pairwise(events)]
        row["losses"] = [float(loss) for loss, _ in results]
        row["norms"] = [float(norm) for _, norm in results]
        row["tokens_per_second"] = job.batch.tokens / row["wall_seconds"]
        if gpu:
            # The values that the next contender begins with are no part of a training.
            row["peak_bytes"] = torch.cuda.max_memory_allocated() - job.start.nbytes
            row["reserved_bytes"] = torch.cuda.max_memory_reserved()
        more: dict[str, Callable[[], Any]] = {}
        if gpu and profiled:
            more["profile"] = lambda: step_profile.summarise(step_profile.intervals(step))
        if host_batch is not None:
            more["host_seconds"] = lambda: _host_seconds(step, job, device, host_batch)
        row["failed"] = {}
        for key, measured in more.items():
            try:
                row[key] = measured()
            except Exception as error:  # the steps were timed
                row["failed"][key] = _message(error)
    row["report"] = dict(job.report)
    job.report.clear()
    return row


def _host_seconds(step: Any, job: Job, device: torch.device, batch: step_models.Batch) -> float:
    whole, job.batch = job.batch, batch
    try:
        for _ in range(2):
            step()
        _synchronize(device)
        start = time.perf_counter()
        for _ in range(3):
            step()
        _synchronize(device)
        return (time.perf_counter() - start) / 3
    finally:
        job.batch = whole


def _flops(name: Name, batch: step_models.Batch) -> int:
    shape, pieces = step_models.MODELS[name.model], [(0, n) for n in batch.lengths]
    if name.method == "full":
        return train_flops.full_step_flops(shape, pieces, batch.targets)
    return train_flops.step_flops(shape, step_models.RANK, pieces, batch.targets)


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _collect() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def _message(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:LONGEST_MESSAGE]


def _text(item: dict[str, Any]) -> str:
    return " ".join(map(str, item.values()))


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    run = Run(args)
    lost = False
    for name in args.jobs:
        if time.monotonic() > run.ends:
            break
        try:
            run.job(name)
        except DeviceLostError as error:
            print(error, file=sys.stderr)
            lost = True
            break
    text = step_report.render(run.entries)
    print(text)
    if args.profile:
        text = "\n\n".join([text, *step_report.profiles(run.entries)])
    if args.out:
        context = next(x for x in reversed(run.entries) if x["event"] == "context")
        for path in output.write(args.out, {**context, "entries": run.entries}, text):
            print(f"wrote {path}", file=sys.stderr)
    if lost:
        return DEVICE_LOST
    return 1 if step_report.problems(run.entries) else 0


if __name__ == "__main__":
    sys.exit(main())
