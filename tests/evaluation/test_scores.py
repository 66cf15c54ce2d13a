"""Scores of single examples, and their intervals."""

import tracemalloc
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from training_helpers import make_examples

from lora_engine.data.render import Example
from lora_engine.errors import UserError
from lora_engine.evaluation.scores import (
    Score,
    by_group,
    difference,
    interval,
    score_examples,
    summary,
)
from lora_engine.testing import tiny_llama


@pytest.fixture(scope="module")
def model():
    return tiny_llama().eval()


def test_an_example_s_score_is_its_own_however_it_is_packed(model):
    examples = make_examples(5)
    scores = score_examples(model, examples)
    assert [s.origin for s in scores] == [e.origin for e in examples]
    for packed in (1, 40):
        for one, other in zip(score_examples(model, examples, tokens=packed), scores, strict=True):
            assert one.nats == pytest.approx(other.nats, rel=1e-5)
            assert (one.targets, one.correct) == (other.targets, other.correct)
    for example, score in zip(examples, scores, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([list(example.input_ids)])).logits[0, :-1]
        learned = torch.tensor(list(example.supervised)[1:])
        following = torch.tensor(list(example.input_ids)[1:])
        loss = torch.nn.functional.cross_entropy(logits, following, reduction="none")[learned]
        assert score.targets == len(loss)
        assert score.nats == pytest.approx(float(loss.sum()), rel=1e-5)
        assert score.correct == int((logits.argmax(1) == following)[learned].sum())


def test_intervals_are_those_of_the_mean():
    random = np.random.default_rng(1)
    totals = random.normal(2.0, 1.0, 400)
    found = interval(totals, np.ones(400))
    assert found["value"] == pytest.approx(totals.mean())
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 / 20, rel=0.15)
    assert interval(np.array([3.0, 3.0]), np.array([2.0, 2.0])) == {
        "value": 1.5, "low": 1.5, "high": 1.5,
    }  # fmt: skip


def test_intervals_of_many_examples_take_the_memory_of_one_resample():
    values = np.random.default_rng(1).normal(2.0, 1.0, 20_000)
    tracemalloc.start()
    found = interval(values, np.ones(20_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 / 20_000**0.5, rel=0.15)
    assert peak < 5e6, "all resamples are 160 MB"


def test_no_tensor_has_the_logits_of_all_targets(monkeypatch):
    monkeypatch.setattr("lora_engine.backends.chunk_rows", lambda *shape: 64)
    model = tiny_llama(vocab_size=8192).eval()
    examples = [Example([5] * 600, [True] * 600)]
    logits = 599 * 8192
    with largest_tensor() as ours:
        score_examples(model, examples)
    with largest_tensor() as theirs, torch.no_grad():
        model(input_ids=torch.tensor([examples[0].input_ids]))
    assert theirs[0] >= logits > 2 * ours[0], (ours, theirs, logits)


@contextmanager
def largest_tensor():
    """[elements] of the largest that is made within it."""
    from torch.utils._python_dispatch import TorchDispatchMode

    found = [0]

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            for one in made if isinstance(made, tuple | list) else [made]:
                if isinstance(one, torch.Tensor) and not func.is_view:
                    found[0] = max(found[0], one.numel())
            return made

    with Watching():
        yield found


def test_a_paired_difference_is_narrower_than_either():
    random = np.random.default_rng(2)
    base = [Score(str(i), 4, float(n), 1) for i, n in enumerate(random.normal(20, 5, 100))]
    better = [Score(s.origin, 4, s.nats - 2.0, 2) for s in base]
    assert difference(better, base) == {"value": -0.5, "low": -0.5, "high": -0.5}
    loss = summary(base)["loss"]
    assert loss["high"] - loss["low"] > 0.3


def test_groups_and_perplexity():
    scores = [
        Score("a", 2, 2.0, 1),
        Score("b", 1, 3.0, 0),
        Score("c", 1, 1.0, 1),
        Score("d", 0, 0, 0),
    ]
    parts = by_group(scores, ["x", "y", "x", "z"])
    assert set(parts) == {"x", "y"}
    assert parts["x"]["loss"]["value"] == 1.0
    assert parts["x"]["perplexity"]["value"] == pytest.approx(np.e)
    assert parts["x"]["accuracy"]["value"] == pytest.approx(2 / 3)
    assert (parts["y"]["examples"], parts["y"]["targets"]) == (1, 1)


def test_nothing_supervised_is_told(model):
    from dataclasses import replace

    blank = [replace(e, supervised=[False] * len(e.input_ids)) for e in make_examples(2)]
    with pytest.raises(UserError, match="no supervised token"):
        score_examples(model, blank)
