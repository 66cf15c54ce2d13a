"""Tunes the launch table by time measured on a GPU.

    python -m benchmarks.gpu.tune --out results --minutes 4
    python -m benchmarks.gpu.tune --out results --write

For each line of launch_table.json that models reach, parameters around the present ones are
compiled by many processes; those that spill registers or take too much shared memory are left out.
Each of the others has to give what the present line gives. All are timed at the line's most telling
sizes, the fastest at all of its sizes, in turn with the present line, which takes part twice: what
it differs from itself is noise. OUT/tuning.jsonl has every result as it comes. A second run goes on
where the first stopped; a process that a kernel takes with it is replaced.

--write makes the table anew from the journal, on any machine: a line changes, for the capability
that was measured alone, where the gain over all of its sizes is larger than the noise. Run
`make kernels-check` after it, which looks at more flags and dtypes than were measured.
OUT/tuning.md has what was found.

Without a GPU, --device cpu takes the same path in Triton's interpreter, at sizes where times mean
nothing.
"""

import argparse
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

from benchmarks.common import output
from benchmarks.common.journal import Journal, read
from benchmarks.gpu import tune_report, tune_search, tune_table
from benchmarks.gpu.tune_cases import KERNELS, Case, all_cases
from benchmarks.gpu.tune_search import Parameters
from benchmarks.gpu.tune_workers import Compiling, Measuring, Worker, WorkerError
from lora_engine.backends import tables

COMPILE_SECONDS, MEASURE_SECONDS = 90, 60
# Sizes of a line that every candidate is timed at, and samples of each.
FIRST_SIZES, FIRST_SAMPLES, LAST_SAMPLES = 2, 3, 9
FINALISTS = 4
# A line that ended the tuner so often is left alone.
MOST_TRIES = 2


@dataclass(frozen=True)
class Line:
    """A line of the launch table and the sizes that reach it, the most telling first."""

    key: tables.LaunchKey
    present: Parameters
    cases: tuple[Case, ...]

    def item(self) -> dict[str, Any]:
        return {"line": list(self.key), "present": self.present}


class Measurer(Protocol):
    """Says whether parameters give the present results, and how long launches take."""

    def check(self, case: Case, present: Parameters, parameters: Parameters) -> None: ...
    def time(
        self,
        case: Case,
        present: Parameters,
        runs: dict[str, Parameters],
        samples: int,
        ceiling: bool,
    ) -> dict[str, float]: ...


class Compiler(Protocol):
    """Begins to compile a line's calls with other parameters; the result is a list of faults."""

    def submit(self, cases: Sequence[Case], parameters: Parameters) -> "Future[list[str]]": ...


class MeasuringProcess:
    """`Measuring` in a process of its own."""

    def __init__(self, device: str) -> None:
        self.worker = Worker(Measuring, device)

    def facts(self) -> dict[str, Any]:
        found: dict[str, Any] = self.worker.ask(("facts", {}), MEASURE_SECONDS)
        return found

    def check(self, case: Case, present: Parameters, parameters: Parameters) -> None:
        arguments = {"case": case, "present": present, "parameters": parameters}
        self.worker.ask(("check", arguments), MEASURE_SECONDS)

    def time(
        self,
        case: Case,
        present: Parameters,
        runs: dict[str, Parameters],
        samples: int,
        ceiling: bool,
    ) -> dict[str, float]:
        arguments = {
            "case": case,
            "present": present,
            "runs": runs,
            "samples": samples,
            "ceiling": ceiling,
        }
        found: dict[str, float] = self.worker.ask(("time", arguments), MEASURE_SECONDS)
        return found

    def close(self) -> None:
        self.worker.close()


class CompilingProcesses:
    """`Compiling` in many processes, each the work of a thread that waits for it."""

    def __init__(self, jobs: int, capability: int, multiprocessors: int) -> None:
        self.idle: SimpleQueue[Worker] = SimpleQueue()
        self.workers = [Worker(Compiling, capability, multiprocessors) for _ in range(jobs)]
        for worker in self.workers:
            self.idle.put(worker)
        self.threads = ThreadPoolExecutor(jobs)

    def submit(self, cases: Sequence[Case], parameters: Parameters) -> "Future[list[str]]":
        return self.threads.submit(self._compile, list(cases), parameters)

    def _compile(self, cases: list[Case], parameters: Parameters) -> list[str]:
        worker = self.idle.get()
        try:
            found: list[str] = worker.ask((cases, parameters), COMPILE_SECONDS)
            return found
        except WorkerError as error:
            return [str(error)]
        finally:
            self.idle.put(worker)

    def close(self) -> None:
        self.threads.shutdown(wait=False, cancel_futures=True)
        for worker in self.workers:
            worker.close()
        self.threads.shutdown(wait=True)


def lines(cases: Iterable[Case], capability: int) -> list[Line]:
    """The lines that the cases reach on a GPU of this capability, in the cases' order."""
    table = tables.launch_table()
    found: dict[tables.LaunchKey, list[Case]] = {}
    for case in cases:
        key = tables.launch_key(case.kernel, capability, case.dtype, case.size())
        found.setdefault(key, []).append(case)
    return [
        Line(key, dict(dict(table[key.kernel][key.capability][key.dtype])[key.limit]), tuple(of))
        for key, of in found.items()
    ]


def in_turn(found: Sequence[Line]) -> list[Line]:
    """Every kernel's first line before any kernel's second: time may run out."""
    seen: dict[str, int] = {}
    ranks = []
    for line in found:
        ranks.append(seen.get(line.key.kernel, 0))
        seen[line.key.kernel] = ranks[-1] + 1
    return [line for _, _, line in sorted(zip(ranks, range(len(ranks)), found, strict=True))]


def left_to_do(found: Sequence[Line], journal: Sequence[dict[str, Any]]) -> list[Line]:
    """Without the lines that a journal has ended, or begun too often, with the same parameters."""
    ended = [x["item"] for x in journal if x["event"] == "end"]
    begun = [x["item"] for x in journal if x["event"] == "start"]
    return [
        line for line in found if line.item() not in ended and begun.count(line.item()) < MOST_TRIES
    ]


def tune(
    found: Sequence[Line],
    compiler: Compiler,
    measurer: Measurer,
    journal: Journal,
    deadline: float,
    most: int = tune_search.MOST_CANDIDATES,
) -> int:
    """Measures line after line until the deadline (of time.monotonic); how many are left.

    most: candidates of a line.
    """
    begun = [
        (line, [(p, compiler.submit(line.cases, p)) for p in _candidates(line, most)])
        for line in found
    ]
    for index, (line, compiled) in enumerate(begun):
        try:
            good = list(_compiled(line, compiled, journal, deadline))
        except TimeoutError:
            journal.add("note", message=f"{len(begun) - index} lines left, the time was over")
            return len(begun) - index
        journal.add("start", item=line.item())
        try:
            _measure(line, good, measurer, journal)
        except WorkerError as error:
            journal.add("failure", item=line.item(), message=str(error))
        else:
            journal.add("end", item=line.item())
    return 0


def _candidates(line: Line, most: int) -> list[Parameters]:
    return tune_search.candidates(line.key.kernel, line.present, most)


def _compiled(
    line: Line,
    compiled: Sequence[tuple[Parameters, "Future[list[str]]"]],
    journal: Journal,
    deadline: float,
) -> Iterator[Parameters]:
    """The candidates that compile without faults; TimeoutError where the time is over."""
    for parameters, future in compiled:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        faults = future.result(timeout=left)
        if faults:
            journal.add("rejected", item=line.item(), parameters=parameters, message=faults[0])
        else:
            yield parameters


def _measure(
    line: Line, candidates: Sequence[Parameters], measurer: Measurer, journal: Journal
) -> None:
    """Times all candidates at the first sizes, and the fastest at every size."""
    good = list(range(len(candidates)))
    times: list[tuple[float, dict[int, float]]] = []
    for case in line.cases[:FIRST_SIZES]:
        measurer.check(case, line.present, line.present)  # else no candidate is to blame
        good = [n for n in good if _right(line, case, candidates[n], measurer, journal)]
        runs = {"before": line.present, **{str(n): candidates[n] for n in good}}
        seconds = measurer.time(case, line.present, runs, FIRST_SAMPLES, False)
        journal.add("first", item=line.item(), case=case.fields(), seconds=seconds)
        times.append((seconds["before"], {n: seconds[str(n)] for n in good}))
    finalists = [candidates[n] for n in tune_search.shortlist(times, FINALISTS)]
    for case in line.cases:
        finalists = [p for p in finalists if _right(line, case, p, measurer, journal)]
        runs = {"before": line.present, **{str(n): p for n, p in enumerate(finalists)}}
        seconds = measurer.time(
            case, line.present, {**runs, "again": line.present}, LAST_SAMPLES, True
        )
        journal.add(
            "row",
            item=line.item(),
            case=case.fields(),
            before=seconds["before"],
            again=seconds["again"],
            ceiling=seconds["ceiling"],
            candidates=[[p, seconds[str(n)]] for n, p in enumerate(finalists)],
        )


def _right(
    line: Line, case: Case, parameters: Parameters, measurer: Measurer, journal: Journal
) -> bool:
    """Whether the launch gives the present results; if not, why is recorded."""
    try:
        measurer.check(case, line.present, parameters)
    except WorkerError as error:
        journal.add(
            "rejected",
            item=line.item(),
            case=case.fields(),
            parameters=parameters,
            message=str(error),
        )
        return False
    return True


def run(args: argparse.Namespace, path: Path) -> int:
    """Measures what is left to do; how many lines remain."""
    deadline = time.monotonic() + 60 * args.minutes
    measurer = MeasuringProcess(args.device)
    compiler = None
    journal = Journal(path)
    try:
        facts = measurer.facts()
        compiler = CompilingProcesses(args.jobs, **facts)
        journal.add("context", **output.context(), **facts, device=args.device)
        cases = all_cases(args.kernels)
        found = in_turn(lines(cases, facts["capability"]))
        if args.device == "cpu":
            found = [Line(x.key, x.present, (x.cases[0].tiny(),)) for x in found]
        left = left_to_do(found, read(path))
        return tune(left, compiler, measurer, journal, deadline, args.candidates)
    finally:
        measurer.close()
        if compiler is not None:
            compiler.close()


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the journal")
    parser.add_argument("--minutes", type=float, default=4.0, help="begin no line after so long")
    parser.add_argument("--kernels", nargs="+", choices=sorted(KERNELS), help="default: all")
    parser.add_argument("--jobs", type=int, default=14, help="processes that compile")
    parser.add_argument("--candidates", type=int, default=tune_search.MOST_CANDIDATES)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--write", action="store_true", help="measure nothing; write launch_table.json"
    )
    parser.add_argument(
        "--without",
        nargs="+",
        default=[],
        metavar="KERNEL[:LIMIT]",
        help="with --write: kernels that stay, or lines such as glu_fwd:4096 and glu_fwd:any",
    )
    parser.add_argument("--table", type=Path, default=tune_table.TABLE, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    path = args.out / "tuning.jsonl"
    left = 0 if args.write else run(args, path)
    found = tune_report.decisions(read(path))
    (args.out / "tuning.md").write_text(tune_report.render(read(path)), encoding="utf-8")
    print(tune_report.render(read(path)))
    if args.write:
        better = {
            each.key: each.decision.after
            for each in found
            if each.decision.after is not None and not _stays(each.key, args.without)
        }
        capability = tune_report.capability(read(path))
        table = tune_table.changed(tune_table.read(args.table), capability, better)
        args.table.write_text(tune_table.text(table), encoding="utf-8")
        print(f"wrote {args.table}: {len(better)} lines changed", file=sys.stderr)
    return 0 if left == 0 else 1


def _stays(key: tune_report.Key, without: Sequence[str]) -> bool:
    kernel, _, _, limit = key
    return kernel in without or f"{kernel}:{limit or 'any'}" in without


if __name__ == "__main__":
    sys.exit(main())
