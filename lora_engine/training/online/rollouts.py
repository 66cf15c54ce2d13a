"""Rollouts: what the model writes for prompts, with its rewards."""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Protocol, TypedDict

import torch
from torch import Tensor, nn

from lora_engine.data.prompts import PromptDataset
from lora_engine.data.render import Example
from lora_engine.errors import UserError
from lora_engine.evaluation.modes import inference
from lora_engine.evaluation.samples import TextTokenizer, stop_tokens
from lora_engine.generation.engine import Completion, Finish, Generator, Request
from lora_engine.generation.sampling import Sampling
from lora_engine.models.attach.head import transformers_model
from lora_engine.training.online.config import RolloutConfig
from lora_engine.training.online.rewards import OVERLONG, Reward, Written, rewarded

Column = float | list[float]


@dataclass(frozen=True)
class Answer:
    """A completion of the prompt `prompt`, by its place among the prompts.

    token_ids, logprobs: as of a `Completion`. reward: the sum; None: no reward says anything.
    parts: each reward by its name, unweighted. columns: for the batches that it is in.
    learned: whether its tokens are targets.
    """

    prompt: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish: Finish
    reward: float | None = None
    parts: Mapping[str, float | None] = field(default_factory=dict)
    columns: Mapping[str, Column] = field(default_factory=dict)
    learned: bool = True

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def of(cls, saved: "SavedAnswer") -> "Answer":
        """What `to_json` returned, from a file."""
        ids, logprobs = tuple(saved["token_ids"]), tuple(saved["logprobs"])
        return replace(cls(**saved), token_ids=ids, logprobs=logprobs)

    def example(self, prompts: PromptDataset) -> Example:
        """The prompt and the completion, whose tokens are targets."""
        asked = prompts[self.prompt]
        ids = [*asked.input_ids, *self.token_ids]
        supervised = [False] * len(asked) + [self.learned] * len(self.token_ids)
        # A column of tokens has a number for each target.
        columns = {
            name: value if self.learned or not isinstance(value, list) else []
            for name, value in self.columns.items()
        }
        return Example(ids, supervised, asked.origin, columns=columns)


class SavedAnswer(TypedDict):
    """An `Answer` in a checkpoint."""

    prompt: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish: Finish
    reward: float | None
    parts: Mapping[str, float | None]
    columns: Mapping[str, Column]
    learned: bool


class Engine(Protocol):
    """What writes completions with the weights that the model has at the time."""

    def run(self, requests: Sequence[Request], check: Callable[[], None]) -> list[list[Completion]]:
        """The completions of each request, in order. check: called now and then meanwhile."""

    def close(self) -> None:
        """Nothing more is asked for."""


class OwnEngine:
    """The model itself: its weights are used in place, nothing is copied."""

    def __init__(self, model: nn.Module, tokenizer: TextTokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer

    def run(self, requests: Sequence[Request], check: Callable[[], None]) -> list[list[Completion]]:
        with inference(self.model):
            ends = stop_tokens(transformers_model(self.model), self.tokenizer)
            return Generator(self.model, self.tokenizer, stop_tokens=ends).run(requests, check)

    def close(self) -> None:
        pass


class Rollouts:
    """Has completions written and rewarded.

    engine: of the model. columns: that rewards may ask for; of a record without one it is None.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: TextTokenizer,
        rewards: Sequence[Reward],
        settings: RolloutConfig,
        engine: Engine,
        columns: Sequence[str],
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.rewards, self.settings, self.engine = rewards, settings, engine
        self.columns = columns

    def write(
        self,
        prompts: PromptDataset,
        numbers: Sequence[int],
        *,
        seed: str,
        count: int,
        temperature: float,
        check: Callable[[], None],
    ) -> list[Answer]:
        """`count` completions in a row of each of the prompts `numbers`, with rewards.

        seed: what the random numbers depend on. check: called between tokens.
        Raises UserError for what a reward does wrong.
        """
        settings = self.settings
        requests = [
            Request(
                tuple(prompts[number].input_ids),
                Sampling(
                    max_new_tokens=settings.max_new_tokens,
                    temperature=temperature,
                    top_k=settings.top_k,
                    top_p=settings.top_p,
                    min_p=settings.min_p,
                    stop=settings.stop,
                    seed=_seed(f"{seed}:{place}"),
                ),
                count,
            )
            for place, number in enumerate(numbers)
        ]
        completions = self.engine.run(requests, check)
        answers = [
            Answer(
                prompt=number,
                token_ids=one.token_ids,
                logprobs=one.logprobs,
                text=one.text,
                finish=one.finish,
            )
            for number, group in zip(numbers, completions, strict=True)
            for one in group
        ]
        return self._rewarded(prompts, answers)

    def _rewarded(self, prompts: PromptDataset, answers: Sequence[Answer]) -> list[Answer]:
        asked = [prompts.prompts[answer.prompt] for answer in answers]
        written = Written(
            prompts=[prompt.asked for prompt in asked],
            completions=[answer.text for answer in answers],
            prompt_ids=[list(prompts[answer.prompt].input_ids) for answer in answers],
            completion_ids=[list(answer.token_ids) for answer in answers],
            columns={name: [prompt.columns.get(name) for prompt in asked] for name in self.columns},
            origins=[prompts[answer.prompt].origin for answer in answers],
        )
        found = rewarded(self.rewards, written)
        total, parts = found.total, dict(found.parts)
        if self.settings.overlong_buffer is not None:
            parts[OVERLONG] = self._overlong(answers)
            total = total + self.settings.overlong_penalty * parts[OVERLONG]
        return [
            replace(
                answer,
                reward=_or_none(total[place]),
                parts={name: _or_none(values[place]) for name, values in parts.items()},
            )
            for place, answer in enumerate(answers)
        ]

    def _overlong(self, answers: Sequence[Answer]) -> Tensor:
        """From 0, where a completion ends before the buffer, to −1 at max_new_tokens."""
        buffer = self.settings.overlong_buffer
        assert buffer is not None
        lengths = torch.tensor([len(a.token_ids) for a in answers], dtype=torch.float64)
        return ((self.settings.max_new_tokens - buffer - lengths) / buffer).clamp(max=0)


def rewards_tensor(answers: Sequence[Answer]) -> Tensor:
    """float64 [n]: the rewards, NaN where there is none."""
    values = [math.nan if answer.reward is None else answer.reward for answer in answers]
    return torch.tensor(values, dtype=torch.float64)


def reward_metrics(answers: Sequence[Answer]) -> dict[str, float]:
    """What people chart of completions."""
    metrics: dict[str, float] = {}
    known = rewards_tensor(answers)
    known = known[~known.isnan()]
    if len(known):
        metrics["reward"] = float(known.mean())
        metrics["reward_std"] = float(known.std()) if len(known) > 1 else 0.0
    for name in dict.fromkeys(name for answer in answers for name in answer.parts):
        own = [value for a in answers if (value := a.parts.get(name)) is not None]
        if own:
            values = torch.tensor(own, dtype=torch.float64)
            metrics[f"rewards/{name}/mean"] = float(values.mean())
            metrics[f"rewards/{name}/std"] = float(values.std()) if len(own) > 1 else 0.0
    lengths = [len(answer.token_ids) for answer in answers]
    ended = [len(answer.token_ids) for answer in answers if answer.finish == "stop"]
    metrics["completions/mean_length"] = math.fsum(lengths) / len(lengths)
    metrics["completions/min_length"] = float(min(lengths))
    metrics["completions/max_length"] = float(max(lengths))
    metrics["completions/clipped_ratio"] = 1 - len(ended) / len(lengths)
    metrics["completions/mean_terminated_length"] = math.fsum(ended) / max(len(ended), 1)
    return metrics


def check_lengths(
    prompts: PromptDataset, settings: RolloutConfig, positions: int | None, model: str = "the model"
) -> None:
    """UserError where a prompt and its completion are longer than a model was made for."""
    if positions is None:
        return
    longest = max(prompts, key=len)
    if len(longest) + settings.max_new_tokens > positions:
        raise UserError(
            f"{longest.origin}: a prompt of {len(longest):,} tokens and max_new_tokens "
            f"{settings.max_new_tokens:,} are more than the {positions:,} that {model} was made "
            "for; give a smaller max_new_tokens, or drop longer prompts with max_length"
        )


def _seed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def _or_none(value: Tensor) -> float | None:
    number = float(value)
    return None if math.isnan(number) else number
