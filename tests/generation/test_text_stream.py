"""Text as its tokens come: whole characters, and nothing of what ends it."""

import pytest

from lora_engine.generation.text import TextStream


class Bytes:
    """A token is a byte; 256 is special."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return bytes(t for t in token_ids if t < 256).decode("utf-8", errors="replace")


def pieces(text: str, *stop: str) -> tuple[list[str], TextStream]:
    stream = TextStream(Bytes(), stop)
    found = []
    for token in text.encode():
        found.append(stream.push(token))
        if stream.stopped:
            break
    return [*found, stream.finish()], stream


@pytest.mark.parametrize("text", ["plain", "añ😀o", "", "e\u0301a", "終わり"])
def test_pieces_are_the_text_in_whole_characters(text: str) -> None:
    found, stream = pieces(text)
    assert "".join(found) == text == stream.text
    assert not any("\ufffd" in piece for piece in found)


def test_text_ends_before_what_stops_it() -> None:
    found, stream = pieces("one STOP two", "STOP")
    assert stream.stopped
    assert "".join(found) == "one " == stream.text


def test_the_first_of_several_stops_counts() -> None:
    found, _ = pieces("ab--##", "##", "--")
    assert "".join(found) == "ab"


def test_the_beginning_of_a_stop_is_kept_back_until_it_is_none() -> None:
    stream = TextStream(Bytes(), ("<end>",))
    assert [stream.push(b) for b in b"x<en"] == ["x", "", "", ""]
    assert stream.push(ord("x")) == "<enx"


def test_what_was_kept_back_is_given_at_the_end() -> None:
    found, stream = pieces("x<en", "<end>")
    assert found[-1] == "<en"
    assert stream.text == "x<en"


def test_a_stop_is_found_across_pieces_of_several_characters() -> None:
    class Words:
        def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
            return "".join(["ab\n", "\nUser: c", "d"][t] for t in token_ids)

    stream = TextStream(Words(), ("\n\nUser",))
    assert stream.push(0) == "ab"
    assert stream.push(1) == ""
    assert stream.stopped
    assert stream.text == "ab"


def test_bytes_that_never_become_a_character_are_shown_at_the_end() -> None:
    stream = TextStream(Bytes())
    assert stream.push(0xF0) == ""
    assert stream.finish() == "\ufffd"
