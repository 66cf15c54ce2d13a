"""The CPU's products of large matrices beside PyTorch's, on the shapes of a layer's linears.

    python -m benchmarks.kernels.matmul --out benchmarks/results/matmul-xeon-2cores

Forward Y = X Wᵀ and backward dX = dY W, with weights that are not in the caches, as in a step. A
packed batch has its own number of rows: PyTorch's product is timed with rows that it has seen and,
once each, with rows that it has not, for which it compiles a product first.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count, cycle
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from benchmarks.common import measure, output
from lora_engine import backends
from lora_engine.backends.cpu.matmul import matmul

SHAPES = {  # of SmolLM2-135M, with columns for LoRA of rank 16: outputs and inputs
    "q, k, v": (960, 576 + 48),
    "o": (576, 576 + 16),
    "gate, up": (3072, 576 + 32),
    "down": (576, 1536 + 16),
}
WEIGHTS_BYTES = 64 * 2**20
UNSEEN = 5


def runs(
    rows: int, outputs: int, inputs: int, dtype: torch.dtype
) -> tuple[dict[str, measure.Thunk], dict[str, Callable[[int], object]]]:
    """Every product by name, and PyTorch's as a function of the number of rows."""
    number = max(2, WEIGHTS_BYTES // (outputs * inputs * dtype.itemsize))
    weights = cycle([torch.randn(outputs, inputs).to(dtype) for _ in range(number)])
    x = torch.randn(2 * rows, inputs).to(dtype)
    dy = torch.randn(2 * rows, outputs).to(dtype)
    y, dx = torch.empty_like(dy), torch.empty_like(x)

    def forward(product: Callable[[Tensor, Tensor, Tensor], object], m: int) -> None:
        product(x[:m], next(weights).t(), y[:m])

    def backward(product: Callable[[Tensor, Tensor, Tensor], object], m: int) -> None:
        product(dy[:m], next(weights), dx[:m])

    def vendor(a: Tensor, b: Tensor, c: Tensor) -> None:
        torch.mm(a, b, out=c)

    both = {"forward": forward, "backward": backward}
    named: dict[str, measure.Thunk] = {}
    for name, run in both.items():
        named[f"{name}, ours"] = lambda run=run: run(matmul, rows)
        named[f"{name}, torch.mm"] = lambda run=run: run(vendor, rows)
    return named, {name: lambda m, run=run: run(vendor, m) for name, run in both.items()}


def unseen(run: Callable[[int], object], rows: Iterator[int]) -> float:
    """Seconds of a product with rows that it has not seen, a median."""
    seconds = []
    for _ in range(UNSEEN):
        m = next(rows)
        begin = time.perf_counter()
        run(m)
        seconds.append(time.perf_counter() - begin)
    return median(seconds)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--samples", type=int, default=15)
    parser.add_argument("--out", type=Path, help="results as OUT.json and OUT.md")
    args = parser.parse_args(argv)
    dtype, device = getattr(torch, args.dtype), torch.device("cpu")
    context = {**output.context(), "isa": backends.native().isa()}
    rows, measured, unseen_rows = [], [], count(args.rows + 1)
    for linear, (outputs, inputs) in SHAPES.items():
        named, vendors = runs(args.rows, outputs, inputs, dtype)
        timings = measure.time_alternating(named, device, samples=args.samples)
        for direction, vendor in vendors.items():
            ours = timings[f"{direction}, ours"].median
            seen = timings[f"{direction}, torch.mm"].median
            first = unseen(vendor, unseen_rows)
            rate = 2e-9 * args.rows * outputs * inputs / ours
            measured.append({"linear": linear, "pass": direction, "ours": ours})
            measured[-1] |= {"torch.mm": seen, "torch.mm, rows unseen": first}
            times = [f"{seconds * 1e3:.3f}" for seconds in (ours, seen, first)]
            ratios = [f"{seen / ours:.2f}", f"{first / ours:.1f}"]
            rows.append([linear, direction, *times, f"{rate:.0f}", *ratios])
    titles = ["linear", "pass", "ours ms", "torch.mm ms", "rows unseen ms", "ours GFLOP/s"]
    titles += ["torch.mm takes", "with rows unseen"]
    what = f"{args.rows} rows, {args.dtype}, kernels of {context['isa']}"
    text = f"{output.header(context)}\n\n{what}\n\n{output.table(titles, rows, left=2)}"
    print(text)
    if args.out is not None:
        output.write(args.out, {**context, "what": what, "seconds": measured}, text)


if __name__ == "__main__":
    main()
