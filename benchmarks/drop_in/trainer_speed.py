"""Other people's trainers on SmolLM2, with and without acceleration: seconds a step, memory, loss.

    python -m benchmarks.drop_in.trainer_speed --out benchmarks/results/trainers_speed
    python -m benchmarks.drop_in.trainer_speed --page benchmarks/results/trainers_speed.json

TRL's trainers with their default settings, but for what is named under the table, on the demo's
functions and docstrings, eight a step. Each contender runs in a process of its own, in turn, round
after round, so that a busy machine hits both alike.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import measure, output
from benchmarks.common.generated import GeneratedPart

PAGE = Path(__file__).parents[2] / "docs/drop-in.md"
PART = GeneratedPart("python -m benchmarks.drop_in.trainer_speed --page", "the trainers' speed")
TRAINERS = ("SFT", "DPO", "GRPO")
WHEN = ("plain", "accelerated")
BATCH = 8
MAX_LENGTH = 512  # tokens, as in the demo
MAX_COMPLETION = 64  # tokens that GRPO samples: a docstring has no more
SETUPS = {
    "float32": "weights in float32, no autocast",
    "autocast": "weights in float32 under bfloat16 autocast (TRL's default)",
    "bfloat16": "weights in bfloat16, adapters in float32, under autocast (TRL's default)",
}


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trainers", type=_listed(TRAINERS), default=TRAINERS)
    parser.add_argument("--setups", type=_listed(SETUPS), default=("bfloat16",))
    parser.add_argument("--steps", type=int, default=4, help="timed steps a round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--gradient-checkpointing", choices=("default", "off"), default="default")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    parser.add_argument("--page", type=Path, metavar="RESULT.json", help="write its table, only")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # trainer, setup, when
    return parser.parse_args(argv)


def _listed(names: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        given = tuple(text.split(","))
        if unknown := set(given) - set(names):
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not of {', '.join(names)}")
        return given

    return parse


def run_one(args: argparse.Namespace) -> dict[str, Any]:
    """One contender: its steps' seconds and losses, and what memory it took."""
    import datasets
    import torch
    import transformers
    import trl

    import lora_engine
    from lora_engine.data.docstrings import docstring_records

    name, setup, when = args.one
    datasets.disable_progress_bars()
    transformers.set_seed(0)
    dtype = torch.bfloat16 if setup == "bfloat16" else torch.float32
    model, tokenizer = lora_engine.load_model("smollm2", dtype=dtype, device="cpu")
    from benchmarks.train import train_workload

    model = train_workload.add_adapters(model)
    train_workload.init_adapters(model, 0)
    measure.release_free_memory()
    loaded = measure.resident_bytes()
    started = time.perf_counter()
    if when == "accelerated":
        lora_engine.accelerate(model)
    attached = time.perf_counter() - started
    steps = args.steps + 1
    records = random.Random(0).sample(docstring_records(), steps * BATCH + 1)
    clock = _clock()
    settings = {
        "max_steps": steps,
        "per_device_train_batch_size": BATCH,
        "logging_steps": 1,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        **({} if setup != "float32" else {"bf16": False}),
        **({} if args.gradient_checkpointing == "default" else {"gradient_checkpointing": False}),
    }
    with tempfile.TemporaryDirectory() as folder:
        trainer = _make(name, trl, datasets, model, tokenizer, records, folder, settings, clock)
        measure.reset_peak()
        trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "seconds": clock.seconds,
        "losses": [entry["loss"] for entry in logs],
        "loaded": loaded,
        "peak": measure.peak_resident_bytes(),
        "attached": attached,
    }


def _make(
    name: str,
    trl: Any,
    datasets: Any,
    model: Any,
    tokenizer: Any,
    records: list[Any],
    folder: str,
    settings: dict[str, Any],
    clock: Any,
) -> Any:
    """The trainer of this name on the demo's records: function -> docstring."""
    prompts = [list(record.messages[:-1]) for record in records]
    answers = [list(record.messages[-1:]) for record in records]
    rows: dict[str, Any] = {"prompt": prompts[:-1]}
    if name == "SFT":
        rows["completion"] = answers[:-1]
    elif name == "DPO":  # another function's docstring is the worse one
        rows |= {"chosen": answers[:-1], "rejected": answers[1:]}
    if name == "GRPO":
        settings["max_completion_length"] = MAX_COMPLETION
    else:
        settings["max_length"] = MAX_LENGTH
    config = getattr(trl, f"{name}Config")(folder, **settings)
    given = {"reward_funcs": _reward} if name == "GRPO" else {}
    return getattr(trl, f"{name}Trainer")(
        model=model,
        args=config,
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=tokenizer,
        callbacks=[clock],
        **given,
    )


def _reward(completions: Sequence[Any], **_: Any) -> list[float]:
    """How many different words a completion has."""
    texts = [
        message[0]["content"] if isinstance(message, list) else message for message in completions
    ]
    return [float(len(set(text.split()))) for text in texts]


def _clock() -> Any:
    import transformers

    class Clock(transformers.TrainerCallback):
        """Notes each step's wall time."""

        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begun = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.perf_counter() - self.begun)

    return Clock()


def measure_all(args: argparse.Namespace) -> dict[str, Any]:
    """Every contender's runs, interleaved."""
    found: dict[str, Any] = {"context": output.context(), "runs": []}
    for _ in range(args.rounds):
        for trainer in args.trainers:
            for setup in args.setups:
                for when in WHEN:
                    run = {"trainer": trainer, "setup": setup, "when": when}
                    run |= _in_a_process(args, [trainer, setup, when])
                    found["runs"].append(run)
                    seconds = statistics.median(run["seconds"][1:])
                    print(f"{trainer} {setup} {when}: {seconds:.2f} s a step", file=sys.stderr)
    return found


def _in_a_process(args: argparse.Namespace, one: list[str]) -> dict[str, Any]:
    options = ["--steps", str(args.steps), "--gradient-checkpointing", args.gradient_checkpointing]
    command = [sys.executable, "-m", "benchmarks.drop_in.trainer_speed", *options, "--one", *one]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def summary(result: dict[str, Any]) -> list[dict[str, Any]]:
    """For each trainer and setup: seconds, times faster (median and range), memory, losses."""
    groups: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for run in result["runs"]:
        group = groups.setdefault((run["trainer"], run["setup"]), {when: [] for when in WHEN})
        group[run["when"]].append(run)
    rows = []
    for (trainer, setup), group in groups.items():
        # The first step includes what is done once: imports, packing, autotuning.
        seconds = {w: [statistics.median(run["seconds"][1:]) for run in group[w]] for w in WHEN}
        ratios = [a / b for a, b in zip(seconds["plain"], seconds["accelerated"], strict=True)]
        first = {w: group[w][0] for w in WHEN}
        pairs = zip(first["plain"]["losses"], first["accelerated"]["losses"], strict=True)
        rows.append(
            {
                "trainer": trainer,
                "setup": setup,
                "seconds": {w: statistics.median(seconds[w]) for w in WHEN},
                "faster": statistics.median(ratios),
                "range": [min(ratios), max(ratios)],
                "peak": {w: max(run["peak"] for run in group[w]) for w in WHEN},
                "loss difference": max(abs(a - b) for a, b in pairs),
            }
        )
    return rows


def table(result: dict[str, Any]) -> str:
    """The summary as Markdown."""
    rows = [
        [
            row["trainer"],
            row["setup"],
            f"{row['seconds']['plain']:.2f}",
            f"{row['seconds']['accelerated']:.2f}",
            f"{row['faster']:.2f} ({row['range'][0]:.2f}-{row['range'][1]:.2f})",
            f"{row['peak']['plain'] / 2**30:.2f}",
            f"{row['peak']['accelerated'] / 2**30:.2f}",
            f"{row['peak']['accelerated'] / row['peak']['plain']:.2f}",
            f"{row['loss difference']:.1e}",
        ]
        for row in summary(result)
    ]
    columns = ["TRL trainer", "setup", "plain s/step", "accelerated", "times faster"]
    columns += ["plain GiB", "accelerated", "share", "largest difference of losses"]
    return output.table(columns, rows, left=2)


def with_table(page: str, result: Path) -> str:
    """The page with the result's table where its markers are."""
    return PART.put(page, result, table(json.loads(result.read_text())))


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.one:
        print(json.dumps(run_one(args)))
        return
    if args.page:
        PAGE.write_text(with_table(PAGE.read_text(), args.page))
        return
    result = measure_all(args)
    notes = [f"{name}: {SETUPS[name]}" for name in args.setups]
    checkpointing = "TRL's default, on" if args.gradient_checkpointing == "default" else "off"
    notes.append(f"gradient checkpointing: {checkpointing}; max_completion_length {MAX_COMPLETION}")
    text = "\n\n".join(
        [output.header(result["context"]), table(result), "\n".join(f"- {n}" for n in notes)]
    )
    print(text)
    if args.out:
        output.write(args.out, result, text)


if __name__ == "__main__":
    main()
