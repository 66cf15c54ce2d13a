"""Token ids of text out of those of its words, each of which the tokenizer is asked for once.

A tokenizer of byte pairs cuts a text at a pattern and encodes each piece by itself. By the patterns
that are known here a piece begins wherever a space and a letter of ASCII stand behind a character
of ASCII that is no space. So a text may be cut there first, and what stands between two such
places, a word as a rule, has the same tokens wherever it stands. The space, which is a word's first
character, is left out of what words are kept by: the first one of a text has none.
"""

import json
import re
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Protocol

_MOST = 100_000  # words that are kept, some 25 MB
_LONGEST = 40  # characters of one that is, the space before it included
_GAP = re.compile(" (?<=[!-~] )(?=[A-Za-z])")  # begins with what a search looks for
_END = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
# The patterns of GPT-2, of cl100k as Llama 3 and as Qwen have it, and of o200k.
_PATTERNS = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    *(
        rf"{_END}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{number}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
        for number in (r"\p{N}", r"\p{N}{1,3}")
    ),
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_END}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_END}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_DIGITS = (r"\p{N}", r"\p{N}{1,3}")


class Encoding(Protocol):
    """What is used of a tokenizers.Encoding."""

    ids: list[int]


class PreTokenizer(Protocol):
    """What is used of a tokenizers.PreTokenizer."""

    def __getstate__(self) -> bytes: ...


class Backend(Protocol):
    """What is used of a tokenizers.Tokenizer."""

    encode_special_tokens: bool
    normalizer: object
    pre_tokenizer: PreTokenizer | None
    model: object
    truncation: object
    padding: object

    def encode_batch_fast(
        self, texts: Sequence[str], *, add_special_tokens: bool
    ) -> Sequence[Encoding]: ...


class _Added(Protocol):
    lstrip: bool
    rstrip: bool
    single_word: bool
    normalized: bool


class WordMemo:
    """Encodes text as `backend` does, without the tokens around a whole text.

    added: texts of the added tokens by id.
    """

    def __init__(self, backend: Backend, added: Mapping[int, str]) -> None:
        self._backend = backend
        self._ids = {text: token for token, text in added.items()}
        longest_first = sorted(self._ids, key=len, reverse=True)
        self._added = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self._begins = tuple({text[0] for text in self._ids})
        self._first: dict[str, Sequence[int]] = {}
        self._known: dict[str, Sequence[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Its token ids."""
        if not any(begin in text for begin in self._begins):
            return self._plain(text)
        ids: list[int] = []
        for i, part in enumerate(self._added.split(text)):  # plain, token, plain, ..., plain
            if i % 2:
                ids.append(self._ids[part])
            elif part:
                ids += self._plain(part)
        return ids

    def _plain(self, text: str) -> list[int]:
        """Of a text without added tokens."""
        first, *words = _GAP.split(text)
        found = [self._first.get(first), *map(self._known.get, words)]
        if None in found:
            new = [i for i, ids in enumerate(found) if ids is None]
            asked = [" " + words[i - 1] if i else first for i in new]
            made = self._backend.encode_batch_fast(asked, add_special_tokens=False)
            for i, encoding in zip(new, made, strict=True):
                found[i] = encoding.ids
                self._keep(words[i - 1] if i else first, encoding.ids, is_first=not i)
        return list(chain.from_iterable(filter(None, found)))

    def _keep(self, word: str, ids: Sequence[int], *, is_first: bool) -> None:
        if len(word) < _LONGEST and len(self._first) + len(self._known) < _MOST:
            (self._first if is_first else self._known)[word] = ids


def word_memo(backend: Backend, added: Mapping[int, _Added]) -> WordMemo | None:
    """For a tokenizer with these added tokens; None where words cannot be told to stand alone."""
    model = backend.model
    is_known = (
        type(model).__name__ == "BPE"
        and not getattr(model, "dropout", None)
        and not getattr(model, "end_of_word_suffix", None)
        and not getattr(model, "continuing_subword_prefix", None)
        and backend.normalizer is None
        and backend.truncation is backend.padding is None
        and backend.pre_tokenizer is not None
        and _cuts_at_words(json.loads(backend.pre_tokenizer.__getstate__()))
    )
    plain = not any(t.lstrip or t.rstrip or t.single_word for t in added.values())
    if not (is_known and plain and added and len({t.normalized for t in added.values()}) == 1):
        return None
    return WordMemo(backend, {token: str(text) for token, text in added.items()})


def _cuts_at_words(pre_tokenizer: Mapping[str, object]) -> bool:
    """Whether each piece that it cuts begins where `_GAP` is: nothing of it is unknown here."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    cuts = bytes_ = 0
    for step in steps if isinstance(steps, list) else ():
        if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            bytes_ += 1
            cuts += bool(step.get("use_regex", True))
        elif step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            pattern = step["pattern"].get("Regex")
            if pattern not in (*_PATTERNS, *_DIGITS):
                return False
            cuts += pattern in _PATTERNS
        elif step["type"] != "Digits":
            return False
    return bytes_ == 1 and cuts >= 1
