"""The same loss, step by step, as plain PEFT and transformers; exit status 1 if not.

    python -m benchmarks.train.loss_parity --out benchmarks/results/loss_parity

float32, the same batches and initial adapters, AdamW. Theirs: eager attention, padded batches,
torch.optim.AdamW. Ours: what train_job.py measures.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from benchmarks.common import output
from benchmarks.train import train_workload
from benchmarks.train.train_contenders import train_ours
from benchmarks.train.train_workload import Workload
from lora_engine.data.render import Example

TOLERANCE = 1e-4


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=train_workload.MODEL, help="what load_model takes")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="relative")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    return parser.parse_args(argv)


def train_plainly(
    model: Any,
    batches: Sequence[Sequence[Example]],
    learning_rate: float = train_workload.LEARNING_RATE,
    max_grad_norm: float | None = None,
) -> Iterator[float]:
    """Train a PEFT model as transformers' documentation does; yields each step's loss."""
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=learning_rate, weight_decay=0.0)
    for examples in batches:
        optimizer.zero_grad()
        batch = {name: x.to(model.device) for name, x in pad(examples).items()}
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        if max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(trainable, max_grad_norm)
        optimizer.step()
        yield loss.item()


def pad(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and labels [S, longest], padded on the right."""
    ids = [torch.tensor(example.input_ids) for example in examples]
    targets = [torch.tensor(train_workload.labels(example)) for example in examples]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(x) for x in ids], batch_first=True),
        "labels": pad_sequence(targets, batch_first=True, padding_value=-100),
    }


def relative_differences(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """|ours - theirs| / |theirs| of every step."""
    return [abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)]


def within(differences: Sequence[float], tolerance: float) -> bool:
    """Whether every difference is a number and at most the tolerance."""
    return all(difference <= tolerance for difference in differences)


def compare(workload: Workload) -> dict[str, list[float]]:
    """Both losses of every step, and their relative differences."""
    plain, _ = train_workload.load_with_adapters(workload, torch.float32)
    plain.set_attn_implementation("eager")
    theirs = list(train_plainly(plain, workload.batches))
    del plain
    model, _ = train_workload.load_with_adapters(workload, torch.float32)
    ours = list(train_ours(model, workload.batches, max_grad_norm=None))
    return {"ours": ours, "theirs": theirs, "difference": relative_differences(ours, theirs)}


def render(result: dict[str, Any]) -> str:
    """The whole result as Markdown that also reads well in a terminal."""
    rows = [
        [str(step), f"{ours:.6f}", f"{theirs:.6f}", f"{difference:.1e}"]
        for step, (ours, theirs, difference) in enumerate(
            zip(result["ours"], result["theirs"], result["difference"], strict=True), start=1
        )
    ]
    worst, tolerance = max(result["difference"]), result["tolerance"]
    verdict = "within" if within(result["difference"], tolerance) else "over"
    return "\n\n".join(
        [
            "# Loss parity, float32",
            output.header(result),
            output.table(["step", "ours", "PEFT", "relative difference"], rows),
            f"Largest difference {worst:.1e}, {verdict} the tolerance of {tolerance:.0e}.",
        ]
    )


def main() -> None:
    args = parse_arguments()
    context = output.context()
    with tempfile.TemporaryDirectory(prefix="loss-parity-") as name:
        folder = Path(name)
        train_workload.prepare(
            folder,
            batches=args.steps,
            batch_size=args.batch_size,
            seed=args.seed,
            model_source=args.model,
        )
        compared = compare(train_workload.load(folder))
    result = {**context, "tolerance": args.tolerance, **compared}
    text = render(result)
    print(text)
    if args.out:
        for path in output.write(args.out, result, text):
            print(f"wrote {path}", file=sys.stderr)
    if not within(compared["difference"], args.tolerance):
        sys.exit(1)


if __name__ == "__main__":
    main()
