"""Long texts are split without losing a token; others are cut so that an answer stays."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_tokenizers import make_byte_level, make_space_prefixing

from lora_engine.data.dataset import prepare
from lora_engine.data.fit import SPLIT, Splitter, cut
from lora_engine.data.render import WEIGHT, Example

TEXT = "One. Two three.\n\nFour five six seven eight nine. Ten\neleven twelve thirteen fourteen. "


@pytest.mark.parametrize("make", [make_byte_level, make_space_prefixing], ids=["bytes", "spaces"])
def test_a_long_text_becomes_pieces_and_loses_nothing(make):
    tokenizer = make()
    text = TEXT * 6
    (whole,) = prepare([{"text": text}], tokenizer, max_length=None)
    dataset = prepare([{"text": text}], tokenizer, max_length=40)
    assert [token for piece in dataset for token in piece.input_ids] == whole.input_ids
    assert all(2 <= len(piece) <= 40 for piece in dataset)
    assert dataset.num_records == 1 and len(dataset) > 3
    assert not dataset.truncated and not dataset.duplicates
    assert dataset[0].notes == (SPLIT,) and dataset[1].notes == ()


def test_pieces_end_where_a_reader_would_pause(tokenizer):
    pieces = prepare([{"text": TEXT * 20}], tokenizer, max_length=200)
    assert len(pieces) > 3
    ends = [tokenizer.decode(piece.input_ids) for piece in pieces][:-1]
    assert all(text.endswith(("\n\n", "\n", ".", ". ", ".\n\n")) for text in ends)


def test_every_piece_begins_with_the_tokenizers_first_token():
    tokenizer = make_byte_level(writes_bos=True)
    pieces = prepare([{"text": TEXT * 6}], tokenizer, max_length=40)
    assert len(pieces) > 3
    assert {piece.input_ids[0] for piece in pieces} == {tokenizer.bos_token_id}
    assert all(not piece.supervised[0] for piece in pieces)
    (whole,) = prepare([{"text": TEXT * 6}], tokenizer, max_length=None)
    assert [t for piece in pieces for t in piece.input_ids[1:]] == whole.input_ids[1:]


@given(length=st.integers(2, 400), limit=st.integers(2, 50))
def test_pieces_of_any_length(tokenizer_of_bytes, length, limit):
    example = Example(list(range(length)), [True] * length)
    pieces = Splitter(tokenizer_of_bytes).split(example, limit)
    assert [token for piece in pieces for token in piece.input_ids] == example.input_ids
    assert all(len(piece) <= limit for piece in pieces)
    assert all(len(piece) >= 2 for piece in pieces) or limit == 2 or length <= 3


@pytest.fixture(scope="module")
def tokenizer_of_bytes():
    class Bytes:
        bos_token_id = None

        def decode(self, ids, **_):
            return "".join("\n" if i % 7 == 0 else " a" if i % 3 == 0 else "b" for i in ids)

        def convert_ids_to_tokens(self, ids):
            return [self.decode([i]) for i in ids]

    return Bytes()


def marked(text: str) -> Example:
    """Small letters are prompt, capital ones learned."""
    return Example([ord(c) for c in text], [c.isupper() for c in text])


def text_of(example: Example) -> str:
    return "".join(map(chr, example.input_ids))


@pytest.mark.parametrize(
    ("text", "limit", "kept"),
    [
        ("abcDE", 5, "abcDE"),
        ("abcdeFG", 5, "cdeFG"),  # the prompt loses its beginning
        ("abcdeFGHIJK", 5, "eFGHI"),  # the answer alone is too long: it loses its end
        ("abCDefGH", 5, "abCDe"),  # the first answer is whole
        ("abcdefGHijKL", 5, "defGH"),
        ("ABCDEFG", 3, "ABC"),
        ("<bcdeFG", 4, "<eFG"),  # the tokenizer's first token stays
        ("<bcdeFGHIJ", 4, "<eFG"),
    ],
)
def test_an_answer_stays(text, limit, kept):
    shorter = cut(marked(text), limit, first=ord("<"))
    assert text_of(shorter) == kept
    assert shorter.supervised == [c.isupper() for c in kept]
    assert shorter.truncated == (text != kept) and shorter.num_targets > 0


def test_weights_of_targets_are_cut_with_them():
    example = marked("abcdEFgHI")
    example = Example(example.input_ids, example.supervised, columns={WEIGHT: [1, 2, 3, 4]})
    assert cut(example, 5).columns == {WEIGHT: [1, 2]}
    assert text_of(cut(example, 5)) == "bcdEF"
    assert cut(example, 8).columns == {WEIGHT: [1, 2, 3]}


def test_a_pair_that_is_too_long_keeps_its_answer(tokenizer):
    long = "a b c d e f g h i j"
    dataset = prepare([{"prompt": long, "completion": " yes"}], tokenizer, max_length=8)
    (whole,) = prepare([{"prompt": long, "completion": " yes"}], tokenizer)
    assert dataset[0].input_ids == whole.input_ids[-8:]
    assert dataset.truncated == ("record:0",)
