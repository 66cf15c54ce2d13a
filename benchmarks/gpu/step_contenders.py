"""Who trains in train_step.py: each takes the same model and gives back one optimiser step."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import lora_engine
from benchmarks.gpu.step_models import Batch, Snapshot
from benchmarks.gpu.step_packed import bitsandbytes, packed

LEARNING_RATE = {"lora": 2e-4, "qlora": 2e-4, "full": 1e-5}
MAX_NORM = 1.0
Convert = Callable[[Any], Any]  # a PEFT model into one over other base weights, for good


@dataclass
class Job:
    """What a contender trains: a model, the values it begins with, a batch.

    make: makes the model anew, for a contender that finds it changed. form: of its frozen weights,
    "dense" until a contender packs them for good. report: what a contender says of itself.
    """

    method: str
    make: Callable[[], Any]
    model: Any
    start: Snapshot
    batch: Batch
    form: str = "dense"
    report: dict[str, str] = field(default_factory=dict)

    def need(self, convert: Convert | None) -> None:
        """Gives the model the form that `convert` makes of a dense one; None: dense."""
        form = "dense" if convert is None else convert.__name__
        if self.form == form:
            return
        if self.form != "dense":
            self.model = None  # freed before another is made
            self.model, self.form = self.make(), "dense"
        if convert is not None:
            self.model, self.form = convert(self.model), form

    @property
    def trained(self) -> list[Tensor]:
        return [p for p in self.model.parameters() if p.requires_grad]


Step = Callable[[], tuple[Tensor | float, Tensor | float]]  # the loss, the gradient's norm


@dataclass(frozen=True)
class Contender:
    """description: what it is. setup: a context in which the step may be run again and again."""

    description: str
    setup: Callable[[Job], Any]


@contextmanager
def _checkpointing(model: Any, on: bool) -> Iterator[None]:
    if not on:
        yield
        return
    model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()


def plain(
    *,
    checkpointing: bool = False,
    autocast: bool = False,
    padded: bool = False,
    accelerated: bool = False,
    convert: Convert | None = None,
) -> Callable[[Job], Any]:
    """A loop of one's own around transformers and PEFT, with torch's fused AdamW.

    autocast: trained values in float32 and bfloat16 by autocast, as trainers do with bf16=True;
        else all in bfloat16. padded: to the longest sequence, where lengths differ, as trainers
        do; else packed into one row. accelerated: after lora_engine.accelerate(model). convert:
        makes another model of the job's, for good.
    """

    @contextmanager
    def setup(job: Job) -> Iterator[Step]:
        job.need(convert)
        model = job.model
        dtype = torch.float32 if autocast or accelerated else torch.bfloat16
        job.start.restore(model, dtype)
        trained = job.trained
        fused = trained[0].device.type == "cuda"
        optimizer = torch.optim.AdamW(
            trained, lr=LEARNING_RATE[job.method], weight_decay=0.0, fused=fused
        )
        device = trained[0].device.type

        def step() -> tuple[Tensor, Tensor]:
            batch = job.batch
            inputs = batch.rows or (batch.padded if padded else batch.packed)
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device, torch.bfloat16) if autocast else nullcontext():
                loss = model(**inputs, use_cache=False).loss
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(trained, MAX_NORM)
            optimizer.step()
            return loss.detach(), norm.detach()

        if accelerated:
            job.report["accelerate"] = str(lora_engine.accelerate(model))
        try:
            model.train()
            with _checkpointing(model, checkpointing):
                yield step
        finally:
            if accelerated:
                lora_engine.restore(model)
            optimizer.state.clear()
            job.start.restore(model)

    return setup


def ours(
    *, checkpointing: bool = False, optimizer: str = "adamw", convert: Convert | None = None
) -> Callable[[Job], Any]:
    """`lora_engine.accelerate` and the Trainer's step: packed, no logits, one flat AdamW."""

    @contextmanager
    def setup(job: Job) -> Iterator[Step]:
        from lora_engine.data.batch import PackedBatch, collate
        from lora_engine.objectives.sft import SFT
        from lora_engine.training.optimizer.adamw import FlatAdamW
        from lora_engine.training.optimizer.flat import FlatParameters
        from lora_engine.training.step import TrainStep

        job.need(convert)
        model = job.model
        job.start.restore(model)
        rate = LEARNING_RATE[job.method]
        config = lora_engine.TrainConfig(
            learning_rate=rate, max_grad_norm=MAX_NORM, optimizer=optimizer
        )
        job.report["accelerate"] = str(lora_engine.accelerate(model))
        flat = FlatParameters(model.named_parameters())
        train = TrainStep(model, SFT(), FlatAdamW(flat, config))
        collated: dict[tuple[int, ...], PackedBatch] = {}

        def step() -> tuple[float, float]:
            lengths = job.batch.lengths
            if lengths not in collated:
                collated[lengths] = collate(job.batch.examples)
            result = train(1, [collated[lengths]], rate, lambda: None)
            return result.loss, result.grad_norm

        try:
            model.train()
            with _checkpointing(model, checkpointing):
                yield step
        finally:
            flat.release()
            lora_engine.restore(model)
            job.start.restore(model)

    return setup


LORA = {
    "ours": Contender("accelerate and the Trainer's step, float32 adapters", ours()),
    "peft": Contender("transformers' sdpa, PEFT, fused AdamW, all in bfloat16", plain()),
    "peft-checkpointed": Contender("peft, layers checkpointed", plain(checkpointing=True)),
    "ours-drop-in": Contender(
        "accelerate, and the loop that peft-autocast has, without autocast",
        plain(accelerated=True),
    ),
    "peft-autocast": Contender(
        "peft with float32 adapters under autocast, as trainers with bf16=True",
        plain(autocast=True),
    ),
    "peft-autocast-checkpointed": Contender(
        "peft-autocast, layers checkpointed", plain(autocast=True, checkpointing=True)
    ),
    "ours-checkpointed": Contender("ours, layers checkpointed", ours(checkpointing=True)),
}
QLORA = {
    "ours": Contender(
        "lora_engine.quantize_model to NF4, else as ours of LoRA", ours(convert=packed)
    ),
    "ours-checkpointed": Contender(
        "ours, layers checkpointed", ours(convert=packed, checkpointing=True)
    ),
    "bitsandbytes": Contender(
        "PEFT over bitsandbytes' Linear4bit in NF4, else as peft", plain(convert=bitsandbytes)
    ),
    "bitsandbytes-checkpointed": Contender(
        "bitsandbytes, layers checkpointed", plain(convert=bitsandbytes, checkpointing=True)
    ),
    "bitsandbytes-autocast": Contender(
        "bitsandbytes with float32 adapters under autocast, as trainers with bf16=True",
        plain(convert=bitsandbytes, autocast=True),
    ),
    "ours-over-bitsandbytes": Contender(
        "ours over bitsandbytes' Linear4bit", ours(convert=bitsandbytes)
    ),
    "peft": Contender("PEFT over the same weights, not packed", plain()),
    "peft-checkpointed": Contender("peft, layers checkpointed", plain(checkpointing=True)),
}
# Where lengths differ.
MIXED = {
    "ours": LORA["ours"],
    "peft-padded": Contender("peft, padded to the longest", plain(padded=True)),
    "peft-padded-checkpointed": Contender(
        "peft, padded to the longest, layers checkpointed", plain(padded=True, checkpointing=True)
    ),
    "peft-packed": Contender("peft, packed into one row, whose mask sdpa is given", plain()),
    "peft-packed-checkpointed": Contender(
        "peft-packed, layers checkpointed", plain(checkpointing=True)
    ),
}
FULL = {
    "ours": Contender("accelerate and the Trainer's step, float32 masters and moments", ours()),
    "ours-8bit": Contender("ours with moments in 8 bits", ours(optimizer="adamw_8bit")),
    "transformers": Contender("sdpa, fused AdamW, weights and moments in bfloat16", plain()),
    "transformers-autocast": Contender(
        "float32 weights and moments under autocast, as trainers with bf16=True",
        plain(autocast=True),
    ),
    "transformers-checkpointed": Contender(
        "transformers, layers checkpointed", plain(checkpointing=True)
    ),
}


NAMES = tuple(dict.fromkeys((*LORA, *QLORA, *MIXED, *FULL)))


def contenders_of(method: str, batch: Batch) -> dict[str, Contender]:
    """Those of a method, in order of importance."""
    if method in ("full", "qlora"):
        return FULL if method == "full" else QLORA
    return LORA if batch.rows is not None else MIXED
