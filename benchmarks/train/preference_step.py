"""One step of DPO, ours against TRL's DPOTrainer: speed, memory, loss.

    python -m benchmarks.train.preference_step --out benchmarks/results/preference_step

Functions of the standard library with a better and a worse docstring, of prompts about four times
as long as an answer. Same model, initial adapter, pairs and dtype for all; the reference is the
model without the adapter. Every contender runs in a process of its own, in turn, round after round,
so that a busy machine hits all alike.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import measure, output
from benchmarks.train import train_workload
from benchmarks.train.train_contenders import Result, Stopwatch, _step_recorder

GIB = 2**30
RATIO = 4.0  # a prompt's tokens over an answer's, on average
NEAR = 1.0  # how far a pair's ratio may be from that
BETA = 0.1
CONTENDERS = {
    "ours": "lora_engine: accelerate, packed pairs, a pair's prompt computed once",
    "ours-unshared": "the same, each answer with a prompt of its own (share_prefixes: false)",
    "trl": "DPOTrainer, everything in the dtype, no gradient checkpointing",
    "trl-default": "DPOConfig's defaults: float32 weights, bf16 autocast, gradient checkpointing",
}


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=train_workload.MODEL, help="what load_model takes")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--steps", type=int, default=3, help="timed steps a round")
    parser.add_argument("--warmup", type=int, default=1, help="steps before them, untimed")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=8, help="pairs a step")
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="comma-separated")
    parser.add_argument("--seed", type=int, default=0, help="draws pairs and the adapter")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    parser.add_argument("--one", nargs=2, metavar=("CONTENDER", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if unknown := set(args.contenders.split(",")) - set(CONTENDERS):
        parser.error(f"no contender {', '.join(unknown)}; there is {', '.join(CONTENDERS)}")
    return args


def prepare(folder: Path, args: argparse.Namespace) -> None:
    """Draw the pairs, as texts, and the initial adapter."""
    from lora_engine import load_model
    from lora_engine.data.preferred_docstrings import docstring_pairs

    model, tokenizer = load_model(args.model, dtype="float32", device="cpu")
    records = docstring_pairs()
    random.Random(args.seed).shuffle(records)
    wanted = (args.warmup + args.steps) * args.pairs
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
    model = train_workload.add_adapters(model)
    train_workload.init_adapters(model, args.seed)
    train_workload.save_adapters(model, folder / "adapters.safetensors")
    (folder / "pairs.json").write_text(json.dumps(rows))


def load(folder: Path, args: argparse.Namespace, tokenizer: Any) -> list[list[Any]]:
    """The batches of pairs, tokenised."""
    from lora_engine.data import prepare as tokenised

    rows = json.loads((folder / "pairs.json").read_text())
    pairs = tokenised(rows, tokenizer, max_length=None)
    return [list(pairs[i : i + args.pairs]) for i in range(0, len(pairs), args.pairs)]


def run_ours(folder: Path, args: argparse.Namespace, name: str) -> Result:
    import lora_engine

    dtype = getattr(torch, args.dtype)
    model, tokenizer = lora_engine.load_model(args.model, dtype=dtype, device="cpu")
    model = train_workload.add_adapters(model)
    train_workload.load_adapters(model, folder / "adapters.safetensors")
    batches = load(folder, args, tokenizer)
    loaded = measure.resident_bytes()
    watch = Stopwatch()
    steps = [watch.step(loss) for loss in _train(model, batches, share=name == "ours")]
    return watch.result(name, steps, loaded)


def _train(model: Any, batches: list[list[Any]], *, share: bool) -> Iterator[float]:
    import lora_engine
    from lora_engine.data.batch import collate
    from lora_engine.objectives import DPO
    from lora_engine.training.optimizer.flat import FlatParameters
    from lora_engine.training.optimizer.optimizer import FlatAdamW
    from lora_engine.training.step import TrainStep

    lora_engine.accelerate(model, strict=True)
    model.train()
    config = lora_engine.TrainConfig(learning_rate=train_workload.LEARNING_RATE)
    flat = FlatParameters(model.named_parameters())
    step = TrainStep(model, DPO(beta=BETA), FlatAdamW(flat, config))
    for number, pairs in enumerate(batches, start=1):
        batch = collate(pairs, share_prefixes=share)
        yield step(number, [batch], config.learning_rate, check=lambda: None).loss


def run_trl(folder: Path, args: argparse.Namespace, name: str) -> Result:
    import datasets
    import trl

    import lora_engine

    datasets.disable_progress_bars()
    default = name == "trl-default"
    dtype = torch.float32 if default else getattr(torch, args.dtype)
    model, tokenizer = lora_engine.load_model(args.model, dtype=dtype, device="cpu")
    loaded = measure.resident_bytes()
    recorder = _step_recorder()
    trainer = trl.DPOTrainer(
        model=model,  # without adapters: the trainer's reference is then the model itself
        args=trl.DPOConfig(
            output_dir=str(folder / "trl"),
            per_device_train_batch_size=args.pairs,
            max_steps=args.warmup + args.steps,
            train_sampling_strategy="sequential",
            max_length=None,
            beta=BETA,
            learning_rate=train_workload.LEARNING_RATE,
            lr_scheduler_type="constant",
            gradient_checkpointing=default,
            bf16=default and args.dtype == "bfloat16",
            use_cpu=True,
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


def measured(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The raw results of all contenders, and what they worked on."""
    from lora_engine import load_model
    from lora_engine.data.batch import collate

    prepare(folder, args)
    _, tokenizer = load_model(args.model, dtype="float32", device="cpu")
    batches = [collate(pairs, share_prefixes=True) for pairs in load(folder, args, tokenizer)]
    names = args.contenders.split(",")
    rounds: dict[str, list[Any]] = {name: [] for name in names}
    for _ in range(args.rounds):
        for name in names:
            out = folder / "result.json"
            command = [sys.executable, "-m", "benchmarks.train.preference_step", *sys.argv[1:]]
            subprocess.run([*command, "--one", name, str(folder)], check=True)
            rounds[name].append(json.loads(out.read_text()))
            seconds = [step["seconds"] for step in rounds[name][-1]["steps"][args.warmup :]]
            print(f"{name}: {statistics.median(seconds):.2f} s/step", file=sys.stderr)
    return {
        "tokens": [batch.num_tokens for batch in batches],
        "rows": [batch.num_rows for batch in batches],
        "targets": [batch.num_targets for batch in batches],
        "warmup": args.warmup,
        "pairs": args.pairs,
        "dtype": args.dtype,
        "rounds": rounds,
    }


def summarise(raw: dict[str, Any]) -> dict[str, Any]:
    """By contender: medians over the timed steps of all rounds, and ratios of ours to it, each the
    median over the same steps of the same rounds; of wall time, and of processor time, which a busy
    machine changes less."""
    warmup, tokens = raw["warmup"], raw["tokens"][raw["warmup"] :]

    def seconds(name: str, kind: str = "seconds") -> list[float]:
        return [step[kind] for r in raw["rounds"][name] for step in r["steps"][warmup:]]

    def peak(name: str) -> int:
        return max(r["peak_bytes"] for r in raw["rounds"][name])

    found: dict[str, Any] = {}
    for name, rounds in raw["rounds"].items():
        own = seconds(name)
        found[name] = {
            "tokens_per_second": statistics.median(
                t / s for t, s in zip(tokens * len(rounds), own, strict=True)
            ),
            "seconds": statistics.median(own),
            "cpu_seconds": statistics.median(seconds(name, "cpu_seconds")),
            "peak_bytes": peak(name),
            "losses": [step["loss"] for step in rounds[0]["steps"]],
        }
        if name != "ours" and "ours" in raw["rounds"]:
            for kind, ratio in (("seconds", "times_faster"), ("cpu_seconds", "times_less_cpu")):
                pairs = zip(seconds(name, kind), seconds("ours", kind), strict=True)
                found[name][f"ours_{ratio}"] = statistics.median(a / b for a, b in pairs)
            found[name]["ours_memory_share"] = peak("ours") / peak(name)
    return found


def render(raw: dict[str, Any], summary: dict[str, Any]) -> str:
    timed = slice(raw["warmup"], None)
    tokens, rows, targets = (
        statistics.mean(raw[part][timed]) for part in ("tokens", "rows", "targets")
    )
    lines = [
        f"# A step of DPO, {raw['dtype']}",
        "",
        output.header(raw),
        "",
        f"{raw['pairs']} pairs a step: {tokens:.0f} tokens on average, of which {targets:.0f} are "
        f"of answers; {rows:.0f} where a pair's prompt counts once. Tokens per second count every "
        "sequence whole, whoever computes its prompt once.",
        "",
        *(f"- {name}: {CONTENDERS[name]}" for name in summary),
        "",
        output.table(
            [
                *("contender", "tokens/s", "s/step", "CPU s/step", "peak GiB"),
                *("ours is faster", "in CPU time", "ours' memory"),
            ],
            [figures_row(name, figures) for name, figures in summary.items()],
        ),
        "",
        "Loss of each step, warm-up included:",
        "",
        output.table(
            ["contender", *(str(i + 1) for i in range(len(raw["tokens"])))],
            [[n, *(f"{x:.4f}" for x in figures["losses"])] for n, figures in summary.items()],
        ),
    ]
    return "\n".join(lines)


def figures_row(name: str, figures: dict[str, Any]) -> list[str]:
    """A contender's row of the table."""
    share = figures.get("ours_memory_share")
    times = [figures.get(f"ours_{ratio}") for ratio in ("times_faster", "times_less_cpu")]
    return [
        name,
        f"{figures['tokens_per_second']:.0f}",
        f"{figures['seconds']:.2f}",
        f"{figures['cpu_seconds']:.2f}",
        f"{figures['peak_bytes'] / GIB:.2f}",
        *("" if each is None else f"{each:.2f} times" for each in times),
        "" if share is None else f"{share:.0%}",
    ]


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.one:
        name, folder = args.one[0], Path(args.one[1])
        result = (run_ours if name.startswith("ours") else run_trl)(folder, args, name)
        (folder / "result.json").write_text(json.dumps(asdict(result)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        raw = {**output.context(), **measured(args, Path(temporary))}
    summary = summarise(raw)
    text = render(raw, summary)
    print(text)
    if args.out:
        output.write(args.out, {**raw, "summary": summary}, text)


if __name__ == "__main__":
    main()
