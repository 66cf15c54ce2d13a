"""The batch that a run is tried on: small, and of what the run learns from."""

from training_helpers import make_examples

from lora_engine.data.render import Example
from lora_engine.training.batches import BatchSource


def first(examples, tokens, tokens_per_batch=4096):
    return BatchSource(examples, tokens_per_batch, shuffle=False).first(tokens)


def example(length, taught, adapter="", start=0):
    ids = list(range(start, start + length))
    return Example(ids, [at in taught for at in range(length)], f"a:{start}", adapter=adapter)


def test_examples_that_teach_are_taken_up_to_the_tokens():
    examples = [example(5, []), example(5, [4], start=10), example(9, [2]), example(3, [1])]
    batch = first(examples, 10)
    assert batch.input_ids.tolist() == [10, 11, 12, 13, 14, 0, 1, 2]


def test_a_long_example_is_cut_to_where_it_teaches():
    batch = first([example(1000, range(600, 620))], 64)
    assert batch.input_ids.tolist() == list(range(568, 632))
    assert batch.num_targets == 20
    at_the_end = first([example(1000, [999])], 64)
    assert at_the_end.input_ids.tolist() == list(range(936, 1000))
    assert at_the_end.num_targets == 1
    assert first([example(1000, range(1000))], 64).num_targets == 63


def test_each_adapter_has_an_example():
    examples = [example(50, range(50), "a", start) for start in range(8)]
    examples[5] = example(50, range(50), "b", 5)
    batch = first(examples, 60)
    assert batch.input_ids.tolist() == [*range(30), *range(5, 35)]
    assert sorted(batch.adapters) == ["a", "b"]


def test_the_first_where_none_teaches():
    assert first([example(4, []), example(3, [])], 16).num_targets == 0
    assert first(make_examples(3), 2).num_targets >= 1
