"""Whole steps beside other trainers: what a job is, and the one runner of all of them.

Every contender runs in a process of its own, so that its peak memory is its own, in turn, round
after round, so that a busy machine hits all alike. Each process also shows that it computes what it
should: a contender whose losses are not the expected ones is left out.
"""

import importlib
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks.common import processes
from benchmarks.common.steps import Result
from lora_engine.errors import UserError, nearest

CEILING = "torch.mm"  # the contender that measures the machine
MODULES = {
    "sft": "benchmarks.train.train_job",
    "write": "benchmarks.train.write_job",
    "grpo": "benchmarks.train.grpo_job",
    "dpo": "benchmarks.train.dpo_job",
    "length": "benchmarks.train.length_job",
}
# Of what the second step's loss falls by, in float32, how much a contender may be away from there.
AWAY = 0.5
SMALLEST = 1e-3  # relative, added to that
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
        expected (the first step's loss in float32, by point), second (the second step's, had the
        first not been, and after it).
    run: a contender's steps, in a process of its own.
    rate: flop/s of torch.mm on the model's own shapes, in a process of its own; None: not of use.
    points: the option that has several values, each of which is measured; "": none.
    choices: what an option of words may be. least: the least a number may be, where it is not 1.
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
    choices: Mapping[str, Sequence[str]] = field(default_factory=dict)
    least: Mapping[str, int] = field(default_factory=dict)
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
CHOICES = {"dtype": DTYPES, "device": ("cpu", "cuda")}
LEAST = {"seed": 0}


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
            options[key] = _value(job, key, text)
    each_once("contenders", ",".join(names))
    return options, tuple(names)


def each_once(key: str, text: str) -> list[str]:
    """The words between commas. UserError if one is there twice."""
    words = text.split(",")
    twice = next((word for word in words if words.count(word) > 1), None)
    if twice is not None:
        raise UserError(f"{key}={text}: {twice} is named twice")
    return words


def _value(job: Job, key: str, text: str) -> Any:
    default, choices = job.options[key], {**CHOICES, **job.choices}.get(key)
    if isinstance(default, str):
        if choices and text not in choices:
            raise UserError(f"{key}={text}: expected one of {', '.join(choices)}")
        return text
    try:
        values = [int(part) for part in each_once(key, text)]
    except ValueError:
        raise UserError(f"{key}={text}: expected a whole number") from None
    least = {**LEAST, **job.least}.get(key, 1)
    if any(value < least for value in values):
        raise UserError(f"{key}={text}: expected at least {least}")
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
    """Runs the contenders in turn.

    No round but the first begins that would not end before `deadline` (monotonic), if it takes as
    long as those before it; what still runs then is stopped and noted.
    """
    given, how = processes.environment_of_peers()
    tell(f"{job.name}: preparing")
    facts = job.prepare(folder, options)
    (folder / "options.json").write_text(json.dumps(options))
    measured = Measured(job, options, facts, {name: {} for name in names}, [], [], [], given)
    measured.notes += [how] if how else []
    points = [str(x) for x in options[job.points]] if job.points else [""]
    turns = [(name, point) for point in points for name in names]
    longest = 0.0
    for number in range(options["rounds"]):
        begun = time.monotonic()
        if number and begun + longest > deadline:
            measured.notes.append(f"{number} of {options['rounds']} rounds: the time was over")
            break
        _measure_rate(measured, folder, deadline)
        turns = [x for x in turns if _measure_one(measured, *x, folder, tell, number, deadline)]
        longest = max(longest, time.monotonic() - begun)
    measured.rounds = {name: found for name, found in measured.rounds.items() if found}
    return measured


def _measure_rate(measured: Measured, folder: Path, deadline: float) -> None:
    job = measured.job
    if job.rate is None:
        return
    try:
        found = processes.run(job.name, CEILING, "", folder, measured.environment, deadline)
        measured.rates.append(found)
    except (processes.FailedError, processes.OutOfTimeError) as error:
        measured.notes.append(f"{CEILING} was not measured: {error}")


def _measure_one(
    measured: Measured,
    name: str,
    point: str,
    folder: Path,
    tell: Callable[[str], None],
    number: int,
    deadline: float,
) -> bool:
    """A contender's steps at a point; whether it is to be measured there again."""
    job, options = measured.job, measured.options
    where = f"{job.name} {point}".strip()
    try:
        given = os.environ if _is_ours(name) else measured.environment
        result = processes.run(job.name, name, point, folder, given, deadline)
        wrong = _what_is_wrong(measured, result, point)
    except processes.OutOfTimeError as error:
        measured.notes.append(f"{where}: {name} {error}")
        tell(measured.notes[-1])
        return False  # what earlier rounds found stays
    except processes.FailedError as error:
        wrong = str(error)
    if wrong:
        line = f"{where}: {name} left out: {wrong}"
        tell(line)
        (measured.failures if _is_ours(name) else measured.notes).append(line)
        measured.rounds[name].pop(point, None)
        return False
    measured.rounds[name].setdefault(point, []).append(result)
    seconds = [step["seconds"] for step in result["steps"][options["warmup"] :]]
    tell(
        f"{where}: round {number + 1} of {options['rounds']}, {name}: "
        f"{statistics.median(seconds):.2f} s a step, "
        f"{result['peak_bytes'] / 2**30:.2f} GiB"
    )
    return True


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
    tolerance = measured.job.tolerance[options["dtype"]]
    if expected is not None and not abs(found - expected) <= tolerance * abs(expected):
        return f"the {measured.job.value} is {found:.4f}, expected {expected:.4f}"
    untrained, trained = measured.facts.get("second", {}).get(point, (None, None))
    if trained is None:
        return ""
    found = result["steps"][1]["loss"]
    away = AWAY * abs(untrained - trained) + SMALLEST * abs(trained)
    if abs(found - trained) <= away:
        return ""
    return (
        f"the loss of its second step is {found:.4f}, expected {trained:.4f} after the first "
        f"({untrained:.4f} without it)"
    )
