import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lora_engine.data.prefixes import shared_segments

rows_of_tokens = st.lists(
    st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=8
)


def arrays(rows):
    return [np.array(row, dtype=np.int64) for row in rows]


@given(rows_of_tokens, st.integers(1, 4))
def test_every_example_is_its_segments_in_a_row(rows, min_shared):
    segments = shared_segments(arrays(rows), min_shared)
    for i, row in enumerate(rows):
        place, last = 0, -1
        for number, segment in enumerate(segments):
            if i in segment.members:
                assert (segment.start, segment.parent) == (place, last)
                first = rows[segment.members[0]]
                assert row[segment.start : segment.end] == first[segment.start : segment.end]
                place, last = segment.end, number
        assert place == len(row)


@given(rows_of_tokens, st.integers(1, 4))
def test_what_is_shared_is_shared_by_all_and_long_enough(rows, min_shared):
    segments = shared_segments(arrays(rows), min_shared)
    assert all(s.end > s.start for s in segments)
    assert all(s.end - s.start >= min_shared for s in segments if len(s.members) > 1)
    if min_shared == 1:  # then no two segments with the same parent begin alike
        heads = [(s.parent, rows[s.members[0]][s.start]) for s in segments]
        assert len(set(heads)) == len(heads)


def test_a_tree():
    rows = [[1, 2, 3, 4, 5], [7], [1, 2, 3, 9], [1, 2, 3, 4, 6], [1, 2, 3, 9]]
    assert [tuple(s) for s in shared_segments(arrays(rows), 2)] == [
        ((0, 2, 3, 4), 0, 3, -1),
        ((0,), 3, 5, 0),
        ((3,), 3, 5, 0),
        ((2,), 3, 4, 0),
        ((4,), 3, 4, 0),
        ((1,), 0, 1, -1),
    ]
