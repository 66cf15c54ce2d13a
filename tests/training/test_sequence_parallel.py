"""Processes that share the tokens of each micro-batch: loss, gradients and runs of one process."""

import numpy as np
import pytest
from processes import Together, run_together
from sequence_fits import first_steps, fit_sequences

from lora_engine.distributed.token_parts import TokenParts
from lora_engine.distributed.world import World
from lora_engine.errors import UserError

COUNTS = [2, pytest.param(4, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("tokens", "counts"), [(8, [2] * 4), (7, [2, 2, 2, 1]), (1, [1, 0, 0, 0])])
def test_the_parts_of_the_tokens(tokens, counts):
    parts = [TokenParts(tokens, World(rank, 4)) for rank in range(4)]
    assert all(part.counts == counts for part in parts)
    own = [place for part in parts for place in range(tokens)[part.own]]
    assert own == list(range(tokens))


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_losses_and_gradients_are_those_of_one_process(count):
    for policy in (None, "layer", "tiled_8"):
        (expected,) = run_together(1, first_steps, policy)
        found = run_together(count, first_steps, policy)
        for own in found:
            for name in expected.keys() - {"losses"}:
                loss, norm, gradient = expected[name]
                assert own[name][0] == pytest.approx(loss, rel=1e-5), name
                assert own[name][1] == pytest.approx(norm, rel=1e-4) and norm > 0.1, name
                np.testing.assert_allclose(own[name][2], gradient, rtol=1e-3, atol=1e-5 * norm)
            assert own["losses"] == pytest.approx(expected["losses"], rel=2e-4)
        assert expected["losses"][-1] < 0.95 * expected["losses"][0]


@pytest.mark.parametrize("count", COUNTS)
def test_a_run_is_that_of_one_process(tmp_path, count):
    ((result, steps, evals, weights),) = run_together(1, fit_sequences, tmp_path / "alone")
    first, *others = run_together(count, fit_sequences, tmp_path / "together")
    assert [s.loss for s in first[1]] == pytest.approx([s.loss for s in steps], rel=2e-4)
    assert [s.tokens for s in first[1]] == [s.tokens for s in steps]
    assert [e.loss for _, e in first[2]] == pytest.approx([e.loss for _, e in evals], rel=2e-4)
    for name, values in weights.items():
        np.testing.assert_allclose(first[3][name], values, rtol=2e-3, atol=2e-4)
        assert all(np.array_equal(other[3][name], first[3][name]) for other in others)
    assert first[0].stopped == result.stopped == "finished"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("sft", 1),
            "train.sequence_parallel: 2 processes cannot share the model's 4 attention heads, 1 of "
            "keys and values; take a number of processes that divides both",
        ),
        (("dpo sigmoid", 4), "train.sequence_parallel: is for supervised fine-tuning"),
        (("sft", 4, 0.1), "train.sequence_parallel: needs lora_engine's attention in every layer"),
    ],
    ids=["heads", "pairs", "dropout"],
)
def test_what_cannot_be_shared_is_one_line(tmp_path, arguments, message):
    first = Together(2, fit_sequences, tmp_path, *arguments).result(0)
    assert isinstance(first, UserError), first
    assert str(first).startswith(message) and "\n" not in str(first)
