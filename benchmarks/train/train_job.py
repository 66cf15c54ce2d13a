"""A training step beside other trainers: `lora-engine bench train`.

One job for all: the same model, LoRA of rank 16 on every linear, the same initial adapters (A and B
random), the same batches of docstring examples, AdamW, a constant learning rate, gradients clipped
at norm 1. A step's time runs from the end of the step before to its own end: it includes fetching
and collating the batch, the optimiser and the logging.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.jobs import COMMON, Facts, Job, Options
from benchmarks.common.steps import Result
from benchmarks.train import train_contenders, train_flops, train_workload
from benchmarks.train.loss_parity import pad
from lora_engine.data.render import Example


def prepare(folder: Path, options: Options) -> Facts:
    """The work of each step, and the first step's loss by plain PEFT on transformers in float32."""
    model = train_workload.prepare(
        folder,
        batches=options["warmup"] + options["steps"],
        batch_size=options["batch_size"],
        seed=options["seed"],
        model_source=options["model"],
    )
    workload = train_workload.load(folder)
    lengths, pieces, targets = workload.lengths(), workload.pieces(), workload.targets()
    flops = [
        train_flops.step_flops(workload.shape, train_workload.RANK, own, count)
        for own, count in zip(pieces, targets, strict=True)
    ]
    timed = slice(options["warmup"], None)
    tokens = _mean([sum(own) for own in lengths[timed]])
    padded = _mean([len(own) * max(own) for own in lengths[timed]])
    shared = _mean([sum(length for _, length in own) for own in pieces[timed]])
    return {
        "unit": "tokens/s",
        "amounts": {"": [sum(own) for own in lengths]},
        "flops": {"": flops},
        "expected": {"": plain_loss(model, workload.batches[0])},
        "second": {"": second_losses(model, *workload.batches[:2])},
        "text": f"{options['model']}, LoRA of rank {train_workload.RANK} on all linears, "
        f"{options['dtype']}, {options['batch_size']} examples a step: {tokens:.0f} tokens on "
        f"average, {padded:.0f} if padded to the longest, {shared:.0f} without what examples of a "
        "step begin with in common more than once. Rates count real tokens, padding not.",
    }


def plain_loss(model: Any, examples: Sequence[Example]) -> float:
    """The mean loss of the examples' targets, by the model as transformers runs it."""
    model.eval()
    with torch.no_grad():
        return float(model(**pad(examples), use_cache=False).loss)


def second_losses(
    model: Any, first: Sequence[Example], second: Sequence[Example]
) -> tuple[float, float]:
    """The mean loss of the second batch's targets before a step on the first one, and after it.

    One example at a time, which keeps the memory small. The model is trained by that.
    """
    count = sum(example.num_targets for example in first)

    def losses() -> Iterator[torch.Tensor]:
        for example in first:
            loss = model(**pad([example]), use_cache=False).loss
            yield loss * (example.num_targets / count)

    before = plain_loss(model, second)
    train_a_step(model, losses())
    return before, plain_loss(model, second)


def train_a_step(model: Any, losses: Iterable[torch.Tensor]) -> None:
    """One step of AdamW on the sum of the losses, as every contender makes it."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=train_workload.LEARNING_RATE, weight_decay=0.0)
    model.eval()  # there is no dropout
    for loss in losses:
        loss.backward()
    torch.nn.utils.clip_grad_norm_(trainable, 1.0)
    optimizer.step()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def run(folder: Path, options: Options, name: str) -> Result:
    workload = train_workload.load(folder, options["device"])
    dtype = getattr(torch, options["dtype"])
    return train_contenders.run(workload, name, dtype, options["checkpointing"])


def rate(folder: Path, options: Options) -> dict[str, float]:
    workload = train_workload.load(folder, options["device"])
    return train_contenders.measure_matmuls(workload, getattr(torch, options["dtype"]))


JOB = Job(
    name="sft",
    what="A training step beside TRL's SFTTrainer.",
    options={**COMMON, "batch_size": 8, "checkpointing": "auto"},
    contenders=train_contenders.CONTENDERS,
    default=("ours", "trl-padded", "trl-padding-free"),
    prepare=prepare,
    run=run,
    rate=rate,
    packages=train_contenders.PACKAGES,
    choices={"checkpointing": ("auto", "on", "off")},
)
