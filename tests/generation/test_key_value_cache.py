"""Rows of a cache: taken in runs, given back, joined, grown up to a limit."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_engine.generation.cache import FreeRuns, KeyValueCache


def small(most: int) -> KeyValueCache:
    return KeyValueCache([4, 6], most, dtype=torch.float32, device=torch.device("cpu"))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 9)), max_size=40))
def test_no_two_runs_share_a_row_and_all_come_back(steps: list[tuple[bool, int]]) -> None:
    runs, taken = FreeRuns(30), []
    for take, number in steps:
        if take:
            first = runs.take(number)
            if first is not None:
                taken.append((first, number))
        elif taken:
            runs.give_back(*taken.pop(number % len(taken)))
        rows = [row for first, count in [*taken, *runs.free] for row in range(first, first + count)]
        assert sorted(rows) == list(range(30))
    for run in taken:
        runs.give_back(*run)
    assert runs.free == [(0, 30)]


def test_what_was_written_stays_when_the_cache_grows() -> None:
    cache = small(100)
    run = cache.take(3)
    assert run is not None
    cache.keys[1][run.first : run.first + 3] = 7.0
    assert cache.take(40) is not None
    assert bool((cache.keys[1][run.first : run.first + 3] == 7.0).all())
    assert cache.bytes == sum(x.nbytes for x in (*cache.keys, *cache.values))


def test_there_are_no_more_rows_than_the_limit() -> None:
    cache = small(10)
    first, second = cache.take(6), cache.take(4)
    assert first is not None and second is not None
    assert cache.take(1) is None
    cache.release(first)
    assert cache.take(7) is None
    assert cache.take(6) is not None


def test_a_run_is_free_after_its_last_user() -> None:
    cache = small(4)
    run = cache.take(4)
    assert run is not None
    run.users += 1
    cache.release(run)
    assert cache.take(1) is None
    cache.release(run)
    assert cache.take(4) is not None
