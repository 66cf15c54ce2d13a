"""Quantising and dequantising a weight in 4 bits, beside bitsandbytes and beside a plain copy.

    python -m benchmarks.kernels.four_bit --rows 4096 --cols 4096 --out benchmarks/results/four_bit
    python -m benchmarks.kernels.four_bit --device cuda --rows 14336 --double-quant

Each is compared with bitsandbytes' bits before it is timed, turn by turn with the others. Shares
count the bytes that have to be moved, codes and scales included, at the rate of a copy that moves
as many. This process keeps freed memory (glibc's mallopt), as training does: otherwise every
result is a new one, and faulting in its pages takes longer than anything that is measured.

On a GPU the level-2 cache is flushed before each call. Values are compared of bitsandbytes' own
codes, since its kernel for a GPU divides approximately; how many codes differ is printed. Without
bitsandbytes ours are timed alone. Quantising waits for the GPU once, to refuse what is not finite;
each implementation's kernel is timed alone as well.
"""

import argparse
import importlib.util
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import measure, output
from lora_engine import QuantizedWeight, backends, quantize_weight
from lora_engine.backends import launchers
from lora_engine.errors import UnavailableError
from lora_engine.quantization.blockwise_4bit import BLOCKS, ascending_codes, code_bounds


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--cols", type=int, default=4096)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
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
    context, device = output.context(), torch.device(args.device)
    backends.keep_freed_memory(device)
    torch.manual_seed(0)
    weight = torch.randn(args.rows, args.cols).to(device, getattr(torch, args.dtype))
    options = {"block": args.block, "double_quant": args.double_quant}
    packed = quantize_weight(weight, args.format, **options)
    out = torch.empty_like(weight)
    moved = weight.nbytes + packed.nbytes
    runs: dict[str, measure.Thunk] = {
        "copy": measure.copy_run(moved, device),
        "dequantise": lambda: packed.rows(0, args.rows, out=out),
        "quantise": lambda: quantize_weight(weight, args.format, **options),
    }
    if args.device == "cuda":
        runs |= kernel_runs(weight, packed, out)
    what = f"{args.format}, {args.rows} x {args.cols} {args.dtype}, blocks of {args.block}"
    what += ", double quantisation" if args.double_quant else ""
    if args.device == "cpu" or importlib.util.find_spec("bitsandbytes") is not None:
        theirs, note = bitsandbytes_runs(weight, packed)
        runs, what = {**runs, **theirs}, what + note
    timings = measure.time_alternating(runs, device, samples=args.rounds)
    medians = {name: timing.median for name, timing in timings.items()}
    rows = []
    for name, timing in timings.items():
        share = medians["copy"] / timing.median
        other = medians.get(f"{name}, bitsandbytes")
        times = "" if other is None else f"{other / timing.median:.1f}"
        spread = f"{timing.fastest * 1e3:.3f} to {timing.slowest * 1e3:.3f}"
        rate = f"{moved / timing.median / 1e9:.3g}"
        rows.append([name, f"{timing.median * 1e3:.3f}", spread, rate, f"{share:.0%}", times])
    titles = ["", "ms", "fastest to slowest", "GB/s", "of the copy's rate", "times bitsandbytes"]
    text = f"{output.header(context)}\n\n{what}\n\n{output.table(titles, rows)}"
    print(text)
    if args.out is not None:
        output.write(args.out, {**context, "what": what, "seconds": medians}, text)


def kernel_runs(
    weight: torch.Tensor, packed: QuantizedWeight, out: torch.Tensor
) -> dict[str, measure.Thunk]:
    """Every implementation's kernels: codes and absmax, without what is done to absmax after that.

    Raises SystemExit where their bits differ.
    """
    format, runs = packed.format, {}
    codes, absmax = (
        torch.empty(entry.shape, dtype=entry.dtype, device=weight.device)
        for entry in replace(format, nested=False).layout(packed.shape).values()
    )
    bounds = code_bounds(format.code, weight.device)
    ascending = ascending_codes(format.code, weight.device)
    for impl in ("cuda", "triton"):
        try:
            backends.select("blockwise_4bit", weight.device, weight.dtype, impl)
        except UnavailableError as error:
            print(error)
            continue
        launcher = launchers.blockwise_4bit(impl)
        quantise = partial(
            launcher.quantize_4bit, weight, bounds, ascending, codes, absmax, format.block
        )
        quantise()
        if not torch.equal(codes, packed.tensors["codes"]):
            raise SystemExit(f"{impl}: the codes are not the operation's")
        if not torch.equal(packed.dequantize(impl=impl), packed.dequantize()):
            raise SystemExit(f"{impl}: the values are not the operation's")
        runs[f"dequantise, {impl}"] = partial(packed.rows, 0, len(weight), out=out, impl=impl)
        runs[f"quantise, {impl} kernel"] = quantise
    return runs


def bitsandbytes_runs(
    weight: torch.Tensor, packed: QuantizedWeight
) -> tuple[dict[str, measure.Thunk], str]:
    """bitsandbytes' quantising and dequantising, and a note on how its codes differ.

    Raises SystemExit where bits differ that must not.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from bitsandbytes import functional
    format = packed.format

    def quantise() -> tuple[torch.Tensor, Any]:
        found: tuple[torch.Tensor, Any] = functional.quantize_4bit(
            weight,
            blocksize=format.block,
            quant_type=format.code,
            compress_statistics=format.nested,
        )
        return found

    codes, state = quantise()
    different = int((packed.tensors["codes"] != codes.view(-1)).sum())
    if different and weight.device.type == "cpu":
        raise SystemExit("the codes are not those of bitsandbytes")
    entries = {
        f"w.{name}" if name else "w": tensor
        for name, tensor in {"": codes, **state.as_dict(packed=True)}.items()
    }
    same = QuantizedWeight.from_state_dict(entries, "w")
    if not torch.equal(same.dequantize(), functional.dequantize_4bit(codes, state)):
        raise SystemExit("the values are not those of bitsandbytes")
    runs: dict[str, measure.Thunk] = {
        "dequantise, bitsandbytes": lambda: functional.dequantize_4bit(codes, state),
        "quantise, bitsandbytes": quantise,
    }
    note = f"; {different} of {codes.numel()} bytes of codes differ" if different else ""
    return runs, note


if __name__ == "__main__":
    main()
