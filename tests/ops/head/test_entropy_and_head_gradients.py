"""Gradients of a head for any gradient of its rows' losses and entropies."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from head_cases import EXTRAS, SCALING, case, leaf, ours, peer, targets
from implementations import Backend
from oracle import check
from torch import Tensor

from lora_engine import reference
from lora_engine.ops import LoraFactors
from lora_engine.ops import linear_cross_entropy as function
from lora_engine.testing import error

OPERATION = "linear_cross_entropy"


@pytest.mark.reference
@pytest.mark.parametrize("upstream", [[0.0, 1.0, -2.0, 1e4, 3.0], [0.0] * 5], ids=["any", "zero"])
def test_rows_take_any_upstream_gradient(backend: Backend, upstream: list[float]) -> None:
    """What DPO and GRPO send back: signed, zero and large factors of each log-probability."""
    target = torch.tensor([3, -100, 1, 0, 6])
    target, dy, *inputs = backend.put(
        target, torch.tensor(upstream), *case(5, 7, torch.float32, "bias+lora")
    )
    leaves = [leaf(x) for x in inputs]
    run = ours(target, "none", backend.impl, chunk_rows=2)
    grads = torch.autograd.grad(run(*leaves), leaves, dy, retain_graph=True)
    exact = [x.double().requires_grad_() for x in inputs]
    oracle = torch.autograd.grad(peer(target, "none")(*exact), exact, dy.double())
    for grad, expected in zip(grads, oracle, strict=True):
        assert (grad - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.reference
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("parts", ["bias+lora"])
@pytest.mark.parametrize("softcap", [None, 6.0])
def test_gradients_of_the_entropy_match_oracle(
    backend: Backend, poisoned: None, softcap: float | None, parts: str, reduction: str
) -> None:
    """Alone, and added to those of the loss."""
    options = {"softcap": softcap} if softcap else {}
    target, *inputs = backend.put(targets(26, 97), *case(26, 97, torch.float32, parts))
    loss = peer(target, reduction, **options)

    def combined(weight_of_loss: float):
        def ours_(hidden: Tensor, weight: Tensor, *more: Tensor) -> Tensor:
            bias, lora = (more[0], LoraFactors(*more[1:], SCALING)) if more else (None, None)
            out = function(
                hidden,
                weight,
                target,
                reduction=reduction,
                impl=backend.impl,
                bias=bias,
                lora=lora,
                entropy=True,
                chunk_rows=9,
                **options,
            )
            assert out.entropy is not None
            return out.entropy + weight_of_loss * out.loss if weight_of_loss else out.entropy

        def theirs(hidden: Tensor, weight: Tensor, *more: Tensor) -> Tensor:
            z = F.linear(hidden, weight, more[0] if more else None)
            if more:
                z = z + SCALING * F.linear(F.linear(hidden, more[1]), more[2])
            z = softcap * torch.tanh(z / softcap) if softcap else z
            logp = z.log_softmax(-1)
            entropy = -(logp.exp() * logp).sum(-1) * (target != -100)
            if not weight_of_loss:
                return entropy
            return entropy + weight_of_loss * loss(hidden, weight, *more)

        return ours_, theirs

    check(*combined(0.0), inputs, tolerance=1e-5, alone=False)
    check(*combined(0.7), inputs, tolerance=1e-5, alone=False)


HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "extras": EXTRAS,
    "temperature": {"temperature": 0.7, "label_smoothing": 0.1, "z_loss": 0.01},
}


@pytest.mark.parametrize("with_entropy", [False, True], ids=["loss", "entropy"])
@pytest.mark.parametrize("options", HEADS)
def test_head_gradients_are_the_formulas(
    backend: Backend, poisoned: None, options: str, with_entropy: bool
) -> None:
    """dX, dW, dbias, dA and dB, for any gradient of each row's loss and entropy."""
    torch.manual_seed(0)
    rows, classes = 26, 97
    target, d_loss, d_entropy, *inputs = backend.put(
        targets(rows, classes),
        torch.randn(rows),
        torch.randn(rows),
        *case(rows, classes, torch.float32, "bias+lora"),
    )
    leaves = [leaf(x) for x in inputs]
    hidden, weight, bias, a, b = leaves
    out = function(
        hidden,
        weight,
        target,
        bias=bias,
        lora=LoraFactors(a, b, SCALING),
        entropy=with_entropy,
        reduction="none",
        chunk_rows=9,
        impl=backend.impl,
        **HEADS[options],
    )
    total = (out.loss * d_loss).sum()
    if out.entropy is not None:
        total = total + (out.entropy * d_entropy).sum()
    grads = torch.autograd.grad(total, leaves)
    x, w, bias, a, b = (t.double() for t in inputs)
    exact = reference.head_gradients(
        x,
        w,
        target,
        d_loss.double(),
        d_entropy.double() if with_entropy else None,
        bias=bias,
        lora=LoraFactors(a, b, SCALING),
        **HEADS[options],
    )
    for name, ours_, oracle in zip(exact._fields, grads, exact, strict=True):
        assert oracle is not None
        assert error(ours_, oracle) < 1e-5, name


@pytest.mark.parametrize("options", HEADS)
def test_the_formulas_of_the_gradients_are_autograds(options: str) -> None:
    target = targets(26, 97)
    leaves = [leaf(x) for x in case(26, 97, torch.float64, "bias+lora")]
    hidden, weight, bias, a, b = leaves
    given = {"bias": bias, "lora": LoraFactors(a, b, SCALING), **HEADS[options]}
    d_loss, d_entropy = torch.randn(2, 26, dtype=torch.float64)
    out = reference.linear_cross_entropy(hidden, weight, target, **given)
    total = (out.loss * d_loss + out.entropy * d_entropy).sum()
    written = reference.head_gradients(hidden, weight, target, d_loss, d_entropy, **given)
    for grad, ours_ in zip(torch.autograd.grad(total, leaves), written, strict=True):
        assert ours_ is not None and torch.allclose(grad, ours_, rtol=1e-10, atol=1e-12)
