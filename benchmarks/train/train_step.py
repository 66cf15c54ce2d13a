"""One training step, ours against TRL's SFTTrainer: speed, memory, loss.

    python -m benchmarks.train.train_step --out benchmarks/results/train_step

Same model, initial adapters, batches, rank and dtype for all. Every contender runs in a process
of its own, in turn, round after round, so that a busy machine hits all alike.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.common import output
from benchmarks.train import train_report, train_workload
from benchmarks.train.train_contenders import CONTENDERS

WORKER = "benchmarks.train.train_contenders"
DEFAULT_CONTENDERS = ("ours", "trl-default", "trl-padded", "trl-padding-free")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=train_workload.MODEL, help="what load_model takes")
    parser.add_argument("--dtype", choices=("bfloat16", "float32", "both"), default="both")
    parser.add_argument("--steps", type=_positive, default=4, help="timed steps per round")
    parser.add_argument("--warmup", type=_positive, default=1, help="steps before them, untimed")
    parser.add_argument("--rounds", type=_positive, default=3)
    parser.add_argument("--batch-size", type=_positive, default=8, help="examples per step")
    parser.add_argument(
        "--contenders",
        type=_contenders,
        default=DEFAULT_CONTENDERS,
        help=f"comma-separated, of: {', '.join(CONTENDERS)} (default: %(default)s)",
    )
    parser.add_argument(
        "--trl-gradient-checkpointing",
        choices=("auto", "on", "off"),
        default="auto",
        help="auto: on in trl-default, off in the others, where it costs time",
    )
    parser.add_argument("--seed", type=int, default=0, help="draws examples and adapters")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def _contenders(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in CONTENDERS]:
        raise argparse.ArgumentTypeError(
            f"no contender {', '.join(unknown)}; there are {', '.join(CONTENDERS)}"
        )
    return names


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run all contenders for all dtypes; the raw results as JSON values."""
    train_workload.prepare(
        folder,
        batches=args.warmup + args.steps,
        batch_size=args.batch_size,
        seed=args.seed,
        model_source=args.model,
    )
    workload = train_workload.load(folder)
    dtypes = ("bfloat16", "float32") if args.dtype == "both" else (args.dtype,)
    return {
        "workload": {
            "model": workload.model,
            "shape": asdict(workload.shape),
            "rank": train_workload.RANK,
            "lengths": workload.lengths(),
            "pieces": workload.pieces(),
            "targets": workload.targets(),
            "warmup": args.warmup,
        },
        "contenders": {name: CONTENDERS[name] for name in args.contenders},
        "dtypes": {dtype: _measure_dtype(args, folder, dtype) for dtype in dtypes},
    }


def _measure_dtype(args: argparse.Namespace, folder: Path, dtype: str) -> dict[str, Any]:
    measured: dict[str, Any] = {"matmuls": [], "contenders": {n: [] for n in args.contenders}}
    for number in range(1, args.rounds + 1):
        measured["matmuls"].append(_run_worker(args, folder, "matmuls", dtype))
        for name, rounds in measured["contenders"].items():
            result = _run_worker(args, folder, name, dtype)
            rounds.append(result)
            seconds = sum(step["seconds"] for step in result["steps"][args.warmup :])
            print(
                f"{dtype} round {number}/{args.rounds} {name}: {seconds / args.steps:.2f} s/step",
                file=sys.stderr,
            )
    return measured


def _run_worker(args: argparse.Namespace, folder: Path, name: str, dtype: str) -> Any:
    out = folder / "result.json"
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", WORKER, str(folder), "--contender", name, "--dtype", dtype]
    command += ["--checkpointing", args.trl_gradient_checkpointing, "--out", str(out)]
    done = subprocess.run(
        command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{done.stderr}\n{name} ({dtype}) failed with exit status {done.returncode}")
    return json.loads(out.read_text())


def main() -> None:
    args = parse_arguments()
    context = output.context()
    with tempfile.TemporaryDirectory(prefix="train-step-") as folder:
        measured = {**context, **measure(args, Path(folder))}
    measured["summary"] = train_report.summarise(measured)
    text = train_report.render(measured)
    print(text)
    if args.out:
        for path in output.write(args.out, measured, text):
            print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
