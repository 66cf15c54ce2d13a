"""Answers in OpenAI's form: whole ones, and the chunks of one that streams."""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from lora_engine.generation.engine import Finish, Request, Written
from lora_engine.generation.prompt import Read
from lora_engine.serving.models import Served
from lora_engine.serving.requests import Asked

_LOWEST = -9999.0  # JSON has no infinity


class Told(NamedTuple):
    """A token's text, its bytes and its log-probability, None of a prompt's first token."""

    text: str
    spelled: bytes
    logprob: float | None


class TokenInfo(NamedTuple):
    """A token of an answer, and the likeliest in its place."""

    token: Told
    likeliest: tuple[Told, ...]


class Piece(NamedTuple):
    """What one token adds to the answer of that number. info: None where it is not to be told.
    written: whether it is the model's, and not the prompt's."""

    answer: int
    text: str
    info: TokenInfo | None
    finish: Finish | None
    written: bool = True


class Pieces:
    """Makes pieces of the generator's events, in the thread that these come in."""

    def __init__(self, served: Served, asked: Asked, requests: Sequence[Request]) -> None:
        self._served, self._asked, self._requests = served, asked, requests
        self._stop_tokens = frozenset(served.stop_tokens)
        self._text = lru_cache(1024)(served.token_text)

    def piece(self, place: int, event: Written) -> Piece:
        done = event.completion
        info = None
        if self._asked.logprobs is not None and event.token not in self._stop_tokens:
            info = TokenInfo(
                self._told(event.token, event.logprob),
                tuple(self._told(token, logprob) for token, logprob in event.likeliest),
            )
        finish = None if done is None else done.finish
        return Piece(
            answer=place * self._asked.count + event.number,
            text=event.piece,
            info=info,
            finish=finish,
        )

    def prompt(self, place: int, read: Sequence[Read]) -> list[Piece]:
        """The prompt at the beginning of each of its answers. read: its tokens, or none where
        they are not to be told."""
        ids = self._requests[place].prompt_ids
        texts = self._served.prompt_texts(self._asked.prompts[place], ids)
        infos: list[TokenInfo | None] = [
            TokenInfo(
                self._told(one.token, one.logprob),
                tuple(self._told(token, logprob) for token, logprob in one.likeliest),
            )
            for one in read
        ]
        if not infos:
            texts, infos = ["".join(texts)], [None]
        ending: list[Finish | None] = [None] * len(texts)
        if self._asked.only_read:
            ending[-1] = "length"
        count = self._asked.count
        return [
            Piece(answer=place * count + number, text=text, info=info, finish=finish, written=False)
            for number in range(count)
            for text, info, finish in zip(texts, infos, ending, strict=True)
        ]

    def _told(self, token: int, logprob: float | None) -> Told:
        text, spelled = self._text(token)
        known = None if logprob is None else max(logprob, _LOWEST)
        return Told(text=text, spelled=spelled, logprob=known)


@dataclass
class _Answer:
    text: str = ""
    tokens: int = 0
    infos: list[tuple[int, TokenInfo]] = field(default_factory=list)  # and where in the text
    finish: Finish | None = None


class Reply:
    """The answers to one request as they grow."""

    def __init__(self, asked: Asked, requests: Sequence[Request]) -> None:
        self.asked = asked
        self._prompt_tokens = sum(len(request.prompt_ids) for request in requests)
        self._answers = [_Answer() for _ in range(len(requests) * asked.count)]
        kind = "chatcmpl" if asked.chat else "cmpl"
        self._id, self._created = f"{kind}-{secrets.token_hex(12)}", int(time.time())

    def add(self, piece: Piece) -> None:
        """The next piece; of chunks, `chunks` gives those that it makes."""
        answer = self._answers[piece.answer]
        if piece.info is not None:
            answer.infos.append((len(answer.text), piece.info))
        answer.text += piece.text
        answer.tokens += piece.written
        answer.finish = piece.finish

    def whole(self) -> dict[str, object]:
        """The body once all is written."""
        choices: list[dict[str, object]] = []
        for index, answer in enumerate(self._answers):
            said: dict[str, object] = {"text": answer.text}
            if self.asked.chat:
                message = {"role": "assistant", "content": answer.text, "refusal": None}
                said = {"message": message}
            told = None if self.asked.logprobs is None else self._logprobs(answer.infos)
            choices.append(
                {"index": index, **said, "logprobs": told, "finish_reason": answer.finish}
            )
        kind = "chat.completion" if self.asked.chat else "text_completion"
        return {**self._head(kind), "choices": choices, "usage": self._usage()}

    def opening(self) -> list[dict[str, object]]:
        """The chunks before anything is written."""
        if not self.asked.chat:
            return []
        delta = {"role": "assistant", "content": ""}
        return [self._chunk(i, {"delta": delta}, None, None) for i in range(len(self._answers))]

    def chunks(self, piece: Piece) -> list[dict[str, object]]:
        """The chunks of a piece, often one."""
        self.add(piece)
        made = []
        logprobs = None
        if piece.info is not None:
            infos = self._answers[piece.answer].infos
            logprobs = self._logprobs(infos)
            infos.clear()
        if piece.text or logprobs:
            said: dict[str, object] = {"text": piece.text}
            if self.asked.chat:
                said = {"delta": {"content": piece.text}}
            made.append(self._chunk(piece.answer, said, logprobs, None))
        if piece.finish is not None:
            said = {"delta": {}} if self.asked.chat else {"text": ""}
            made.append(self._chunk(piece.answer, said, None, piece.finish))
        return made

    def closing(self) -> list[dict[str, object]]:
        """The chunks after all is written."""
        if not self.asked.usage:
            return []
        return [{**self._head(self._chunk_kind), "choices": [], "usage": self._usage()}]

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.asked.chat else "text_completion"

    def _chunk(
        self,
        index: int,
        said: dict[str, object],
        logprobs: dict[str, object] | None,
        finish: Finish | None,
    ) -> dict[str, object]:
        choice = {"index": index, **said, "logprobs": logprobs, "finish_reason": finish}
        usage = {"usage": None} if self.asked.usage else {}
        return {**self._head(self._chunk_kind), "choices": [choice], **usage}

    def _head(self, kind: str) -> dict[str, object]:
        about = {"id": self._id, "object": kind, "created": self._created}
        return {**about, "model": self.asked.model}

    def _usage(self) -> dict[str, object]:
        written = sum(answer.tokens for answer in self._answers)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": written,
            "total_tokens": self._prompt_tokens + written,
        }

    def _logprobs(self, infos: Sequence[tuple[int, TokenInfo]]) -> dict[str, object]:
        if self.asked.chat:
            return {"content": [_chat_token(info) for _, info in infos], "refusal": None}
        likeliest = [
            None if info.token.logprob is None else {t.text: t.logprob for t in info.likeliest}
            for _, info in infos
        ]
        return {
            "tokens": [info.token.text for _, info in infos],
            "token_logprobs": [info.token.logprob for _, info in infos],
            "top_logprobs": likeliest if self.asked.logprobs else None,
            "text_offset": [offset for offset, _ in infos],
        }


def _chat_token(info: TokenInfo) -> dict[str, object]:
    return {**_token(info.token), "top_logprobs": [_token(token) for token in info.likeliest]}


def _token(token: Told) -> dict[str, object]:
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.spelled)}
