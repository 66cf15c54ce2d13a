"""What this machine does at most: bytes a copy moves, operations a matrix product makes.

    python -m benchmarks.common.ceilings --append ceilings.jsonl

A copy's bytes are those read and those written. Operands are random: a product of zeros draws less
power and runs at a higher clock.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import measure, output
from benchmarks.common.journal import Journal, started

COPIES = {"cuda": (64 * 2**20, 2**30, 8 * 2**30), "cpu": (2**20, 2**28)}
PRODUCTS = {"cuda": ((8192, 4096, 4096), (8192, 8192, 8192)), "cpu": ((1024, 1024, 1024),)}
# Nothing of ours is trained in float16 on a CPU, where its products take seconds.
DTYPES = {
    "cuda": (torch.bfloat16, torch.float16, torch.float32),
    "cpu": (torch.bfloat16, torch.float32),
}


def ceilings(device: torch.device) -> list[tuple[dict[str, Any], measure.Thunk, int]]:
    """Each ceiling's name, what is timed, and bytes or floating-point operations of one call."""
    found: list[tuple[dict[str, Any], measure.Thunk, int]] = [
        ({"ceiling": "copy", "bytes": count}, measure.copy_run(count, device), count)
        for count in COPIES[device.type]
    ]
    for m, n, k in PRODUCTS[device.type]:
        for dtype in DTYPES[device.type]:
            matmul = measure.Matmul(m, n, k)
            name = str(dtype).removeprefix("torch.")
            item = {"ceiling": "product", "m": m, "n": n, "k": k, "dtype": name}
            found.append((item, measure.matmul_run([matmul], dtype, device), matmul.flops))
    return found


def measured(device: torch.device, samples: int = 10) -> list[dict[str, Any]]:
    """A row for each ceiling: {"item": its name, "seconds": of one call, "rate": of its median}."""
    rows = []
    for item, run, amount in ceilings(device):
        timing = measure.time_alternating({"": run}, device, samples=samples)[""]
        rows.append({"item": item, "seconds": asdict(timing), "rate": amount / timing.median})
    return rows


def limits(rows: Sequence[dict[str, Any]]) -> tuple[float, dict[str, float]]:
    """Of `measured`: bytes a second of the largest copy, operations a second by dtype's name."""
    copies = [row for row in rows if row["item"]["ceiling"] == "copy"]
    products: dict[str, float] = {}
    for row in rows:
        if row["item"]["ceiling"] == "product":
            name = row["item"]["dtype"]
            products[name] = max(products.get(name, 0.0), row["rate"])
    return max(copies, key=lambda row: row["item"]["bytes"])["rate"], products


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--minutes", type=float, help="accepted as by every stage; this takes 10 s")
    parser.add_argument("--append", type=Path, metavar="FILE", help="a JSON object a line")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    log, done = Journal(args.append), started(args.append)
    log.add("context", **output.context())
    lines = []
    for item, run, amount in ceilings(device):
        if item in done:
            continue
        log.add("start", item=item)
        timing = measure.time_alternating({"": run}, device, samples=args.samples)[""]
        rate = amount / timing.median
        log.add("row", item=item, seconds=timing.median, fastest=timing.fastest, rate=rate)
        lines.append([" ".join(map(str, item.values())), f"{rate / 1e12:.3f}"])
        log.add("end", item=item)
    print(output.table(("ceiling", "TB/s or TFLOP/s"), lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
