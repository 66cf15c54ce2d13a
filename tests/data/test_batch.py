from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_engine.data.batch import collate
from lora_engine.data.render import TARGET, WEIGHT, Example, part

examples = st.lists(
    st.lists(st.tuples(st.integers(0, 99), st.booleans()), min_size=1, max_size=9),
    min_size=1,
    max_size=6,
).map(
    lambda rows: [
        Example([token for token, _ in row], [flag for _, flag in row], origin=f"rows:{i}")
        for i, row in enumerate(rows)
    ]
)


@given(examples)
def test_collate_matches_a_plain_loop(given_examples):
    batch = collate(given_examples)
    ids, positions, boundaries, index, targets = [], [], [0], [], []
    for example in given_examples:
        for position, token in enumerate(example.input_ids):
            if position > 0 and example.supervised[position]:
                index.append(len(ids) - 1)
                targets.append(token)
            ids.append(token)
            positions.append(position)
        boundaries.append(len(ids))
    assert batch.input_ids.tolist() == ids
    assert batch.position_ids.tolist() == positions
    assert batch.cu_seqlens.tolist() == boundaries
    assert batch.target_index.tolist() == index
    assert batch.target_ids.tolist() == targets
    assert batch.max_seqlen == max(len(example) for example in given_examples)
    assert batch.origins == tuple(example.origin for example in given_examples)
    assert (batch.num_tokens, batch.num_targets, batch.num_sequences) == (
        len(ids),
        len(targets),
        len(given_examples),
    )
    assert batch.num_targets == sum(example.num_targets for example in given_examples)


@given(examples)
def test_shared_prefixes_lead_to_the_same_targets(given_examples):
    doubled = [*given_examples, *given_examples]
    plain, shared = collate(doubled), collate(doubled, share_prefixes=True)
    assert torch.equal(plain.target_ids, shared.target_ids)
    assert (plain.num_tokens, plain.origins) == (shared.num_tokens, shared.origins)
    assert histories(shared) == histories(plain)
    assert shared.num_rows == shared.input_ids.numel() <= plain.num_rows == plain.num_tokens
    assert plain.parents is None


def test_prefixes_are_shared_within_an_adapter_only():
    ids = list(range(20))
    rows = [("a", 30), ("b", 31), ("a", 32), ("b", 33)]
    batch = collate(
        [Example([*ids, last], [True] * 21, adapter=name) for name, last in rows],
        share_prefixes=True,
    )
    assert batch.adapters == ("a", "a", "a", "b", "b", "b")
    assert batch.parents.tolist() == [-1, 0, 0, -1, 3, 3]
    assert batch.num_rows == 2 * 22
    assert collate([Example(ids, [True] * 20)]).adapters == ()


def histories(batch):
    """The tokens that each target's prediction sees."""
    parents = [-1] * batch.num_sequences if batch.parents is None else batch.parents.tolist()
    whole, found = [], {}
    for s, (begin, end) in enumerate(pairwise(batch.cu_seqlens.tolist())):
        whole.append((whole[parents[s]] if parents[s] >= 0 else []) + list(range(begin, end)))
        for place, row in enumerate(whole[s]):
            found[row] = batch.input_ids[whole[s][: place + 1]].tolist()
            assert batch.position_ids[row] == place
    return [found[row] for row in batch.target_index.tolist()]


def test_a_shared_beginning_is_packed_once():
    system = list(range(10, 22))
    rows = [[*system, 1, 2], [*system, 1, 3, 4], [5, 6]]
    batch = collate([Example(row, [True] * len(row)) for row in rows], share_prefixes=True)
    assert batch.input_ids.tolist() == [*system, 1, 2, 3, 4, 5, 6]
    assert batch.position_ids.tolist() == [*range(13), 13, 13, 14, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 13, 14, 16, 18]
    assert batch.parents.tolist() == [-1, 0, 0, -1]
    assert batch.target_index.tolist() == [*range(13), *range(13), 14, 16]
    assert (batch.num_rows, batch.num_tokens, batch.max_seqlen) == (18, 31, 15)


def test_dtypes():
    batch = collate([Example([5, 6], [True, True])])
    for name in ("input_ids", "position_ids", "target_index", "target_ids"):
        assert getattr(batch, name).dtype == torch.int64, name
    assert batch.cu_seqlens.dtype == torch.int32
    twice = collate(
        [Example([1] * 9, [True] * 9), Example([1] * 10, [True] * 10)], share_prefixes=True
    )
    assert twice.parents.dtype == torch.int32


def test_to_moves_every_tensor_and_keeps_the_rest():
    examples = [Example([5] * 64 + [token], [True] * 65, origin="a") for token in (7, 8)]
    batch = collate(examples, share_prefixes=True)
    assert batch.parents is not None
    moved = batch.to("meta")
    assert {t.device.type for t in vars(moved).values() if isinstance(t, torch.Tensor)} == {"meta"}
    assert (moved.max_seqlen, moved.origins) == (65, ("a", "a"))


@pytest.mark.parametrize("rows", [[], [Example([], [])]], ids=["none", "empty"])
def test_nothing_to_pack_is_an_error(rows):
    with pytest.raises(ValueError, match="cannot pack"):
        collate(rows)


def test_another_token_than_the_one_that_stands_there_may_be_learned():
    columns = {TARGET: [-1, 77, -1], WEIGHT: [1.0, 2.0, 3.0]}
    example = Example([5, 6, 7, 8, 9], [True, False, True, True, True], columns=columns)
    batch = collate([example, Example([1, 2], [False, True])])
    assert batch.input_ids.tolist() == [5, 6, 7, 8, 9, 1, 2]
    assert batch.target_ids.tolist() == [7, 77, 9, 2] and TARGET not in batch.columns
    cut = part(example, [0, 3, 4])
    assert (cut.input_ids, cut.columns) == ([5, 8, 9], {TARGET: [77, -1], WEIGHT: [2.0, 3.0]})
    assert collate([cut]).target_ids.tolist() == [77, 9]
