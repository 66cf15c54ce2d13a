"""Results so large that the CPU kernels store them past the caches (csrc/cpu/stream.hpp)."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lora_engine import ops

COLS = 4096
ROWS = 4096  # 32 MiB of bfloat16: as much as it takes
PERIOD = 16

OPERATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "rms_norm": lambda x, other, weight: ops.rms_norm(x, weight, 1e-5, residual=other)[0],
    "layer_norm": lambda x, other, weight: ops.layer_norm(x, weight, weight, 1e-5),
    "glu": lambda x, other, weight: ops.glu(x, other),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_rows_are_those_of_a_small_call(isa: str, name: str) -> None:
    torch.manual_seed(0)
    small = [torch.randn(PERIOD, COLS).bfloat16() for _ in range(3)]
    weight = torch.randn(COLS).bfloat16()
    large = [x.repeat(ROWS // PERIOD, 1) for x in small]
    results = []
    for x, other, dy in (small, large):
        x.requires_grad_()
        y = OPERATIONS[name](x, other, weight)
        results.append((y, *torch.autograd.grad(y, x, dy)))
    for once, often in zip(*results, strict=True):
        assert torch.equal(often.view(-1, PERIOD, COLS), once.expand(ROWS // PERIOD, -1, -1))
