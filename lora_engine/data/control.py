"""Control tokens, and how text that spells one is kept from becoming one.

A control token has a meaning of its own to the model: it begins or ends a turn, or the text. What
a user wrote may spell one, as this sentence's `<|im_end|>` does. Such text is replaced by a
stand-in of digits before the chat template runs, which writes the real control tokens around it;
the tokenizer then gets each stand-in's text as plain text (see `encode`).
"""

import re
from collections.abc import Mapping, Sequence
from functools import cached_property

from lora_engine.data.strings import strings_in
from lora_engine.data.template import Message, Tokenizer, try_render

# Stands for a message's text while looking for its place: no template changes or splits it.
MARKER = "\ue000\ue001text\ue001\ue000"
# Digits: no filter of a template (upper, trim, tojson, ...) changes them.
_OPEN, _CLOSE = "70519463882617035294", "40625893"
_STAND_IN = re.compile(f"{_OPEN}([0-9]{{4}}){_CLOSE}")


class ControlTokens:
    """The control tokens of a tokenizer with its chat template, neither of which may change.

    They are its special tokens, and added tokens that the template writes around a user's text or
    behind the assistant's. Other added tokens, such as `<think>`, are part of what is written.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = {str(t): t for t in tokenizer.added_tokens_decoder.values()}
        special = {text for text, token in self._added.items() if token.special}
        self._plain_added = [text for text in self._added if text not in special]
        # Longest first, so that one that begins another does not hide it.
        self.special = tuple(_longest_first({*tokenizer.all_special_tokens, *special}))

    @cached_property
    def eos(self) -> tuple[str, int] | None:
        """The token that ends a text, and its id; None if there is none."""
        token, number = self._tokenizer.eos_token, self._tokenizer.eos_token_id
        return None if number is None else (token, number)

    @cached_property
    def bos(self) -> tuple[str, int | None]:
        """The token that the tokenizer itself begins a text with, and its id; ("", None): none."""
        first = self._tokenizer("", verbose=False)["input_ids"][:1]
        token, number = self._tokenizer.bos_token, self._tokenizer.bos_token_id
        return (token, number) if number is not None and first == [number] else ("", None)

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """Their texts, longest first. A single character or white space is ordinary text too."""
        around = self._around_user() + self._behind_assistant()
        written = (text for text in self._plain_added if text in around)
        return tuple(
            text for text in _longest_first({*self.special, *written}) if len(text.strip()) > 1
        )

    @cached_property
    def ids(self) -> frozenset[int]:
        """Their ids, without that of the unknown token, which stands for other text as well."""
        ids = self._tokenizer.convert_tokens_to_ids(list(self.texts))
        return frozenset(ids) - {self._tokenizer.unk_token_id, None}

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches any of them, as a group."""
        return re.compile(
            "(" + "|".join(map(re.escape, self.texts)) + ")" if self.texts else "(?!)"
        )

    @cached_property
    def turn_end(self) -> str:
        """The one that the template writes behind what an assistant says, or ""."""
        behind = self._behind_assistant().lstrip()
        return next((token for token in self.texts if behind.startswith(token)), "")

    @cached_property
    def ends(self) -> tuple[str, ...]:
        """Those that end a text or an assistant's turn."""
        return tuple(dict.fromkeys(filter(None, (self._tokenizer.eos_token, self.turn_end))))

    def found_in(self, value: object) -> tuple[str, ...]:
        """The control tokens that the strings in `value` spell, each once."""
        texts = (text for text in strings_in(value) if self._may_be_in(text))
        return tuple(dict.fromkeys(match for text in texts for match in self.pattern.findall(text)))

    def split_end(self, text: str) -> tuple[str, tuple[str, ...]]:
        """(text without the end tokens it ends in, those tokens in their order, each once).

        White space behind an end token goes with it.
        """
        ends: list[str] = []
        while True:
            stripped = text.rstrip()
            end = next((token for token in self.ends if stripped.endswith(token)), None)
            if end is None:
                return text, tuple(dict.fromkeys(reversed(ends)))
            text = stripped.removesuffix(end)
            ends.append(end)

    def mark(self, text: str) -> str:
        """`text` with stand-ins for the control tokens that it spells."""
        return self.pattern.sub(self._stand_in, text)

    def mark_message(self, message: Message) -> Message:
        """`message` with stand-ins in all its strings, keys included."""
        return {self.mark(key): self._mark_value(value) for key, value in message.items()}

    def mark_values(self, values: Sequence[object]) -> tuple[object, ...]:
        """`values` with stand-ins in all their strings, keys included."""
        return tuple(map(self._mark_value, values))

    def _mark_value(self, value: object) -> object:
        if isinstance(value, str):
            return self.mark(value)
        if isinstance(value, Mapping):
            return {self.mark(key): self._mark_value(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self._mark_value(inner) for inner in value]
        return value

    def unmark(self, text: str) -> str:
        """`text` with the control tokens' texts instead of their stand-ins."""
        return _STAND_IN.sub(self._stood_for, text)

    def marked_in(self, text: str) -> tuple[str, ...]:
        """The control tokens that stand-ins in `text` stand for, each once."""
        return tuple(dict.fromkeys(map(self._stood_for, _STAND_IN.finditer(text))))

    def is_marked(self, text: str) -> bool:
        """Whether `text` holds a stand-in."""
        return _OPEN in text and _STAND_IN.search(text) is not None

    def strips(self, token: str) -> tuple[bool, bool]:
        """Whether `token` swallows the white space (before it, behind it)."""
        added = self._added.get(token)
        return (added.lstrip, added.rstrip) if added else (False, False)

    @cached_property
    def _beginnings(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return tuple({text[0] for text in self.texts}), tuple({text[:3] for text in self.texts})

    def _may_be_in(self, text: str) -> bool:
        """Whether `text` may hold one: a fast test, after which few texts need the pattern."""
        first, longer = self._beginnings
        return any(begin in text for begin in first) and any(begin in text for begin in longer)

    def _stand_in(self, match: re.Match[str]) -> str:
        return f"{_OPEN}{self.texts.index(match[0]):04}{_CLOSE}"

    def _stood_for(self, match: re.Match[str]) -> str:
        index = int(match[1])
        return self.texts[index] if index < len(self.texts) else match[0]

    def _around_user(self) -> str:
        return "".join(self._rendered_around({"role": "user", "content": MARKER}))

    def _behind_assistant(self) -> str:
        asked = {"role": "user", "content": "?"}
        return self._rendered_around(asked, {"role": "assistant", "content": MARKER})[1]

    def _rendered_around(self, *messages: Message) -> tuple[str, str]:
        """What the template writes before and behind the marker."""
        if self._tokenizer.chat_template is None:
            return "", ""
        rendered = try_render(messages, self._tokenizer)
        if rendered is None or rendered.count(MARKER) != 1:
            return "", ""
        before, behind = rendered.split(MARKER)
        return before, behind


def _longest_first(texts: Sequence[str] | set[str]) -> list[str]:
    return sorted(texts, key=lambda text: (-len(text), text))
