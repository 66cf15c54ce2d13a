"""What answers are like: the same ones, refusals, scripts, and what the tokenizer does to words."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from lora_engine.data.listing import Finding, group
from lora_engine.data.render import Example
from lora_engine.data.template import Tokenizer

LOOKED_AT = 20_000  # examples of which answers are read
_SAID_OFTEN = 0.01  # share of the answers from which on the same one is told of
_SHOWN = 60  # characters of an answer or a word
_WORDS = 2_000  # most frequent words that are tokenised
_BADLY = 1.6  # letters per token, below which a word is split badly
_REFUSALS = re.compile(
    r"^\W*(?:i['’]?m (?:very |really )?sorry|sorry,|i apologi[sz]e|i (?:cannot|can['’]?t|am unable|"
    r"am not able|won['’]?t be able)|unfortunately, i|as an ai|as a (?:large )?language model)",
    re.IGNORECASE,
)
_WORD = re.compile(r"[^\W\d_]{4,}")


@dataclass(frozen=True)
class Quality:
    """Of the first LOOKED_AT examples.

    looked_at: how many these are.
    same_answers: answers that more examples share than chance explains, with their places.
    refusals: answers that begin as refusals do.
    scripts: letters of all texts by their script, the most frequent first.
    unknown: tokens of texts that the tokenizer has no token for.
    split_badly: words of little more than a letter a token: (word, tokens, times).
    """

    looked_at: int = 0
    same_answers: tuple[Finding, ...] = ()
    refusals: Finding | None = None
    scripts: tuple[tuple[str, int], ...] = ()
    unknown: int = 0
    split_badly: tuple[tuple[str, int, int], ...] = ()


def quality(examples: Iterable[Example], tokenizer: Tokenizer) -> Quality:
    """Looks at what the examples say and teach."""
    answers: list[tuple[str, str]] = []
    scripts, words = Counter[str](), Counter[str]()
    unknown = looked_at = 0
    for example in islice(examples, LOOKED_AT):
        looked_at += 1
        ids = example.input_ids
        if tokenizer.unk_token_id is not None:
            unknown += ids.count(tokenizer.unk_token_id)
        text = tokenizer.decode(ids)
        for letters, count in Counter(text).items():
            if letters.isalpha():
                scripts[_script(letters)] += count
        words.update(_WORD.findall(text))
        if answer := _first_answer(example):
            answers.append((example.origin, tokenizer.decode(answer).strip()))
    refusals = [(origin, "") for origin, said in answers if _REFUSALS.match(said)]
    often = max(3, int(len(answers) * _SAID_OFTEN))
    return Quality(
        looked_at=looked_at,
        same_answers=tuple(
            Finding(_shortened(same.text), same.count, same.origins)
            for same in sorted(group(answers), key=lambda same: -same.count)[:5]
            if same.count >= often
        ),
        refusals=group(refusals)[0] if refusals else None,
        scripts=tuple(scripts.most_common()),
        unknown=unknown,
        split_badly=_split_badly(words, tokenizer),
    )


def _first_answer(example: Example) -> list[int]:
    """The first run of learned tokens; none where all is learned, as of a text."""
    supervised = example.supervised
    if True not in supervised or supervised[0]:
        return []
    begin = supervised.index(True)
    end = next((i for i in range(begin, len(supervised)) if not supervised[i]), len(supervised))
    return example.input_ids[begin:end]


def _script(letter: str) -> str:
    """'Latin' of é: how its name in Unicode begins."""
    name = unicodedata.name(letter, "unknown").partition(" ")[0]
    return {"CJK": "Han"}.get(name, name.capitalize())


def _split_badly(words: Counter[str], tokenizer: Tokenizer) -> tuple[tuple[str, int, int], ...]:
    """The most frequent words that take many tokens for their length."""
    bad = []
    for word, times in words.most_common(_WORDS):
        tokens = len(tokenizer(f" {word}", add_special_tokens=False, verbose=False)["input_ids"])
        if tokens > 2 and len(word) / tokens < _BADLY:
            bad.append((_shortened(word), tokens, times))
    return tuple(bad[:10])


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else line[: _SHOWN - 1] + "…"


def token_texts(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """The text of each token; of a character in several tokens with the last of them."""
    texts, pending = [], []
    for token in ids:
        pending.append(token)
        text = tokenizer.decode(pending)
        if "\ufffd" in text and len(pending) < 4:
            texts.append("")
            continue
        texts.append(text)
        pending = []
    return texts
