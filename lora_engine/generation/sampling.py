"""How the next token is chosen from a model's logits."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
import torch
from torch import Tensor

from lora_engine.errors import UserError

# Of a row of probabilities so many are sorted first: nearly always all that top-k and top-p keep.
SORTED_FIRST = 256


@dataclass(frozen=True)
class Sampling:
    """How a continuation is written.

    max_new_tokens: at most so many, the one that ends it included.
    temperature: what logits are divided by, from 1e-30 (float32 has no larger quotients); 0: the
        most likely token, always.
    top_k: only the k most likely tokens are drawn; 0: all.
    top_p: only the most likely tokens that together have at least this probability.
    min_p: only tokens with at least this share of the most likely one's probability.
    repetition_penalty: logits of tokens that the prompt or the text has are divided by it, or
        multiplied where they are negative (arXiv:1909.05858).
    presence_penalty, frequency_penalty: what logits lose of tokens that the text has, once and for
        each time that it has them, the prompt not counted (as OpenAI defines them); -2 to 2.
    stop: texts that end a continuation; they and what follows are not part of it.
    stop_tokens: tokens that end it; None: the tokenizer's and the model's own.
    top_logprobs: of each token so many of the likeliest in its place are told, at most 20.
    seed: of the random numbers. A continuation depends on its prompt, its settings, its seed and
        its number among the prompt's alone, not on what else is written at the time; where products
        are the vendor's (docs/generation.md says where) but for their rounding.

    Raises UserError for values outside their range.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] | None = None
    top_logprobs: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        ranges = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (
                self.temperature == 0 or 1e-30 <= self.temperature < inf,
                "0, or a finite one from 1e-30",
            ),
            "top_k": (self.top_k >= 0, "at least 0"),
            "top_p": (0 < self.top_p <= 1, "over 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "from 0 to 1"),
            "repetition_penalty": (
                0 < self.repetition_penalty < float("inf"),
                "a finite one over 0",
            ),
            "presence_penalty": (-2 <= self.presence_penalty <= 2, "from -2 to 2"),
            "frequency_penalty": (-2 <= self.frequency_penalty <= 2, "from -2 to 2"),
            "top_logprobs": (0 <= self.top_logprobs <= 20, "from 0 to 20"),
            "seed": (0 <= self.seed < 2**64, "from 0 to 2**64 - 1"),
            "stop": (all(self.stop), "texts that are not empty"),
        }
        for name, (fits, expected) in ranges.items():
            if not fits:
                raise UserError(f"{name}: expected {expected}, got {getattr(self, name)!r}")

    @property
    def penalises(self) -> bool:
        """Whether what stands there already counts."""
        own = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return own != (1.0, 0.0, 0.0)


Likeliest = tuple[tuple[int, float], ...]


class RandomNumbers:
    """A continuation's uniform random numbers: a substream of the seed, by its number."""

    def __init__(self, seed: int, number: int) -> None:
        # Philox is a counter under a key: substreams of other keys have nothing in common.
        key = np.array([seed, number], dtype=np.uint64)
        self._generator = np.random.Generator(np.random.Philox(key=key))

    def next(self) -> float:
        return float(self._generator.random())


@dataclass(frozen=True)
class Chosen:
    """tokens: [S] int64. logprobs: [S] float32, of the distribution at the temperature, before
    top_k, top_p and min_p take tokens out of it: what `Head.cross_entropy` gives in training.
    likeliest: of each continuation, (token, its logprob) of its `top_logprobs` likeliest."""

    tokens: Tensor
    logprobs: Tensor
    likeliest: Sequence[Likeliest]


def choose(
    logits: Tensor,  # [S, V]
    settings: Sequence[Sampling],
    numbers: Sequence[RandomNumbers],
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
) -> Chosen:
    """The next token of each of S continuations, of their prompts and the texts so far.

    Raises UserError where a row of logits has no finite one, or has a NaN.
    """
    scores = logits.float()
    penalised = [s for s, one in enumerate(settings) if one.penalises]
    if penalised:
        scores = scores.clone()
        for s in penalised:
            _penalise(scores[s], settings[s], prompts[s], texts[s])
    greedy = [one.temperature == 0 for one in settings]
    temperatures = [1.0 if one.temperature == 0 else one.temperature for one in settings]
    if any(temperature != 1.0 for temperature in temperatures):
        scores = scores / torch.tensor(temperatures, device=scores.device)[:, None]
    logprobs = scores.log_softmax(-1)
    best = logprobs.argmax(-1)
    if not bool(logprobs.gather(1, best[:, None]).isfinite().all()):
        raise UserError("generate: the model's logits are NaN, or none is finite")
    tokens = best.tolist()
    for s, one in enumerate(settings):
        if not greedy[s]:
            tokens[s] = _draw(logprobs[s], one, numbers[s].next())
    chosen = torch.tensor(tokens, device=logits.device)
    told = [likeliest(logprobs[s], one.top_logprobs) for s, one in enumerate(settings)]
    return Chosen(chosen, logprobs.gather(1, chosen[:, None])[:, 0], told)


def likeliest(
    logprobs: Tensor,  # [V]
    count: int,
) -> Likeliest:
    """The `count` likeliest tokens and their log-probabilities."""
    if count == 0:
        return ()
    values, tokens = logprobs.topk(min(count, len(logprobs)))
    return tuple(zip(tokens.tolist(), values.tolist(), strict=True))


def _penalise(
    scores: Tensor,  # [V]
    settings: Sampling,
    prompt: Sequence[int],
    text: Sequence[int],
) -> None:
    """Changes a row of logits."""
    if settings.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*prompt, *text}), dtype=torch.int64, device=scores.device)
        values, penalty = scores[seen], settings.repetition_penalty
        scores[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if text and (settings.presence_penalty or settings.frequency_penalty):
        counts = Counter(text)
        tokens = torch.tensor(list(counts), dtype=torch.int64, device=scores.device)
        times = torch.tensor(list(counts.values()), dtype=scores.dtype, device=scores.device)
        scores[tokens] -= settings.presence_penalty + settings.frequency_penalty * times


def _draw(
    logprobs: Tensor,  # [V]
    settings: Sampling,
    number: float,
) -> int:
    """The token at `number` [0, 1) of the cumulative distribution of those that are kept."""
    if settings.top_k == 0 and settings.top_p >= 1 and settings.min_p == 0:
        return _at(logprobs.exp(), number)
    probs, tokens = _most_likely(logprobs.exp(), settings)
    return int(tokens[_at(probs, number)])


def _most_likely(probs: Tensor, settings: Sampling) -> tuple[Tensor, Tensor]:
    """The probabilities that are kept, descending, and their tokens."""
    count = probs.numel()
    first = min(count, SORTED_FIRST)
    while True:
        kept, tokens = probs.topk(first)
        cumulative = kept.double().cumsum(0)
        keep = first
        if settings.top_k:
            keep = min(keep, settings.top_k)
        before = cumulative - kept
        total = probs.double().sum()
        keep = min(keep, int((before < settings.top_p * total).sum()))
        keep = min(keep, int((kept >= settings.min_p * kept[0]).sum()))
        if keep < first or first == count:
            return kept[:keep], tokens[:keep]
        first = count


def _at(probs: Tensor, number: float) -> int:
    """The first place whose cumulative probability is over `number` of the total."""
    cumulative = probs.double().cumsum(0)
    target = number * float(cumulative[-1])
    place = int(torch.searchsorted(cumulative, target, right=True))
    last = int(torch.searchsorted(cumulative, float(cumulative[-1])))
    return min(place, last)
