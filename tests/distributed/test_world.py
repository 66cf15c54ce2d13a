"""What processes tell each other, and who says what ended them."""

import os
import signal
from itertools import pairwise

import pytest
import torch
from processes import Together, run_together

from lora_engine.distributed.replicate import GradientSum
from lora_engine.distributed.world import ALONE, World, check_same, current
from lora_engine.errors import PeerLost, UserError


def exchange():
    world = current()
    summed = torch.full((3,), world.rank + 1.0)
    world.add_(summed)
    sent = torch.arange(4.0) if world.is_first else torch.zeros(4)
    world.send_(sent)
    values = world.gather({"rank": world.rank, "text": "ä" * world.rank, "loss": float("inf")})
    return world, summed.tolist(), sent.tolist(), values, world.of_first(world.rank)


def test_tensors_and_values_go_round():
    results = run_together(2, exchange)
    said = [{"rank": r, "text": "ä" * r, "loss": float("inf")} for r in range(2)]
    for rank, result in enumerate(results):
        assert result == (World(rank, 2), [3.0] * 3, [0.0, 1.0, 2.0, 3.0], said, 0)


def test_one_process_talks_to_itself():
    assert current() is ALONE
    tensor = torch.ones(2)
    ALONE.add_(tensor)
    ALONE.send_(tensor)
    assert tensor.tolist() == [1.0, 1.0]
    assert ALONE.gather((1, 2)) == [(1, 2)]
    check_same(ALONE, {"data": "x"})


def fail_in(rank, error):
    if current().rank == rank:
        raise error
    current().gather(None)


def test_the_first_process_says_what_another_one_failed_of():
    run = Together(2, fail_in, 1, UserError("rows.jsonl:3: is no JSON"))
    first, second = run.result(0), run.result(1)
    assert isinstance(first, PeerLost) and isinstance(second, SystemExit)
    assert str(first) == "process 1: rows.jsonl:3: is no JSON"


def test_the_others_are_silent_where_the_first_process_fails():
    run = Together(2, fail_in, 0, UserError("rows.jsonl:3: is no JSON"))
    first, second = run.result(0), run.result(1)
    assert str(first) == "rows.jsonl:3: is no JSON"
    assert isinstance(second, SystemExit)


def be_killed():
    if current().rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    current().gather(None)


def test_a_process_that_is_killed_has_no_words():
    assert "is gone without a word" in str(Together(2, be_killed).result(0))


SIZES = (5, 700, 3, 600, 800)  # of parameters in a row; those of 600 and more are large


def gradients(seed, order):
    """Each parameter's gradient of a loss in which they come in `order`, summed over processes."""
    world = current()
    buffer = torch.zeros(sum(SIZES))
    starts = [sum(SIZES[:i]) for i in range(len(SIZES) + 1)]
    parts = [slice(*bounds) for bounds in pairwise(starts)]
    parameters = [torch.nn.Parameter(torch.ones(size)) for size in SIZES]
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = buffer[part]
    large = [(p, part) for p, part in zip(parameters, parts, strict=True) if p.numel() >= 600]
    total, before_the_end = GradientSum(world, buffer, large), []
    begin = total._begin

    def noted(part):
        before_the_end.append((part.start, total._on))
        begin(part)

    total._begin = noted
    values = torch.randn(2, sum(SIZES), generator=torch.Generator().manual_seed(seed + world.rank))
    for number, of_micro_batch in enumerate(values):
        x = torch.ones(())
        for index in order[world.rank]:  # the last one's gradient comes first
            x = x + (parameters[index] * of_micro_batch[parts[index]]).sum()
        if number == 0:
            x.backward()
            continue
        with total.overlapped():
            x.backward()
    total.finish()
    return buffer.tolist(), before_the_end


@pytest.mark.parametrize("missing", [False, True])
def test_large_gradients_are_added_up_while_others_arrive(missing):
    """Also where a process has no gradient for one of them: the order of the sums is one."""
    every = [0, 1, 2, 3, 4]
    order = (every, [0, 1, 2, 4] if missing else every)
    first, second = run_together(2, gradients, 0, order)
    expected = torch.zeros(sum(SIZES))
    for rank in range(2):
        generator = torch.Generator().manual_seed(rank)
        values = torch.randn(2, sum(SIZES), generator=generator).sum(0)
        if missing and rank:
            values[708:1308] = 0
        expected += values
    torch.testing.assert_close(torch.tensor(first[0]), expected)
    assert first[0] == second[0]
    # From the last large part to the first, then what is between them.
    assert [start for start, _ in first[1]] == [1308, 708, 5, 0, 705]
    assert [start for start, _ in second[1]] == [1308, 708, 5, 0, 705]
    assert [early for _, early in first[1]] == [True] * 3 + [False] * 2
    assert [early for _, early in second[1]] == [True, *[not missing] * 2, False, False]


def test_a_gradient_that_comes_in_parts_is_refused():
    parameter = torch.nn.Parameter(torch.ones(4))
    buffer = torch.zeros(4)
    parameter.grad = buffer
    total = GradientSum(World(0, 2), buffer, [(parameter, slice(0, 4))])
    total._begin = lambda part: None
    with total.overlapped(), pytest.raises(UserError, match="use_reentrant=False"):
        (parameter * 2).sum().backward()
        (parameter * 2).sum().backward()
    total.close()
    (parameter * 2).sum().backward()
