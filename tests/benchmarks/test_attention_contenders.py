"""The comparison of attention on a GPU, as far as it goes without one."""

import pytest
import torch

from benchmarks.gpu import attention
from benchmarks.gpu.attention import TINY, Contender, Problem, Size, measure_size, render

CPU = torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton is not interpreted beside a GPU")
def test_ours_and_pytorch_s_are_timed_where_they_agree() -> None:
    pytest.importorskip("triton")
    rows, notes = measure_size(TINY[0], torch.float32, CPU, samples=1)
    assert notes == []
    assert [(row["contender"], row["pass"]) for row in rows] == [
        ("sdpa, one by one", "forward"),
        ("triton", "forward"),
        ("sdpa, one by one", "both"),
        ("triton", "both"),
    ]
    assert "| 2 x 48, 2/1 heads of 16 | triton" in render(rows)


def test_a_contender_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def two(problem: Problem, device: torch.device):
        right = problem.of_function(problem.one_by_one)
        yield "right", right
        yield "wrong", Contender(lambda: right.forward() * 1.1, right.both)

    monkeypatch.setattr(attention, "contenders", two)
    rows, notes = measure_size(TINY[0], torch.float32, CPU, samples=1)
    assert {row["contender"] for row in rows} == {"right"}
    assert "wrong: AssertionError: o differs by 0.1" in notes[0]


def test_operations_are_counted_for_the_causal_half() -> None:
    size = Size((4, 4), heads=3, kv_heads=1, head_dim=8)
    assert size.flops(1) == 2 * (2 * (1 + 2 + 3 + 4)) * 3 * 8


def test_sequences_of_several_lengths_are_compared_one_by_one() -> None:
    size = Size((48, 5, 5), heads=2, kv_heads=1, head_dim=16)
    assert str(size) == "48 + 2 x 5, 2/1 heads of 16"
    assert size.flops(1) == 2 * (48 * 49 // 2 + 2 * 15) * 2 * 16
    problem = Problem(size, torch.float32, CPU)
    whole = problem.of_function(problem.one_by_one).forward()
    last = Problem(Size((5,), 2, 1, 16), torch.float32, CPU)
    last.rows = tuple(x[-5:] for x in problem.rows)
    assert torch.allclose(last.of_function(last.one_by_one).forward(), whole[-5:], atol=1e-6)
