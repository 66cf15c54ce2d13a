"""How many of the other examples are mixed in, which, and what the whole then says of itself."""

from collections import Counter

import pytest

from lora_engine.data.dataset import Dropped, TokenizedDataset, prepare
from lora_engine.data.render import Example
from lora_engine.data.replay import with_replay


def dataset(name: str, count: int, **options) -> TokenizedDataset:
    examples = [Example([1, 2], [False, True], f"{name}:{i}") for i in range(count)]
    return TokenizedDataset(examples, name, **options)


def replayed(mixed: TokenizedDataset) -> Counter[str]:
    return Counter(e.origin for e in mixed if e.origin.startswith("old"))


def test_the_fraction_is_of_all_examples_and_nothing_is_lost():
    mixed = with_replay(dataset("new", 90), dataset("old", 50), 0.1)
    assert len(mixed) == 100
    assert [e.origin for e in mixed[:90]] == [f"new:{i}" for i in range(90)]
    assert replayed(mixed).total() == len(replayed(mixed)) == 10  # none twice
    assert mixed.mixture == (("new", 90, 90), ("old", 50, 10))


def test_too_few_are_taken_several_times():
    mixed = with_replay(dataset("new", 30), dataset("old", 4), 0.25)
    assert sorted(replayed(mixed).values()) == [2, 2, 3, 3]


def test_one_is_taken_at_least():
    assert len(with_replay(dataset("new", 3), dataset("old", 4), 0.01)) == 4


def test_the_seed_decides_which():
    one, same, other = (
        replayed(with_replay(dataset("new", 90), dataset("old", 50), 0.1, seed=seed))
        for seed in (0, 0, 1)
    )
    assert one == same != other


def test_what_was_dropped_of_either_is_told():
    new = dataset("new", 3, records=4, dropped=(Dropped("new:3", "empty"),), kinds=(("text", 4),))
    old = dataset("old", 2, records=2, kinds=(("messages", 1), ("text", 1)))
    mixed = with_replay(new, old, 0.5)
    assert (mixed.num_records, mixed.dropped) == (6, new.dropped)
    assert mixed.kinds == (("messages", 1), ("text", 5))


def test_examples_of_a_store_stay_there(tokenizer):
    both = prepare([{"text": f"text {i}"} for i in range(10)], tokenizer)
    new, old = (
        TokenizedDataset(both.examples[part], name)
        for part, name in ((slice(6), "new"), (slice(6, None), "old"))
    )
    mixed = with_replay(new, old, 0.4)
    assert type(mixed.examples) is type(both.examples)
    assert [tokenizer.decode(e.input_ids)[:6] for e in mixed][:6] == [f"text {i}" for i in range(6)]
    assert {tokenizer.decode(e.input_ids)[:6] for e in mixed[6:]} == {
        f"text {i}" for i in range(6, 10)
    }


@pytest.mark.parametrize("fraction", [0, 1, -0.5, 2])
def test_a_fraction_is_between_0_and_1(fraction):
    with pytest.raises(ValueError, match="between 0 and 1"):
        with_replay(dataset("new", 2), dataset("old", 2), fraction)
