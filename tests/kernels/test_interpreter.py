"""bfloat16 in Triton's interpreter, as tests/support/triton_interpreter.py mends it."""

import pytest
import torch
from torch import Tensor

from lora_engine import backends

if not backends.triton_interpreted():
    pytest.skip("Triton's interpreter is not in use", allow_module_level=True)

import triton
import triton.language as tl


@triton.jit
def _product_kernel(x_ptr, y_ptr, z_ptr, stride_ym, stride_yn, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs[:, None] * BLOCK + offs[None, :])
    y = tl.load(y_ptr + offs[:, None] * stride_ym + offs[None, :] * stride_yn)
    tl.store(z_ptr + offs[:, None] * BLOCK + offs[None, :], tl.dot(x, y))


@triton.jit
def _cast_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs).to(tl.bfloat16))


@triton.jit
def _chained_kernel(x_ptr, y_ptr, z_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    offs = offs[:, None] * BLOCK + offs[None, :]
    x, y = tl.load(x_ptr + offs), tl.load(y_ptr + offs)
    scores = tl.exp(tl.dot(x, tl.trans(y)) * 0.1).to(tl.bfloat16)
    tl.store(z_ptr + offs, tl.dot(scores, y, tl.zeros((BLOCK, BLOCK), tl.float32)))


def matrices(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(32, 32, generator=generator).to(dtype) for _ in range(2)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
def test_dot_is_the_product_of_the_values(dtype: torch.dtype, transposed: bool) -> None:
    x, y = matrices(dtype)
    z = torch.empty(32, 32)
    _product_kernel[(1,)](x, y, z, *(reversed(y.stride()) if transposed else y.stride()), BLOCK=32)
    exact = x.double() @ (y.T if transposed else y).double()
    assert (z.double() - exact).abs().max() < 1e-5


def test_dot_keeps_special_values() -> None:
    x, y = torch.eye(16, dtype=torch.bfloat16), torch.ones(16, 16, dtype=torch.bfloat16)
    y[0, 0], y[1, 1], y[2, 2] = 2.0**-130, float("nan"), -0.0
    z = torch.empty(16, 16)
    _product_kernel[(1,)](x, y, z, *y.stride(), BLOCK=16)
    assert z[:, 1].isnan().all() and z[0, 0] == 2.0**-130 and z[2, 2] == 0.0
    assert torch.equal(z[3:, 2:], torch.ones(13, 14))


def test_cast_rounds_as_torch_does() -> None:
    x = torch.randn(2048, generator=torch.Generator().manual_seed(0))
    x[:2] = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8])
    x[2:8] = torch.tensor([float("inf"), -float("inf"), float("nan"), 1e-40, -0.0, 3.4e38])
    y = torch.empty(2048, dtype=torch.bfloat16)
    _cast_kernel[(1,)](x, y, BLOCK=2048)
    assert torch.equal(y.float().nan_to_num(7.0), x.bfloat16().float().nan_to_num(7.0))
    assert y.isnan().nonzero().tolist() == [[4]]


def test_product_of_a_cast_result() -> None:
    x, y = matrices(torch.bfloat16)
    z = torch.empty(32, 32)
    _chained_kernel[(1,)](x, y, z, BLOCK=32)
    scores = ((x.float() @ y.float().T) * 0.1).exp().bfloat16().double()
    # A score may round the other way where the two sums differ in their last bit.
    assert (z.double() - scores @ y.double()).abs().max() < 2.0**-8 * scores.max()
