import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_engine.data.batch import collate
from lora_engine.data.render import Example

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


def test_dtypes():
    batch = collate([Example([5, 6], [True, True])])
    for name in ("input_ids", "position_ids", "target_index", "target_ids"):
        assert getattr(batch, name).dtype == torch.int64, name
    assert batch.cu_seqlens.dtype == torch.int32


def test_to_moves_every_tensor_and_keeps_the_rest():
    batch = collate([Example([5, 6, 7], [False, True, True], origin="a")])
    moved = batch.to("meta")
    assert {t.device.type for t in vars(moved).values() if isinstance(t, torch.Tensor)} == {"meta"}
    assert (moved.max_seqlen, moved.origins) == (3, ("a",))


@pytest.mark.parametrize("rows", [[], [Example([], [])]], ids=["none", "empty"])
def test_nothing_to_pack_is_an_error(rows):
    with pytest.raises(ValueError, match="cannot pack"):
        collate(rows)
