"""cuDNN's attention behind the contract of our kernels, with PyTorch's operators emulated."""

import pytest
import torch
from torch import Tensor

from lora_engine import reference
from lora_engine.backends import launchers
from lora_engine.testing import cu_seqlens

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="rotation is interpreted")

SEQUENCES, LENGTH, HEADS, KV_HEADS, DIM, SCALE = 3, 6, 4, 2, 16, 0.2
BOUNDS = cu_seqlens([LENGTH] * SEQUENCES)


def tokens_of(x: Tensor) -> Tensor:
    """[tokens, heads, dim] of what cuDNN is given."""
    assert (x.shape[0], x.shape[2]) == (SEQUENCES, LENGTH)
    return x.transpose(1, 2).flatten(0, 1)


def batch_of(x: Tensor) -> Tensor:
    return x.unflatten(0, (SEQUENCES, LENGTH)).transpose(1, 2)


def sums_of(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    """log sum exp of each query's scores, [tokens, heads, 1]."""
    qs, ks = (x.unflatten(0, (SEQUENCES, LENGTH)) for x in (q, k))
    scores = scale * torch.einsum("sqhd,skhd->shqk", qs, ks.repeat_interleave(HEADS // KV_HEADS, 2))
    if causal:
        hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores.logsumexp(-1).transpose(1, 2).flatten(0, 1)[:, :, None]


def forward(q, k, v, bias, sums, p, causal, debug, *, scale):
    assert (bias, sums, p, debug) == (None, True, 0.0, False)
    q, k, v = map(tokens_of, (q, k, v))
    out = reference.attention(q, k, v, BOUNDS, causal=causal, softmax_scale=scale)
    return batch_of(out), batch_of(sums_of(q, k, causal, scale)), None, None


def backward(d_o, q, k, v, o, sums, seed, offset, bias, bounds_q, bounds_k, most_q, most_k, p,
             causal, *, scale):  # fmt: skip
    assert (bias, bounds_q, bounds_k, most_q, most_k, p) == (None, None, None, LENGTH, LENGTH, 0.0)
    d_o, q, k, v, o, sums = map(tokens_of, (d_o, q, k, v, o, sums))
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = reference.attention(*leaves, BOUNDS, causal=causal, softmax_scale=scale)
    assert torch.allclose(out, o)
    assert torch.allclose(sums, sums_of(q, k, causal, scale))
    return tuple(map(batch_of, torch.autograd.grad(out, leaves, d_o)))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rotated", [True, False], ids=["rotated", "plain"])
def test_is_that_of_the_reference(
    monkeypatch: pytest.MonkeyPatch, causal: bool, rotated: bool
) -> None:
    name = "_scaled_dot_product_cudnn_attention"
    monkeypatch.setattr(torch.ops.aten, name, forward)
    monkeypatch.setattr(torch.ops.aten, f"{name}_backward", backward)
    torch.manual_seed(0)
    tokens, widths = SEQUENCES * LENGTH, [HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM]
    q, k, v = torch.randn(tokens, sum(widths) + 8)[:, :-8].split(widths, 1)
    cos = sin = None
    if rotated:
        angle = torch.rand(tokens, DIM // 2).repeat(1, 2)
        cos, sin = angle.cos(), angle.sin()
    d_o, o = torch.randn(tokens, widths[0]), torch.empty(tokens, widths[0] + 8)[:, :-8]
    lse = torch.empty(HEADS, tokens)
    grads = torch.empty(tokens, sum(widths)).split(widths, 1)
    options = {"head_dim": DIM, "scale": SCALE, "causal": causal, "window": 0}
    kernels = launchers.attention_by_plan("cudnn")
    kernels.attention_fwd(q, k, v, BOUNDS, cos, sin, o, lse, **options)
    kernels.attention_bwd(d_o, q, k, v, BOUNDS, cos, sin, o, lse, *grads, **options)
    leaves = [x.unflatten(1, (-1, DIM)).detach().requires_grad_() for x in (q, k, v)]
    expected = reference.attention(
        *leaves, BOUNDS, cos=cos, sin=sin, causal=causal, softmax_scale=SCALE
    )
    assert torch.allclose(o, expected.flatten(1), atol=1e-5)
    wanted = torch.autograd.grad(expected, leaves, d_o.unflatten(1, (-1, DIM)))
    for found, grad in zip(grads, wanted, strict=True):
        assert torch.allclose(found, grad.flatten(1), atol=1e-5)


@pytest.mark.parametrize("rotated", [True, False], ids=["rotated", "plain"])
def test_plans_that_pytorch_keeps_fit_every_call(
    monkeypatch: pytest.MonkeyPatch, rotated: bool
) -> None:
    """PyTorch finds a plan by the strides of q, k and v, whatever those of o and its gradient."""
    plans: dict[object, object] = {}

    def keep(d_o, q, k, v, o, *rest, **options):
        strides = tuple(x.stride() for x in (d_o, o))
        assert plans.setdefault(tuple(x.stride() for x in (q, k, v)), strides) == strides
        return tuple(torch.empty_like(x) for x in (q, k, v))

    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention_backward", keep)
    tokens, width, kv_width = SEQUENCES * LENGTH, HEADS * DIM, KV_HEADS * DIM
    q, k, v = (torch.randn(tokens, n) for n in (width, kv_width, kv_width))
    tables = [torch.rand(tokens, DIM) if rotated else None] * 2
    for o_padding, d_o_padding in ((0, 0), (8, 0), (16, 0), (16, 8)):
        o = torch.randn(tokens, width + o_padding)[:, :width]
        d_o = torch.randn(tokens, width + d_o_padding)[:, :width]
        grads = [torch.empty_like(x) for x in (q, k, v)]
        launchers.attention_by_plan("cudnn").attention_bwd(
            d_o, q, k, v, BOUNDS, *tables, o, torch.randn(HEADS, tokens), *grads,
            head_dim=DIM, scale=SCALE, causal=True, window=0,
        )  # fmt: skip
    assert len(plans) == (3 if rotated else 1)


def test_what_it_does_not_know_is_refused() -> None:
    x, options = torch.randn(4, DIM), {"head_dim": DIM, "scale": 1.0, "causal": True, "window": 3}
    with pytest.raises(ValueError, match="no window and no parents"):
        launchers.attention_by_plan("cudnn").attention_fwd(
            x, x, x, cu_seqlens([4]), None, None, x, torch.empty(1, 4), **options
        )
