"""Plain texts are read a piece at a time, and nothing of them is lost."""

import gzip
import io
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_engine.data import documents
from lora_engine.data.dataset import prepare
from lora_engine.data.documents import Document
from lora_engine.data.readers import read_file
from lora_engine.data.recipe import Recipe
from lora_engine.data.records import read_records
from lora_engine.data.stream import ExampleStream, Place, StreamPart
from lora_engine.errors import UserError

PARAGRAPH = "One two three. Four é 日本 five.\nSix seven eight.\n\n"


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(documents, "PIECE", 240)


def pieces(text: str, size: int = 100) -> list[tuple[str, str]]:
    """(piece, its place) of a text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE", size)
        document = Document(io.BytesIO(text.encode()), Path("a.txt"))
        read = [(piece, document.origin, is_last) for piece, is_last in document]
    assert [is_last for *_, is_last in read] == [False] * (len(read) - 1) + [True]
    return [(piece, origin.removeprefix("a.txt:")) for piece, origin, _ in read]


@settings(max_examples=60, deadline=None)
@given(
    text=st.lists(
        st.sampled_from(["a ", "é", "日本。", ". ", "\n", "\r\n", "\n\n", "word"]), max_size=80
    ).map("".join),
    size=st.integers(4, 40),
)
def test_nothing_is_lost(text, size):
    read = pieces(text, size)
    assert "".join(piece for piece, _ in read) == text
    assert all(size <= len(piece) <= 2 * size for piece, _ in read[:-1])
    assert len(read[-1][0]) < 2 * size
    before = ""
    for piece, place in read:
        line, inside = 1 + before.count("\n"), before and not before.endswith("\n")
        assert place == f"{line} (character {len(before) + 1})" if inside else str(line)
        before += piece


def test_pieces_end_where_a_reader_would_pause():
    read = pieces(PARAGRAPH * 30, 240)
    assert len(read) > 4 and all(piece.endswith("\n\n") for piece, _ in read)
    assert [place for _, place in read[:3]] == ["1", "16", "31"]
    lines = pieces("word word\n" * 90)
    assert len(lines) > 4 and all(piece.endswith("word\n") for piece, _ in lines)
    sentences = pieces("Word word. " * 90)[:-1]
    assert len(sentences) > 4 and all(piece.endswith("Word word.") for piece, _ in sentences)
    words = pieces("word " * 200)
    assert [place for _, place in words[:3]] == ["1", "1 (character 105)", "1 (character 205)"]
    assert all(piece.startswith(" word") for piece, _ in words[1:])
    assert [len(piece) for piece, _ in pieces("é" * 450)] == [100, 100, 100, 150]


def test_a_long_document_is_learned_as_one(tmp_path, tokenizer, small_pieces):
    text = PARAGRAPH * 30
    (tmp_path / "a.txt").write_text(text)
    dataset = prepare(tmp_path / "a.txt", tokenizer, max_length=None)
    assert len(dataset) > 5
    ids = [token for example in dataset for token in example.input_ids]
    assert tokenizer.decode(ids) == text + tokenizer.eos_token
    assert ids.count(tokenizer.eos_token_id) == 1  # where the document ends
    assert dataset[1].origin == f"{tmp_path / 'a.txt'}:16"
    (short,) = prepare([{"text": text}], tokenizer, max_length=None)
    assert ids == short.input_ids  # the pieces end between tokens


def test_what_is_no_text_is_told_with_its_line(tmp_path, small_pieces):
    good = PARAGRAPH * 20
    for name, bad, words in (
        ("a.txt", b"\xe9", "is not UTF-8 text"),
        ("b.md", b"a\0b", "holds a NUL, which no text does; save it as UTF-8"),
        ("c.txt", "No mark.".encode("utf-16-le"), "holds a NUL"),
    ):
        (tmp_path / name).write_bytes(good.encode() + b"x" + bad)
        with pytest.raises(UserError, match=rf"{name}:61: {words}"):
            read_records(tmp_path / name)


def test_memory_does_not_grow_with_the_file(tmp_path):
    with gzip.open(tmp_path / "a.txt.gz", "wb", 1) as file:
        for _ in range(40):
            file.write(PARAGRAPH.encode() * 20_000)
    tracemalloc.start()
    size = sum(len(row.value["text"]) for row in read_file(tmp_path / "a.txt.gz"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size == 40 * 20_000 * len(PARAGRAPH) and peak < 20e6 < size


def test_a_stream_takes_a_long_document_in_turns(tmp_path, tokenizer, small_pieces, monkeypatch):
    monkeypatch.setattr("lora_engine.data.stream._BYTES", 400)
    (tmp_path / "a.txt").write_text(PARAGRAPH * 60)
    parts = [StreamPart((tmp_path / "a.txt",), Recipe(max_length=16))]
    stream = ExampleStream("data", parts, tokenizer)
    place, whole, places = stream.begin, [], []
    while not place.tracks[0].passes:
        dataset, after = stream.buffer(place)
        whole.append([list(example.input_ids) for example in dataset])
        places.append(place)
        place = after
    assert len(whole) > 5
    ids = [token for some in whole[:-1] for example in some for token in example]
    assert tokenizer.decode(ids) == (PARAGRAPH * 60)[: len(tokenizer.decode(ids))]
    for number in (1, len(whole) - 2):  # from the middle, by another reader
        again = ExampleStream("data", parts, tokenizer).buffer(Place.of(places[number])).dataset
        assert [list(example.input_ids) for example in again] == whole[number]
