"""Examples that are nearly the same are found, and others are not."""

import random

import pytest

from lora_engine.data.near import near_duplicates
from lora_engine.data.render import Example


def example(tokens, origin="", adapter="") -> Example:
    return Example(list(tokens), [True] * len(tokens), origin, adapter=adapter)


@pytest.fixture(scope="module")
def texts():
    draw = random.Random(0)
    return [[draw.randrange(5000) for _ in range(120)] for _ in range(300)]


def test_an_edited_text_is_found_with_its_likeness(texts):
    train = [example(text, f"train:{i}") for i, text in enumerate(texts)]
    edited = [*texts[7][:60], 1, 2, *texts[7][61:]]  # a token of 120 becomes two
    (found,) = near_duplicates(train, [example(edited, "eval:0")])
    assert (found.origin, found.other) == ("eval:0", "train:7")
    pieces = [{tuple(t[i : i + 5]) for i in range(len(t) - 4)} for t in (edited, texts[7])]
    exact = len(pieces[0] & pieces[1]) / len(pieces[0] | pieces[1])
    assert found.likeness == pytest.approx(exact, abs=1e-3)


def test_most_of_many_edited_texts_are_found(texts):
    train = [example(text, f"train:{i}") for i, text in enumerate(texts)]
    edited = [[*text[:110], 9, 9, *text[112:]] for text in texts]
    found = near_duplicates(train, [example(t, f"eval:{i}") for i, t in enumerate(edited)])
    assert len(found) > 0.98 * len(texts)
    assert all(near.origin[5:] == near.other[6:] for near in found)


def test_what_is_equal_or_other_or_of_another_adapter_is_not_told(texts):
    train = [example(texts[0], "train:0", "one")]
    edited = [*texts[0][:-1], 1]
    assert not near_duplicates(train, [example(texts[0], adapter="one")])
    assert not near_duplicates(train, [example(texts[1], adapter="one")])
    assert not near_duplicates(train, [example(edited, adapter="two")])
    assert near_duplicates(train, [example(edited, adapter="one")])


def test_short_examples(texts):
    train = [example([1, 2, 3], "train:0")]
    assert not near_duplicates(train, [example([1, 2]), example([1, 2, 3]), example([3, 2, 1])])
