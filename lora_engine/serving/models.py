"""What writes under a name that requests give, and their prompts in its tokens."""

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Protocol

from lora_engine.data.encode import Encoder
from lora_engine.data.prompts import prompt_ids
from lora_engine.data.records import Record
from lora_engine.errors import UserError
from lora_engine.generation.engine import Request
from lora_engine.generation.text import Detokenizer, TextStream
from lora_engine.serving.errors import ApiError
from lora_engine.serving.requests import Asked, Limits, Prompt


class TokenTexts(Detokenizer, Protocol):
    """What of a tokenizer turns tokens into text, one by one too."""

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]: ...


class Served:
    """One of the names.

    encoder: of prompts, with a tokenizer of its own: it is used in another thread than answers are
    written in. using: a context in which the model writes as it. stop_tokens: that end an answer.
    positions: the most tokens of a prompt and its answer together. vocabulary: ids are below it.
    """

    def __init__(
        self,
        name: str,
        encoder: Encoder,
        tokenizer: TokenTexts,
        using: Callable[[], AbstractContextManager[None]],
        *,
        stop_tokens: Sequence[int],
        positions: int,
        vocabulary: int,
    ) -> None:
        self.name, self.using, self.positions = name, using, positions
        self.stop_tokens, self.vocabulary = tuple(stop_tokens), vocabulary
        self._encoder, self._tokenizer = encoder, tokenizer

    def requests(self, asked: Asked, limits: Limits) -> list[Request]:
        """One of each prompt. Raises ApiError for what cannot be tokenised, or is too long."""
        return [self._request(prompt, asked, limits) for prompt in asked.prompts]

    def _request(self, prompt: Prompt, asked: Asked, limits: Limits) -> Request:
        param = "messages" if asked.chat else "prompt"
        try:
            ids = prompt_ids(prompt, self._encoder) if isinstance(prompt, Record) else [*prompt]
        except UserError as error:
            raise ApiError(400, str(error), param=param) from error
        if not ids:
            raise ApiError(400, f"{param}: is empty", param=param)
        if max(ids) >= self.vocabulary:
            raise ApiError(
                400, f"{param}: token {max(ids)}, {self.name} has {self.vocabulary}", param=param
            )
        room = self.positions - len(ids)
        new = min(limits.new_tokens, room) if asked.new_tokens is None else asked.new_tokens
        least = 0 if asked.only_read else 1
        if new < least or new > room:
            raise ApiError(
                400,
                f"{param}: {len(ids):,} tokens, and {max(new, least):,} new ones, are more than "
                f"the {self.positions:,} of {self.name}",
                param=param,
                code="context_length_exceeded",
            )
        sampling = replace(asked.sampling, max_new_tokens=max(new, 1), stop_tokens=self.stop_tokens)
        return Request(tuple(ids), sampling, asked.count)

    def prompt_texts(self, prompt: Prompt, prompt_ids: Sequence[int]) -> list[str]:
        """What each token of a prompt adds to its text; special ones are text too, but for the
        start token that a text did not have."""
        stream = TextStream(self._tokenizer, special=True)
        texts = [stream.push(token) for token in prompt_ids]
        texts[-1] += stream.finish()
        if isinstance(prompt, Record) and "".join(texts[1:]) == prompt.prompt:
            texts[0] = ""
        return texts

    def token_text(self, token: int) -> tuple[str, bytes]:
        """The token as it stands within a text, and its bytes: of a part of a character the text is
        "bytes:\\xe2"."""
        # Alone, some tokenizers leave out its space.
        once = self._tokenizer.decode([token], skip_special_tokens=False)
        twice = self._tokenizer.decode([token, token], skip_special_tokens=False)
        text = twice[len(once) :]
        if "\ufffd" not in text:
            return text, text.encode()
        spelled = _bytes_of(self._tokenizer.convert_ids_to_tokens([token])[0])
        if spelled is None:
            return text, text.encode()
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled), spelled


def _byte_level() -> dict[str, int]:
    """Bytes by the characters that byte-level BPE (GPT-2) spells them with: printable ones are
    themselves, the others follow from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_LEVEL = _byte_level()


def _bytes_of(token: str) -> bytes | None:
    """The bytes of a vocabulary's entry: of SentencePiece "<0xE2>". None: it spells none."""
    if re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):
        return bytes([int(token[3:5], 16)])
    if all(character in _BYTE_LEVEL for character in token):
        return bytes(_BYTE_LEVEL[character] for character in token)
    return None
