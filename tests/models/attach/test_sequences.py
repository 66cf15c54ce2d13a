"""Which sequences a batch has, and whether they are known to be equally long."""

import torch
from torch import Tensor

from lora_engine.models.attach.sequences import SequenceFinder, Sequences
from lora_engine.testing import cu_seqlens


def found(
    shape: tuple[int, int],
    *,
    mask: Tensor | None = None,
    bounds: Tensor | None = None,
    longest: int | None = None,
) -> Sequences:
    tables = torch.zeros(1, shape[1], 4)
    return SequenceFinder()(shape, (tables, tables), mask, bounds, None, longest)


def test_rows_without_a_mask_are_equal_sequences() -> None:
    sequences = found((3, 5))
    assert sequences.cu_seqlens.tolist() == [0, 5, 10, 15]
    assert sequences.equal_lengths


def test_bounds_are_of_equal_sequences_where_the_longest_says_so() -> None:
    equal, other = cu_seqlens([4, 4]), cu_seqlens([3, 5])
    assert found((1, 8), bounds=equal, longest=4).equal_lengths
    assert not found((1, 8), bounds=equal).equal_lengths
    assert not found((1, 8), bounds=other, longest=5).equal_lengths


def test_a_mask_is_not_read_for_it() -> None:
    assert not found((2, 4), mask=torch.ones(2, 4, dtype=torch.bool)).equal_lengths


def test_another_longest_is_another_batch() -> None:
    finder, tables, bounds = SequenceFinder(), torch.zeros(1, 8, 4), cu_seqlens([4, 4])
    first = finder((1, 8), (tables, tables), None, bounds, None, None)
    second = finder((1, 8), (tables, tables), None, bounds, None, 4)
    assert (first.equal_lengths, second.equal_lengths) == (False, True)
    assert finder((1, 8), (tables, tables), None, bounds, None, 4) is second
