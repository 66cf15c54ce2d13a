"""Results so large that the CPU kernels store them past the caches: simd/nontemporal.hpp."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lora_engine import ops
from lora_engine.backends.cpu import rms_norm

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


def test_heads_that_begin_inside_a_line_are_stored_as_ever(isa: str) -> None:
    heads, cols, tokens = 16, 102, 10288  # a token's rows are whole lines, one head's are not
    x = torch.randn(1, heads, cols).bfloat16().repeat(tokens, 1, 1)
    weight, y, dx = torch.randn(cols).bfloat16(), torch.empty_like(x), torch.empty_like(x)
    rstd = torch.empty(tokens * heads)
    assert y.numel() * y.element_size() >= 32 << 20 and 2 * heads * cols % 64 == 0
    rms_norm.rms_norm_fwd(x, None, weight, y, None, rstd, 1e-5, 0.0)
    rms_norm.rms_norm_bwd(x, None, x, weight, rstd, dx, None, 0.0)
    expected = torch.nn.functional.rms_norm(x[0], [cols], weight, 1e-5)
    assert torch.allclose(y[0].float(), expected.float(), rtol=2e-2, atol=1e-2)
    assert torch.equal(y, y[:1].expand_as(y)) and torch.equal(dx, dx[:1].expand_as(dx))
