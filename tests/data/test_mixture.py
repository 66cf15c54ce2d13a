"""Sources in given shares of an epoch."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_engine.data.mixture import mixed


def sources(*sizes: int) -> list[np.ndarray]:
    starts = np.cumsum([0, *sizes])
    return [np.arange(start, start + size) for start, size in zip(starts, sizes, strict=False)]


def test_shares_are_those_of_the_weights():
    few, many = mixed(sources(10, 90), [1, 1])
    assert (len(few), len(many)) == (50, 50)
    assert np.bincount(few).tolist() == [5] * 10  # each as often as the others
    assert len(set(many)) == 50  # none twice
    assert [len(part) for part in mixed(sources(30, 30, 60), [1, 2, 1])] == [30, 60, 30]


def test_what_is_drawn_depends_on_the_seed_alone():
    one, same, other = (mixed(sources(10, 90), [1, 3], seed=seed) for seed in (0, 0, 1))
    assert [part.tolist() for part in one] == [part.tolist() for part in same]
    assert one[1].tolist() != other[1].tolist()


@given(
    st.lists(st.tuples(st.integers(1, 50), st.floats(0.01, 100)), min_size=1, max_size=5),
    st.integers(0, 9),
)
def test_repetitions_differ_by_one_at_most(parts, seed):
    sizes, weights = zip(*parts, strict=True)
    given_sources = sources(*sizes)
    for own, taken, weight in zip(
        given_sources, mixed(given_sources, weights, seed=seed), weights, strict=True
    ):
        counts = np.bincount(taken - own[0], minlength=len(own))
        assert counts.max() - counts.min() <= 1 and set(taken) <= set(own)
        assert len(taken) == pytest.approx(sum(sizes) * weight / sum(weights), abs=1.01)
