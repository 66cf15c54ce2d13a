import torch

from benchmarks.common.registry import CASES, SIZES
from benchmarks.kernels import (
    cases,  # noqa: F401  (registers the cases)
    plans,
)


def test_the_gpu_plan_is_runnable_and_complete() -> None:
    plan = plans.gpu_plan(CASES)
    assert {item.case for item in plan} == set(CASES)
    assert all(item.size in SIZES for item in plan)
    assert len(set(plan)) == len(plan)
    assert set(plans.CASE_SIZES) <= set(CASES)


def test_every_case_comes_once_before_any_comes_twice() -> None:
    plan = plans.gpu_plan(["adamw", "rms_norm", "linear_cross_entropy"])
    first = [(item.case, item.size, item.dtype, item.compile) for item in plan[:4]]
    assert first == [
        ("rms_norm", "8192x4096", "bfloat16", True),
        ("linear_cross_entropy", "hopper", "bfloat16", True),
        ("adamw", "hopper", "bfloat16", True),
        ("rms_norm", "8192x576", "bfloat16", False),
    ]


def test_sizes_of_the_targets() -> None:
    for rows, cols in ((8192, 576), (8192, 1536), (4096, 4096), (8192, 4096), (8192, 14336)):
        size = SIZES[f"{rows}x{cols}"]
        assert size.tokens == rows
        assert size.model.hidden == size.model.intermediate == cols
        assert size.model.heads * size.model.head_dim == cols
    hopper = SIZES["hopper"]
    assert (hopper.targets, hopper.model.hidden, hopper.model.vocab) == (8192, 4096, 128256)


def test_without_a_gpu_the_plan_is_small() -> None:
    plan = plans.plan_for(torch.device("cpu"), CASES)
    assert [item.case for item in plan] == list(CASES)
    assert {item.size for item in plan} == {"tiny"}
