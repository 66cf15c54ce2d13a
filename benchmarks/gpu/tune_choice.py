"""Measures on a GPU what lora_strategy.json and CHUNK_BYTES decide.

    python -m benchmarks.gpu.tune_choice --append choice.jsonl

The wide products of a LoRA linear, forward and dX, by each strategy; the head with its loss and
gradient by the bytes of a chunk of logits. The first of each is what is chosen at present, and
takes part twice: what it differs from itself is noise. At the end stands which is the fastest over
all sizes, if it is so for certain; lora_strategy.json and plans.py are changed by hand.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.common import measure, output
from benchmarks.common.journal import Journal, read, started
from benchmarks.gpu.tune_search import Decision, Measured, decide
from lora_engine import backends, ops
from lora_engine.backends import choice, plans, selection
from lora_engine.backends.request import Head, Request
from lora_engine.ops.augmented import Joined
from lora_engine.ops.lora.linear import make_product

AGAIN = "again"
# Rows, outputs and inputs: o, q k v, gate and up, down of Llama 3.1 8B, and smaller ones.
PRODUCTS = {
    "cuda": (
        (8192, 4096, 4096),
        (8192, 6144, 4096),
        (8192, 28672, 4096),
        (8192, 4096, 14336),
        (2048, 4096, 4096),
        (2048, 28672, 4096),
        (8192, 2048, 2048),
        (16384, 1536, 576),
    ),
    "cpu": ((40, 64, 48),),
}
RANK = 16
# What carries each out on a GPU. dX without the augmented product has one kernel.
FORWARD, DX = ("augmented", "two_segment", "base_add"), ("augmented", "two_segment")
# Rows, hidden and classes.
HEADS = {
    "cuda": ((8192, 4096, 128256), (2048, 4096, 128256), (8192, 2048, 151936), (8192, 576, 49152)),
    "cpu": ((64, 32, 512),),
}
# Of a chunk's logits, beside what is chosen at present.
MEBIBYTES = {"cuda": (64, 128, 256, 512, 1024, 2048), "cpu": (1, 2)}


@dataclass(frozen=True)
class Item:
    """A choice at one size: what is timed, by name, the present one first."""

    what: str
    sizes: tuple[int, ...]
    runs: Callable[[], dict[str, measure.Thunk]]

    def fields(self) -> dict[str, Any]:
        return {"what": self.what, "sizes": list(self.sizes)}


def items(device: torch.device, dtype: torch.dtype) -> Iterator[Item]:
    """Everything that is measured, the first sizes of each choice first."""

    def products(names: Sequence[str], sizes: tuple[int, ...], forward: bool) -> Any:
        return lambda: _product_runs(names, sizes, forward, device, dtype)

    for sizes in PRODUCTS[device.type]:
        yield Item("forward", sizes, products(FORWARD, sizes, True))
        yield Item("dX", sizes, products(DX, sizes, False))
    for sizes in HEADS[device.type]:
        yield Item("head", sizes, lambda sizes=sizes: _head_runs(sizes, device, dtype))


def _product_runs(
    names: Sequence[str],
    sizes: tuple[int, ...],
    forward: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, measure.Thunk]:
    m, n, k = sizes
    weight = (torch.randn(n, k, device=device) * k**-0.5).to(dtype)
    pair = torch.randn(RANK, k, device=device), torch.randn(n, RANK, device=device)
    group = ops.LoraGroup.dense([weight], [ops.LoraFactors(*pair, 2.0)])
    xs = torch.randn(m, k + group.padded_rank, device=device, dtype=dtype)
    dys = torch.randn(m, n + group.padded_rank, device=device, dtype=dtype)
    product, joined = make_product(xs[:, :k], group), Joined.of(xs, k)
    work = (lambda: product.forward(joined)) if forward else (lambda: product.input_gradient(dys))

    def by(name: str) -> measure.Thunk:
        def run() -> object:
            with mock.patch.object(backends, "product_strategy", lambda *sizes: name):
                return work()

        return run

    return {name: by(name) for name in names}


def _head_runs(
    sizes: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> dict[str, measure.Thunk]:
    rows, cols, classes = sizes
    hidden = torch.randn(rows, cols, device=device, dtype=dtype).requires_grad_()
    weight = (torch.randn(classes, cols, device=device) * cols**-0.5).to(dtype)
    target = torch.randint(classes, (rows,), device=device)

    def by(mebibytes: int) -> measure.Thunk:
        limit = mebibytes * 2**20
        with mock.patch.dict(plans.CHUNK_BYTES, {"cpu": limit, "cuda": limit}):
            head = Head(rows, classes)
            request = Request.on(device, "linear_cross_entropy", dtype, head)
            plan: Any = choice.choose(request, selection.present()).plan

        def run() -> object:
            loss = ops.linear_cross_entropy(hidden, weight, target, chunk_rows=plan).loss
            return torch.autograd.grad(loss, hidden)

        return run

    present = plans.CHUNK_BYTES[device.type] // 2**20
    return {f"{x} MiB": by(x) for x in dict.fromkeys((present, *MEBIBYTES[device.type]))}


def measured(lines: Sequence[dict[str, Any]]) -> dict[str, list[Measured]]:
    """A journal's results by choice; a candidate is {"name": its place among the choice's}."""
    found: dict[str, list[Measured]] = {}
    for line in lines:
        if line["event"] == "row":
            (_, before), *others = (x for x in line["seconds"].items() if x[0] != AGAIN)
            candidates = tuple(({name: 1}, seconds) for name, seconds in others)
            again = line["seconds"][AGAIN]
            one = Measured(line["item"], before, again, candidates, before)
            found.setdefault(line["item"]["what"], []).append(one)
    return found


def render(lines: Sequence[dict[str, Any]]) -> str:
    """The journal as Markdown."""
    rows = [
        [
            line["item"]["what"],
            " ".join(map(str, line["item"]["sizes"])),
            name,
            f"{seconds * 1e6:.0f}",
            f"{seconds / next(iter(line['seconds'].values())):.3f}",
            f"{line['extra_bytes'][name] / 2**20:.0f}" if name in line["extra_bytes"] else "",
        ]
        for line in lines
        if line["event"] == "row"
        for name, seconds in line["seconds"].items()
    ]
    columns = ("choice", "sizes", "how", "µs", "of the present", "extra MiB")
    verdicts = [f"- {what}: {verdict(decide(of))}" for what, of in measured(lines).items()]
    notes = [f"- {x['message']}" for x in lines if x["event"] in ("failure", "note")]
    return "\n".join(["# Choices", "", output.table(columns, rows, left=3), "", *verdicts, *notes])


def verdict(decision: Decision) -> str:
    """What a decision over all of a choice's sizes says."""
    if decision.after is None:
        return f"stays (best other {decision.gain - 1:+.1%}, margin {decision.margin:.1%})"
    return f"{next(iter(decision.after))} is {decision.gain - 1:.1%} faster"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--samples", type=int, default=7)
    parser.add_argument("--minutes", type=float, default=2.0, help="begin nothing after so long")
    parser.add_argument("--append", type=Path, required=True, metavar="FILE", help="the journal")
    args = parser.parse_args(argv)
    device, deadline = torch.device(args.device), time.monotonic() + 60 * args.minutes
    backends.keep_freed_memory(device)
    log, done = Journal(args.append), started(args.append)
    log.add("context", **output.context())
    for item in items(device, getattr(torch, args.dtype)):
        if item.fields() in done:
            continue
        if time.monotonic() > deadline:
            log.add("note", message="cut short, the time was over")
            break
        log.add("start", item=item.fields())
        try:
            runs = item.runs()
            present = next(iter(runs.values()))
            timings = measure.time_alternating(
                {**runs, AGAIN: present}, device, samples=args.samples
            )
            seconds = {name: timing.median for name, timing in timings.items()}
            extra = {name: measure.extra_memory(run, device) for name, run in runs.items()}
            log.add("row", item=item.fields(), seconds=seconds, extra_bytes=extra)
        except RuntimeError as error:
            log.add("failure", item=item.fields(), message=" ".join(str(error).split())[:300])
    print(render(read(args.append)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
