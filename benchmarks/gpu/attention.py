"""Causal attention in packed sequences on a GPU, ours beside PyTorch's.

    python -m benchmarks.gpu.attention --append results/attention.jsonl

Rotation is left out: not every contender has it. Each contender is first compared with PyTorch's
attention sequence by sequence, in the same dtype. TFLOP/s count the causal half of two products in
the forward pass and of five in the backward pass, whatever a contender computes twice.
"""

import argparse
import importlib.util
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.common import measure, output
from benchmarks.common.journal import Journal, started
from benchmarks.gpu.attention_report import render
from lora_engine import backends
from lora_engine.backends import contracts, launchers
from lora_engine.testing import cu_seqlens

FORWARD_PRODUCTS, BOTH_PRODUCTS = 2, 7
BATCHED = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
# A contender may differ from the first by so much of the largest value.
TOLERANCE = 3e-2


@dataclass(frozen=True)
class Size:
    """Packed sequences of so many tokens each."""

    lengths: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def alike(self) -> bool:
        return len(set(self.lengths)) == 1

    def flops(self, products: int) -> int:
        pairs = sum(length * (length + 1) // 2 for length in self.lengths)
        return 2 * products * pairs * self.heads * self.head_dim

    def __str__(self) -> str:
        counts = [(length, len([*run])) for length, run in groupby(self.lengths)]
        lengths = [f"{count} x {length}" if count > 1 else f"{length}" for length, count in counts]
        heads = f"{self.heads}/{self.kv_heads} heads of {self.head_dim}"
        return f"{' + '.join(lengths)}, {heads}"


UNEQUAL = (3584, 2304, 1536, 768)
MIXED = (1900, 64, 900, 300, 128, 2048, 700, 450, 32, 256, 600, 200, 64, 36, 500, 14)
SIZES = (
    Size((1024,) * 8, 32, 8, 128),
    Size((8192,), 32, 8, 128),
    Size(UNEQUAL, 32, 8, 128),
    Size((1024,) * 8, 32, 8, 64),
    Size((8192,), 32, 8, 64),
    Size(UNEQUAL, 32, 8, 64),
    Size((256,) * 32, 32, 8, 128),
    Size(MIXED, 32, 8, 128),
)
TINY = (Size((48, 48), 2, 1, 16), Size((48, 5), 2, 1, 16))


@dataclass(frozen=True)
class Contender:
    """forward gives the output; both the gradients of q, k and v for the problem's d_o."""

    forward: Callable[[], Tensor]
    both: Callable[[], tuple[Tensor, ...]]


class Problem:
    """q, k and v side by side, as one product writes them, and what they are attended with."""

    def __init__(self, size: Size, dtype: torch.dtype, device: torch.device) -> None:
        torch.manual_seed(0)
        self.size, heads = size, (size.heads, size.kv_heads, size.kv_heads)
        self.widths = [n * size.head_dim for n in heads]
        rows = torch.randn(size.tokens, sum(self.widths), device=device, dtype=dtype)
        self.rows = rows.split(self.widths, 1)
        self.d_o = torch.randn(size.tokens, self.widths[0], device=device, dtype=dtype)
        self.bounds = cu_seqlens([*size.lengths]).to(device)

    def of_kernels(self, kernels: contracts.Attention) -> Contender:
        """Our own calls of launchers, without autograd."""
        q, k, v = self.rows
        o = torch.empty_like(self.d_o)
        lse = torch.empty(self.size.heads, self.size.tokens, device=q.device)
        grads = torch.empty(q.shape[0], sum(self.widths), device=q.device, dtype=q.dtype)
        parts = grads.split(self.widths, 1)
        dim = self.size.head_dim

        def forward() -> Tensor:
            kernels.attention_fwd(
                q, k, v, self.bounds, None, None, o, lse,
                head_dim=dim, scale=dim**-0.5, causal=True, window=0,
            )  # fmt: skip
            return o

        def both() -> tuple[Tensor, ...]:
            forward()
            kernels.attention_bwd(
                self.d_o, q, k, v, self.bounds, None, None, o, lse, *parts,
                head_dim=dim, scale=dim**-0.5, causal=True, window=0,
            )  # fmt: skip
            return parts

        return Contender(forward, both)

    def of_function(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Contender:
        """A differentiable function of q, k and v [tokens, heads, head_dim]."""
        dim = self.size.head_dim
        leaves = [x.detach().clone().requires_grad_() for x in self.rows]

        def run() -> Tensor:
            return attend(*(x.unflatten(1, (-1, dim)) for x in leaves)).flatten(1)

        def forward() -> Tensor:
            with torch.no_grad():
                return run()

        return Contender(forward, lambda: torch.autograd.grad(run(), leaves, self.d_o))

    def one_by_one(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """PyTorch's attention for each sequence."""
        parts = zip(*(x.split(self.size.lengths) for x in (q, k, v)), strict=True)
        return torch.cat([_sdpa(*(x[None] for x in part))[0] for part in parts])

    def as_batch(self, backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """PyTorch's attention for all sequences as a batch: their lengths are alike."""

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                rows = (x.unflatten(0, (len(self.size.lengths), -1)) for x in (q, k, v))
                return _sdpa(*rows).flatten(0, 1)

        return attend

    def varlen(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """PyTorch's own for packed sequences, which is told the longest."""
        from torch.nn.attention.varlen import varlen_attn

        length, options = max(self.size.lengths), _causal(varlen_attn)
        found = varlen_attn(q, k, v, self.bounds, self.bounds, length, length, **options)
        assert isinstance(found, Tensor)
        return found


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of [B, L, heads, head_dim]."""
    heads = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True).transpose(1, 2)


def _causal(varlen_attn: Callable[..., Any]) -> dict[str, Any]:
    """How a version of PyTorch is asked for a causal mask and grouped heads."""
    names = varlen_attn.__annotations__
    options: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in names else {}
    if "is_causal" in names:
        return options | {"is_causal": True}
    return options | {"window_size": (-1, 0)}


def contenders(problem: Problem, device: torch.device) -> Iterator[tuple[str, Contender]]:
    """By name; the first is what the others are compared with."""
    yield "sdpa, one by one", problem.of_function(problem.one_by_one)
    yield "triton", problem.of_kernels(launchers.attention("triton"))
    if device.type == "cuda":
        yield "cuda", problem.of_kernels(launchers.attention("cuda"))
        alike = problem.size.alike
        for plan in ("hopper", "cudnn") if alike else ("hopper",):
            yield f"{plan} plan", problem.of_kernels(launchers.attention_by_plan(plan))
        if alike:
            for name, backend in BATCHED.items():
                yield f"sdpa {name}, batch", problem.of_function(problem.as_batch(backend))
        if importlib.util.find_spec("torch.nn.attention.varlen") is not None:
            yield "varlen_attn", problem.of_function(problem.varlen)


def check(contender: Contender, expected: Contender) -> None:
    """Raises AssertionError where results are not those of `expected`."""
    pairs = zip(
        (contender.forward(), *contender.both()),
        (expected.forward(), *expected.both()),
        strict=True,
    )
    for name, (found, wanted) in zip(("o", "dq", "dk", "dv"), pairs, strict=True):
        error = (found.float() - wanted.float()).abs().max() / wanted.float().abs().max()
        if not error <= TOLERANCE:
            raise AssertionError(f"{name} differs by {error:.3g} of the largest value")


def measure_size(
    size: Size, dtype: torch.dtype, device: torch.device, samples: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """A row per contender and pass, and a line about each contender that cannot run."""
    problem = Problem(size, dtype, device)
    good: dict[str, Contender] = {}
    notes = []
    expected: Contender | None = None
    for name, contender in contenders(problem, device):
        expected = expected or contender
        try:
            check(contender, expected)
        except Exception as error:
            text = " ".join(str(error).split())[:300]
            notes.append(f"{size}: {name}: {type(error).__name__}: {text}")
        else:
            good[name] = contender
    rows = []
    passes: tuple[tuple[str, int], ...] = (
        ("forward", FORWARD_PRODUCTS),
        ("both", BOTH_PRODUCTS),
    )
    for name, products in passes:
        runs = {
            who: contender.forward if name == "forward" else contender.both
            for who, contender in good.items()
        }
        found = measure.time_alternating(runs, device, samples=samples)
        for who, timing in found.items():
            flops = size.flops(products)
            rows.append(
                {
                    "size": str(size),
                    "pass": name,
                    "contender": who,
                    "microseconds": timing.median * 1e6,
                    "tflops": flops / timing.median / 1e12,
                }
            )
    return rows, notes


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--samples", type=int, default=9)
    parser.add_argument("--minutes", type=float, help="begin no size after so long")
    parser.add_argument(
        "--append", type=Path, metavar="FILE", help="write each row to FILE at once"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    deadline = time.monotonic() + 60 * args.minutes if args.minutes is not None else None
    done = [item["size"] for item in started(args.append)]
    journal = Journal(args.append)
    journal.add("context", **output.context(), triton=backends.explain("attention", device).reason)
    found = []
    for size in SIZES if device.type == "cuda" else TINY:
        if str(size) in done or (deadline is not None and time.monotonic() > deadline):
            continue
        journal.add("start", item={"size": str(size)})
        rows, notes = measure_size(size, dtype, device, args.samples)
        for row in rows:
            journal.add("row", item={"size": str(size)}, **row)
        for note in notes:
            journal.add("note", message=note)
            print(note)
        journal.add("end", item={"size": str(size)})
        found += rows
    print(render(found))


if __name__ == "__main__":
    main()
