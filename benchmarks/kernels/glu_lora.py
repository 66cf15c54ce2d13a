"""A gated activation between adapted linears: one pass against the operations one by one, on a GPU.

    python -m benchmarks.kernels.glu_lora

Bytes are those that each way cannot do without: operands and results, S and the factors; partial
sums are left out. Results of both ways are compared before anything is timed.
"""

import argparse
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from benchmarks.common import measure, output
from benchmarks.gpu.tune_cases import empty, moved, normal
from lora_engine.backends import launchers
from lora_engine.backends.lora_parts import AdapterPart, DyGradients, XGradient
from lora_engine.testing import error

# (hidden size, intermediate size)
MODELS = {"llama-3.1-8b": (4096, 14336), "llama-3.2-1b": (2048, 8192)}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


class Mlp:
    """The tensors of an MLP around its activation, as a decoder layer lays them out."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, tokens: int, model: str, rank: int
    ) -> None:
        hidden, cols = MODELS[model]
        self.activation = "silu"
        both = normal(device, dtype, tokens, 2 * cols).split(cols, dim=1)
        self.gate, self.up = both
        self.dh = normal(device, dtype, tokens, cols)
        self.hs = empty(device, dtype, tokens, cols + rank)
        self.h, self.s = self.hs.split((cols, rank), dim=1)
        self.dys = empty(device, dtype, tokens, 2 * cols + 2 * rank)
        self.dgate, self.dup, ds = self.dys.split((cols, cols, 2 * rank), dim=1)
        self.lora_a = normal(device, dtype, rank, cols, padding=rank)
        columns = [slice(0, rank), slice(rank, 2 * rank)]
        spans = list(zip((slice(0, cols), slice(cols, 2 * cols)), columns, strict=True))
        self.outer_spans = [(slice(0, hidden), slice(0, rank))]
        self.inner = DyGradients(
            normal(device, dtype, 2 * cols, 2 * rank, padding=hidden),
            normal(device, dtype, tokens, 2 * rank),
            ds,
            empty(device, torch.float32, 2 * cols * rank),
            spans,
            [AdapterPart(*span, 2.0) for span in spans],
        )
        outer_ds = normal(device, dtype, tokens, rank, padding=hidden)
        self.outer = XGradient(outer_ds, empty(device, torch.float32, rank, cols), self.outer_spans)

    def forward_results(self) -> tuple[Tensor, ...]:
        return self.h, self.s

    def backward_results(self) -> tuple[Tensor, ...]:
        d_b = self.inner.d_lora_b
        assert d_b is not None
        return self.dgate, self.dup, self.inner.ds, d_b, self.outer.d_lora_a

    def forward_apart(self) -> None:
        launchers.glu("triton").glu_fwd(self.gate, self.up, self.h, activation=self.activation)
        lora = launchers.lora_linear("triton")
        lora.lora_a_fwd(self.h, self.lora_a, self.s, self.outer_spans)

    def forward_together(self) -> None:
        launchers.glu_lora("triton").glu_lora_fwd(
            self.gate,
            self.up,
            self.h,
            self.lora_a,
            self.s,
            self.outer_spans,
            activation=self.activation,
        )

    def backward_apart(self) -> None:
        launchers.glu("triton").glu_bwd(
            self.dh, self.gate, self.up, self.dgate, self.dup, self.h, activation=self.activation
        )
        lora = launchers.lora_linear("triton")
        lora.lora_a_bwd(self.outer.ds, self.h, self.outer.d_lora_a, self.outer_spans)
        lora.lora_b_bwd(self.dys[:, : 2 * self.dh.shape[1]], *self.inner)

    def backward_together(self) -> None:
        launchers.glu_lora("triton").glu_lora_bwd(
            self.dh,
            self.gate,
            self.up,
            self.dgate,
            self.dup,
            self.inner,
            self.outer,
            activation=self.activation,
        )

    def bytes(self, *, backward: bool, together: bool) -> int:
        operands = moved(self.gate, self.up)
        if not backward:
            return operands + (1 if together else 2) * moved(self.h) + moved(self.s, self.lora_a)
        results = moved(self.dgate, self.dup)
        inner = moved(self.inner.lora_b, self.inner.s, self.inner.ds)
        thin = inner + moved(self.outer.ds, self.outer.d_lora_a)
        again = 0 if together else results + 2 * moved(self.h)
        return operands + moved(self.dh) + results + thin + again


Ways = dict[str, tuple[Callable[[], None], int]]


def compare(mlp: Mlp, backward: bool) -> Ways:
    """Both ways and their bytes. AssertionError where results differ by more than rounding."""
    results = mlp.backward_results if backward else mlp.forward_results
    apart = mlp.backward_apart if backward else mlp.forward_apart
    together = mlp.backward_together if backward else mlp.forward_together
    apart()
    expected = [x.clone() for x in results()]
    for x in results():
        x.fill_(float("nan"))
    together()
    for i, (found, wanted) in enumerate(zip(results(), expected, strict=True)):
        assert error(found, wanted) < TOLERANCE[mlp.dh.dtype], f"result {i} differs"
    return {
        "one by one": (apart, mlp.bytes(backward=backward, together=False)),
        "one pass": (together, mlp.bytes(backward=backward, together=True)),
    }


def rows(models: Iterable[str], tokens: Sequence[int], rank: int, samples: int) -> list[list[str]]:
    """What is printed, a line for each way."""
    device, lines = torch.device("cuda"), []
    for model in models:
        for count in tokens:
            mlp = Mlp(device, torch.bfloat16, count, model, rank)
            for backward in (False, True):
                ways = compare(mlp, backward)
                runs = {name: run for name, (run, _) in ways.items()}
                timings = measure.time_alternating(runs, device, samples=samples)
                base = timings["one by one"].median
                for name, (_, moved_bytes) in ways.items():
                    seconds = timings[name].median
                    lines.append(
                        [
                            model,
                            str(count),
                            "backward" if backward else "forward",
                            name,
                            f"{seconds * 1e6:.0f}",
                            f"{moved_bytes / seconds / 1e9:.0f}",
                            f"{base / seconds:.2f}",
                        ]
                    )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", choices=sorted(MODELS), default=list(MODELS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[8192])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--samples", type=int, default=5)
    args = parser.parse_args()
    columns = ("model", "M", "pass", "way", "µs", "GB/s", "times as fast")
    print(output.table(columns, rows(args.model, args.tokens, args.rank, args.samples), left=4))


if __name__ == "__main__":
    main()
