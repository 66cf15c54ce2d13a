"""Kernel benchmarks: ours against PyTorch and against the machine's own ceiling.

    python -m benchmarks.kernels.run --dtype bfloat16 --out benchmarks/results/kernels

A case is timed only if its results match the reference first; the exit status is 1 if any does not.
On a CPU they are compared on the first tokens and targets of a large size, and each call takes
other random inputs, in turn, as many as the last level of cache does not hold.
"""

import argparse
import gc
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from benchmarks.common import measure, output
from benchmarks.common.journal import Journal, started
from benchmarks.common.registry import CASES, SIZES, Contender, Problem, Size, Work, as_tuple
from benchmarks.common.verify import copies, references, upstream, verify
from benchmarks.kernels import (
    cases,  # noqa: F401  (registers the cases)
    kernel_peers,
    kernel_report,
)
from benchmarks.kernels.plans import Item, plan_for
from lora_engine import backends

LONGEST_MESSAGE = 500
DEVICE_LOST = 3
COMPILED = "torch.compile"
# What is compared with float64 on a CPU, where that takes longer than all the rest.
VERIFIED_TOKENS = 1536
VERIFIED_TARGETS = 128


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=sorted(CASES), default=list(CASES))
    parser.add_argument("--size", nargs="+", choices=sorted(SIZES), default=["smollm2"])
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--samples", type=int, default=15, help="timing samples each")
    parser.add_argument("--compile", action="store_true", help="also torch.compile of PyTorch's")
    parser.add_argument(
        "--plan",
        action="store_true",
        help="instead of --cases, --size, --dtype and --compile: everything in order of importance",
    )
    parser.add_argument("--minutes", type=float, help="begin nothing more after so long")
    parser.add_argument(
        "--append",
        type=Path,
        metavar="FILE",
        help="write each result to FILE at once, a JSON object a line; what FILE has is left out",
    )
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    return parser.parse_args(argv)


# A problem, and what is timed on its inputs by name.
Set: TypeAlias = tuple[Problem, dict[str, Contender]]


def measure_case(
    sets: Sequence[Set], device: torch.device, samples: int
) -> Iterator[dict[str, Any]]:
    """One row per pass and implementation.

    sets: the same problem with other inputs, and the same contenders; taken in turn.
    """
    problem = sets[0][0]
    itemsize = problem.inputs[0].itemsize
    if problem.both is None:
        passes = [("step", problem.forward)]
    else:
        passes = [("forward", problem.forward), ("forward+backward", problem.both)]
    for pass_name, work in passes:
        backward = work is problem.both
        runs = {
            name: measure.rotated([_run(p, found[name], backward=backward) for p, found in sets])
            for name in sets[0][1]
        }
        dtype = problem.inputs[0].dtype
        ceiling = measure.rotated([_ceiling(work, dtype, device) for _ in sets])
        timings = measure.time_alternating({**runs, "": ceiling}, device, samples=samples)
        limit = timings.pop("")
        rate = _ceiling_amount(work) / limit.median
        for name, timing in timings.items():
            achieved = work.amount / timing.median
            yield {
                "pass": pass_name,
                "implementation": name,
                "seconds": asdict(timing),
                "rate": achieved,
                "unit": work.unit,
                "ceiling": rate,
                "ceiling_seconds": asdict(limit),
                "share_of_ceiling": achieved / rate,
                "extra_bytes": measure.extra_memory(runs[name], device),
                "calls": measure.count_calls(runs[name], device),
                "operations_per_byte": work.intensity(itemsize),
                "input_sets": len(sets),
            }


def _run(problem: Problem, contender: Contender, *, backward: bool) -> measure.Thunk:
    function = contender.function
    if contender.timed is not None:
        return contender.timed(problem.inputs, backward)
    inputs = copies(problem.inputs) if contender.in_place else problem.inputs
    gradients: list[Tensor] = []
    if not backward:
        # Without the flag that a gradient is wanted, which some read although none is recorded.
        inputs = tuple(x.detach() for x in inputs)

        def run() -> object:
            with torch.no_grad():
                return function(*inputs)

    else:
        wanted = [x for x in inputs if x.requires_grad]
        gradients = [upstream(output) for output in as_tuple(function(*inputs))]

        def run() -> object:
            return torch.autograd.grad(as_tuple(function(*inputs)), wanted, gradients)

    return measure.Restored(run, [*inputs, *gradients]) if contender.in_place else run


def _ceiling(work: Work, dtype: torch.dtype, device: torch.device) -> measure.Thunk:
    if work.matmuls is None:
        return measure.copy_run(work.amount, device)
    return measure.matmul_run(work.matmuls, dtype, device)


def _ceiling_amount(work: Work) -> int:
    return work.amount if work.matmuls is None else sum(m.flops for m in work.matmuls)


def run_items(
    items: Sequence[Item], args: argparse.Namespace, journal: Journal
) -> tuple[list[dict[str, Any]], list[str], list[str]]:
    """Rows of the items that match the reference, a line about each that does not, and notes.

    Raises DeviceLostError where an error of the GPU leaves it unusable for this process.
    """
    device = torch.device(args.device)
    deadline = time.monotonic() + 60 * args.minutes if args.minutes is not None else None
    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    notes: list[str] = []
    for index, item in enumerate(items):
        if deadline is not None and time.monotonic() > deadline:
            notes.append(f"{len(items) - index} of {len(items)} left out, the time was over")
            journal.add("note", message=notes[-1])
            break
        journal.add("start", item=item.fields())
        try:
            for row in _run_item(item, device, args, journal, notes):
                rows.append(row)
                journal.add("row", item=item.fields(), **row)
        except Exception as error:
            failures.append(f"{item.case}: not timed, {_one_line(error)}")
            journal.add("failure", item=item.fields(), message=failures[-1])
            del error
            if not _usable(device):
                raise DeviceLostError(failures[-1]) from None
        journal.add("end", item=item.fields())
        _free(device)
    return rows, failures, notes


class DeviceLostError(RuntimeError):
    """The GPU answers every further call of this process with an error."""


def _run_item(
    item: Item, device: torch.device, args: argparse.Namespace, journal: Journal, notes: list[str]
) -> Iterator[dict[str, Any]]:
    torch.manual_seed(0)
    problem = _problem(item, SIZES[item.size], device)
    operation = problem.operation or item.case
    chosen = asdict(backends.explain(operation, device, problem.inputs[0].dtype))
    if args.plan and chosen["impl"] == "reference":
        notes.append(f"{item.case}: left out, {chosen['reason']}")
        journal.add("skipped", item=item.fields(), message=notes[-1])
        return
    verified = _verified_problem(item, problem, device, notes)
    expected = references(verified)
    verify(verified, verified.ours, expected)
    right = ["ours", "pytorch"]
    checked = _contenders_of(item, verified, device)
    for name, contender in checked.items():
        try:
            verify(verified, contender.function, expected, in_place=contender.in_place)
        except Exception as error:
            notes.append(f"{item.case}, {item.size}: {name} not timed, {_one_line(error)}")
            journal.add("skipped", item=item.fields(), message=notes[-1])
            if not _usable(device):
                raise
        else:
            right.append(name)
    compiled = {COMPILED: checked[COMPILED]} if COMPILED in right else {}
    if compiled and verified is not problem:
        compiled = dict(_compiled(item, problem))
    del expected, verified, checked
    _free(device)
    sets = input_sets(item, problem, right, device, compiled)
    for name, error in _who_cannot_be_timed(sets[0]):
        notes.append(f"{item.case}, {item.size}: {name} not timed, {error}")
        journal.add("skipped", item=item.fields(), message=notes[-1])
        for _, found in sets:
            del found[name]
    if not _usable(device):
        raise DeviceLostError(notes[-1])
    for row in measure_case(sets, device, args.samples):
        size = {"size": item.size, "dtype": item.dtype}
        yield {"case": item.case, **size, "choice": chosen, **row}


def _who_cannot_be_timed(inputs: Set) -> list[tuple[str, str]]:
    """Other packages that fail where they are timed, which may be other calls than were verified,
    and how. Ours and PyTorch's are not tried: nobody is timed without them."""
    problem, found = inputs
    failed = []
    for name in [name for name in found if name not in ("ours", "pytorch")]:
        try:
            for backward in (False, True) if problem.both is not None else (False,):
                _run(problem, found[name], backward=backward)()
        except Exception as error:
            failed.append((name, _one_line(error)))
    return failed


def input_sets(
    item: Item,
    problem: Problem,
    names: Sequence[str],
    device: torch.device,
    compiled: Mapping[str, Contender] | None = None,
) -> list[Set]:
    """The problem and others alike, of which the cache does not hold the inputs, with contenders.

    compiled: what is compiled once, and called with the inputs of each.
    """
    count = measure.input_sets(sum(x.nbytes for x in problem.inputs), device)
    problems = [problem]
    problems += [_problem(item, SIZES[item.size], device) for _ in range(count - 1)]
    sets = []
    for each in problems:
        found = {**contenders(item, each, device), **(compiled or {})}
        sets.append((each, {name: found[name] for name in names}))
    return sets


def contenders(item: Item, problem: Problem, device: torch.device) -> dict[str, Contender]:
    """Ours, PyTorch's and other packages', by name; what is compiled is not among them."""
    found = {"ours": Contender(problem.ours), "pytorch": Contender(problem.eager)}
    return found | dict(_others(item, problem, device))


def _problem(item: Item, size: Size, device: torch.device) -> Problem:
    return CASES[item.case](size, getattr(torch, item.dtype), device)


def _verified_problem(
    item: Item, problem: Problem, device: torch.device, notes: list[str]
) -> Problem:
    """What is compared with the reference: the problem, or on a CPU a part of a large one."""
    size = SIZES[item.size]
    part = size.at_most(VERIFIED_TOKENS, VERIFIED_TARGETS)
    if device.type != "cpu" or part == size:
        return problem
    smaller = _problem(item, part, device)
    if [x.shape for x in smaller.inputs] == [x.shape for x in problem.inputs]:
        return problem
    counts = f"{part.tokens} of {size.tokens} tokens, {part.targets} of {size.targets} targets"
    notes.append(f"{item.case}, {item.size}: verified on {counts}")
    return smaller


def _contenders_of(item: Item, problem: Problem, device: torch.device) -> dict[str, Contender]:
    """What is timed beside ours and PyTorch as it is, by name."""
    return dict(_others(item, problem, device)) | dict(_compiled(item, problem))


def _others(item: Item, problem: Problem, device: torch.device) -> Iterator[tuple[str, Contender]]:
    for name, function in problem.more.items():
        yield name, Contender(function)
    yield from kernel_peers.contenders(item.case, problem, device)


def _compiled(item: Item, problem: Problem) -> Iterator[tuple[str, Contender]]:
    if item.compile:
        # Sizes share a function's code, and after a few recompilations it would run as it is.
        torch.compiler.reset()
        yield COMPILED, Contender(torch.compile(problem.eager, dynamic=False))


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
    return kind + (text if len(text) <= LONGEST_MESSAGE else text[:LONGEST_MESSAGE] + " ...")


def _usable(device: torch.device) -> bool:
    """Whether the device still works after an error: some leave the process without it."""
    try:
        torch.ones(1, device=device).item()
    except RuntimeError:
        return False
    return True


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def render(result: dict[str, Any]) -> str:
    """The whole result as Markdown that also reads well in a terminal."""
    return "\n\n".join(
        [
            f"# Kernels, {result['size']}, {result['dtype']}",
            output.header(result),
            kernel_report.rows_table(result["rows"]),
            kernel_report.choices(result["rows"]),
            *result["failures"],
            *result["notes"],
        ]
    )


def items_of(args: argparse.Namespace) -> list[Item]:
    """What the arguments ask for, without what the journal has already."""
    if args.plan:
        items = plan_for(torch.device(args.device), CASES)
    else:
        names = [(case, size) for size in args.size for case in args.cases]
        items = [Item(case, size, args.dtype, args.compile) for case, size in names]
    done = started(args.append)
    return [item for item in items if item.fields() not in done]


def main() -> None:
    args = parse_arguments()
    context = output.context()
    backends.keep_freed_memory(
        torch.device(args.device)
    )  # as in training; everything that is timed has it
    journal = Journal(args.append)
    journal.add("context", **context)
    try:
        rows, failures, notes = run_items(items_of(args), args, journal)
    except DeviceLostError as error:
        print(error, file=sys.stderr)
        sys.exit(DEVICE_LOST)
    result = {
        **context,
        "size": "plan" if args.plan else " ".join(args.size),
        "dtype": args.dtype,
        "device": args.device,
        "rows": rows,
        "failures": failures,
        "notes": notes,
    }
    text = render(result)
    print(text)
    if args.out:
        for path in output.write(args.out, result, text):
            print(f"wrote {path}", file=sys.stderr)
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    main()
