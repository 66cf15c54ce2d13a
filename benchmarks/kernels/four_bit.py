"""Quantising and dequantising a weight in 4 bits, beside bitsandbytes and beside a plain copy.

    python -m benchmarks.kernels.four_bit --rows 4096 --cols 4096 --out benchmarks/results/four_bit

Each is compared with bitsandbytes' bits before it is timed, turn by turn with the others. Shares
count the bytes that have to be moved, codes and scales included, at the rate of a copy that moves
as many. This process keeps freed memory (glibc's mallopt), as training does: otherwise every
result is a new one, and faulting in its pages takes longer than anything that is measured.
"""

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.common import measure, output
from lora_engine import backends, quantize_weight
from lora_engine.quantization.blockwise_4bit import BLOCKS


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--cols", type=int, default=4096)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--format", choices=("nf4", "fp4"), default="nf4")
    parser.add_argument("--block", type=int, choices=BLOCKS, default=64)
    parser.add_argument("--double-quant", action="store_true")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    args = parser.parse_args(argv)
    if args.cols % args.block:
        parser.error(f"--cols {args.cols}: bitsandbytes needs whole blocks of {args.block} a row")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from bitsandbytes import functional as bitsandbytes
    context, device = output.context(), torch.device("cpu")
    backends.keep_freed_memory(device)
    torch.manual_seed(0)
    weight = torch.randn(args.rows, args.cols).to(getattr(torch, args.dtype))
    options = {"block": args.block, "double_quant": args.double_quant}

    def theirs() -> tuple[torch.Tensor, object]:
        return bitsandbytes.quantize_4bit(
            weight,
            blocksize=args.block,
            quant_type=args.format,
            compress_statistics=args.double_quant,
        )

    packed, (codes, state) = quantize_weight(weight, args.format, **options), theirs()
    out = torch.empty_like(weight)
    if not torch.equal(packed.tensors["codes"], codes.view(-1)):
        raise SystemExit("the codes are not those of bitsandbytes")
    if not torch.equal(packed.dequantize(), bitsandbytes.dequantize_4bit(codes, state)):
        raise SystemExit("the values are not those of bitsandbytes")
    moved = weight.nbytes + packed.nbytes
    runs = {
        "copy": measure.copy_run(moved, device),
        "dequantise": lambda: packed.rows(0, args.rows, out=out),
        "dequantise, bitsandbytes": lambda: bitsandbytes.dequantize_4bit(codes, state),
        "quantise": lambda: quantize_weight(weight, args.format, **options),
        "quantise, bitsandbytes": theirs,
    }
    timings = measure.time_alternating(runs, device, samples=args.rounds)
    medians = {name: timing.median for name, timing in timings.items()}
    rows = []
    for name, timing in timings.items():
        share = medians["copy"] / timing.median
        other = medians.get(f"{name}, bitsandbytes")
        times = "" if other is None else f"{other / timing.median:.1f}"
        spread = f"{timing.fastest * 1e3:.2f} to {timing.slowest * 1e3:.2f}"
        rows.append([name, f"{timing.median * 1e3:.2f}", spread, f"{share:.0%}", times])
    what = f"{args.format}, {args.rows} x {args.cols} {args.dtype}, blocks of {args.block}"
    what += ", double quantisation" if args.double_quant else ""
    titles = ["", "ms", "fastest to slowest", "of the copy's rate", "times bitsandbytes"]
    text = f"{output.header(context)}\n\n{what}\n\n{output.table(titles, rows)}"
    print(text)
    if args.out is not None:
        output.write(args.out, {**context, "what": what, "seconds": medians}, text)


if __name__ == "__main__":
    main()
