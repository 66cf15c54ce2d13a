"""What writes tokens: our layers over a cache that sequences share, or the model's own calls."""

import copy
from collections.abc import Sequence
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

    def read(self, prompt_ids: Sequence[int]) -> tuple[State, Tensor] | None:
        """A prompt's state, and the logits [V] of its next token.

        None where there is no room before other states are released.
        """

    def fork(self, prompt: State, rows: int) -> State | None:
        """The state of a text that goes on with the prompt by up to `rows` tokens.

        Both have to be released. None where there is no room before others are.
        """

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

    def read(self, prompt_ids: Sequence[int]) -> tuple[Text, Tensor] | None:
        """Each prompt is read by itself: beside others its sums would be rounded otherwise."""
        count = len(prompt_ids)
        run = self.cache.take(count)
        if run is None:
            return None
        if self._texts == 0 and self._plan.rows:
            self._stack = self.layers.stack(self._plan.rows)
        self._texts += 1
        ids = torch.tensor(prompt_ids, device=self.device)
        if self._stack is None or count > self._plan.prompt_by_rows:
            hidden = self._read_at_once(ids, run)
        else:
            hidden = self._read_by_rows(self._stack, ids, run)
        return Text((run,), count, count), _logits(self.layers.head(), hidden[-1:])[0]

    def fork(self, prompt: Text, rows: int) -> Text | None:
        run = self.cache.take(rows)
        if run is None:
            return None
        for shared in prompt.runs:
            shared.users += 1
        self._texts += 1
        return Text((*prompt.runs, run), prompt.length, prompt.length)

    def decode(self, states: Sequence[Text], tokens: Sequence[int]) -> Tensor:
        most = self._stack.rows if self._stack is not None else max(len(states), 1)
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

    def _read_by_rows(self, stack: DecodeStack, ids: Tensor, run: Run) -> Tensor:
        """The last hidden states of a prompt, its tokens as rows that see those before them."""
        for first in range(0, len(ids), stack.rows):
            positions = torch.arange(first, min(first + stack.rows, len(ids)))
            seen = [[(run.first, place + 1)] for place in positions.tolist()]
            hidden = self._hidden(stack, ids[positions], positions, seen)
        return hidden

    def _hidden(
        self,
        stack: DecodeStack | None,
        ids: Tensor,  # [M]
        positions: Tensor,  # [M]
        seen: Sequence[Sequence[tuple[int, int]]],
    ) -> Tensor:
        """The hidden states [M, H] of tokens that see such runs of the cache."""
        bounds = [0, *accumulate(len(runs) for runs in seen)]
        where = (
            torch.tensor([runs[-1][0] + runs[-1][1] - 1 for runs in seen], device=self.device),
            torch.tensor([run for runs in seen for run in runs], device=self.device),
            torch.tensor(bounds, dtype=torch.int32, device=self.device),
        )
        buffers = zip(self.cache.keys, self.cache.values, strict=True)
        caches = [ops.CacheRows(keys, values, *where) for keys, values in buffers]
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

    def _read_at_once(self, ids: Tensor, run: Run) -> Tensor:
        """The hidden states of a prompt, as one packed sequence."""
        count = len(ids)
        bounds = torch.tensor([0, count], dtype=torch.int32, device=self.device)

        def attend(layer: CachedLayer, q: Tensor, k: Tensor, v: Tensor, *turn: Tensor) -> Tensor:
            module = layer.attention.module
            heads = (x.unflatten(-1, (-1, module.head_dim)) for x in (q, k))
            q, k = (x.flatten(1) for x in ops.rope(*heads, *turn))
            rows = slice(run.first, run.first + count)
            self.cache.keys[layer.number][rows] = k
            self.cache.values[layer.number][rows] = v
            return ops.attention(
                q,
                k,
                v,
                bounds,
                head_dim=module.head_dim,
                softmax_scale=module.scaling,
                window=layer.attention.window,
            )

        return self.layers.hidden_states(ids, torch.arange(count, device=ids.device), attend)


@dataclass
class ModuleText:
    """A text in a cache of transformers. cache: its keys and values, or what the model has."""

    cache: object
    length: int


class ModuleDecoder:
    """The model's own calls, one text after the other: for what `CachedLayers` refuses."""

    max_batch = 1

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.device = next(model.parameters()).device

    def read(self, prompt_ids: Sequence[int]) -> tuple[ModuleText, Tensor]:
        return self._call(prompt_ids, ModuleText(None, 0))

    def fork(self, prompt: ModuleText, rows: int) -> ModuleText:
        return ModuleText(copy.deepcopy(prompt.cache), prompt.length)

    def decode(self, states: Sequence[ModuleText], tokens: Sequence[int]) -> Tensor:
        rows = []
        for text, token in zip(states, tokens, strict=True):
            after, logits = self._call([token], text)
            text.cache, text.length = after.cache, after.length
            rows.append(logits)
        return torch.stack(rows)

    def release(self, state: ModuleText) -> None:
        state.cache = None

    def _call(self, ids: Sequence[int], before: ModuleText) -> tuple[ModuleText, Tensor]:
        row = torch.tensor([list(ids)], device=self.device)
        output = self.model(input_ids=row, past_key_values=before.cache, use_cache=True)
        cache = getattr(output, "past_key_values", None)
        if cache is None:
            raise UserError(
                f"generate: {type(self.model).__name__} returns no cache of what it has read"
            )
        return ModuleText(cache, before.length + len(ids)), output.logits[0, -1]


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
