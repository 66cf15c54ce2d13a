import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_engine import ops

HYPER = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.98, "eps": 1e-8, "weight_decay": 0.1}


def steps_of_torch(params: torch.Tensor, grads: list[torch.Tensor]) -> torch.Tensor:
    leaf = params.clone().requires_grad_()
    optimizer = torch.optim.AdamW(
        [leaf], lr=HYPER["lr"], betas=(0.9, 0.98), eps=1e-8, weight_decay=0.1, foreach=False
    )
    for grad in grads:
        leaf.grad = grad.clone()
        optimizer.step()
    return leaf.detach()


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@settings(max_examples=15, deadline=None)
@given(count=st.integers(0, 300), seed=st.integers(0, 99))
def test_equals_torch(impl: str, dtype: torch.dtype, count: int, seed: int) -> None:
    torch.manual_seed(seed)
    params = torch.randn(count, dtype=dtype)
    grads = [torch.randn(count, dtype=dtype) * 10.0**e for e in (0, -3, 2)]
    expected = steps_of_torch(params, grads)
    exp_avg, exp_avg_sq = torch.zeros_like(params), torch.zeros_like(params)
    for step, grad in enumerate(grads, 1):
        ops.adamw_(params, grad, exp_avg, exp_avg_sq, step=step, impl=impl, **HYPER)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    assert torch.allclose(params, expected, rtol=tolerance, atol=tolerance)


def test_grad_scale_scales_the_gradient(isa: str) -> None:
    results = []
    for grad, scale in ((torch.full((9,), 4.0), 0.25), (torch.ones(9), 1.0)):
        params, m, v = torch.ones(9), torch.zeros(9), torch.zeros(9)
        ops.adamw_(params, grad, m, v, step=1, grad_scale=scale, **HYPER)
        results.append(torch.stack((params, m, v)))
    assert torch.equal(*results)


def test_errors() -> None:
    flat = [torch.zeros(4) for _ in range(4)]
    with pytest.raises(ValueError, match=r"grads \[3\] float32 does not fit params \[4\]"):
        ops.adamw_(flat[0], torch.zeros(3), flat[2], flat[3], step=1, **HYPER)
    with pytest.raises(ValueError, match="step 0 must count from 1"):
        ops.adamw_(*flat, step=0, **HYPER)
    with pytest.raises(ValueError, match="expected float32"):
        ops.adamw_(*(x.bfloat16() for x in flat), step=1, **HYPER)
    with pytest.raises(ValueError, match="exp_avg is not contiguous"):
        ops.adamw_(flat[0], flat[1], torch.zeros(8)[::2], flat[3], step=1, **HYPER)
