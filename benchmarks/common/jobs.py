"""Whole steps beside other trainers: what a job is, and the one runner of all of them.

Every contender runs in a process of its own, so that its peak memory is its own, in turn, round
after round, so that a busy machine hits all alike. The first round also says who computes what it
should: a contender whose first loss is not the expected one is left out of the rounds that follow.
"""

import importlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import psutil

from benchmarks.common import measure
from benchmarks.common.steps import Result
from lora_engine import openmp
from lora_engine.errors import UserError, nearest

ROOT = Path(__file__).resolve().parents[2]
WORKER = "benchmarks.common.worker"
CEILING = "torch.mm"  # the contender that measures the machine
MODULES = {
    "sft": "benchmarks.train.train_job",
    "write": "benchmarks.train.write_job",
    "grpo": "benchmarks.train.grpo_job",
    "dpo": "benchmarks.train.dpo_job",
    "length": "benchmarks.train.length_job",
}
OF_THE_RUNTIME = "300000"  # turns that a thread of GNU's OpenMP spins unless told otherwise
SECONDS_OF_LOOKING = 0.5
MOST_USED_BY_OTHERS = 20.0  # per cent of all cores, on a machine that counts as idle
Options: TypeAlias = dict[str, Any]
Facts: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A whole step that several contenders do alike.

    what: one sentence for whoever reads the results.
    options: what can be set, with its default. Each job has model, dtype, device, steps, warmup,
        rounds; warmup steps come before the timed ones.
    contenders: what each is. default: those that run unless others are asked for.
    packages: the distribution that a contender needs, where it is not installed with lora_engine.
    prepare: draws the work into a folder, once for all; its facts say what it is:
        unit, amounts (of each step, warm-up included), text; where known also flops of each step,
        expected (the first step's loss in float32, by point).
    run: a contender's steps, in a process of its own.
    rate: flop/s of torch.mm on the model's own shapes, in a process of its own; None: not of use.
    points: the option that has several values, each of which is measured; "": none.
    value: what a step's `loss` is, where it is something else.
    tolerance: how far from the expected value a first one may be, relative, by dtype.
    """

    name: str
    what: str
    options: Mapping[str, Any]
    contenders: Mapping[str, str]
    default: tuple[str, ...]
    prepare: Callable[[Path, Options], Facts]
    run: Callable[[Path, Options, str], Result]
    rate: Callable[[Path, Options], dict[str, float]] | None = None
    points: str = ""
    value: str = "loss of its first step"
    packages: Mapping[str, str] = field(default_factory=dict)
    tolerance: Mapping[str, float] = field(
        default_factory=lambda: {"float32": 1e-3, "bfloat16": 2e-2}
    )


COMMON: Options = {
    "model": "smollm2",
    "dtype": "bfloat16",
    "device": "cpu",
    "steps": 3,
    "warmup": 1,
    "rounds": 2,
    "seed": 0,
}
DTYPES = ("bfloat16", "float32")


def job_of(name: str) -> Job:
    """The job of that name, with what it imports."""
    job: Job = importlib.import_module(MODULES[name]).JOB
    return job


def options_of(job: Job, words: Mapping[str, str]) -> tuple[Options, tuple[str, ...]]:
    """The job's options with what the user set, and the contenders' names.

    UserError for a setting or a contender that the job has not.
    """
    options = dict(job.options)
    names = list(job.default)
    for key, text in words.items():
        if key == "contenders":
            names = text.split(",")
            for name in names:
                if name not in job.contenders:
                    known = ", ".join(job.contenders)
                    raise UserError(f"contenders={text}: no contender {name!r}; there is {known}")
        elif key not in options:
            near = nearest(key, [*options, "contenders"])
            hint = f"; did you mean {near}?" if near else f"; there is {', '.join(options)}"
            raise UserError(f"{key}={text}: {job.name} has no setting {key!r}{hint}")
        else:
            options[key] = _value(key, text, options[key])
    if options["dtype"] not in DTYPES:
        raise UserError(f"dtype={options['dtype']}: expected one of {', '.join(DTYPES)}")
    if options["device"] not in ("cpu", "cuda"):
        raise UserError(f"device={options['device']}: expected cpu or cuda")
    if len(set(names)) < len(names):
        raise UserError(f"contenders={','.join(names)}: one is named twice")
    return options, tuple(names)


def _value(key: str, text: str, default: Any) -> Any:
    if isinstance(default, str):
        return text
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{key}={text}: expected a whole number") from None
    if any(value < (0 if key == "seed" else 1) for value in values):
        raise UserError(f"{key}={text}: expected at least 1")
    if isinstance(default, list):
        return values
    if len(values) > 1:
        raise UserError(f"{key}={text}: expected one number")
    return values[0]


@dataclass
class Measured:
    """A job's results.

    facts: of its preparation. rounds: by contender and point, a result a round.
    failures: what is wrong with ours. notes: who was left out, and why; how threads waited.
    """

    job: Job
    options: Options
    facts: Facts
    rounds: dict[str, dict[str, list[dict[str, Any]]]]
    rates: list[dict[str, float]]
    failures: list[str]
    notes: list[str]
    environment: Mapping[str, str]  # of peers


def measure_job(
    job: Job,
    options: Options,
    names: Sequence[str],
    folder: Path,
    tell: Callable[[str], None],
    deadline: float = math.inf,
) -> Measured:
    """Runs the contenders in turn; no round but the first begins after `deadline` (monotonic)."""
    given, how = environment_of_peers()
    facts = job.prepare(folder, options)
    (folder / "options.json").write_text(json.dumps(options))
    measured = Measured(job, options, facts, {name: {} for name in names}, [], [], [], given)
    measured.notes += [how] if how else []
    points = [str(x) for x in options[job.points]] if job.points else [""]
    for number in range(options["rounds"]):
        if number and time.monotonic() > deadline:
            measured.notes.append(f"{number} of {options['rounds']} rounds: the time was over")
            break
        if job.rate is not None:
            try:
                measured.rates.append(_run(job, CEILING, "", folder, measured.environment))
            except _FailedError as error:
                measured.notes.append(f"{CEILING} was not measured: {error}")
        for point in points:
            for name in list(measured.rounds):
                _measure_one(measured, name, point, folder, tell, number)
    return measured


def _measure_one(
    measured: Measured,
    name: str,
    point: str,
    folder: Path,
    tell: Callable[[str], None],
    number: int,
) -> None:
    job, options = measured.job, measured.options
    where = f"{job.name} {point}".strip()
    try:
        given = os.environ if _is_ours(name) else measured.environment
        result = _run(job, name, point, folder, given)
        wrong = _what_is_wrong(measured, result, point)
    except _FailedError as error:
        wrong = str(error)
    if wrong:
        line = f"{where}: {name} left out: {wrong}"
        tell(line)
        (measured.failures if _is_ours(name) else measured.notes).append(line)
        del measured.rounds[name]
        return
    measured.rounds[name].setdefault(point, []).append(result)
    seconds = [step["seconds"] for step in result["steps"][options["warmup"] :]]
    tell(
        f"{where}: round {number + 1} of {options['rounds']}, {name}: "
        f"{statistics.median(seconds):.2f} s a step, "
        f"{result['peak_bytes'] / 2**30:.2f} GiB"
    )


def _is_ours(name: str) -> bool:
    return name.partition("-")[0] == "ours"


def _what_is_wrong(measured: Measured, result: dict[str, Any], point: str) -> str:
    """Why a result is not to be timed; "" if it is what is expected."""
    options, found = measured.options, result["steps"][0]["loss"]
    if len(result["steps"]) != options["warmup"] + options["steps"]:
        return f"made {len(result['steps'])} steps"
    if not math.isfinite(found):
        return f"the {measured.job.value} is {found}"
    expected = measured.facts.get("expected", {}).get(point)
    if expected is None:
        return ""
    tolerance = measured.job.tolerance[options["dtype"]]
    if abs(found - expected) <= tolerance * abs(expected):
        return ""
    return f"the {measured.job.value} is {found:.4f}, expected {expected:.4f}"


class _FailedError(Exception):
    """A contender's process ended with an error; the message is its last line."""


def _run(job: Job, name: str, point: str, folder: Path, given: Mapping[str, str]) -> Any:
    out = folder / "result.json"
    out.unlink(missing_ok=True)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**given, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", WORKER, job.name, name, str(folder), point]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, errors="replace"
    )
    if done.returncode or not out.exists():
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        last = lines[-1] if lines else f"exit status {done.returncode}"
        raise _FailedError(last[:300])
    return json.loads(out.read_text())


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


def rows_of(measured: Measured) -> list[dict[str, Any]]:
    """A row of results for each contender and point.

    Rates are medians over all timed steps of all rounds. `compared` has the contender's time, its
    processor's time and its memory over ours of the same step of the same round.
    """
    return [
        _row(measured, name, point, rounds)
        for name, points in measured.rounds.items()
        for point, rounds in points.items()
    ]


def _row(
    measured: Measured, name: str, point: str, rounds: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    options, facts, job = measured.options, measured.facts, measured.job
    warmup = options["warmup"]
    seconds, cpu = (_timed(rounds, warmup, kind) for kind in ("seconds", "cpu_seconds"))
    amounts = facts["amounts"][point][warmup:] * len(rounds)
    row: dict[str, Any] = {
        "case": job.name,
        "size": f"{options['model']} {point}".strip(),
        "dtype": options["dtype"],
        "device": options["device"],
        "pass": "step",
        "implementation": name,
        "seconds": asdict(measure.Timing.of(seconds)),
        "cpu_seconds": asdict(measure.Timing.of(cpu)),
        "rates": spread([a / s for a, s in zip(amounts, seconds, strict=True)]),
        "unit": facts["unit"],
        "loaded_bytes": statistics.median(r["loaded_bytes"] for r in rounds),
        "peak_bytes": max(r["peak_bytes"] for r in rounds),
        "training_bytes": max(r["peak_training_bytes"] for r in rounds),
        "calls": rounds[0]["calls"],
        "losses": [step["loss"] for step in rounds[0]["steps"]],
    }
    row["rate"] = row["rates"]["median"]
    if point:
        row["x"] = int(point)
    if measured.rates and "flops" in facts:
        flops = facts["flops"][point][warmup:] * len(rounds)
        row["ceiling"] = statistics.median(r["flops_per_second"] for r in measured.rates)
        achieved = statistics.median(f / s for f, s in zip(flops, seconds, strict=True))
        row["share_of_ceiling"] = achieved / row["ceiling"]
    ours = measured.rounds.get("ours", {}).get(point)
    if name != "ours" and ours and len(ours) == len(rounds):
        our_seconds, our_cpu = (_timed(ours, warmup, k) for k in ("seconds", "cpu_seconds"))
        row["compared"] = {
            "times_as_long": spread([a / b for a, b in zip(seconds, our_seconds, strict=True)]),
            "times_the_cpu": spread([a / b for a, b in zip(cpu, our_cpu, strict=True)]),
            "our_share_of_memory": max(r["peak_bytes"] for r in ours) / row["peak_bytes"],
        }
    return row


def _timed(rounds: Sequence[dict[str, Any]], warmup: int, kind: str) -> list[float]:
    return [step[kind] for r in rounds for step in r["steps"][warmup:]]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}
