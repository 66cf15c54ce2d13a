import pytest
import torch
from oracle import check

from lora_engine import ops, reference


def tables(tokens: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.rand(tokens, dim // 2, generator=torch.Generator().manual_seed(3)) * 6
    return torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 2), (5, 3, 64), (63, 9, 80), (0, 2, 4)], ids=str)
def test_matches_oracle(isa: str, poisoned: None, dtype: torch.dtype, shape: tuple) -> None:
    torch.manual_seed(0)
    cos, sin = tables(shape[0], shape[2])
    check(
        lambda x: ops.rope(x, cos, sin),
        lambda x: (
            reference.rope(x, cos.to(x.dtype).double(), sin.to(x.dtype).double())
            if x.dtype == torch.float64
            else reference.rope(x, cos, sin)
        ),
        [torch.randn(shape).to(dtype)],
    )


def test_halves_may_have_different_angles(isa: str) -> None:
    cos, sin = torch.rand(4, 8), torch.rand(4, 8)
    check(
        lambda x: ops.rope(x, cos, sin),
        lambda x: reference.rope(x, cos, sin),
        [torch.rand(4, 2, 8)],
    )


def test_reads_a_slice_of_packed_heads(isa: str) -> None:
    qkv = torch.randn(6, 5 * 16)
    cos, sin = tables(6, 16)
    k = qkv[:, 32:64].view(6, 2, 16)
    assert torch.allclose(ops.rope(k, cos, sin), reference.rope(k, cos, sin), atol=1e-6)


def test_agrees_with_transformers() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    cos, sin = tables(7, 16)
    q = torch.randn(7, 4, 16)
    expected, _ = apply_rotary_pos_emb(
        q.transpose(0, 1)[None], q.transpose(0, 1)[None], cos[None], sin[None]
    )
    assert torch.allclose(ops.rope(q, cos, sin), expected[0].transpose(0, 1), atol=1e-6)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_gradcheck(impl: str) -> None:
    cos, sin = torch.rand(3, 4).double(), torch.rand(3, 4).double()
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.rope(x, cos, sin, impl=impl), (x,))


def test_errors_name_the_shapes() -> None:
    with pytest.raises(ValueError, match=r"cos \[4, 8\] float32 does not fit x \[3, 2, 8\]"):
        ops.rope(torch.randn(3, 2, 8), torch.ones(4, 8), torch.ones(4, 8))
    with pytest.raises(ValueError, match="even D"):
        ops.rope(torch.randn(3, 2, 7), torch.ones(3, 7), torch.ones(3, 7))
