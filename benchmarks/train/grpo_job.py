"""A round of GRPO beside TRL's GRPOTrainer: `lora-engine bench rl`.

Sums of small numbers, as the chat template writes them; every completion has the same number of
tokens, whatever ends a turn, so that all do the same work: writing, rewards and the update. Same
model, initial adapter, prompts, generations and dtype; TRL writes by transformers' generate. What
is drawn is random, so no loss is expected of anyone.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import measure
from benchmarks.common.jobs import COMMON, Facts, Job, Options
from benchmarks.common.steps import Result, Stopwatch, step_recorder
from benchmarks.train import train_workload

CONTENDERS = {
    "ours": "lora_engine's Trainer(online=…), a group's prompt computed once",
    "ours-unshared": "the same, learning with a prompt for each completion (share_prefixes: false)",
    "trl": "GRPOTrainer, everything in the dtype, no gradient checkpointing",
}


def even_letters(completions: Sequence[Any], **columns: Any) -> list[float]:
    """Costs nothing, and differs within a group."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(sum(map(ord, text)) % 7) for text in texts]


def rows(options: Options) -> list[dict[str, Any]]:
    """The prompts of all steps, as messages."""
    from lora_engine.data.sums import sum_records

    wanted = (options["warmup"] + options["steps"]) * options["prompts"]
    records = sum_records()
    train_workload.check_enough(wanted, len(records), "prompts, steps, warmup")
    return [{"prompt": [dict(m) for m in r.prompt]} for r in records[:wanted]]  # type: ignore[union-attr,arg-type]


def prepare(folder: Path, options: Options) -> Facts:
    """Draws the initial adapter."""
    rows(options)
    from lora_engine import load_model

    model, _ = load_model(options["model"], dtype="float32", device="cpu")
    model = train_workload.add_adapters(model)
    train_workload.init_adapters(model, options["seed"])
    train_workload.save_adapters(model, folder / "adapters.safetensors")
    written = options["prompts"] * options["generations"] * options["tokens"]
    return {
        "unit": "tokens/s",
        "amounts": {"": [written] * (options["warmup"] + options["steps"])},
        "text": f"{options['model']}, {options['dtype']}, {options['prompts']} prompts a step, "
        f"{options['generations']} completions of {options['tokens']} tokens each; rates count "
        "what is written.",
    }


class _Watched:
    """Measures the steps of a Trainer."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.steps: list[Any] = []

    def on_start(self, trainer: Any) -> None:
        self.watch = Stopwatch(self.device)

    def on_step(self, metrics: Any) -> None:
        self.steps.append(self.watch.step(metrics.loss))


def run_ours(folder: Path, options: Options, name: str) -> Result:
    import lora_engine
    from lora_engine.objectives import GRPO
    from lora_engine.training.online import rollouts
    from lora_engine.training.online.config import RolloutConfig
    from lora_engine.training.online.online import Online

    rollouts.stop_tokens = lambda *_: []  # type: ignore[assignment]
    model, tokenizer = lora_engine.load_model(
        options["model"], dtype=options["dtype"], device=options["device"]
    )
    model = train_workload.add_adapters(model)
    train_workload.load_adapters(model, folder / "adapters.safetensors")
    lora_engine.accelerate(model, strict=True)
    device = torch.device(options["device"])
    loaded = measure.held_bytes(device)
    watched = _Watched(device)
    rollout = RolloutConfig.model_validate(
        {
            "prompts": options["prompts"],
            "generations": options["generations"],
            "max_new_tokens": options["tokens"],
        }
    )
    config = lora_engine.TrainConfig(
        output_dir=folder / "ours",
        overwrite=True,
        max_steps=options["warmup"] + options["steps"],
        learning_rate=train_workload.LEARNING_RATE,
        schedule="constant",
        preflight=False,
        share_prefixes=name == "ours",
    )
    lora_engine.Trainer(
        model,
        tokenizer,
        rows(options),
        None,
        config,
        objective=GRPO(),
        online=Online([even_letters], rollout),
        callbacks=[watched],
    ).fit()
    return watched.watch.result(name, watched.steps, loaded)


def run_trl(folder: Path, options: Options, name: str) -> Result:
    import datasets
    import trl

    import lora_engine

    datasets.disable_progress_bars()
    dtype = getattr(torch, options["dtype"])
    model, tokenizer = lora_engine.load_model(
        options["model"], dtype=options["dtype"], device=options["device"]
    )
    device = torch.device(options["device"])
    loaded = measure.held_bytes(device)
    recorder = step_recorder(device)
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=even_letters,
        args=trl.GRPOConfig(
            output_dir=str(folder / "trl"),
            per_device_train_batch_size=options["prompts"] * options["generations"],
            num_generations=options["generations"],
            max_completion_length=options["tokens"],
            generation_kwargs={"min_new_tokens": options["tokens"]},
            max_steps=options["warmup"] + options["steps"],
            shuffle_dataset=False,
            loss_type="dapo",
            epsilon_high=0.28,
            learning_rate=train_workload.LEARNING_RATE,
            lr_scheduler_type="constant",
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=options["device"] == "cpu",
            dataloader_pin_memory=False,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_list(rows(options)),
        processing_class=tokenizer,
        peft_config=train_workload.lora_config(),
        callbacks=[recorder],
    )
    train_workload.load_adapters(trainer.model, folder / "adapters.safetensors")
    for parameter in trainer.model.parameters():
        parameter.data = parameter.data.to(dtype)
    trainer.train()
    return recorder.watch.result(name, recorder.steps, loaded)


def run(folder: Path, options: Options, name: str) -> Result:
    return (run_ours if name.startswith("ours") else run_trl)(folder, options, name)


JOB = Job(
    name="grpo",
    what="A round of GRPO beside TRL's GRPOTrainer.",
    options={
        **COMMON,
        "dtype": "float32",
        "steps": 2,
        "rounds": 1,
        "prompts": 4,
        "generations": 8,
        "tokens": 32,
    },
    contenders=CONTENDERS,
    default=("ours", "trl"),
    prepare=prepare,
    run=run,
    packages={"trl": "trl"},
    least={"generations": 2},
)
