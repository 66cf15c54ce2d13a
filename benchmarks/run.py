"""Kernel benchmarks: ours against PyTorch and against the machine's own ceiling.

    python benchmarks/run.py --dtype bfloat16 --out benchmarks/results/kernels

A case is timed only if its results match the reference first; the exit status is 1 if any does not.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cases  # noqa: F401  (registers the cases)
import measure
import output
import torch
from registry import CASES, SIZES, Function, Problem, Work, as_tuple
from torch import Tensor

from lora_engine import backends
from lora_engine.testing import assert_as_good_as

# How much worse than PyTorch's own error in the same dtype, relative to the largest magnitude.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-8}
COLUMNS = ("case", "pass", "implementation", "µs", "rate", "of ceiling", "extra MiB")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=sorted(CASES), default=list(CASES))
    parser.add_argument("--size", choices=sorted(SIZES), default="smollm2")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--samples", type=int, default=15, help="timing samples each")
    parser.add_argument("--compile", action="store_true", help="also torch.compile of PyTorch's")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    return parser.parse_args(argv)


def verify(problem: Problem, function: Function) -> None:
    """Raise AssertionError unless results and gradients match the reference.

    They may be as far from the float64 oracle as PyTorch's are in the same dtype, and TOLERANCES
    beyond.
    """
    tolerance = TOLERANCES[problem.inputs[0].dtype]
    expected = _outputs_and_gradients(problem, problem.oracle, torch.float64)
    peer = _outputs_and_gradients(problem, problem.eager)
    actual = _outputs_and_gradients(problem, function)
    for (what, oracle), (_, theirs), (_, mine) in zip(expected, peer, actual, strict=True):
        assert_as_good_as(mine, theirs, oracle, tolerance=tolerance, what=what)


def _outputs_and_gradients(
    problem: Problem, function: Function, dtype: torch.dtype | None = None
) -> list[tuple[str, Tensor]]:
    inputs = problem.inputs
    if dtype is not None:
        inputs = tuple(_converted(x, dtype) for x in inputs)
    elif problem.in_place:
        inputs = tuple(x.clone() for x in inputs)
    outputs = as_tuple(function(*inputs))
    named = [(f"output {i}", output.detach()) for i, output in enumerate(outputs)]
    if problem.both is not None:
        for i, gradient in enumerate(_gradients(inputs, outputs)):
            named.append((f"gradient {i}", gradient))
    return named


def _converted(x: Tensor, dtype: torch.dtype) -> Tensor:
    return (
        x.detach()
        .to(dtype if x.is_floating_point() else x.dtype, copy=True)
        .requires_grad_(x.requires_grad)
    )


def _gradients(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of a fixed weighted sum of the outputs."""
    wanted = [x for x in inputs if x.requires_grad]
    return torch.autograd.grad(outputs, wanted, [_upstream(output) for output in outputs])


def _upstream(output: Tensor) -> Tensor:
    """The same values whatever the dtype, none of them special."""
    ramp = torch.arange(output.numel(), device=output.device, dtype=torch.float32)
    return torch.cos(ramp).view(output.shape).to(torch.bfloat16).to(output.dtype)


def measure_case(
    problem: Problem, functions: dict[str, Function], device: torch.device, samples: int
) -> Iterator[dict[str, Any]]:
    """One row per pass and implementation."""
    if problem.both is None:
        passes = [("step", problem.forward)]
    else:
        passes = [("forward", problem.forward), ("forward+backward", problem.both)]
    for pass_name, work in passes:
        runs = {
            name: _run(problem, function, backward=work is problem.both)
            for name, function in functions.items()
        }
        ceiling = _ceiling(work, problem.inputs[0].dtype, device)
        timings = measure.time_alternating({**runs, "": ceiling}, device, samples=samples)
        rate = _ceiling_amount(work) / timings.pop("").median
        for name, timing in timings.items():
            achieved = work.amount / timing.median
            yield {
                "pass": pass_name,
                "implementation": name,
                "seconds": asdict(timing),
                "rate": achieved,
                "unit": work.unit,
                "ceiling": rate,
                "share_of_ceiling": achieved / rate,
                "extra_bytes": measure.extra_memory(runs[name], device),
            }


def _run(problem: Problem, function: Function, *, backward: bool) -> measure.Thunk:
    inputs = problem.inputs
    if not backward:

        def forward() -> object:
            with torch.no_grad():
                return function(*inputs)

        return forward
    wanted = [x for x in inputs if x.requires_grad]
    upstream = [_upstream(output) for output in as_tuple(function(*inputs))]
    return lambda: torch.autograd.grad(as_tuple(function(*inputs)), wanted, upstream)


def _ceiling(work: Work, dtype: torch.dtype, device: torch.device) -> measure.Thunk:
    if work.matmuls is None:
        return measure.copy_run(work.amount, device)
    return measure.matmul_run(work.matmuls, dtype, device)


def _ceiling_amount(work: Work) -> int:
    return work.amount if work.matmuls is None else sum(m.flops for m in work.matmuls)


def run_cases(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of all cases that match the reference, and a line about each that does not."""
    device, dtype, size = torch.device(args.device), getattr(torch, args.dtype), SIZES[args.size]
    rows, failures = [], []
    for name in args.cases:
        torch.manual_seed(0)
        problem = CASES[name](size, dtype, device)
        functions = {"ours": problem.ours, "pytorch": problem.eager}
        if args.compile:
            functions["torch.compile"] = torch.compile(problem.eager, dynamic=False)
        try:
            for function in functions.values():
                verify(problem, function)
        except AssertionError as error:
            failures.append(f"{name}: not timed, {error}")
            continue
        chosen = asdict(backends.explain(name, device, problem.inputs[0].dtype))
        for row in measure_case(problem, functions, device, args.samples):
            rows.append({"case": name, "choice": chosen, **row})
    return rows, failures


def render(result: dict[str, Any]) -> str:
    """The whole result as Markdown that also reads well in a terminal."""
    lines = [
        [
            row["case"],
            row["pass"],
            row["implementation"],
            f"{row['seconds']['median'] * 1e6:.0f}",
            f"{row['rate'] / 1e9:.1f} {row['unit']}",
            f"{row['share_of_ceiling']:.0%}",
            f"{row['extra_bytes'] / 2**20:.1f}",
        ]
        for row in result["rows"]
    ]
    choices = {row["case"]: row["choice"] for row in result["rows"]}
    ours = [f"- {name}: {c['impl']} ({c['reason']})" for name, c in choices.items()]
    return "\n\n".join(
        [
            f"# Kernels, {result['size']}, {result['dtype']}",
            output.header(result),
            output.table(COLUMNS, lines, left=3),
            "What ran as ours:\n" + "\n".join(ours),
            *result["failures"],
        ]
    )


def main() -> None:
    args = parse_arguments()
    context = output.context()
    rows, failures = run_cases(args)
    result = {
        **context,
        "size": args.size,
        "dtype": args.dtype,
        "device": args.device,
        "rows": rows,
        "failures": failures,
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
