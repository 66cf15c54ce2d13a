"""transformers' Trainer with an accelerated model: the same losses and weights as without."""

from collections.abc import Callable

import pytest

from benchmarks.drop_in.trainer_setups import HUGGING_FACE

SLOW = {"gradient checkpointing", "label smoothing", "compute_loss reads logits"}


@pytest.mark.parametrize("when", ["before", pytest.param("after", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in HUGGING_FACE]
)
def test_every_step_is_the_same(name: str, when: str, compare: Callable[..., None]) -> None:
    compare(HUGGING_FACE[name], when)
