"""A warp-specialised kernel of CUDA C++: TMA, mbarriers, named barriers, wgmma, from both sides."""

from pathlib import Path

import ptx
import pytest
import torch
from ptx.nvcc import compile_cuda

SOURCE = Path(__file__).with_name("hopper_product.cu")
SHARED = 2 * (128 + 64) * 64 * 2 + 1024
KERNELS = ("product_from_shared", "product_from_registers")


def product(text: str, entry: str, x: torch.Tensor, w: torch.Tensor, **options: object):
    """y = x w^T by the kernel."""
    y = torch.full((x.shape[0], w.shape[0]), float("nan"))
    maps = [
        ptx.TensorMap(x, (64, 128), 128),
        ptx.TensorMap(w, (64, 64), 128),
        ptx.TensorMap(y, (64, 64)),
    ]
    grid = -(-x.shape[0] // 128), -(-w.shape[0] // 64)
    kernel = ptx.Kernel(text, entry)
    kernel.launch(grid, 288, [*maps, x.shape[1]], shared=SHARED, **options)
    return y


@pytest.mark.parametrize("completion", ["late", "early", "random"])
@pytest.mark.parametrize("entry", KERNELS)
def test_ragged_product(entry: str, completion: str) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(200, 328).bfloat16(), torch.randn(72, 328).bfloat16()
    y = product(compile_cuda(SOURCE, "90a"), entry, x, w, completion=completion, seed=3)
    exact = x.double() @ w.double().T
    assert (y - exact).abs().max() < 1e-4
