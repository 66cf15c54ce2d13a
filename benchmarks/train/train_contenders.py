"""Who trains in train_job.py; each runs alone in a process of its own."""

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.common import measure
from benchmarks.common.steps import Result, Stopwatch, step_recorder
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
CONTENDERS = {
    "ours": OURS,
    **{name: v.description for name, v in TRL_VARIANTS.items()},
    "peft": "a loop of one's own: PEFT on transformers with sdpa, padding, everything in the dtype",
    "unsloth": "Unsloth's FastLanguageModel in SFTTrainer, padding",
}
PACKAGES = {**dict.fromkeys(TRL_VARIANTS, "trl"), "unsloth": "unsloth"}


def train_ours(
    model: Any, batches: Sequence[Sequence[Example]], **settings: Any
) -> Iterator[float]:
    """Accelerate a PEFT model, then train it a step per batch, as the Trainer does.

    settings: of TrainConfig; the learning rate stays constant. Returns the losses as they come.
    """
    import lora_engine
    from lora_engine.data.batch import collate
    from lora_engine.models.attach.packed import can_share_prefixes
    from lora_engine.objectives.sft import SFT
    from lora_engine.training.optimizer.adamw import FlatAdamW
    from lora_engine.training.optimizer.flat import FlatParameters
    from lora_engine.training.step import TrainStep

    lora_engine.accelerate(model, strict=True)
    model.train()
    config = lora_engine.TrainConfig(**{"learning_rate": train_workload.LEARNING_RATE, **settings})
    step = TrainStep(model, SFT(), FlatAdamW(FlatParameters(model.named_parameters()), config))
    share = config.share_prefixes and can_share_prefixes(model)

    def losses() -> Iterator[float]:
        for number, examples in enumerate(batches, start=1):
            batch = collate(examples, share_prefixes=share)
            result = step(number, [batch], config.learning_rate, check=lambda: None)
            yield result.loss

    return losses()


def run_ours(workload: Workload, dtype: torch.dtype) -> Result:
    """lora_engine: accelerate, packed batches, and the Trainer's step."""
    device = torch.device(workload.device)
    model, _ = train_workload.load_with_adapters(workload, dtype)
    loaded = measure.held_bytes(device)
    watch = Stopwatch(device)
    steps = watch.watch(train_ours(model, workload.batches))
    return watch.result("ours", steps, loaded)


def run_peft(workload: Workload, dtype: torch.dtype) -> Result:
    """PEFT on transformers, the loop of its documentation over padded batches."""
    from benchmarks.train.loss_parity import train_plainly

    device = torch.device(workload.device)
    model, _ = train_workload.load_with_adapters(workload, dtype, float32_adapters=False)
    loaded = measure.held_bytes(device)
    watch = Stopwatch(device)
    steps = watch.watch(train_plainly(model, workload.batches, max_grad_norm=1.0))
    return watch.result("peft", steps, loaded)


def run_trl(workload: Workload, dtype: torch.dtype, name: str, variant: TrlVariant) -> Result:
    """TRL's SFTTrainer on a PEFT model; its whole loop, as trainer.train() runs it."""
    import datasets

    datasets.disable_progress_bars()
    weights = torch.float32 if variant.float32_weights else dtype
    model, tokenizer = train_workload.load_with_adapters(
        workload, weights, float32_adapters=variant.float32_adapters
    )
    return _train_by_trl(workload, dtype, name, variant, model, tokenizer)


def _train_by_trl(
    workload: Workload,
    dtype: torch.dtype,
    name: str,
    variant: TrlVariant,
    model: Any,
    tokenizer: Any,
) -> Result:
    import datasets
    import trl

    device = torch.device(workload.device)
    loaded = measure.held_bytes(device)
    rows = [
        {"input_ids": example.input_ids, "labels": train_workload.labels(example)}
        for batch in workload.batches
        for example in batch
    ]
    recorder = step_recorder(device, count_calls=not variant.compile)
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
        use_cpu=workload.device == "cpu",
        dataloader_pin_memory=False,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )


def run_unsloth(workload: Workload, dtype: torch.dtype) -> Result:
    """Unsloth as its documentation has it, but for the checkpointing of activations, and our
    initial adapters."""
    fast: Any = importlib.import_module("unsloth").FastLanguageModel  # before transformers and trl

    from lora_engine.models.load.gguf import converted_gguf, smollm2_gguf_path

    source = workload.model
    if source == train_workload.MODEL:
        source = str(converted_gguf(smollm2_gguf_path(), dtype))
    model, tokenizer = fast.from_pretrained(
        source, max_seq_length=train_workload.MAX_LENGTH, dtype=dtype, load_in_4bit=False
    )
    model = fast.get_peft_model(
        model,
        r=train_workload.RANK,
        lora_alpha=train_workload.ALPHA,
        lora_dropout=0,
        use_gradient_checkpointing=False,
    )
    train_workload.load_adapters(model, workload.adapters)
    variant = TRL_VARIANTS["trl-padded"]
    return _train_by_trl(workload, dtype, "unsloth", variant, model, tokenizer)


def run(workload: Workload, contender: str, dtype: torch.dtype, checkpointing: str) -> Result:
    """Run one contender over all batches.

    checkpointing: "on" or "off" overrides the TRL variant's own choice, "auto" leaves it.
    """
    own = {"ours": run_ours, "peft": run_peft, "unsloth": run_unsloth}
    if contender in own:
        return own[contender](workload, dtype)
    variant = TRL_VARIANTS[contender]
    if checkpointing != "auto":
        variant = replace(variant, gradient_checkpointing=checkpointing == "on")
    return run_trl(workload, dtype, contender, variant)


def measure_matmuls(workload: Workload, dtype: torch.dtype) -> dict[str, float]:
    """Seconds and rate of torch.mm on the model's own frozen products, for a mean batch.

    The decoder layers are alike: one is measured and counted as often as there are layers. Its
    weights stay in the cache between repetitions, so that this is the machine's best.
    """
    device, shape = torch.device(workload.device), workload.shape
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
