"""What writes tokens: our layers over a cache that sequences share, or the model's own calls."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from lora_engine import backends, ops
from lora_engine.errors import UserError
from lora_engine.generation.cache import KeyValueCache, Run
from lora_engine.models.attach.cached_layers import CachedLayer, CachedLayers, why_not_cached
from lora_engine.models.attach.head import Head
from lora_engine.ops.layer.decode_stack import DecodeStack

State = TypeVar("State")


class Decoder(Protocol, Generic[State]):
    """A model that goes on with several texts at once, one token each at a time."""

    @property
    def max_batch(self) -> int:
        """The most texts that it goes on with at once."""

    def prompt(self, length: int) -> State | None:
        """The state of a prompt of so many tokens, which is still to be read.

        None where there is no room before other states are released.
        """

    def fork(self, prompt: State, rows: int) -> State | None:
        """The state of a text that goes on with the prompt by up to `rows` tokens.

        Both have to be released. None where there is no room before others are.
        """

    def read(self, states: Sequence[State], prompts: Sequence[Sequence[int]]) -> Tensor:
        """Reads prompts into their states; the logits [P, V] of the tokens after them."""

    def decode(self, states: Sequence[State], tokens: Sequence[int]) -> Tensor:
        """Goes on with each text by its token; the logits [S, V] of the ones after."""

    def release(self, state: State) -> None:
        """The state is not needed any more."""


@dataclass
class Text:
    """A prompt, or what goes on with one.

    runs: of the cache, its own last. length: of all its tokens so far.
    """

    runs: tuple[Run, ...]
    length: int
    prompt_length: int


class CachedDecoder:
    """Our layers (`CachedLayers`). A prompt is read once for all texts that go on with it.

    The model's adapters and weights must not be exchanged while texts are being written: what is
    computed with is settled when the first prompt is read.

    cache_tokens: the most tokens whose keys and values are kept.
    """

    def __init__(self, model: nn.Module, *, max_batch: int | None, cache_tokens: int) -> None:
        self.layers = CachedLayers(model)
        self.device = self.layers.device
        self._plan = backends.decoding_plan(self.device, self.layers.dtype)
        self.max_batch = max_batch or self._plan.texts
        widths = [layer.cache_width for layer in self.layers.layers]
        self.cache = KeyValueCache(
            widths, cache_tokens, dtype=self.layers.dtype, device=self.device
        )
        self._stack: DecodeStack | None = None
        self._texts = 0

    def prompt(self, length: int) -> Text | None:
        run = self.cache.take(length)
        if run is None:
            return None
        if self._texts == 0 and self._plan.rows:
            self._stack = self.layers.stack(self._plan.rows)
        self._texts += 1
        return Text((run,), length, length)

    def fork(self, prompt: Text, rows: int) -> Text | None:
        run = self.cache.take(rows)
        if run is None:
            return None
        for shared in prompt.runs:
            shared.users += 1
        self._texts += 1
        return Text((*prompt.runs, run), prompt.length, prompt.length)

    def read(self, states: Sequence[Text], prompts: Sequence[Sequence[int]]) -> Tensor:
        """How a prompt is read, and its logits to the bit, are up to its own length alone."""
        # Prompts of a kind stand together, the short ones first.
        order = sorted(range(len(prompts)), key=lambda i: self._is_long(len(prompts[i])))
        ids = [torch.tensor(prompts[i], device=self.device) for i in order]
        runs = [states[i].runs[-1] for i in order]
        hidden: list[Tensor] = []
        for first, last in self._passes([len(each) for each in ids]):
            part = ids[first:last], runs[first:last]
            if self._stack is None or self._is_long(len(ids[first])):
                hidden.append(self._read_at_once(*part))
            else:
                hidden.append(self._read_by_rows(self._stack, *part))
        place = sorted(range(len(prompts)), key=order.__getitem__)
        head, rows = self.layers.head(), self._plan.rows or 1
        return torch.cat([_logits(head, few) for few in torch.cat(hidden)[place].split(rows)])

    def decode(self, states: Sequence[Text], tokens: Sequence[int]) -> Tensor:
        most = self._plan.rows or max(len(states), 1)
        hidden = [
            self._decode(states[first : first + most], tokens[first : first + most])
            for first in range(0, len(states), most)
        ]
        head = self.layers.head()
        return torch.cat([_logits(head, rows) for rows in hidden])

    def release(self, state: Text) -> None:
        for run in state.runs:
            self.cache.release(run)
        self._texts -= 1

    def _decode(self, states: Sequence[Text], tokens: Sequence[int]) -> Tensor:
        """The hidden states [S, H] of each text's token, whose keys and values are kept."""
        seen = []
        for text in states:
            own = text.runs[-1]
            spans = [(run.first, run.rows) for run in text.runs[:-1]]
            seen.append([*spans, (own.first, text.length - text.prompt_length + 1)])
        ids = torch.tensor(tokens, device=self.device)
        positions = torch.tensor([text.length for text in states], device=self.device)
        hidden = self._hidden(self._stack, ids, positions, seen)
        for text in states:
            text.length += 1
        return hidden

    def _is_long(self, length: int) -> bool:
        return length > self._plan.prompt_by_rows

    def _passes(self, lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
        """The prompts from one to another that are read in one pass, one such part after the other.

        Short ones by rows, or long ones whose sums are the same beside others.
        """
        first = tokens = 0
        for i, length in enumerate(lengths):
            tokens += length
            if i == first:
                continue
            long = self._is_long(length)
            fits = self._stack is not None and (not long or tokens <= self._plan.prompt_tokens)
            if not fits or long != self._is_long(lengths[first]):
                yield first, i
                first, tokens = i, length
        yield first, len(lengths)

    def _read_by_rows(
        self, stack: DecodeStack, prompts: Sequence[Tensor], runs: Sequence[Run]
    ) -> Tensor:
        """The last hidden states [P, H] of prompts, their tokens as rows that see those before."""
        ids, positions = torch.cat(list(prompts)), _positions(prompts)
        seen = [[(run.first, place + 1)] for run in runs for place in range(run.rows)]
        hidden = []
        for first in range(0, len(ids), stack.rows):
            few = slice(first, first + stack.rows)
            hidden.append(self._hidden(stack, ids[few], positions[few], seen[few]))
        return torch.cat(hidden)[_ends(prompts) - 1]

    def _hidden(
        self,
        stack: DecodeStack | None,
        ids: Tensor,  # [M]
        positions: Tensor,  # [M]
        seen: Sequence[Sequence[tuple[int, int]]],
    ) -> Tensor:
        """The hidden states [M, H] of tokens that see such runs of the cache."""
        bounds = [0, *accumulate(len(runs) for runs in seen)]
        slots = torch.tensor([runs[-1][0] + runs[-1][1] - 1 for runs in seen], device=self.device)
        spans = torch.tensor([run for runs in seen for run in runs], device=self.device)
        cu_spans = torch.tensor(bounds, dtype=torch.int32, device=self.device)
        caches = [
            ops.CacheRows(keys=keys, values=values, slots=slots, spans=spans, cu_spans=cu_spans)
            for keys, values in zip(self.cache.keys, self.cache.values, strict=True)
        ]
        if stack is not None:
            return self.layers.decode(stack, ids, positions, caches)

        def attend(layer: CachedLayer, q: Tensor, k: Tensor, v: Tensor, *turn: Tensor) -> Tensor:
            module = layer.attention.module
            cos, sin = turn
            return ops.attention_decode(
                q,
                k,
                v,
                caches[layer.number],
                head_dim=module.head_dim,
                cos=cos,
                sin=sin,
                softmax_scale=module.scaling,
                window=layer.attention.window,
            )

        return self.layers.hidden_states(ids, positions, attend)

    def _read_at_once(self, prompts: Sequence[Tensor], runs: Sequence[Run]) -> Tensor:
        """The last hidden states [P, H] of prompts, as packed sequences."""
        ends = _ends(prompts)
        bounds = nn.functional.pad(ends, (1, 0)).to(self.device, torch.int32)
        slots = torch.cat([torch.arange(run.first, run.first + run.rows) for run in runs])
        slots = slots.to(self.device)

        def attend(layer: CachedLayer, q: Tensor, k: Tensor, v: Tensor, *turn: Tensor) -> Tensor:
            module = layer.attention.module
            heads = (x.unflatten(-1, (-1, module.head_dim)) for x in (q, k))
            q, k = (x.flatten(1) for x in ops.rope(*heads, *turn))
            self.cache.keys[layer.number].index_copy_(0, slots, k)
            self.cache.values[layer.number].index_copy_(0, slots, v)
            return ops.attention(
                q,
                k,
                v,
                bounds,
                head_dim=module.head_dim,
                softmax_scale=module.scaling,
                window=layer.attention.window,
            )

        positions = _positions(prompts).to(self.device)
        hidden = self.layers.hidden_states(torch.cat(list(prompts)), positions, attend)
        return hidden[ends.to(self.device) - 1]


@dataclass
class ModuleText:
    """A text in a cache of transformers.

    cache: its keys and values, or what the model has; None before the first call.
    prompt: whose cache it goes on with then; None: it is a prompt itself.
    """

    prompt: "ModuleText | None" = None
    cache: object = None


class ModuleDecoder:
    """The model's own calls, one text after the other: for what `CachedLayers` refuses."""

    max_batch = 1

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.device = next(model.parameters()).device

    def prompt(self, length: int) -> ModuleText:
        return ModuleText()

    def fork(self, prompt: ModuleText, rows: int) -> ModuleText:
        return ModuleText(prompt)

    def read(self, states: Sequence[ModuleText], prompts: Sequence[Sequence[int]]) -> Tensor:
        return torch.stack([self._call(*one) for one in zip(states, prompts, strict=True)])

    def decode(self, states: Sequence[ModuleText], tokens: Sequence[int]) -> Tensor:
        for text in states:
            if text.prompt is not None:
                text.cache, text.prompt = copy.deepcopy(text.prompt.cache), None
        return self.read(states, [[token] for token in tokens])

    def release(self, state: ModuleText) -> None:
        """Its cache goes with the last text that has yet to copy it."""

    def _call(self, text: ModuleText, ids: Sequence[int]) -> Tensor:
        row = torch.tensor([list(ids)], device=self.device)
        output = self.model(input_ids=row, past_key_values=text.cache, use_cache=True)
        text.cache = getattr(output, "past_key_values", None)
        if text.cache is None:
            raise UserError(
                f"generate: {type(self.model).__name__} returns no cache of what it has read"
            )
        logits: Tensor = output.logits[0, -1]
        return logits


def decoder_of(
    model: nn.Module, *, max_batch: int | None = None, cache_tokens: int = 65536
) -> CachedDecoder | ModuleDecoder:
    """`CachedDecoder` where the model's layers are ours, else `ModuleDecoder`."""
    if why_not_cached(model) is not None:
        return ModuleDecoder(model)
    return CachedDecoder(model, max_batch=max_batch, cache_tokens=cache_tokens)


def _logits(head: Head, hidden: Tensor) -> Tensor:
    """The logits [S, V] of few rows [S, H]."""
    return head.logits(hidden.to(head.weight.dtype))


def _ends(prompts: Sequence[Tensor]) -> Tensor:
    """Where each prompt ends, one after the other: [P]."""
    return torch.tensor(list(accumulate(map(len, prompts))))


def _positions(prompts: Sequence[Tensor]) -> Tensor:
    """Each token's place in its prompt, one prompt after the other: [T]."""
    return torch.cat([torch.arange(len(prompt)) for prompt in prompts])
