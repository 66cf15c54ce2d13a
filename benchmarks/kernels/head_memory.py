"""Peak memory of linear_cross_entropy, forward and backward, beside a head of any size.

    python -m benchmarks.kernels.head_memory --rows 64 --hidden 8192 --vocab 262144 --chunk-rows 16

Beside its inputs it may take one chunk of logits, what the vendor's products need for a chunk, and
what grows with the rows alone: the gradient of the hidden rows, which is half precision or float32,
and results of a few numbers each. The exit status is 1 if it takes more, or if the loss is not that
of float32 logits.

What a product needs depends on the processor. Without bfloat16 instructions oneDNN (3.12) adds up a
chunk of logits in float32, and has it freed and allocated anew for each chunk. With AMX it packs a
head of at most 32 columns whole, once a thread: such a head is nothing to measure, and the least
for --hidden is 64. A wider head is packed in pieces that fit a core's second-level cache.
"""

import argparse
import sys
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.common import measure, output
from lora_engine import ops

SLACK = 8 * 2**20  # what an allocator and threads may take, whatever the sizes
BYTES_PER_ROW = 64  # loss, log-probability, log-sum-exp, target's copy and their like
VOCAB_STEP = 4096
NARROWEST = 64


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=8192)
    parser.add_argument("--vocab", type=int, default=262144)
    parser.add_argument("--chunk-rows", type=int, default=16)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    if args.hidden < NARROWEST:
        parser.error(f"--hidden {args.hidden}: less than {NARROWEST}")
    return args


def limit_bytes(args: argparse.Namespace) -> int:
    """What it may take beyond its inputs."""
    itemsize = getattr(torch, args.dtype).itemsize
    chunk = args.chunk_rows * args.vocab * (itemsize + 2 * 4)  # and sums in float32, twice
    rows = args.rows * (2 * args.hidden * itemsize + BYTES_PER_ROW)  # d_hidden, and it scaled
    return chunk + rows + SLACK


def random_head(args: argparse.Namespace) -> Tensor:
    """A weight [V, H], made a few rows at a time: it may fill half of the memory."""
    dtype, device = getattr(torch, args.dtype), args.device
    weight = torch.empty(args.vocab, args.hidden, dtype=dtype, device=device)
    for part in weight.split(VOCAB_STEP):
        part.copy_(torch.randn(part.shape, device=device).mul_(args.hidden**-0.5))
    return weight


def expected_loss(hidden: Tensor, weight: Tensor, target: Tensor) -> float:
    """The mean in float32, from the classes' logits a few at a time."""
    rows = hidden.float()
    parts = [torch.logsumexp(rows @ part.float().t(), dim=1) for part in weight.split(VOCAB_STEP)]
    chosen = (rows * weight[target].float()).sum(dim=1)
    return float((torch.logsumexp(torch.stack(parts), dim=0) - chosen).mean())


def main() -> None:
    args = parse_arguments()
    context = output.context()
    torch.manual_seed(0)
    device = torch.device(args.device)
    weight = random_head(args)
    hidden = torch.randn(args.rows, args.hidden, device=device).to(weight.dtype)
    hidden.requires_grad_()
    target = torch.randint(args.vocab, (args.rows,), device=device)

    def step() -> float:
        result = ops.linear_cross_entropy(hidden, weight, target, chunk_rows=args.chunk_rows)
        torch.autograd.grad(result.loss, hidden)
        return float(result.loss.detach())

    start = time.perf_counter()
    loss = step()
    seconds = time.perf_counter() - start
    extra, limit = measure.extra_memory(step, device), limit_bytes(args)
    wanted = expected_loss(hidden.detach(), weight, target)
    logits = args.rows * args.vocab * weight.element_size()
    print(output.header(context))
    print(f"head {weight.nbytes / 2**20:.0f} MiB, logits of all rows {logits / 2**20:.0f} MiB")
    print(f"loss {loss:.5f}, of float32 logits {wanted:.5f}; first call {seconds:.1f} s")
    print(f"extra memory {extra / 2**20:.1f} MiB, limit {limit / 2**20:.1f} MiB")
    if extra > limit:
        sys.exit("it takes more memory than the limit")
    if abs(loss - wanted) > 1e-2 * abs(wanted):
        sys.exit("the loss is not that of float32 logits")


if __name__ == "__main__":
    main()
