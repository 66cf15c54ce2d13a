"""Examples that are too long: a text is split, others are cut so that an answer stays."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from lora_engine.data.render import Example, part
from lora_engine.data.template import Tokenizer

OnTooLong = Literal["split", "truncate", "drop"]
SPLIT = "longer than max_length, split into several examples"
# The last part of a piece, in which it may end: so much of it is given up for a good place.
_SEARCHED = 4
# How good a place is: before a paragraph, a line, a sentence, a word.
_PARAGRAPH, _LINE, _SENTENCE, _WORD = 4, 3, 2, 1
_SENTENCE_ENDS = (".", "!", "?", "…", "。", "！", "？", '."', '!"', '?"')
_WORD_STARTS = ("▁", "Ġ", " ")


class Splitter:
    """Splits a text's tokens into pieces; no token is lost, and none stands in two pieces."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, tuple[str, bool]] = {}

    def split(self, example: Example, max_length: int) -> list[Example]:
        """Pieces of at most `max_length` tokens, which end at a paragraph, line, sentence or word.

        Where the text begins with the tokenizer's first token, so does every piece.
        """
        ids, supervised = example.input_ids, example.supervised
        if len(ids) <= max_length:
            return [example]
        first = ids[:1] if ids[0] == self._tokenizer.bos_token_id and max_length > 2 else []
        pieces: list[Example] = []
        begin = 0
        while begin < len(ids):
            before = first if begin else []
            room = max_length - len(before)
            end = self._end(ids, begin, begin + room)
            piece = replace(
                example,
                input_ids=[*before, *ids[begin:end]],
                supervised=[*[False] * len(before), *supervised[begin:end]],
                notes=example.notes if pieces else (*example.notes, SPLIT),
                ignored=() if pieces else example.ignored,
            )
            pieces.append(piece)
            begin = end
        return pieces

    def _end(self, ids: Sequence[int], begin: int, limit: int) -> int:
        """Where a piece that begins at `begin` ends, at most at `limit`."""
        if limit >= len(ids):
            return len(ids)
        latest = min(limit, len(ids) - 2) if limit > begin + 2 else limit  # two tokens remain
        earliest = max(begin + 2, latest - (limit - begin) // _SEARCHED)
        best, rank = latest, -1
        for place in range(latest, earliest - 1, -1):
            if (found := self._rank(ids, place)) > rank:
                best, rank = place, found
                if rank == _PARAGRAPH:
                    break
        return best

    def _rank(self, ids: Sequence[int], place: int) -> int:
        """How well a text is split before the token at `place`."""
        before, _ = self._text(ids[place - 1])
        _, begins_word = self._text(ids[place])
        if "\n" in before:
            again = before.count("\n") > 1 or "\n" in self._text(ids[place - 2])[0]
            return _PARAGRAPH if again else _LINE
        if before.rstrip().endswith(_SENTENCE_ENDS):
            return _SENTENCE
        return _WORD if begins_word else 0

    def _text(self, token: int) -> tuple[str, bool]:
        """A token's text, and whether a word begins with it."""
        if token not in self._texts:
            text = self._tokenizer.decode([token], clean_up_tokenization_spaces=False)
            (spelling,) = self._tokenizer.convert_ids_to_tokens([token])
            starts = text.startswith(" ") or str(spelling).startswith(_WORD_STARTS)
            self._texts[token] = (text, starts)
        return self._texts[token]


def cut(example: Example, max_length: int, first: int | None = None) -> Example:
    """The example in at most `max_length` tokens, with an answer.

    Where the beginning holds a whole answer, it is kept. Where not, the prompt loses its beginning
    so that the first answer is whole; one that is longer by itself loses its end. first: a token,
    the tokenizer's, that stays at the beginning.
    """
    ids, supervised = example.input_ids, example.supervised
    if len(ids) <= max_length:
        return example
    begin = _first_answer(supervised)
    end = next((i for i in range(begin, len(ids)) if not supervised[i]), len(ids))
    if end <= max_length or begin == 0 or begin == len(ids):
        kept = list(range(max_length))
    else:
        head = [0] if first is not None and ids[0] == first and begin > 1 and max_length > 2 else []
        room = max_length - len(head)
        start = min(max(end - room, len(head)), begin - 1)
        kept = [*head, *range(start, min(start + room, len(ids)))]
    return replace(part(example, kept), truncated=True)


def _first_answer(supervised: Sequence[bool]) -> int:
    """Where the first learned token stands; behind the end if there is none."""
    return list(supervised).index(True) if True in supervised else len(supervised)
