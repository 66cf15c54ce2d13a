"""Trainers with other settings than their defaults: the same losses and weights as without."""

from collections.abc import Callable

import pytest

from benchmarks.drop_in.trainer_variants import VARIANTS


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_every_step_is_the_same(name: str, compare: Callable[..., None]) -> None:
    compare(VARIANTS[name], "after")
