"""Lists of JSON read a piece at a time: the same values, lines and mistakes as read at once."""

import io
import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_engine.data import json_list
from lora_engine.data.json_list import JsonList, ListError
from lora_engine.data.readers import _decoder, read_file
from lora_engine.errors import UserError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


def read(content: bytes, piece: int) -> tuple[list[object], list[str]]:
    """The values, and the place of each in the file."""
    values, places = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_list, "PIECE", piece)
        listed = JsonList(io.BytesIO(content), Path("a.json"), _decoder)
        for value in listed:
            values.append(value)
            places.append(listed.origin.removeprefix("a.json:"))
    return values, places


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(VALUES, max_size=6),
    piece=st.integers(1, 40),
    indent=st.sampled_from([None, 0, 2]),
    ascii_=st.booleans(),
)
def test_values_are_those_of_the_whole(values, piece, indent, ascii_):
    text = json.dumps(values, indent=indent, ensure_ascii=ascii_)
    try:
        content = text.encode()
    except UnicodeEncodeError:  # half a character
        return
    found, places = read(content, piece)
    assert found == values
    if indent is None:
        assert places == [f"1 (record {i})" for i in range(1, len(values) + 1)]
    elif values:
        starts = [
            json.dumps(values[: i + 1], indent=indent).count("\n") for i in range(len(values))
        ]
        sizes = [json.dumps(value, indent=indent).count("\n") for value in values]
        lines = [start - size for start, size in zip(starts, sizes, strict=True)]
        assert places == list(map(str, lines))


@pytest.mark.parametrize("piece", [1, 5, 1000])
def test_the_number_is_told_where_the_line_is_not_enough(piece):
    content = b'[{"a": 1}, 2,\n{"a": 3}, {\n"a": 4}, 5\n, 6,\n\n 7]'
    places = ["1 (record 1)", "1 (record 2)", "2", "2 (record 4)", "3 (record 5)", "4", "6"]
    assert read(content, piece)[1] == places


@pytest.mark.parametrize("piece", [1, 3, 7, 1000])
@pytest.mark.parametrize(
    ("content", "place", "words"),
    [
        (b'[\n{"a": 1},\n{"a" 2}]', "3", "valid JSON: Expecting ':' delimiter (line 3, column 6)"),
        (b'[{"a": 1},\n\n {"a": tru}]', "3", "valid JSON: Expecting value (line 3, column 8)"),
        (b'[{"a": 1}, {"b": 2, }]', "1 (record 2)", "(line 1, column 21)"),
        (b'[{"a": 1}\n{"a": 2}]', "1 (record 1)", "is not followed by ',' or ']'"),
        (b'[{"a": "b', "1 (record 1)", "is not valid JSON: Unterminated string"),
        (b'[{"a": 1},\n', "2", "is not valid JSON: Expecting value"),
        (b"[1, 2]\n\n x", "3", "stands behind the end of the list"),
    ],
)
def test_the_first_mistake_is_told_with_its_place(piece, content, place, words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_list, "PIECE", piece)
        listed = JsonList(io.BytesIO(content), Path("a.json"), _decoder)
        with pytest.raises(ListError) as caught:
            list(listed)
    assert listed.origin == f"a.json:{place}" and words in str(caught.value)


@pytest.mark.parametrize("piece", [1, 2, 1000])
def test_what_is_no_text_is_told_with_its_line(piece):
    with pytest.raises(UserError, match=r"^a\.json:3: is not UTF-8 text \(byte 20 of the text\)$"):
        read(b'[\n{"a": 1},\n{"a": "\xe9"}]', piece)
    assert read(b"\xef\xbb\xbf[12, 345]", piece) == ([12, 345], ["1 (record 1)", "1 (record 2)"])
    with pytest.raises(UserError, match=r"^a\.json:1: expected a JSON list"):
        read(b"12", piece)


def test_memory_does_not_grow_with_the_file(tmp_path):
    row = json.dumps({"text": "word " * 200})
    (tmp_path / "a.json").write_text("[" + ",\n".join([row] * 20_000) + "]")
    tracemalloc.start()
    count = sum(1 for _ in read_file(tmp_path / "a.json"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 20_000 and peak < 8e6 < (tmp_path / "a.json").stat().st_size
