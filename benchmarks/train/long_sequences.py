"""Memory of a training step over one sequence of up to 64 k tokens, on a CPU.

    python -m benchmarks.train.long_sequences --out benchmarks/results/long_sequences-xeon-2cores

SmolLM2-135M in bfloat16, LoRA of rank 16 on all linears, one step, the last 2,048 tokens
supervised; a process each. tensors: the most bytes that torch's allocator counted, the model's
included. resident: the process's peak.

Attention's time grows with the square of the length. First its kernels are left out, and all else
runs: they allocate no tensor, and what they write is there already. Then, up to `--attended`
tokens, whole steps are run; their bytes have to be the same, but for scalars.
"""

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.common import output, svg

TARGETS = 2048
LENGTHS = [1024, 2048, 4096, 8192, 16384, 32768, 65536]
# Checkpointing, and where what it keeps waits.
WAYS = {
    "by layer": ("layer", None),
    "MLP in tiles, kept on disk": ("tiled_4096", "disk"),
}
ATTENDED = "MLP in tiles, kept on disk"  # the way that whole steps are run in


def without_attention() -> AbstractContextManager[object]:
    """Within, attention's kernels write something and compute nothing."""
    from lora_engine.backends.cpu import attention

    def forward(q: Any, k: Any, v: Any, *others: Any, **_: Any) -> None:
        o, lse = others[3:5]
        o.copy_(q)
        lse.zero_()

    def backward(*tensors: Any, **_: Any) -> None:
        for gradient in tensors[9:12]:
            gradient.zero_()

    return patch.multiple(attention, attention_fwd=forward, attention_bwd=backward)


def measured(
    length: int, policy: str, place: str | None, attended: bool, layers: int | None = None
) -> dict[str, Any]:
    """Peak bytes, seconds and loss of a step; layers: of the model's, the first so many."""
    import torch

    import lora_engine
    from lora_engine.data.batch import collate
    from lora_engine.data.render import Example
    from lora_engine.memory.checkpointing import checkpointing
    from lora_engine.memory.measured import peak_cpu_bytes
    from lora_engine.memory.offload import activation_store
    from lora_engine.models.load.load import load_model
    from lora_engine.models.peft.adapters import LoraConfig, add_adapters
    from lora_engine.objectives.sft import SFT
    from lora_engine.training.config import TrainConfig
    from lora_engine.training.optimizer.adamw import FlatAdamW
    from lora_engine.training.optimizer.flat import FlatParameters
    from lora_engine.training.step import TrainStep

    made: dict[str, Any] = {}

    def prepare() -> None:
        model, _ = load_model("smollm2", dtype="bfloat16", device="cpu")
        if layers is not None:
            model.model.layers = model.model.layers[:layers]
        torch.manual_seed(0)
        model = add_adapters(model, LoraConfig()).train()
        lora_engine.accelerate(model, strict=True)
        ids = torch.randint(model.config.vocab_size, (length,)).tolist()
        supervised = [place >= length - TARGETS for place in range(length)]
        made["batch"] = collate([Example(ids, supervised, "made:1")])
        flat = FlatParameters(model.named_parameters())
        made["step"] = TrainStep(model, SFT(), FlatAdamW(flat, TrainConfig()))

    def step() -> None:
        started = time.perf_counter()
        with (
            nullcontext() if attended else without_attention(),
            tempfile.TemporaryDirectory() as folder,
            activation_store(place, Path(folder), torch.device("cpu")) as store,
            checkpointing(made["step"].model, policy, store),
        ):
            made["loss"] = made["step"](1, [made["batch"]], 1e-4, lambda: None).loss
        made["seconds"] = time.perf_counter() - started

    peak = peak_cpu_bytes(step, prepare)
    return {
        "attended": attended,
        "peak_bytes": peak,
        "resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "seconds": made["seconds"],
        "loss": made["loss"] if attended else None,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--attended", type=int, default=16384)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    result: dict[str, Any] = {"context": output.context(), "rows": []}
    cases = [(length, name, False) for length in args.lengths for name in WAYS]
    cases += [(length, ATTENDED, True) for length in args.lengths if length <= args.attended]
    for length, name, attended in cases:
        # A second profile in a process may lack events.
        with get_context("spawn").Pool(1) as pool:
            found = pool.apply(measured, (length, *WAYS[name], attended))
        result["rows"].append({"way": name, "tokens": length, **found})
        print(result["rows"][-1], flush=True)
        if args.out is not None:
            output.write(args.out, result, report(result))
            args.out.with_suffix(".svg").write_text(chart(result))
    print(report(result))
    return 0


def line_of(rows: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Bytes for each token between the shortest and the longest, and by how much of its peak the
    length that is farthest from that line is off it."""
    first, last = rows[0], rows[-1]
    each = (last["peak_bytes"] - first["peak_bytes"]) / max(1, last["tokens"] - first["tokens"])
    off = (
        row["peak_bytes"] - first["peak_bytes"] - each * (row["tokens"] - first["tokens"])
        for row in rows
    )
    return each, max(abs(o) / row["peak_bytes"] for o, row in zip(off, rows, strict=True))


def chart(result: dict[str, Any]) -> str:
    """Peaks against the length: what is linear in the length is a straight line."""
    colours = svg.colour_of(list(WAYS))
    longest = max(row["tokens"] for row in result["rows"])
    drawn = []
    for name, own in of_ways(result).items():
        points = [(float(row["tokens"]), row["peak_bytes"] / 1e6) for row in own]
        labels = [f"{name}, {x:,.0f} tokens: {y:,.0f} MB" for x, y in points]
        drawn.append(svg.Line(name, points, colours[name], labels=labels))
    return svg.lines(
        "Peak memory of a training step of SmolLM2-135M, bfloat16, LoRA",
        drawn,
        x_label="tokens of the one sequence",
        y_label="MB of tensors",
        even=True,
        x_text=lambda x: f"{x:,.0f}",
        y_text=lambda y: f"{y:,.0f}",
        x_values=[quarter * longest / 4 for quarter in range(5)],
    )


def of_ways(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The rows without attention of each way."""
    rows = [row for row in result["rows"] if not row["attended"]]
    return {name: own for name in WAYS if (own := [r for r in rows if r["way"] == name])}


def report(result: dict[str, Any]) -> str:
    cells = [
        [
            row["way"],
            f"{row['tokens']:,}",
            f"{row['peak_bytes'] / 1e6:,.0f}",
            f"{row['resident_bytes'] / 1e6:,.0f}",
            f"{row['seconds']:,.0f}",
            "left out" if row["loss"] is None else f"loss {row['loss']:.4f}",
        ]
        for row in result["rows"]
    ]
    columns = ["checkpointing", "tokens", "tensors MB", "resident MB", "seconds", "attention"]
    found = []
    for name, own in of_ways(result).items():
        each, off = line_of(own)
        found.append(
            f"{name}: {each / 1e3:.1f} kB a token, from {own[0]['tokens']:,} to "
            f"{own[-1]['tokens']:,}; no length is further than {off:.1%} off that line."
        )
    title = "Peak of a training step of SmolLM2-135M against the length of its one sequence"
    table = output.table(columns, cells)
    return "\n\n".join([title, table, *found, output.header(result["context"])])


if __name__ == "__main__":
    sys.exit(main())
