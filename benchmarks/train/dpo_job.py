"""A step of preferences beside TRL's DPOTrainer: `lora-engine bench rl`.

Functions of the standard library with a better and a worse docstring, of prompts about four times
as long as an answer. Same model, initial adapter, pairs and dtype for all; the reference is the
model without the adapter.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.common import measure
from benchmarks.common.jobs import COMMON, Facts, Job, Options
from benchmarks.common.steps import Result, Stopwatch, step_recorder
from benchmarks.train import train_workload
from benchmarks.train.loss_parity import pad
from benchmarks.train.train_job import AT_ONCE, reference_losses

RATIO = 4.0  # a prompt's tokens over an answer's, on average
NEAR = 1.0  # how far a pair's ratio may be from that
BETA = 0.1
CONTENDERS = {
    "ours": "lora_engine: accelerate, packed pairs, a pair's prompt computed once",
    "ours-unshared": "the same, each answer with a prompt of its own (share_prefixes: false)",
    "trl": "DPOTrainer, everything in the dtype, no gradient checkpointing",
    "trl-default": "DPOConfig's defaults: float32 weights, bf16 autocast, gradient checkpointing",
}


def prepare(folder: Path, options: Options) -> Facts:
    """Draws the pairs, as texts, and the initial adapter."""
    from lora_engine import load_model
    from lora_engine.data.batch import collate
    from lora_engine.data.preferred_docstrings import docstring_pairs

    model, tokenizer = load_model(options["model"], dtype="float32", device="cpu")
    records = docstring_pairs()
    random.Random(options["seed"]).shuffle(records)
    wanted = (options["warmup"] + options["steps"]) * options["pairs"]
    rows: list[dict[str, str]] = []
    for record in records:
        prompt = str(record.prompt[0]["content"])  # type: ignore[index]
        chosen, rejected = (
            "\n" + str(answer[0]["content"])  # type: ignore[index]
            for answer in (record.chosen, record.rejected)
        )
        asked, *said = (len(tokenizer(text)["input_ids"]) for text in (prompt, chosen, rejected))
        if abs(asked / (sum(said) / 2) - RATIO) <= NEAR:
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
        if len(rows) == wanted:
            break
    train_workload.check_enough(wanted, len(rows), "pairs, steps, warmup")
    model = train_workload.add_adapters(model)
    train_workload.init_adapters(model, options["seed"])
    train_workload.save_adapters(model, folder / "adapters.safetensors")
    (folder / "pairs.json").write_text(json.dumps(rows))
    pairs = load(folder, options, tokenizer)
    batches = [collate(batch, share_prefixes=True) for batch in pairs]
    timed = batches[options["warmup"] :]
    tokens, shared, targets = (
        sum(values) / len(timed)
        for values in (
            [batch.num_tokens for batch in timed],
            [batch.num_rows for batch in timed],
            [batch.num_targets for batch in timed],
        )
    )
    first, second = expected_losses(model, pairs)
    return {
        "unit": "tokens/s",
        "amounts": {"": [batch.num_tokens for batch in batches]},
        "expected": {"": first},
        "second": {"": second},
        "text": f"{options['model']}, {options['dtype']}, {options['pairs']} pairs a step: "
        f"{tokens:.0f} tokens on average, of which {targets:.0f} are of answers; {shared:.0f} "
        "where a pair's prompt counts once. Rates count every sequence whole, whoever computes its "
        "prompt once.",
    }


def expected_losses(model: Any, pairs: list[list[Any]]) -> tuple[float, tuple[float, float]]:
    """Of DPO, -log sigmoid of BETA times the margin over the model without its adapter, by the
    model as transformers runs it: `reference_losses` of the first two batches."""

    def margins(some: list[Any]) -> torch.Tensor:
        """Log-probability of each pair's chosen answer over that of its rejected one."""
        answers = [answer for pair in some for answer in (pair, pair.others[0])]
        padded = pad(answers)
        counted = padded.pop("labels")[:, 1:] != -100
        logprobs = model(**padded).logits[:, :-1].log_softmax(-1)
        own = logprobs.gather(2, padded["input_ids"][:, 1:, None])[..., 0]
        sums = (own * counted).sum(1)
        return sums[::2] - sums[1::2]

    def parts(number: int) -> list[list[Any]]:
        step = AT_ONCE // 2
        return [pairs[number][i : i + step] for i in range(0, len(pairs[number]), step)]

    model.eval()
    with torch.no_grad(), model.disable_adapter():
        without = [[margins(some) for some in parts(number)] for number in (0, 1)]

    def losses(number: int) -> Iterator[torch.Tensor]:
        for some, before in zip(parts(number), without[number], strict=True):
            yield -F.logsigmoid(BETA * (margins(some) - before)).sum() / len(pairs[number])

    return reference_losses(model, losses)


def load(folder: Path, options: Options, tokenizer: Any) -> list[list[Any]]:
    """The batches of pairs, tokenised."""
    from lora_engine.data import prepare as tokenised

    rows = json.loads((folder / "pairs.json").read_text())
    pairs = tokenised(rows, tokenizer, max_length=None)
    return [list(pairs[i : i + options["pairs"]]) for i in range(0, len(pairs), options["pairs"])]


def run_ours(folder: Path, options: Options, name: str) -> Result:
    import lora_engine

    dtype = getattr(torch, options["dtype"])
    model, tokenizer = lora_engine.load_model(
        options["model"], dtype=dtype, device=options["device"]
    )
    model = train_workload.add_adapters(model)
    train_workload.load_adapters(model, folder / "adapters.safetensors")
    batches = load(folder, options, tokenizer)
    device = torch.device(options["device"])
    loaded = measure.held_bytes(device)
    watch = Stopwatch(device)
    steps = watch.watch(_train(model, batches, share=name == "ours"))
    return watch.result(name, steps, loaded)


def _train(model: Any, batches: list[list[Any]], *, share: bool) -> Iterator[float]:
    import lora_engine
    from lora_engine.data.batch import collate
    from lora_engine.objectives import DPO
    from lora_engine.training.optimizer.adamw import FlatAdamW
    from lora_engine.training.optimizer.flat import FlatParameters
    from lora_engine.training.step import TrainStep

    lora_engine.accelerate(model, strict=True)
    model.train()
    config = lora_engine.TrainConfig(learning_rate=train_workload.LEARNING_RATE)
    flat = FlatParameters(model.named_parameters())
    step = TrainStep(model, DPO(beta=BETA), FlatAdamW(flat, config))

    def losses() -> Iterator[float]:
        for number, pairs in enumerate(batches, start=1):
            batch = collate(pairs, share_prefixes=share)
            yield step(number, [batch], config.learning_rate, check=lambda: None).loss

    return losses()


def run_trl(folder: Path, options: Options, name: str) -> Result:
    import datasets
    import trl

    import lora_engine

    datasets.disable_progress_bars()
    default = name == "trl-default"
    dtype = torch.float32 if default else getattr(torch, options["dtype"])
    model, tokenizer = lora_engine.load_model(
        options["model"], dtype=dtype, device=options["device"]
    )
    device = torch.device(options["device"])
    loaded = measure.held_bytes(device)
    recorder = step_recorder(device)
    trainer = trl.DPOTrainer(
        model=model,  # without adapters: the trainer's reference is then the model itself
        args=trl.DPOConfig(
            output_dir=str(folder / "trl"),
            per_device_train_batch_size=options["pairs"],
            max_steps=options["warmup"] + options["steps"],
            train_sampling_strategy="sequential",
            max_length=None,
            beta=BETA,
            learning_rate=train_workload.LEARNING_RATE,
            lr_scheduler_type="constant",
            gradient_checkpointing=default,
            bf16=default and options["dtype"] == "bfloat16",
            use_cpu=options["device"] == "cpu",
            dataloader_pin_memory=False,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_list(json.loads((folder / "pairs.json").read_text())),
        processing_class=tokenizer,
        peft_config=train_workload.lora_config(),
        callbacks=[recorder],
    )
    train_workload.load_adapters(trainer.model, folder / "adapters.safetensors")
    if not default:
        for parameter in trainer.model.parameters():
            parameter.data = parameter.data.to(dtype)
    trainer.train()
    return recorder.watch.result(name, recorder.steps, loaded)


def run(folder: Path, options: Options, name: str) -> Result:
    return (run_ours if name.startswith("ours") else run_trl)(folder, options, name)


JOB = Job(
    name="dpo",
    what="A step of DPO beside TRL's DPOTrainer.",
    options={**COMMON, "pairs": 8},
    contenders=CONTENDERS,
    default=("ours", "trl"),
    prepare=prepare,
    run=run,
    packages={"trl": "trl", "trl-default": "trl"},
)
