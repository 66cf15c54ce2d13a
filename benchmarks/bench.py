"""`lora-engine bench`: one entry to all measurements, and what becomes of their results.

    lora-engine bench                  # the README's claim: a training step beside TRL
    lora-engine bench kernels cases=glu,rope dtype=float32
    lora-engine bench compare A.json B.json

An area is kernels (common/registry.py's cases, in this process) or one of JOBS (whole steps, a
process for each contender: common/jobs.py). `--out NAME` writes NAME.json, NAME.md, NAME.html and
the charts NAME-….svg.
"""

import math
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.common import bench_pages, ceilings, jobs, output, peers, processes
from benchmarks.common.document import Plot, markdown, page
from benchmarks.common.job_rows import rows_of
from benchmarks.common.others import OtherPrograms
from lora_engine.errors import UserError, nearest
from lora_engine.files import naming, user_path, write_text

JOBS = {"train": ("sft",), "generate": ("write",), "rl": ("dpo", "grpo"), "memory": ("length",)}
AREAS = ("kernels", *JOBS)
KERNEL_OPTIONS = {
    "cases": "all",
    "sizes": "smollm2",
    "sweep": "lora_linear",
    "dtype": "bfloat16",
    "device": "cpu",
    "samples": "15",
    "compile": "no",
}


def settings(words: Sequence[str]) -> dict[str, str]:
    """KEY=VALUE words as a mapping. UserError for what is none, or named twice."""
    found: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key or not value:
            raise UserError(f"{word}: expected KEY=VALUE, as in rounds=3")
        if key in found:
            raise UserError(f"{word}: {key} is set twice")
        found[key] = value
    return found


def measure(
    area: str, words: Mapping[str, str], minutes: float, tell: Callable[[str], None]
) -> dict[str, Any]:
    """The results of an area. UserError for settings it has not."""
    watch = OtherPrograms()
    run = _measure(area, words, minutes, tell)
    return {**run, "others_cores": watch.cores()}


def _measure(
    area: str, words: Mapping[str, str], minutes: float, tell: Callable[[str], None]
) -> dict[str, Any]:
    deadline = time.monotonic() + 60 * minutes
    if area == "kernels":
        return _kernels(words, minutes, tell)
    prepared = [(job, *jobs.options_of(job, own)) for job, own in _chosen(area, words)]
    _check_devices({options["device"] for _, options, _ in prepared})
    run = _context(area, words)
    run |= {"jobs": {}, "rows": [], "failures": [], "notes": []}
    for job, options, names in prepared:
        here = [name for name in names if _installed(job, name)]
        run["notes"] += [
            f"{job.name}: {name} not measured, {job.packages[name]} is not installed"
            for name in names
            if name not in here
        ]
        if not here:
            continue
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            found = jobs.measure_job(job, options, here, Path(folder), tell, deadline)
        run["rows"] += rows_of(found)
        run["failures"] += found.failures
        run["notes"] += found.notes
        run["jobs"][job.name] = {
            "what": job.what,
            "text": found.facts["text"],
            "options": options,
            "contenders": {name: job.contenders[name] for name in found.rounds},
            "rates": found.rates,
            "rounds": found.rounds,
        }
    return run


def _chosen(area: str, words: Mapping[str, str]) -> list[tuple[jobs.Job, Mapping[str, str]]]:
    """The area's jobs, or those that are asked for, each with the settings that are its own."""
    given = dict(words)
    names = jobs.each_once("jobs", given.pop("jobs", ",".join(JOBS[area])))
    for name in names:
        if name not in JOBS[area]:
            raise UserError(f"jobs={words['jobs']}: no {name!r}; there is {', '.join(JOBS[area])}")
    found = [jobs.job_of(name) for name in names]
    known = {key for job in found for key in job.options}
    nobody = {k: v for k, v in given.items() if k not in known}
    return [(job, {k: v for k, v in given.items() if k in job.options} | nobody) for job in found]


def _installed(job: jobs.Job, name: str) -> bool:
    package = job.packages.get(name)
    return package is None or peers.version(package) is not None


def _check_devices(devices: set[str]) -> None:
    from lora_engine import backends

    if "cuda" in devices and not backends.gpu_count():
        raise UserError("device=cuda: torch finds no GPU here; leave it out to measure the CPU")


def _context(area: str, words: Mapping[str, str]) -> dict[str, Any]:
    shown = shlex.join(["lora-engine", "bench", area, *(f"{k}={v}" for k, v in words.items())])
    where = {"commit": _commit(), "area": area, "peers": peers.states()}
    return {**output.context(), "command": shown, **where}


def _commit() -> str:
    """Of this checkout, with "+" where files differ from it; "unknown" without git."""
    command = ["git", "-C", str(processes.ROOT), "describe", "--always", "--abbrev=12", "--dirty=+"]
    try:
        found = subprocess.run(
            [*command, "--exclude=*"], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.strip()


def _kernels(
    words: Mapping[str, str], minutes: float, tell: Callable[[str], None]
) -> dict[str, Any]:
    import torch

    from benchmarks.common.journal import Journal
    from benchmarks.common.registry import SWEEP
    from benchmarks.kernels import run as kernels
    from lora_engine import backends

    chosen = _kernel_options(words)
    _check_devices({chosen["device"]})
    run = _context("kernels", words)
    device = torch.device(chosen["device"])
    backends.keep_freed_memory(device)  # as in training; everything that is timed has it
    tell("ceilings of this machine")
    run["ceilings"] = ceilings.measured(device)
    bandwidth, products = ceilings.limits(run["ceilings"])
    run["limits"] = {"copy": bandwidth, "products": products}
    given = ["--device", chosen["device"], "--samples", chosen["samples"]]
    given += ["--minutes", str(minutes)] if math.isfinite(minutes) else []
    args = kernels.parse_arguments(given)
    compiled = chosen["compile"] == "yes"
    items = [
        kernels.Item(case, size, chosen["dtype"], compiled)
        for size in chosen["sizes"].split(",")
        for case in chosen["cases"].split(",")
    ]
    if chosen["sweep"] != "no":
        known = {(item.case, item.size) for item in items}
        swept = [size for size in SWEEP if (chosen["sweep"], size) not in known]
        items += [kernels.Item(chosen["sweep"], size, chosen["dtype"]) for size in swept]

    class Told(Journal):
        """Says which case is measured."""

        def add(self, event: str, **fields: Any) -> None:
            if event == "start":
                tell(f"{fields['item']['case']}, {fields['item']['size']}")

    rows, failures, notes = kernels.run_items(items, args, Told(None))
    return {**run, "options": chosen, "rows": rows, "failures": failures, "notes": notes}


def _kernel_options(words: Mapping[str, str]) -> dict[str, str]:
    from benchmarks.common.registry import CASES, SIZES
    from benchmarks.kernels import cases  # noqa: F401  (registers the cases)

    for key, value in words.items():
        if key not in KERNEL_OPTIONS:
            near = nearest(key, KERNEL_OPTIONS)
            hint = f"; did you mean {near}?" if near else f"; there is {', '.join(KERNEL_OPTIONS)}"
            raise UserError(f"{key}={value}: kernels has no setting {key!r}{hint}")
    chosen = {**KERNEL_OPTIONS, **words}
    if chosen["cases"] == "all":
        chosen["cases"] = ",".join(CASES)
    allowed = {
        "cases": CASES,
        "sizes": SIZES,
        "sweep": {*CASES, "no"},
        "dtype": jobs.DTYPES,
        "device": ("cpu", "cuda"),
        "compile": ("no", "yes"),
    }
    for key, known in allowed.items():
        several = key in ("cases", "sizes")
        for one in jobs.each_once(key, chosen[key]) if several else [chosen[key]]:
            if one not in known:
                near = nearest(one, known)
                hint = f"did you mean {near}?" if near else f"there is {', '.join(sorted(known))}"
                raise UserError(f"{key}={chosen[key]}: no {one!r}; {hint}")
    if not chosen["samples"].isdigit() or chosen["samples"] == "0":
        raise UserError(f"samples={chosen['samples']}: expected a whole number, at least 1")
    return chosen


def bench(
    area: str,
    words: Sequence[str],
    *,
    out: str | None = None,
    minutes: float = math.inf,
    show: Callable[[str], None] = print,
    tell: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
) -> int:
    """Measures, prints, writes. Returns 1 if something of ours was wrong, or nothing measured."""
    given = settings(words)
    name = _target(area, out)
    with _ended_by_signals():
        run = measure(area, given, minutes, tell)
    parts = bench_pages.parts(run)
    show(markdown(parts))
    for path in _write(name, run, parts):
        tell(f"wrote {path}")
    return 1 if run["failures"] or not run["rows"] else 0


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Within, SIGTERM and a terminal that hangs up end the command as Ctrl-C does: the process of a
    contender is ended too, and its folder removed."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {n: signal.signal(n, interrupt) for n in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _target(area: str, out: str | None) -> Path:
    """What results are called; refused before anything is measured where it cannot be written."""
    try:
        name = user_path(out if out is not None else f"runs/bench/{area}")
    except ValueError as error:
        raise UserError(f"--out: {error}") from error
    if name.is_dir():
        raise UserError(f"--out {out}: is a folder; name a file in it, without its ending")
    for parent in name.parents:
        if parent.exists() and not parent.is_dir():
            raise UserError(f"--out {out}: {parent} is a file; take another place")
    nearest_folder = next(parent for parent in name.absolute().parents if parent.exists())
    with naming(name):
        tempfile.TemporaryFile(dir=nearest_folder).close()
    return name


def _write(name: Path, run: Mapping[str, Any], parts: Sequence[Any]) -> list[Path]:
    written = list(output.write(name, dict(run), markdown(parts, name.name)))
    for part in parts:
        if isinstance(part, Plot):
            written.append(name.with_name(f"{name.name}-{part.name}.svg"))
            write_text(written[-1], part.svg)
    written.append(name.with_name(f"{name.name}.html"))
    write_text(written[-1], page(f"lora_engine bench {run['area']}", parts))
    return written
