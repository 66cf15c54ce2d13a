"""A round of GRPO, ours against TRL's GRPOTrainer: writing, rewards and the step, and memory.

    python -m benchmarks.train.online_step --out benchmarks/results/online_step

Sums of small numbers, as the chat template writes them; every completion has the same number of
tokens, whatever ends a turn, so that all do the same work. Same model, initial adapter, prompts,
generations and dtype; TRL writes by transformers' generate. Every contender runs in a process of
its own, in turn, round after round, so that a busy machine hits all alike.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import measure, output
from benchmarks.train import train_workload
from benchmarks.train.preference_step import figures_row
from benchmarks.train.train_contenders import Result, Stopwatch, _step_recorder

CONTENDERS = {
    "ours": "lora_engine's Trainer(online=…), a group's prompt computed once",
    "trl": "GRPOTrainer, everything in the dtype, no gradient checkpointing",
}


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=train_workload.MODEL, help="what load_model takes")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32")
    parser.add_argument("--steps", type=int, default=2, help="timed steps a round")
    parser.add_argument("--warmup", type=int, default=1, help="steps before them, untimed")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=4, help="prompts a step")
    parser.add_argument("--generations", type=int, default=8, help="completions of each")
    parser.add_argument("--tokens", type=int, default=32, help="of every completion")
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="comma-separated")
    parser.add_argument("--seed", type=int, default=0, help="draws the adapter")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    parser.add_argument("--one", nargs=2, metavar=("CONTENDER", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if unknown := set(args.contenders.split(",")) - set(CONTENDERS):
        parser.error(f"no contender {', '.join(unknown)}; there is {', '.join(CONTENDERS)}")
    return args


def even_letters(completions: Sequence[Any], **columns: Any) -> list[float]:
    """Costs nothing, and differs within a group."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(sum(map(ord, text)) % 7) for text in texts]


def rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The prompts of all steps, as messages."""
    from lora_engine.data.sums import sum_records

    wanted = (args.warmup + args.steps) * args.prompts
    return [{"prompt": [dict(m) for m in r.prompt]} for r in sum_records()[:wanted]]  # type: ignore[union-attr,arg-type]


def prepare(folder: Path, args: argparse.Namespace) -> None:
    """The initial adapter."""
    from lora_engine import load_model

    model, _ = load_model(args.model, dtype="float32", device="cpu")
    model = train_workload.add_adapters(model)
    train_workload.init_adapters(model, args.seed)
    train_workload.save_adapters(model, folder / "adapters.safetensors")


class _Watched:
    """Measures the steps of a Trainer, and how much of each is writing."""

    def __init__(self) -> None:
        self.steps: list[Any] = []
        self.writing: list[float] = []

    def on_start(self, trainer: Any) -> None:
        self.watch = Stopwatch()

    def on_step(self, metrics: Any) -> None:
        self.steps.append(self.watch.step(metrics.loss))
        self.writing.append(metrics.metrics["rollout_seconds"])


def run_ours(folder: Path, args: argparse.Namespace, name: str) -> Result:
    import lora_engine
    from lora_engine.objectives import GRPO
    from lora_engine.training.online import rollouts
    from lora_engine.training.online.config import RolloutConfig
    from lora_engine.training.online.online import Online

    rollouts.stop_tokens = lambda *_: []  # type: ignore[assignment]
    model, tokenizer = lora_engine.load_model(args.model, dtype=args.dtype, device="cpu")
    model = train_workload.add_adapters(model)
    train_workload.load_adapters(model, folder / "adapters.safetensors")
    lora_engine.accelerate(model, strict=True)
    loaded = measure.resident_bytes()
    watched = _Watched()
    rollout = RolloutConfig.model_validate(
        {
            "prompts": args.prompts,
            "generations": args.generations,
            "max_new_tokens": args.tokens,
        }
    )
    config = lora_engine.TrainConfig(
        output_dir=folder / "ours",
        overwrite=True,
        max_steps=args.warmup + args.steps,
        learning_rate=train_workload.LEARNING_RATE,
        schedule="constant",
        preflight=False,
    )
    lora_engine.Trainer(
        model,
        tokenizer,
        rows(args),
        None,
        config,
        objective=GRPO(),
        online=Online([even_letters], rollout),
        callbacks=[watched],
    ).fit()
    (folder / "writing.json").write_text(json.dumps(watched.writing))
    return watched.watch.result(name, watched.steps, loaded)


def run_trl(folder: Path, args: argparse.Namespace, name: str) -> Result:
    import datasets
    import trl

    import lora_engine

    datasets.disable_progress_bars()
    dtype = getattr(torch, args.dtype)
    model, tokenizer = lora_engine.load_model(args.model, dtype=args.dtype, device="cpu")
    loaded = measure.resident_bytes()
    recorder = _step_recorder()
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=even_letters,
        args=trl.GRPOConfig(
            output_dir=str(folder / "trl"),
            per_device_train_batch_size=args.prompts * args.generations,
            num_generations=args.generations,
            max_completion_length=args.tokens,
            generation_kwargs={"min_new_tokens": args.tokens},
            max_steps=args.warmup + args.steps,
            shuffle_dataset=False,
            loss_type="dapo",
            epsilon_high=0.28,
            learning_rate=train_workload.LEARNING_RATE,
            lr_scheduler_type="constant",
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            dataloader_pin_memory=False,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_list(rows(args)),
        processing_class=tokenizer,
        peft_config=train_workload.lora_config(),
        callbacks=[recorder],
    )
    train_workload.load_adapters(trainer.model, folder / "adapters.safetensors")
    for parameter in trainer.model.parameters():
        parameter.data = parameter.data.to(dtype)
    trainer.train()
    return recorder.watch.result(name, recorder.steps, loaded)


def measured(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The raw results of all contenders, and what they worked on."""
    prepare(folder, args)
    names = args.contenders.split(",")
    rounds: dict[str, list[Any]] = {name: [] for name in names}
    for _ in range(args.rounds):
        for name in names:
            command = [sys.executable, "-m", "benchmarks.train.online_step", *sys.argv[1:]]
            subprocess.run([*command, "--one", name, str(folder)], check=True)
            rounds[name].append(json.loads((folder / "result.json").read_text()))
            seconds = [step["seconds"] for step in rounds[name][-1]["steps"][args.warmup :]]
            print(f"{name}: {statistics.median(seconds):.2f} s/step", file=sys.stderr)
    writing = folder / "writing.json"
    return {
        "warmup": args.warmup,
        "prompts": args.prompts,
        "generations": args.generations,
        "tokens": args.tokens,
        "dtype": args.dtype,
        "writing": json.loads(writing.read_text())[args.warmup :] if writing.exists() else [],
        "rounds": rounds,
    }


def summarise(raw: dict[str, Any]) -> dict[str, Any]:
    """By contender: medians over the timed steps of all rounds, and ratios of ours to it, of wall
    time and of processor time, which a busy machine changes less."""

    def median(name: str, kind: str) -> float:
        steps = (step for r in raw["rounds"][name] for step in r["steps"][raw["warmup"] :])
        return statistics.median(step[kind] for step in steps)

    def peak(name: str) -> int:
        return max(r["peak_bytes"] for r in raw["rounds"][name])

    written = raw["prompts"] * raw["generations"] * raw["tokens"]
    found: dict[str, Any] = {}
    for name in raw["rounds"]:
        own = {kind: median(name, kind) for kind in ("seconds", "cpu_seconds")}
        found[name] = {
            **own,
            "tokens_per_second": written / own["seconds"],
            "peak_bytes": peak(name),
        }
        if name != "ours" and "ours" in raw["rounds"]:
            for kind, ratio in (("seconds", "times_faster"), ("cpu_seconds", "times_less_cpu")):
                found[name][f"ours_{ratio}"] = own[kind] / median("ours", kind)
            found[name]["ours_memory_share"] = peak("ours") / peak(name)
    if "ours" in found and raw["writing"]:
        found["ours"]["writing_share"] = (
            statistics.median(raw["writing"]) / found["ours"]["seconds"]
        )
    return found


def render(raw: dict[str, Any], summary: dict[str, Any]) -> str:
    lines = [
        f"# A step of GRPO, {raw['dtype']}",
        "",
        output.header(raw),
        "",
        f"{raw['prompts']} prompts, {raw['generations']} completions of {raw['tokens']} tokens "
        "each; tokens per second count what is written.",
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
    ]
    share = summary.get("ours", {}).get("writing_share")
    if share is not None:
        lines += ["", f"Of a step of ours {share:.0%} is writing; the rest is the update."]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.one:
        name, folder = args.one[0], Path(args.one[1])
        result = (run_ours if name == "ours" else run_trl)(folder, args, name)
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
