"""A training step's CPU time at two revisions, as ratios: both take turns, step by step.

    python benchmarks/train/step_revisions.py main HEAD
    python benchmarks/train/step_revisions.py HEAD~3 HEAD --cases toy --rounds 40 --out FOLDER

Each revision has a process of its own, with one thread. A round is a step of each, the first one
first in every other round. CPU time, not time that passed: other programs may run beside it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if not __package__:  # started by its path: lora_engine is found before ROOT, by PYTHONPATH
    sys.path[0:1] = []
    sys.path.append(str(ROOT))

WARM_UP = 3  # steps before the first round
LENGTHS = {"short": (40, 60, 30, 50), "long": (400, 600, 300, 250, 350)}
CASES = ("smollm2-180", "smollm2-1900", "toy")


@dataclass(frozen=True)
class Ratio:
    """CPU seconds of a step at both revisions, medians; of the second over the first, by rounds."""

    case: str
    rounds: int
    first: float
    second: float
    ratio: float  # median of the rounds' ratios
    lowest: float
    highest: float


def steps(case: str) -> Iterator[float]:
    """Losses of the case's training, each a step that is made when the loss is asked for."""
    import peft
    import torch

    import lora_engine
    from benchmarks.train.train_contenders import train_ours
    from lora_engine.data.render import Example
    from lora_engine.testing import tiny_llama

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model: Any
    if case == "toy":
        vocabulary = 97
        model = tiny_llama(hidden_size=64, intermediate_size=128, layers=8)
    else:
        vocabulary = 49_000
        model, _ = lora_engine.load_model("smollm2", dtype=torch.bfloat16)
    config = peft.LoraConfig(
        r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, config)
    lengths = LENGTHS["long" if case.endswith("1900") else "short"]

    def batches() -> Iterator[list[Example]]:
        generator = torch.Generator().manual_seed(0)
        while True:
            yield [
                Example(
                    torch.randint(vocabulary, (n,), generator=generator).tolist(),
                    [False] * (n // 4) + [True] * (n - n // 4),
                )
                for n in lengths
            ]

    yield from train_ours(model, batches())  # type: ignore[arg-type]


def work(case: str) -> None:
    """Makes a step for each line that comes, and answers with its CPU seconds."""
    losses = steps(case)
    for _ in range(WARM_UP):
        next(losses)
    print("ready", flush=True)
    for _ in sys.stdin:
        before = time.process_time()
        next(losses)
        print(time.process_time() - before, flush=True)


def compare(case: str, packages: Sequence[Path], rounds: int) -> Ratio:
    """The case at both revisions, whose packages are these folders."""
    workers = [start(case, folder) for folder in packages]
    for worker in workers:
        answer(worker)
    seconds: list[list[float]] = [[], []]
    for number in range(rounds):
        for which in (0, 1) if number % 2 else (1, 0):
            assert workers[which].stdin is not None
            print(file=workers[which].stdin, flush=True)
            seconds[which].append(float(answer(workers[which])))
    for worker in workers:
        worker.communicate()
    ratios = [b / a for a, b in zip(*seconds, strict=True)]
    return Ratio(case, rounds, *map(median, seconds), median(ratios), min(ratios), max(ratios))


def start(case: str, packages: Path) -> subprocess.Popen[str]:
    """A process that answers as `work` does."""
    environment = os.environ | {"PYTHONPATH": str(packages), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, __file__, "--work", case],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def answer(worker: subprocess.Popen[str]) -> str:
    """The line that a worker says next."""
    assert worker.stdout is not None
    line = worker.stdout.readline()
    if not line:
        sys.exit("a step failed; its message is above")
    return line.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("revisions", nargs="*", help="two, as git names them")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, help="a JSON file for the ratios")
    parser.add_argument("--work", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.work)
        return
    if len(args.revisions) != 2:
        parser.error("give two revisions")
    from benchmarks.train.same_bits import git, install

    names = [git("rev-parse", "--short", revision) for revision in args.revisions]
    with tempfile.TemporaryDirectory() as folder:
        packages = [install(name, Path(folder) / name) for name in names]
        ratios = []
        for case in args.cases:
            ratios.append(compare(case, packages, args.rounds))
            print(json.dumps(asdict(ratios[-1])), flush=True)
    if args.out:
        args.out.write_text(
            json.dumps({"revisions": names, "ratios": [asdict(r) for r in ratios]}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
