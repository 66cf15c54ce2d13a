"""What LoRA costs on top of a frozen linear: by each strategy, and by PEFT.

    python -m benchmarks.kernels.lora_linear --out benchmarks/results/lora_linear-bfloat16
    python -m benchmarks.kernels.lora_linear --device cuda --model llama-3.1-8b qwen3-0.6b

Every row is one linear with one adapter. `base` is the frozen linear alone (the vendor's matrix
product, forward and dX). `augmented` is ours as a decoder layer runs it, x and dY in buffers with
padding columns; `op` is `ops.lora_linear` on a plain tensor, copied to get such columns. Results
and all gradients of each are compared with float64 before anything is timed.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import measure, output
from benchmarks.common.journal import Journal, started
from lora_engine import backends, ops
from lora_engine.ops.augmented import Joined
from lora_engine.ops.lora.linear import make_product
from lora_engine.testing import assert_as_good_as

# Each projection's (outputs, inputs).
MODELS = {
    "smollm2-135m": {"q": (576, 576), "gate": (1536, 576), "down": (576, 1536)},
    "qwen3-0.6b": {
        "q": (2048, 1024),
        "k": (1024, 1024),
        "gate": (3072, 1024),
        "down": (1024, 3072),
    },
    "llama-3.1-8b": {
        "q": (4096, 4096),
        "k": (1024, 4096),
        "gate": (14336, 4096),
        "down": (4096, 14336),
    },
}
TOKENS = {"cpu": (1024,), "cuda": (2048, 8192, 16384)}
SCALING = 2.0
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}


@dataclass(frozen=True)
class Case:
    """One linear with one adapter, and a batch."""

    x: Tensor  # [M, K]
    dy: Tensor  # [M, N]
    weight: Tensor  # [N, K]
    lora_a: Tensor  # [r, K] float32
    lora_b: Tensor  # [N, r] float32

    def forward_flops(self) -> int:
        return 2 * self.dy.numel() * self.x.shape[1]


@dataclass(frozen=True)
class Strategy:
    """forward() and both(), which returns y, dx, dA, dB (None where there is none)."""

    forward: Callable[[], object]
    both: Callable[[], Sequence[Tensor | None]]


def make_case(m: int, n: int, k: int, r: int, dtype: torch.dtype, device: torch.device) -> Case:
    torch.manual_seed(0)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(shape, device=device) * std

    return Case(
        normal(m, k).to(dtype),
        normal(m, n).to(dtype),
        normal(n, k, std=k**-0.5).to(dtype),
        normal(r, k, std=k**-0.5),
        normal(n, r, std=0.05),
    )


def base(case: Case) -> Strategy:
    out, dx = torch.empty_like(case.dy), torch.empty_like(case.x)

    def both() -> Sequence[Tensor | None]:
        torch.mm(case.x, case.weight.t(), out=out)
        return out, torch.mm(case.dy, case.weight, out=dx), None, None

    return Strategy(lambda: torch.mm(case.x, case.weight.t(), out=out), both)


def _group(case: Case) -> ops.LoraGroup:
    factors = ops.LoraFactors(case.lora_a, case.lora_b, SCALING)
    return ops.LoraGroup.dense([case.weight], [factors])


def augmented(case: Case) -> Strategy:
    """The products of a block: x and dY lie in buffers with padding columns for S and dS."""
    group = _group(case)
    product = make_product(case.x, group)
    assert product is not None
    (m, n), k = case.dy.shape, case.x.shape[1]
    xs = case.x.new_empty(m, k + group.padded_rank)
    dys = case.x.new_empty(m, n + group.padded_rank)
    xs[:, :k], dys[:, :n] = case.x, case.dy
    joined = Joined.of(xs, k)
    needs = [factor is case.lora_a or factor is case.lora_b for factor in group.tensors()]
    wanted = product.wanted(needs)

    def both() -> Sequence[Tensor | None]:
        y, _ = product.forward(joined)
        ds, d_b = product.fill_ds(dys, xs[:, k:], wanted)
        dx = product.input_gradient(dys)
        d_a = product.lora_a_gradient(ds, xs[:, :k], wanted)
        found = product.factor_gradients(needs, d_a, d_b, [dys[:, :n]], None)
        return y, dx, found[0], found[1]

    return Strategy(lambda: product.forward(joined), both)


def _differentiated(case: Case, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Strategy:
    leaves = [t.detach().requires_grad_() for t in (case.x, case.lora_a, case.lora_b)]

    def forward() -> object:
        with torch.no_grad():
            return function(*leaves)

    def both() -> Sequence[Tensor | None]:
        y = function(*leaves)
        return (y.detach(), *torch.autograd.grad(y, leaves, case.dy))

    return Strategy(forward, both)


def op(case: Case) -> Strategy:
    def function(x: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        return ops.lora_linear(x, group)[0]

    leaves_case = Case(
        case.x,
        case.dy,
        case.weight,
        case.lora_a.detach().requires_grad_(),
        case.lora_b.detach().requires_grad_(),
    )
    group = _group(leaves_case)
    x = case.x.detach().requires_grad_()

    def forward() -> object:
        with torch.no_grad():
            return function(x, leaves_case.lora_a, leaves_case.lora_b)

    def both() -> Sequence[Tensor | None]:
        y = function(x, leaves_case.lora_a, leaves_case.lora_b)
        leaves = [x, leaves_case.lora_a, leaves_case.lora_b]
        return (y.detach(), *torch.autograd.grad(y, leaves, case.dy))

    return Strategy(forward, both)


def base_add(case: Case) -> Strategy:
    """What a user writes: the linear, two small products, a multiplication and an addition."""

    def function(x: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        low = torch.nn.functional.linear(x, lora_a.to(x.dtype))
        delta = torch.nn.functional.linear(low, lora_b.to(x.dtype))
        return torch.nn.functional.linear(x, case.weight) + SCALING * delta

    return _differentiated(case, function)


def peft_layer(case: Case) -> Strategy:
    """PEFT's layer, adapters in the base's dtype (its fastest), no dropout."""
    import peft

    n, k = case.weight.shape
    holder = torch.nn.Sequential(torch.nn.Linear(k, n, bias=False))
    holder.to(device=case.x.device, dtype=case.x.dtype)
    r = case.lora_a.shape[0]
    config = peft.LoraConfig(r=r, lora_alpha=round(SCALING * r), target_modules=["0"])
    model = peft.get_peft_model(holder, config, autocast_adapter_dtype=False)
    layer: Any = model.base_model.model[0]
    pair = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        layer.base_layer.weight.copy_(case.weight)
        for parameter, value in zip(pair, (case.lora_a, case.lora_b), strict=True):
            parameter.copy_(value)
    x = case.x.detach().requires_grad_()

    def forward() -> object:
        with torch.no_grad():
            return layer(x)

    def both() -> Sequence[Tensor | None]:
        y = layer(x)
        return (y.detach(), *torch.autograd.grad(y, [x, *pair], case.dy))

    return Strategy(forward, both)


STRATEGIES: dict[str, Callable[[Case], Strategy]] = {
    "base": base,
    "augmented": augmented,
    "op": op,
    "base + add": base_add,
    "PEFT": peft_layer,
}


def oracle(case: Case) -> Sequence[Tensor]:
    double = Case(*(t.double() for t in vars(case).values()))
    return [t for t in base_add(double).both() if t is not None]


def verify(case: Case, made: dict[str, Strategy]) -> None:
    """AssertionError unless each is as near to float64 as `base + add` in the same dtype."""
    exact, plain = oracle(case), made["base + add"].both()
    names = ("y", "dx", "dA", "dB")
    for strategy, found in made.items():
        if strategy == "base":
            continue
        for what, mine, peer, true in zip(names, found.both(), plain, exact, strict=True):
            assert mine is not None and peer is not None
            assert_as_good_as(
                mine, peer, true, tolerance=TOLERANCE[case.x.dtype], what=f"{strategy} {what}"
            )


def measure_case(case: Case, device: torch.device, samples: int) -> list[dict[str, Any]]:
    made = {name: make(case) for name, make in STRATEGIES.items()}
    verify(case, made)
    rows = []
    for what, factor in (("forward", 1), ("forward+backward", 2)):
        runs = {n: (s.forward if factor == 1 else s.both) for n, s in made.items()}
        timings = measure.time_alternating(runs, device, samples=samples)
        for name, timing in timings.items():
            rows.append(
                {
                    "pass": what,
                    "strategy": name,
                    "seconds": asdict(timing),
                    "flops_per_second": factor * case.forward_flops() / timing.median,
                    "ratio_to_base": timing.median / timings["base"].median,
                    "extra_bytes": measure.extra_memory(runs[name], device),
                }
            )
    return rows


def dispatch_seconds(device: torch.device, calls: int = 300) -> float:
    """Time of one forward call on a tiny input, where nothing but overhead is left."""
    case = make_case(1, 16, 16, 4, torch.float32, device)
    group = _group(case)
    with torch.no_grad():
        best = float("inf")
        for _ in range(20):
            start = time.perf_counter()
            for _ in range(calls):
                ops.lora_linear(case.x, group)
            best = min(best, (time.perf_counter() - start) / calls)
    return best


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--model", nargs="+", choices=sorted(MODELS), default=["smollm2-135m"])
    parser.add_argument("--tokens", nargs="+", type=int, help="rows of the batch")
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 16, 64])
    parser.add_argument("--samples", type=int, default=15)
    parser.add_argument("--minutes", type=float, help="begin nothing more after so long")
    parser.add_argument(
        "--append",
        type=Path,
        metavar="FILE",
        help="write each result to FILE at once, a JSON object a line; what FILE has is left out",
    )
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    return parser.parse_args(argv)


def render(result: dict[str, Any]) -> str:
    dispatch = result["dispatch_seconds"]
    columns = ("linear", "M", "r", "pass", "strategy", "µs", "TFLOP/s", "of base", "extra MiB")
    lines = [
        [
            f"{row['model']} {row['linear']}",
            str(row["tokens"]),
            str(row["rank"]),
            row["pass"],
            row["strategy"],
            f"{row['seconds']['median'] * 1e6:.0f}",
            f"{row['flops_per_second'] / 1e12:.2f}",
            f"{row['ratio_to_base']:.2f}",
            f"{row['extra_bytes'] / 2**20:.1f}",
        ]
        for row in result["rows"]
    ]
    return "\n\n".join(
        [
            f"# LoRA linear, {result['dtype']}",
            output.header(result),
            f"One call of `ops.lora_linear` on a tiny input: {dispatch * 1e6:.0f} µs",
            output.table(columns, lines, left=5),
        ]
    )


def places(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """What is measured: every linear at rank 16 and the middle number of tokens first."""
    tokens = args.tokens or TOKENS[device.type]
    found = [
        {"model": model, "linear": linear, "tokens": m, "rank": rank}
        for model in args.model
        for linear in MODELS[model]
        for m in tokens
        for rank in args.ranks
    ]
    middle = tokens[len(tokens) // 2]
    return sorted(found, key=lambda place: (place["rank"] != 16, place["tokens"] != middle))


def main() -> None:
    args = parse_arguments()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    backends.keep_freed_memory(device)  # as in training; everything that is timed has it
    journal = Journal(args.append)
    result: dict[str, Any] = {**output.context(), "dtype": args.dtype, "device": args.device}
    result["dispatch_seconds"] = dispatch_seconds(device)
    journal.add("context", **result)
    rows = []
    deadline = time.monotonic() + 60 * args.minutes if args.minutes is not None else None
    done = started(args.append)
    for place in places(args, device):
        item = {**place, "dtype": args.dtype}
        if item in done:
            continue
        if deadline is not None and time.monotonic() > deadline:
            journal.add("note", message="cut short, the time was over")
            break
        journal.add("start", item=item)
        n, k = MODELS[place["model"]][place["linear"]]
        case = make_case(place["tokens"], n, k, place["rank"], dtype, device)
        try:
            found = measure_case(case, device, args.samples)
        except AssertionError as error:
            if args.append is None:
                raise
            journal.add("failure", item=item, message=" ".join(str(error).split()))
            continue
        for row in found:
            rows.append({**place, **row})
            journal.add("row", item=item, **rows[-1])
        journal.add("end", item=item)
    result["rows"] = rows
    text = render(result)
    print(text)
    if args.out:
        for path in output.write(args.out, result, text):
            print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
