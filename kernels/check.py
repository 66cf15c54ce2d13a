"""Compiles every Triton and CUDA kernel for the supported GPUs, and checks what came out.

    make kernels-check
    python kernels/check.py --capability 90 --kernel glu

No GPU and no driver is needed. It fails on registers spilled, on too much shared memory, on a grid
that cannot be launched, on matrix instructions that are missing where check_cases.py expects them,
on lines of launch_table.json that no case reaches and on kernels that no case compiles.
"""

import argparse
import ast
import multiprocessing
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import check_cases
import check_compile
import torch
import triton
from check_cases import Call
from check_compile import ROOT, SHARED_LIMITS, SOURCES, Launch, Row, recorded

COLUMNS = (
    "kernel",
    "configuration",
    "capability",
    "variants",
    "registers",
    "stack",
    "shared",
    "matrix",
    "load bytes",
)
QUICK_CAPABILITIES = (80, 90)
CUDA_SOURCES = ROOT / "csrc" / "cuda"
CUDA_MODULE = "csrc/cuda"
PAGE_HEAD = """\
# What the Triton kernels take

Made by `make kernels-check ARGS="--quick --page kernels/notes/registers.md"`, which compiles them
ahead of time with Triton {version}: every flag and every line of the launch table once. Registers
and the widest load from global memory in bytes are a thread's, shared memory in bytes a program's.

| kernel | capability | configurations | registers | stack | shared memory | widest load |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
"""


@dataclass(frozen=True)
class Job:
    """A call to compile: the `index`th that an operation's cases yield for a dtype."""

    operation: str
    dtype: torch.dtype
    index: int
    capability: int

    def call(self) -> Call:
        calls = check_cases.OPERATIONS[self.operation](self.dtype)
        return next(c for i, c in enumerate(calls) if i == self.index)

    def __str__(self) -> str:
        return f"{self.call()}, capability {self.capability}"


@dataclass(frozen=True)
class Planned:
    """A job, what it would compile (nothing is compiled yet), and the lines of the launch table."""

    job: Job
    launches: tuple[Launch, ...]
    entries: frozenset[Any]


def plan(capabilities: Sequence[int]) -> tuple[list[Planned], list[str]]:
    """Every call of every case, run without compiling, and a line about each that fails."""
    planned, problems = [], []
    for capability in capabilities:
        for name, cases in check_cases.OPERATIONS.items():
            for dtype in check_cases.DTYPES:
                for index, call in enumerate(cases(dtype)):
                    job = Job(name, dtype, index, capability)
                    try:
                        with recorded(capability, compile=False) as recording:
                            call.launcher(*call.args, **call.kwargs)
                    except Exception as error:
                        problems.append(f"{job}: {type(error).__name__}: {error}")
                        continue
                    launches, entries = tuple(recording.launches), frozenset(recording.entries)
                    planned.append(Planned(job, launches, entries))
    return planned, problems


def unused_entries(planned: Iterable[Planned], capabilities: Sequence[int]) -> list[str]:
    """A line for each line of the launch table that applies to a capability and was never used."""
    check_compile.load_kernels()
    from lora_engine.backends import tables

    used = {entry for one in planned for entry in one.entries}
    problems = []
    for kernel, by_capability in tables.launch_table().items():
        keys = {key if key in by_capability else "*" for key in map(str, capabilities)}
        for key in sorted(keys & set(by_capability)):
            for dtype, lines in by_capability[key].items():
                for limit, _ in lines:
                    if tables.LaunchKey(kernel, key, dtype, limit) not in used:
                        size = "any size" if limit is None else f"size <= {limit}"
                        problems.append(
                            f"launch_table.json: {kernel}, capability {key}, dtype {dtype}, "
                            f"{size}: no case in check_cases.py reaches this line"
                        )
    return problems


def written_kernels() -> set[tuple[str, str]]:
    """(module, name) of every Triton kernel in kernels/src: `_*_kernel` with a jit decorator."""
    kernels = set()
    for path in SOURCES.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef):
                continue
            jitted = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
            if jitted and node.name.startswith("_") and node.name.endswith("_kernel"):
                kernels.add((f"lora_engine.backends.triton.{path.stem}", node.name))
    return kernels


def uncompiled_kernels(rows: Iterable[Row]) -> list[str]:
    """A line for each kernel in kernels/src that is in no row."""
    missing = written_kernels() - {(row.module, row.kernel) for row in rows}
    return [f"{module}.{name}: no case compiled it" for module, name in sorted(missing)]


def needed(planned: Sequence[Planned], *, quick: bool) -> list[Planned]:
    """The jobs that bring something new, the largest sizes first: they need most registers.

    New is a kernel with other flags, parameters or alignment for a capability and dtype. If
    `quick`, only flags for any capability, and lines of the table for each, in whatever dtype.
    """
    chosen: list[Planned] = []
    seen: set[object] = set()
    for one in reversed(planned):
        new: set[object] = set()
        for x in one.launches:
            alike = (x.unaligned, x.configuration, one.job.dtype, one.job.capability)
            new.add((x.kernel, x.flags, *(() if quick else alike)))
        new |= {(one.job.capability, entry) for entry in one.entries}
        if new - seen:
            chosen.append(one)
            seen |= new
    return chosen


def concerns(planned: Planned, name: str) -> bool:
    """Whether a job is of the operation or compiles the kernel `name`."""
    return name == planned.job.operation or name in {launch.kernel for launch in planned.launches}


def compile_jobs(jobs: Sequence[Job]) -> tuple[list[Row], list[str]]:
    """The kernels that the jobs launch, each once, and a line about each job that fails."""
    rows: dict[object, Row] = {}
    problems = []
    for job in jobs:
        call = job.call()
        try:
            with recorded(job.capability, compile=True) as recording:
                call.launcher(*call.args, **call.kwargs)
            for launch in recording.launches:
                matrix = "native" if launch.kernel in call.matrix else None
                matrix = "any" if launch.kernel in call.any_matrix else matrix
                row = check_compile.examine(launch, job.capability, matrix=matrix)
                row = replace(row, problems=tuple(f"{x} [{call}]" for x in row.problems))
                rows.setdefault(
                    (row.key, row.capability, row.configuration, bool(row.problems)), row
                )
            unknown = {*call.matrix, *call.any_matrix} - {x.kernel for x in recording.launches}
            problems += [f"{job}: launches no {name}" for name in sorted(unknown)]
        except Exception as error:
            problems.append(f"{job}: {type(error).__name__}: {error}")
    return list(rows.values()), problems


def compile_all(jobs: Sequence[Job], processes: int) -> tuple[list[Row], list[str]]:
    """`compile_jobs` in parallel; a process keeps to one operation, dtype and capability."""
    batches: dict[object, list[Job]] = {}
    for job in jobs:
        batches.setdefault((job.capability, job.operation, job.dtype), []).append(job)
    rows, problems = [], []
    # Forked: the children keep what has been imported, and what a test has replaced.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        for compiled, failed in pool.map(compile_jobs, batches.values()):
            rows += compiled
            problems += failed
    return list({identity(row): row for row in rows}.values()), problems


def identity(row: Row) -> object:
    """Rows that are alike in this are one kernel; a fault is not hidden by a case without it."""
    return row.key, row.capability, row.configuration, bool(row.problems)


def cuda_rows(capabilities: Sequence[int]) -> tuple[list[Row], list[str], str]:
    """The CUDA C++ kernels' rows, a line about each fault, and what was done in words."""
    if not CUDA_SOURCES.is_dir():
        return [], [], "CUDA C++: there are no kernels in csrc/cuda"
    import check_cuda

    if check_cuda.find_nvcc() is None:
        return [], [], "CUDA C++: NOT checked, there is no nvcc here"
    architectures = {a: int(a.rstrip("a")) for a in check_cuda.SHARED_LIMIT}
    wanted = [a for a, capability in architectures.items() if capability in capabilities]
    rows = []
    try:
        for row in check_cuda.rows(wanted):
            capability = architectures[row.architecture]
            key, stack = f"{row.kernel} {row.architecture}", row.stack + row.spilled
            problems = (row.problem,) if row.problem else ()
            rows.append(
                Row(CUDA_MODULE, row.kernel, capability, "CUDA C++", key, row.registers, stack,
                    row.shared, False, 0, problems)
            )  # fmt: skip
    except check_cuda.CompileError as error:
        return rows, [f"csrc/cuda: {error}"], "CUDA C++: nvcc failed"
    problems = [] if rows else ["csrc/cuda: no kernel was found"]
    return rows, problems, f"CUDA C++: {len(rows)} kernels compiled by nvcc"


def faults(rows: Iterable[Row]) -> list[str]:
    """A line for each problem of a row."""
    return [
        f"{row.kernel}, {row.configuration or 'no table'}, capability {row.capability}: {problem}"
        for row in rows
        for problem in row.problems
    ]


def table(rows: Iterable[Row]) -> str:
    """One line for each kernel, configuration and capability: ranges over dtypes and alignments."""
    groups: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.kernel, row.configuration, row.capability), []).append(row)
    lines = [COLUMNS]
    for (kernel, configuration, capability), members in sorted(groups.items()):
        numbers = ("registers", "stack", "shared")
        matrix = {row.matrix for row in members}
        lines.append(
            (
                kernel,
                configuration,
                str(capability),
                str(len(members)),
                *(_range(getattr(row, name) for row in members) for name in numbers),
                "some" if len(matrix) == 2 else "yes" if True in matrix else "no",
                _range(row.load_bytes for row in members),
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def page(rows: Iterable[Row]) -> str:
    """A page in Markdown: one line for each Triton kernel and capability, with ranges."""
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        if row.module != CUDA_MODULE:
            groups.setdefault((row.kernel, row.capability), []).append(row)
    lines = [PAGE_HEAD.format(version=triton.__version__)]
    for (kernel, capability), members in sorted(groups.items()):
        numbers = ("registers", "stack", "shared", "load_bytes")
        ranges = [_range(getattr(row, name) for row in members) for name in numbers]
        configurations = len({row.configuration for row in members})
        lines.append(f"| `{kernel}` | {capability} | {configurations} | {' | '.join(ranges)} |\n")
    return "".join(lines)


def _range(values: Iterator[int]) -> str:
    different = sorted(set(values))
    return str(different[0]) if len(different) == 1 else f"{different[0]}-{different[-1]}"


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--capability", type=int, nargs="+", choices=sorted(SHARED_LIMITS), help="default: all"
    )
    parser.add_argument("--kernel", help="an operation or kernel; completeness is not checked")
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"capabilities {QUICK_CAPABILITIES}; every flag, and every line of the table, once",
    )
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the page of notes/ there")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    default = QUICK_CAPABILITIES if args.quick else tuple(SHARED_LIMITS)
    capabilities = args.capability or default
    check_compile.load_kernels()
    planned, problems = plan(capabilities)
    if args.kernel is None:
        problems += unused_entries(planned, capabilities)
    else:
        planned = [one for one in planned if concerns(one, args.kernel)]
        problems += [] if planned else [f"--kernel {args.kernel}: no case launches it"]
    chosen = needed(planned, quick=args.quick)
    rows, failed = compile_all([one.job for one in chosen], args.processes)
    problems += failed
    note = "CUDA C++: left out by --kernel"
    if args.kernel is None:
        problems += uncompiled_kernels(rows)
        cuda, failed, note = cuda_rows(capabilities)
        rows += cuda
        problems += failed
    problems += faults(rows)
    if args.page is not None:
        args.page.write_text(page(rows))
    print(table(rows))
    print(f"\n{len(rows)} kernels compiled\n{note}")
    for problem in problems:
        print(f"FAILED: {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
