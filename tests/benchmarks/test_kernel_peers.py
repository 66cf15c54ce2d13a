"""Other packages' kernels compute what our cases ask, and what is timed of them is that."""

import pytest
import torch

from benchmarks.common.registry import CASES, SIZES
from benchmarks.common.verify import upstream, verify
from benchmarks.kernels import (
    cases,  # noqa: F401  (registers the cases)
    kernel_peers,
    mlx_peer,
)

CPU = torch.device("cpu")
TINY = SIZES["tiny"]


def peers_of(name, dtype=torch.float32, size=TINY):
    torch.manual_seed(0)
    problem = CASES[name](size, dtype, CPU)
    return problem, dict(kernel_peers.contenders(name, problem, CPU))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_peft(dtype):
    pytest.importorskip("peft")
    problem, found = peers_of("lora_linear", dtype)
    verify(problem, found["peft"].function)
    forward, both = (found["peft"].timed(problem.inputs, back) for back in (False, True))
    expected = found["peft"].function(*problem.inputs)
    for mine, other in zip(forward(), expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)
    wanted = [x for x in problem.inputs if x.requires_grad]
    right = torch.autograd.grad(expected, wanted, [upstream(y) for y in expected])
    for mine, other in zip(both(), right, strict=True):
        most = 2**-7 * other.abs().max().item()
        torch.testing.assert_close(mine.to(other.dtype), other, rtol=0, atol=most)


def test_bitsandbytes():
    pytest.importorskip("bitsandbytes")
    problem, found = peers_of("blockwise_4bit", torch.bfloat16, SIZES["smollm2"])
    verify(problem, found["bitsandbytes"].function)


@pytest.mark.parametrize(
    "name", ["rms_norm", "layer_norm", "glu", "cross_entropy", "linear_cross_entropy"]
)
def test_mlx(name):
    pytest.importorskip("mlx.core")
    problem, found = peers_of(name)
    verify(problem, found["mlx"].function)
    found["mlx"].timed(problem.inputs, True)()


def test_who_has_nothing_for_a_case_is_none(monkeypatch):
    assert peers_of("rope")[1] == {}
    monkeypatch.setattr(kernel_peers, "_installed", lambda module: False)
    assert peers_of("lora_linear")[1] == {}


def test_mlx_has_no_attention():
    pytest.importorskip("mlx.core")
    assert mlx_peer.contender("attention", CASES["attention"](TINY, torch.float32, CPU)) is None
