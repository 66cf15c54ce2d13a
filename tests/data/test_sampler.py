import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_engine.data.sampler import PackedSampler, pack_best_fit

lengths = st.lists(st.integers(1, 60), min_size=1, max_size=80)
capacities = st.integers(1, 100)


@given(lengths, capacities, st.integers(0, 5), st.booleans())
def test_every_example_exactly_once_per_epoch(sizes, capacity, epoch, shuffle):
    sampler = PackedSampler(sizes, capacity, seed=3, shuffle=shuffle)
    batches = sampler.epoch_batches(epoch)
    assert sorted(index for batch in batches for index in batch) == list(range(len(sizes)))
    assert sampler.num_batches(epoch) == len(batches)


@given(lengths, capacities)
def test_batches_fit_unless_one_example_alone_does_not(sizes, capacity):
    for batch in PackedSampler(sizes, capacity).epoch_batches(0):
        tokens = sum(sizes[index] for index in batch)
        assert tokens <= capacity or len(batch) == 1


@given(lengths, capacities)
def test_at_most_one_batch_is_half_empty(sizes, capacity):
    loads = [sum(sizes[i] for i in batch) for batch in pack_best_fit(sizes, capacity)]
    assert sum(2 * load <= capacity for load in loads) <= 1


@given(lengths, capacities)
def test_packing_matches_a_plain_search_for_the_fullest_batch_with_room(sizes, capacity):
    loads: list[int] = []
    for size in sizes:
        fitting = [load for load in loads if load + size <= capacity]
        if fitting:
            loads.remove(max(fitting))
            loads.append(max(fitting) + size)
        else:
            loads.append(size)
    packed = pack_best_fit(sizes, capacity)
    assert sorted(sum(sizes[i] for i in batch) for batch in packed) == sorted(loads)


def test_the_plan_depends_on_seed_and_epoch_only():
    sizes = list(range(1, 50))
    first = PackedSampler(sizes, 64, seed=1)
    plans = [first.epoch_batches(epoch) for epoch in (0, 1, 2)]
    assert plans[0] != plans[1] != plans[2]
    again = PackedSampler(sizes, 64, seed=1)
    assert [again.epoch_batches(epoch) for epoch in (2, 0, 1)] == [plans[2], plans[0], plans[1]]
    assert PackedSampler(sizes, 64, seed=2).epoch_batches(0) != plans[0]


def test_without_shuffle_the_order_stays():
    sampler = PackedSampler([4, 4, 4, 4], 8, shuffle=False)
    assert sampler.epoch_batches(0) == sampler.epoch_batches(7) == [[0, 1], [2, 3]]


def test_real_lengths_leave_little_room():
    sizes = np.random.default_rng(0).lognormal(4.9, 0.5, 4000).astype(int).clip(60, 480)
    assert PackedSampler(sizes, 1600).fill() > 0.97


def test_the_emptiest_batches_come_at_no_special_time():
    sizes = [30] * 100
    loads = [len(batch) for batch in PackedSampler(sizes, 100).epoch_batches(0)]
    assert loads.count(1) == 1
    positions = {
        [len(b) for b in PackedSampler(sizes, 100, seed=s).epoch_batches(0)].index(1)
        for s in range(8)
    }
    assert len(positions) > 3


@pytest.mark.parametrize(
    ("sizes", "capacity"), [([], 8), ([0, 3], 8), ([3], 0)], ids=["none", "empty", "no-room"]
)
def test_bad_arguments(sizes, capacity):
    with pytest.raises(ValueError):
        PackedSampler(sizes, capacity)
