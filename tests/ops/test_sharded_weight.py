"""Weights in shards: their bytes, and what is gathered when."""

from dataclasses import dataclass, field

import pytest
import torch

from lora_engine.distributed.world import World
from lora_engine.ops import QuantizedWeight, quantize_weight, shard_weight, sharded_weight
from lora_engine.ops.sharded_weight import ShardedGroup


def weights_of(kind, shapes):
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(*shape, generator=generator) for shape in shapes]
    if kind in ("float32", "bfloat16"):
        return [weight.to(getattr(torch, kind)) for weight in made]
    nested = kind == "nf4, nested"
    return [quantize_weight(w, kind.partition(",")[0], double_quant=nested) for w in made]


@dataclass(frozen=True, eq=False)
class Peers(World):
    """The first of processes that are not there: their shards are, and what is done is noted."""

    shards: list = field(default_factory=list)
    log: list = field(default_factory=list)

    def begin_gather_(self, out, own):
        (rows,) = [rows for rows in self.shards if rows[0] is own]
        self.log.append(("begin", self.name_of(own)))
        out.view(self.size, -1).copy_(torch.stack(rows))
        return own

    def end(self, work):
        self.log.append(("end", self.name_of(work)))

    def name_of(self, own):
        return next(number for number, rows in enumerate(self.shards) if rows[0] is own)


def sharded(weights, count):
    """The first of `count` processes' part of each weight."""
    world = Peers(0, count)
    made = []
    for weight in weights:
        parts = [shard_weight(weight, World(rank, count)) for rank in range(count)]
        first = shard_weight(weight, world)
        world.shards.append([first.shard, *(part.shard for part in parts[1:])])
        made.append(first)
    return made, world


def dense(weight):
    return weight.dequantize() if isinstance(weight, QuantizedWeight) else weight


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "nf4", "nf4, nested", "int8", "fp8"])
def test_gathered_shards_are_the_weights(kind, count):
    """Of sizes that no number of processes divides."""
    weights = weights_of(kind, [(5, 96), (7, 96)])
    parts, _ = sharded(weights, count)
    whole = ShardedGroup(parts).whole()
    for weight, part, gathered in zip(weights, parts, whole, strict=True):
        assert torch.equal(dense(gathered), dense(weight))
        assert part.shard.numel() == part.nbytes // count
        assert part.tail.numel() == part.nbytes % count
        assert (part.shape, part.dtype) == (tuple(weight.shape), weight.dtype)


@pytest.fixture
def layers(monkeypatch):
    """Four groups of one weight each, of growing sizes, and what is done of them."""
    monkeypatch.setattr(sharded_weight, "_gatherers", {})
    weights = weights_of("float32", [(4 + number, 8) for number in range(4)])
    parts, world = sharded(weights, 2)
    return weights, [ShardedGroup([part]) for part in parts], world.log


def use(layers, number):
    weights, groups, log = layers
    (whole,) = groups[number].whole()
    assert torch.equal(whole, weights[number])
    begun = [name for what, name in log if what == "begin"]
    log.clear()
    return begun


def test_the_next_is_gathered_ahead_from_the_second_time_on(layers):
    forth, back = [0, 1, 2, 3], [2, 1, 0]
    assert [use(layers, number) for number in forth + back] == [[n] for n in forth + back]
    assert use(layers, 1) == [1, 2]  # not known after 1, 0; known after 0, 1
    ahead = [use(layers, number) for number in [2, 3, 2, 1, 0]]
    assert ahead == [[3], [2], [1], [0], [1]]
    assert [use(layers, number) for number in [1, 2]] == [[2], [3]]


def test_the_same_again_is_still_there(layers):
    assert [use(layers, 0), use(layers, 0)] == [[0], []]


def test_what_was_expected_and_does_not_come_is_thrown_away(layers):
    for number in [0, 1, 2, 0, 1]:
        use(layers, number)
    # 2 is on its way.
    assert use(layers, 3) == [3]
    assert use(layers, 2) == [2]


def test_a_group_that_is_gone_is_not_expected(layers):
    weights, groups, log = layers
    for number in [0, 1, 2]:
        use(layers, number)
    groups[2] = None
    use(layers, 0)
    assert use(layers, 1) == [1]
    del weights, log


def test_a_lent_weight_stays_while_the_next_one_comes(layers):
    weights, groups, _ = layers
    for number in [0, 1, 2, 0]:
        use(layers, number)
    (lent,) = groups[1].whole()  # 2 is written into the other slot
    assert torch.equal(lent, weights[1])
