"""Many continuations at once: a text that ends makes room for the next one that waits."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from lora_engine.errors import UserError
from lora_engine.generation.decoder import Decoder, decoder_of
from lora_engine.generation.sampling import Likeliest, RandomNumbers, Sampling, choose
from lora_engine.generation.text import Detokenizer, TextStream

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Request:
    """A prompt, and how often and how it is gone on with.

    prompt_ids: at least one token. count: continuations, which differ by their random numbers.
    """

    prompt_ids: tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)
    count: int = 1


@dataclass(frozen=True)
class Completion:
    """token_ids: what was written, the token that ended it included.

    logprobs: of each of them, as the model that wrote it has them at the sampling's temperature.
    text: without special tokens and without what stopped it; "" without a tokenizer.
    finish: "stop" at a stop token or text, "length" at max_new_tokens.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish: Finish


@dataclass(frozen=True)
class Written:
    """One token of one continuation: of which request and which of its continuations, and, with
    the last one, the whole.

    piece: the text that it settles. likeliest: the `top_logprobs` likeliest in its place.
    """

    request: int
    number: int
    token: int
    logprob: float
    likeliest: Likeliest
    piece: str
    completion: Completion | None


@dataclass
class _Prompt:
    """A request that is being served. left: continuations that have not begun."""

    id: int
    request: Request
    stop_tokens: frozenset[int]
    left: deque[int]
    state: Any = None
    logits: torch.Tensor | None = None


@dataclass
class _Writing:
    """A continuation that is being written."""

    prompt: _Prompt
    number: int
    state: Any
    random: RandomNumbers
    stream: TextStream | None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class Generator:
    """Goes on with prompts, as many at a time as fit.

    model: a transformers (or PEFT) causal language model, best an accelerated one: other models
        run one text at a time, through their own calls (`batched` says which). Its adapters are
        those that are active. Call within `evaluation.modes.inference`, or where the model is in
        evaluation mode and gradients are off.
    tokenizer: for texts; None: only tokens.
    max_batch: the most continuations at once; None: 32 on a CPU, 128 on a GPU.
    cache_tokens: the most tokens whose keys and values are kept.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Detokenizer | None = None,
        *,
        stop_tokens: Sequence[int] = (),
        max_batch: int | None = None,
        cache_tokens: int = 65536,
    ) -> None:
        self.tokenizer = tokenizer
        self.stop_tokens = frozenset(stop_tokens)
        self._decoder: Decoder[Any] = decoder_of(
            model, max_batch=max_batch, cache_tokens=cache_tokens
        )
        self._waiting: deque[_Prompt] = deque()
        self._writing: list[_Writing] = []
        self._count = 0

    @property
    def max_batch(self) -> int:
        """The most continuations at once."""
        return self._decoder.max_batch

    @property
    def batched(self) -> bool:
        """Whether continuations are written side by side, by our own layers."""
        return self.max_batch > 1

    def add(self, request: Request) -> int:
        """The request's number; it waits for `step`. UserError for what can never be written."""
        if not request.prompt_ids:
            raise UserError("generate: the prompt has no tokens")
        if request.count < 1:
            raise UserError(f"generate: count={request.count}: expected at least 1")
        if request.sampling.stop and self.tokenizer is None:
            raise UserError("generate: stop texts need a tokenizer")
        own = request.sampling.stop_tokens
        stop = self.stop_tokens if own is None else frozenset(own)
        number, self._count = self._count, self._count + 1
        self._waiting.append(
            _Prompt(id=number, request=request, stop_tokens=stop, left=deque(range(request.count)))
        )
        return number

    def cancel(self, request: int) -> None:
        """Nothing more of that request is written."""
        for prompt in [p for p in self._waiting if p.id == request]:
            self._waiting.remove(prompt)
            prompt.left.clear()
            self._release_prompt(prompt)
        for writing in [w for w in self._writing if w.prompt.id == request]:
            self._writing.remove(writing)
            self._decoder.release(writing.state)
            writing.prompt.left.clear()
            self._release_prompt(writing.prompt)

    def step(self) -> list[Written]:
        """Begins what fits, and writes the next token of every continuation. [] at the end."""
        begun = self._begin()
        if self._writing:
            # A continuation that has begun in this step has its first token already.
            going_on = [w for w in self._writing if all(w is not one for one, _ in begun)]
            written = [event for _, event in begun]
            if going_on:
                logits = self._decoder.decode(
                    [w.state for w in going_on], [w.tokens[-1] for w in going_on]
                )
                written += self._take(going_on, logits)
            return written
        return [event for _, event in begun]

    def run(
        self, requests: Sequence[Request], check: Callable[[], None] = lambda: None
    ) -> list[list[Completion]]:
        """The completions of each request, in order. check: called before every step."""
        numbers = {self.add(request): i for i, request in enumerate(requests)}
        done: list[dict[int, Completion]] = [{} for _ in requests]
        check()
        while events := self.step():
            check()
            for event in events:
                if event.completion is not None and event.request in numbers:
                    done[numbers[event.request]][event.number] = event.completion
        return [[by_number[n] for n in sorted(by_number)] for by_number in done]

    def stream(self, request: Request) -> Iterator[Written]:
        """The tokens of one request as they are written; what is left undone is cancelled."""
        number = self.add(request)
        try:
            while events := self.step():
                yield from (event for event in events if event.request == number)
        finally:
            self.cancel(number)

    def _begin(self) -> list[tuple[_Writing, Written]]:
        """Lets waiting continuations begin, with their first tokens, as long as they fit."""
        self._admit()
        begun = [w for w in self._writing if not w.tokens]
        unread = {w.prompt.id: w.prompt for w in begun if w.prompt.logits is None}
        if unread:
            self._read(list(unread.values()))
        if not begun:
            return []
        events = self._take(begun, torch.stack([_logits(w.prompt) for w in begun]))
        for writing in begun:
            self._release_prompt(writing.prompt)
        return list(zip(begun, events, strict=True))

    def _admit(self) -> None:
        """Gives room to waiting continuations as long as they fit; prompts are not read yet."""
        while self._waiting and len(self._writing) < self._decoder.max_batch:
            prompt = self._waiting[0]
            state = self._room_for(prompt)
            if state is None and not self._writing:
                # The prompt may lie in the middle of all that is free: once more, from the start.
                self._forget(prompt)
                state = self._room_for(prompt)
                if state is None:
                    self._refuse(prompt)
            if state is None:
                break
            number = prompt.left.popleft()
            if not prompt.left:
                self._waiting.popleft()
            sampling = prompt.request.sampling
            stream = None if self.tokenizer is None else TextStream(self.tokenizer, sampling.stop)
            random = RandomNumbers(sampling.seed, number)
            self._writing.append(
                _Writing(prompt=prompt, number=number, state=state, random=random, stream=stream)
            )

    def _room_for(self, prompt: _Prompt) -> Any:
        """The state of the prompt's next continuation; None if it has to wait."""
        if prompt.state is None:
            prompt.state = self._decoder.prompt(len(prompt.request.prompt_ids))
        if prompt.state is None:
            return None
        return self._decoder.fork(prompt.state, prompt.request.sampling.max_new_tokens)

    def _read(self, prompts: list[_Prompt]) -> None:
        """The prompts' logits. Requests whose prompts could not be read are cancelled."""
        states, ids = [p.state for p in prompts], [p.request.prompt_ids for p in prompts]
        try:
            logits = self._decoder.read(states, ids)
        except BaseException:
            for prompt in prompts:
                self.cancel(prompt.id)
            raise
        for prompt, row in zip(prompts, logits, strict=True):
            prompt.logits = row

    def _refuse(self, prompt: _Prompt) -> None:
        self._waiting.remove(prompt)
        prompt.left.clear()
        self._release_prompt(prompt)
        length, new = len(prompt.request.prompt_ids), prompt.request.sampling.max_new_tokens
        raise UserError(
            f"generate: a prompt of {length} tokens and {new} new ones do not fit cache_tokens"
        )

    def _release_prompt(self, prompt: _Prompt) -> None:
        """Gives back the prompt's own hold once all its continuations have begun."""
        if not prompt.left:
            self._forget(prompt)

    def _forget(self, prompt: _Prompt) -> None:
        """Gives back what is held of the prompt, which may be read again, to the same bits."""
        if prompt.state is not None:
            self._decoder.release(prompt.state)
            prompt.state, prompt.logits = None, None

    def _take(self, writing: list[_Writing], logits: torch.Tensor) -> list[Written]:
        """Chooses the next token of each, and ends those that it ends."""
        chosen = choose(
            logits,
            [w.prompt.request.sampling for w in writing],
            [w.random for w in writing],
            [w.prompt.request.prompt_ids for w in writing],
            [w.tokens for w in writing],
        )
        events = []
        chosen_tokens, logprobs = chosen.tokens.tolist(), chosen.logprobs.tolist()
        told = zip(writing, chosen_tokens, logprobs, chosen.likeliest, strict=True)
        for one, token, logprob, likeliest in told:
            one.tokens.append(token)
            one.logprobs.append(logprob)
            piece, completion = self._ended(one, token)
            events.append(
                Written(
                    request=one.prompt.id,
                    number=one.number,
                    token=token,
                    logprob=logprob,
                    likeliest=likeliest,
                    piece=piece,
                    completion=completion,
                )
            )
        return events

    def _ended(self, one: _Writing, token: int) -> tuple[str, Completion | None]:
        """The text that the token settles, and the whole if it is the last one."""
        prompt = one.prompt
        ended = token in prompt.stop_tokens
        piece = "" if one.stream is None or ended else one.stream.push(token)
        finish: Finish | None = None
        if ended or (one.stream is not None and one.stream.stopped):
            finish = "stop"
        elif len(one.tokens) == prompt.request.sampling.max_new_tokens:
            finish = "length"
        if finish is None:
            return piece, None
        text = ""
        if one.stream is not None:
            piece += one.stream.finish()
            text = one.stream.text
            if one.stream.stopped:  # by what was kept back
                finish = "stop"
        self._writing = [w for w in self._writing if w is not one]
        self._decoder.release(one.state)
        return piece, Completion(
            token_ids=tuple(one.tokens), logprobs=tuple(one.logprobs), text=text, finish=finish
        )


def _logits(prompt: _Prompt) -> torch.Tensor:
    assert prompt.logits is not None
    return prompt.logits
