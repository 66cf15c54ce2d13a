"""What kernels must not read though their arguments ask for it."""

import pytest
import torch

from lora_engine.backends import launchers


@pytest.mark.parametrize("capability", [80, 90])
def test_a_target_that_is_no_column_is_not_read(capability: int) -> None:
    """On a GPU nobody looks at targets before: such a row's loss is NaN, others' are right."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the Triton kernels are compiled for the GPU in this process")
    from triton_ptx import executed_ptx

    torch.manual_seed(0)
    logits = torch.randn(6, 1000)
    target = torch.tensor([999, 1000, -1, 2**40, -(2**62), 0])
    loss, logprob, grad = torch.empty(6), torch.empty(6), torch.empty(6, 1000)
    correct = torch.empty(6, dtype=torch.bool)
    with executed_ptx(capability):
        launchers.cross_entropy("triton").cross_entropy(
            logits, target, loss, logprob, correct, ignore_index=-100, grad=grad
        )
    right = [0, 5]
    exact = torch.nn.functional.cross_entropy(logits[right], target[right], reduction="none")
    assert torch.allclose(loss[right], exact, atol=1e-5)
    assert loss[1:5].isnan().all() and logprob[1:5].isnan().all() and not correct[1:5].any()
    assert grad[right].isfinite().all()
