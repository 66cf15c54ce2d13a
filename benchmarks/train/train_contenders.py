"""The contenders of train_step.py; each runs alone in a process of its own.

python -m benchmarks.train.train_contenders WORKLOAD --contender ours --dtype bfloat16 --out FILE
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import measure
from benchmarks.train import train_flops, train_workload
from benchmarks.train.train_workload import Workload
from lora_engine.data.render import Example


@dataclass(frozen=True)
class TrlVariant:
    """How SFTTrainer is set up.

    float32_weights: the base model stays in float32 whatever the dtype (TRL's default when it
        loads the model itself); the dtype then comes from autocast alone.
    autocast: bfloat16 autocast (SFTConfig's default); no effect on float32.
    float32_adapters: PEFT's default; else adapters and their optimiser states in the dtype.
    """

    description: str
    padding_free: bool = False
    gradient_checkpointing: bool = False
    float32_weights: bool = False
    autocast: bool = False
    float32_adapters: bool = False
    compile: bool = False


TRL_VARIANTS = {
    "trl-default": TrlVariant(
        "SFTConfig's defaults: float32 weights with bf16 autocast, gradient checkpointing, padding",
        gradient_checkpointing=True,
        float32_weights=True,
        autocast=True,
        float32_adapters=True,
    ),
    "trl-padded": TrlVariant("everything in the dtype, no gradient checkpointing, padding"),
    "trl-padding-free": TrlVariant(
        "everything in the dtype, no gradient checkpointing, padding_free",
        padding_free=True,
    ),
    "trl-padding-free-autocast": TrlVariant(
        "weights in the dtype, float32 adapters under autocast, padding_free",
        padding_free=True,
        autocast=True,
        float32_adapters=True,
    ),
    "trl-padding-free-compile": TrlVariant(
        "as trl-padding-free, with torch_compile", padding_free=True, compile=True
    ),
}
OURS = "lora_engine: accelerate, packed batches and the Trainer's step, float32 adapters"
CONTENDERS = {"ours": OURS, **{name: v.description for name, v in TRL_VARIANTS.items()}}


@dataclass(frozen=True)
class Step:
    """One optimiser step: wall time including its batch's preparation, and the mean loss.

    cpu_seconds: processor time of all threads. Well under `seconds` times their number, either
    the step left cores idle or others had them.
    """

    seconds: float
    cpu_seconds: float
    loss: float


@dataclass(frozen=True)
class Result:
    """steps: all steps, warm-up included.

    loaded_bytes: resident once the model and its adapters are in memory.
    peak_bytes: highest resident size of the process, loading included.
    peak_training_bytes: highest resident size from the first step on.
    """

    contender: str
    steps: list[Step]
    loaded_bytes: int
    peak_bytes: int
    peak_training_bytes: int


class Stopwatch:
    """Measures step after step, and the peak of memory from its creation on."""

    def __init__(self) -> None:
        self._peak_before = measure.peak_resident_bytes()
        measure.reset_peak()
        self._last = time.perf_counter(), time.process_time()

    def step(self, loss: float) -> Step:
        """The step since the last one, or since the creation."""
        (wall, cpu), self._last = self._last, (time.perf_counter(), time.process_time())
        return Step(self._last[0] - wall, self._last[1] - cpu, loss)

    def result(self, contender: str, steps: list[Step], loaded_bytes: int) -> Result:
        peak = measure.peak_resident_bytes()
        return Result(contender, steps, loaded_bytes, max(peak, self._peak_before), peak)


def train_ours(
    model: Any, batches: Sequence[Sequence[Example]], **settings: Any
) -> Iterator[float]:
    """Accelerate a PEFT model and train it a step per batch, as the Trainer does; yields losses.

    settings: of TrainConfig; the learning rate stays constant.
    """
    import lora_engine
    from lora_engine.data.batch import collate
    from lora_engine.models.attach.packed import can_share_prefixes
    from lora_engine.objectives.sft import SFT
    from lora_engine.training.optimizer.flat import FlatParameters
    from lora_engine.training.optimizer.optimizer import FlatAdamW
    from lora_engine.training.step import TrainStep

    lora_engine.accelerate(model, strict=True)
    model.train()
    config = lora_engine.TrainConfig(**{"learning_rate": train_workload.LEARNING_RATE, **settings})
    step = TrainStep(model, SFT(), FlatAdamW(FlatParameters(model.named_parameters()), config))
    share = config.share_prefixes and can_share_prefixes(model)
    for number, examples in enumerate(batches, start=1):
        batch = collate(examples, share_prefixes=share)
        result = step(number, [batch], config.learning_rate, check=lambda: None)
        yield result.loss


def run_ours(workload: Workload, dtype: torch.dtype) -> Result:
    """lora_engine: accelerate, packed batches, and the Trainer's step."""
    model, _ = train_workload.load_with_adapters(workload, dtype)
    loaded = measure.resident_bytes()
    watch = Stopwatch()
    steps = [watch.step(loss) for loss in train_ours(model, workload.batches)]
    return watch.result("ours", steps, loaded)


def run_trl(workload: Workload, dtype: torch.dtype, name: str, variant: TrlVariant) -> Result:
    """TRL's SFTTrainer on a PEFT model; its whole loop, as trainer.train() runs it."""
    import datasets
    import trl

    datasets.disable_progress_bars()
    weights = torch.float32 if variant.float32_weights else dtype
    model, tokenizer = train_workload.load_with_adapters(
        workload, weights, float32_adapters=variant.float32_adapters
    )
    loaded = measure.resident_bytes()
    rows = [
        {"input_ids": example.input_ids, "labels": train_workload.labels(example)}
        for batch in workload.batches
        for example in batch
    ]
    recorder = _step_recorder()
    trainer = trl.SFTTrainer(
        model=model,
        args=_sft_config(workload, dtype, variant),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[recorder],
    )
    trainer.train()
    return recorder.watch.result(name, recorder.steps, loaded)


def _sft_config(workload: Workload, dtype: torch.dtype, variant: TrlVariant) -> Any:
    import trl

    return trl.SFTConfig(
        output_dir=str(workload.adapters.parent / "trl"),
        per_device_train_batch_size=len(workload.batches[0]),
        max_steps=len(workload.batches),
        train_sampling_strategy="sequential",
        max_length=None,  # the examples are truncated already
        learning_rate=train_workload.LEARNING_RATE,
        lr_scheduler_type="constant",
        padding_free=variant.padding_free,
        gradient_checkpointing=variant.gradient_checkpointing,
        bf16=variant.autocast and dtype == torch.bfloat16,
        torch_compile=variant.compile,
        use_cpu=True,
        dataloader_pin_memory=False,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )


def _step_recorder() -> Any:
    from transformers import TrainerCallback

    class StepRecorder(TrainerCallback):
        """From the start of training, the time and loss of every step."""

        def __init__(self) -> None:
            self.steps: list[Step] = []
            self.watch: Stopwatch

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.watch = Stopwatch()

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" in logs:  # after every step; the summary at the end has another key
                self.steps.append(self.watch.step(logs["loss"]))

    return StepRecorder()


def run(workload: Workload, contender: str, dtype: torch.dtype, checkpointing: str) -> Result:
    """Run one contender over all batches.

    checkpointing: "on" or "off" overrides the TRL variant's own choice, "auto" leaves it.
    """
    if contender == "ours":
        return run_ours(workload, dtype)
    variant = TRL_VARIANTS[contender]
    if checkpointing != "auto":
        variant = replace(variant, gradient_checkpointing=checkpointing == "on")
    return run_trl(workload, dtype, contender, variant)


def measure_matmuls(workload: Workload, dtype: torch.dtype) -> dict[str, float]:
    """Seconds and rate of torch.mm on the model's own frozen products, for a mean batch.

    The decoder layers are alike: one is measured and counted as often as there are layers. Its
    weights stay in the cache between repetitions, so that this is the machine's best.
    """
    device, shape = torch.device("cpu"), workload.shape
    count = len(workload.batches)
    tokens = sum(map(sum, workload.lengths())) // count
    parts = {
        "layer": train_flops.layer_matmuls(shape, tokens),
        "head": train_flops.head_matmuls(shape, sum(workload.targets()) // count),
    }
    timings = measure.time_alternating(
        {name: measure.matmul_run(matmuls, dtype, device) for name, matmuls in parts.items()},
        device,
    )
    repeats = {"layer": shape.layers, "head": 1}
    seconds = sum(repeats[name] * timings[name].fastest for name in parts)
    flops = sum(repeats[name] * m.flops for name, matmuls in parts.items() for m in matmuls)
    return {"seconds": seconds, "flops_per_second": flops / seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workload", type=Path)
    parser.add_argument("--contender", choices=(*CONTENDERS, "matmuls"), required=True)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), required=True)
    parser.add_argument("--checkpointing", choices=("auto", "on", "off"), default="auto")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    workload, dtype = train_workload.load(args.workload), getattr(torch, args.dtype)
    if args.contender == "matmuls":
        result = measure_matmuls(workload, dtype)
    else:
        result = asdict(run(workload, args.contender, dtype, args.checkpointing))
    args.out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
