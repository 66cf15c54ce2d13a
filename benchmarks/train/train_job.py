"""A training step beside other trainers: `lora-engine bench train`.

One job for all: the same model, LoRA of rank 16 on every linear, the same initial adapters (A and B
random), the same batches of docstring examples, AdamW, a constant learning rate, gradients clipped
at norm 1. A step's time runs from the end of the step before to its own end: it includes fetching
and collating the batch, the optimiser and the logging.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.jobs import COMMON, Facts, Job, Options
from benchmarks.common.steps import Result
from benchmarks.train import train_contenders, train_flops, train_workload
from benchmarks.train.loss_parity import pad
from lora_engine.data.render import Example

AT_ONCE = 4  # sequences of a reference in float32, whose memory would be more than a contender's


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
    first, second = reference_losses(model, lambda n: plain_losses(model, workload.batches[n]))
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
        "expected": {"": first},
        "second": {"": second},
        "text": f"{options['model']}, LoRA of rank {train_workload.RANK} on all linears, "
        f"{options['dtype']}, {options['batch_size']} examples a step: {tokens:.0f} tokens on "
        f"average, {padded:.0f} if padded to the longest, {shared:.0f} without what examples of a "
        "step begin with in common more than once. Rates count real tokens, padding not.",
    }


def plain_loss(model: Any, examples: Sequence[Example]) -> float:
    """The mean loss of the examples' targets, by the model as transformers runs it."""
    model.eval()
    with torch.no_grad():
        return float(sum(plain_losses(model, examples)))


def plain_losses(model: Any, examples: Sequence[Example]) -> Iterator[torch.Tensor]:
    """What AT_ONCE examples after the other add to the mean loss."""
    count = sum(example.num_targets for example in examples)
    for i in range(0, len(examples), AT_ONCE):
        some = examples[i : i + AT_ONCE]
        if share := sum(example.num_targets for example in some) / count:  # else its mean is nan
            yield model(**pad(some), use_cache=False).loss * share


def reference_losses(
    model: Any, losses: Callable[[int], Iterable[torch.Tensor]]
) -> tuple[float, tuple[float, float]]:
    """Loss of the first batch, and of the second before a step on the first one and after it.

    losses: of the batch of that number, parts whose sum is its loss. The model is trained by that.
    The step is that of every contender: AdamW, gradients clipped at norm 1.
    """
    model.eval()  # there is no dropout
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=train_workload.LEARNING_RATE, weight_decay=0.0)
    first = 0.0
    for loss in losses(0):
        loss.backward()
        first += loss.item()
    torch.nn.utils.clip_grad_norm_(trainable, 1.0)

    def second() -> float:
        with torch.no_grad():
            return float(sum(losses(1)))

    before = second()
    optimizer.step()
    return first, (before, second())


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
