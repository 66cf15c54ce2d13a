"""Memory of a training step against the length of its sequence: `lora-engine bench memory`.

One sequence of random tokens, all of them supervised, one optimiser step after the other; a process
for each contender and length.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import measure
from benchmarks.common.jobs import COMMON, Facts, Job, Options
from benchmarks.common.steps import Result, Stopwatch
from benchmarks.train import train_contenders, train_workload
from benchmarks.train.loss_parity import train_plainly
from benchmarks.train.train_job import plain_loss, plain_losses, reference_losses
from benchmarks.train.train_workload import Workload
from lora_engine.data.render import Example

CONTENDERS = {
    "ours": train_contenders.OURS,
    "peft": "PEFT on transformers with sdpa, everything in the dtype",
    "peft-checkpointed": "the same with gradient checkpointing, not reentrant",
}


def prepare(folder: Path, options: Options) -> Facts:
    model = train_workload.prepare(
        folder, batches=1, batch_size=1, seed=options["seed"], model_source=options["model"]
    )
    workload = train_workload.load(folder)
    count = options["warmup"] + options["steps"]
    points = [str(length) for length in options["lengths"]]
    batches = {point: sequences(workload, int(point), count, options["seed"]) for point in points}
    # A step in float32 at the shortest length only: it is to say who trains, not to take long.
    shortest = str(min(options["lengths"]))
    longer = {p: plain_loss(model, batches[p][0]) for p in points if p != shortest}
    first, second = reference_losses(model, lambda n: plain_losses(model, batches[shortest][n]))
    return {
        "unit": "tokens/s",
        "amounts": {point: [int(point)] * count for point in points},
        "expected": {**longer, shortest: first},
        "second": {shortest: second},
        "text": f"{options['model']}, LoRA of rank {train_workload.RANK} on all linears, "
        f"{options['dtype']}, one sequence of random tokens a step, all of them supervised.",
    }


def sequences(workload: Workload, length: int, count: int, seed: int) -> list[list[Example]]:
    """`count` batches of one sequence of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(workload.shape.vocab, (count, length), generator=generator).tolist()
    return [[Example(ids, [False] + [True] * (length - 1), str(i))] for i, ids in enumerate(rows)]


def run(folder: Path, options: Options, name: str) -> Result:
    workload = train_workload.load(folder, options["device"])
    device = torch.device(workload.device)
    model, _ = train_workload.load_with_adapters(
        workload, getattr(torch, options["dtype"]), float32_adapters=name == "ours"
    )
    count = options["warmup"] + options["steps"]
    batches = sequences(workload, options["point"], count, options["seed"])
    loaded = measure.held_bytes(device)
    watch = Stopwatch(device)
    return watch.result(name, watch.watch(_losses(model, batches, name)), loaded)


def _losses(model: Any, batches: list[list[Example]], name: str) -> Iterator[float]:
    if name == "ours":
        return train_contenders.train_ours(model, batches)
    if name == "peft-checkpointed":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return train_plainly(model, batches, max_grad_norm=1.0)


JOB = Job(
    name="length",
    what="Memory of a training step against the length of its sequence.",
    options={**COMMON, "steps": 1, "rounds": 1, "lengths": [512, 1024, 2048, 4096]},
    contenders=CONTENDERS,
    default=tuple(CONTENDERS),
    prepare=prepare,
    run=run,
    points="lengths",
    least={"lengths": 2},
)
