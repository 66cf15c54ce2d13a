"""Micro-batches of an online run: a round of completions is written, rewarded and learned from."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lora_engine.data.batch import PackedBatch, collate
from lora_engine.data.prompts import PromptDataset
from lora_engine.data.render import Example
from lora_engine.evaluation.batch_loss import reference_logprobs, target_scores
from lora_engine.evaluation.modes import inference
from lora_engine.objectives.online import OnlineObjective, Sampled
from lora_engine.training import random_state
from lora_engine.training.batches import BatchSource
from lora_engine.training.online.completions import CompletionsLog
from lora_engine.training.online.rollouts import (
    Answer,
    Rollouts,
    reward_metrics,
    rewards_tensor,
)
from lora_engine.training.online.trial import trial_batch
from lora_engine.training.run.lines import Written
from lora_engine.training.state import Position

logger = logging.getLogger(__name__)

# What a checkpoint holds of a source, as JSON.
Saved = Mapping[str, object]


@dataclass(frozen=True)
class Round:
    """number: from 0 on. answers: those of a prompt `size` in a row. next_prompt: how many prompts
    were taken by its end, over all passes through the data."""

    number: int
    size: int
    next_prompt: int
    answers: list[Answer] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def groups(self) -> list[list[Answer]]:
        return [
            self.answers[first : first + self.size]
            for first in range(0, len(self.answers), self.size)
        ]


class _Measured(NamedTuple):
    """Of each completion's tokens, before the model learns from them."""

    logprobs: list[Tensor]
    values: list[Tensor]
    reference: list[Tensor]


class OnlineSource(BatchSource):
    """As `BatchSource`, with a round for an epoch and an optimiser step for a batch's index.

    A round depends on the model's weights and on how many prompts were taken before it, which is
    what a checkpoint saves of it; in the middle of a round its completions too.

    path: of completions.jsonl. check: called between tokens and batches; what it raises leaves the
        source as it was.
    """

    check: Callable[[], None] = staticmethod(lambda: None)

    def __init__(
        self,
        prompts: PromptDataset,
        rollouts: Rollouts,
        objective: OnlineObjective,
        tokens_per_batch: int,
        path: Path,
        *,
        seed: int = 0,
    ) -> None:
        self._prompts, self._rollouts, self._objective = prompts, rollouts, objective
        self._settings = rollouts.settings
        self._tokens_per_batch, self._seed = tokens_per_batch, seed
        self._path = path
        self._log: CompletionsLog | None = None
        self._round = Round(-1, self._settings.generations, 0)

    def take(self, start: Position, count: int) -> tuple[list[PackedBatch], Position]:
        """The micro-batches of the one step at `start`, and the position after it.

        Raises UserError for what a reward does wrong.
        """
        number, step = start.epoch, start.batch_index
        if step >= self._settings.steps:
            number, step = number + 1, 0
        if self._round.number != number:
            with random_state.restored_on_error():  # a reward may draw from it, and fail
                self._round = self._sampled(number)
        groups = self._round.groups
        passed, part = divmod(step, self._settings.minibatches)
        order = np.random.default_rng([self._seed, 1, number, passed]).permutation(len(groups))
        chosen = np.array_split(order, self._settings.minibatches)[part]
        batches = self._batches([groups[i] for i in chosen.tolist()])
        return batches, Position(number, step + 1)

    def metrics(self, position: Position) -> dict[str, float]:
        """Of a round, at its first step."""
        return self._round.metrics if position[:2] == (self._round.number, 1) else {}

    def start(self, saved: Saved | None) -> None:
        """Opens completions.jsonl; goes on from what `saved` returned."""
        if saved is None:
            self._log = CompletionsLog(self._path)
            return
        self._log = CompletionsLog(self._path, Written(*_list(saved["completions"])))
        answers = [Answer.of(answer) for answer in _list(saved["answers"])]
        self._round = Round(
            number=int(str(saved["round"])),
            size=self._settings.generations,
            next_prompt=int(str(saved["next_prompt"])),
            answers=answers,
            metrics=dict(saved["metrics"]),  # type: ignore[call-overload]
        )

    def saved(self, position: Position) -> Saved:
        """JSON; the round's completions where a step of it is left to do."""
        assert self._log is not None, "start() comes first"
        now = self._round
        done = position.epoch == now.number and position.batch_index >= self._settings.steps
        return {
            "round": now.number,
            "next_prompt": now.next_prompt,
            "answers": [] if done else [answer.to_json() for answer in now.answers],
            "metrics": now.metrics,
            "completions": self._log.sync(),
        }

    def close(self) -> None:
        self._rollouts.engine.close()
        if self._log is not None:
            self._log.close()

    def log(self, step: int, prompts: PromptDataset, answers: Sequence[Answer]) -> None:
        """Adds completions of held-out prompts to completions.jsonl."""
        assert self._log is not None, "start() comes first"
        self._log.append({"step": step, "heldout": True}, prompts, answers)

    def first(self, tokens: int) -> PackedBatch:
        """The first prompts, of whose own tokens a trial learns."""
        return trial_batch(self._prompts, tokens)

    def one_epoch(self) -> Iterator[PackedBatch]:
        """None: what a round holds has to be written first."""
        return iter(())

    def count(self, epochs: int) -> int:
        """Optimiser steps in `epochs` passes over the prompts."""
        rounds = -(-epochs * len(self._prompts) // self._settings.prompts)
        return rounds * self._settings.steps

    def _sampled(self, number: int) -> Round:
        """The round of that number, written to completions.jsonl as well."""
        began = time.perf_counter()
        settings, size = self._settings, self._settings.generations
        taken = self._round.next_prompt
        kept: list[Answer] = []
        spare: list[Answer] = []
        tried: list[Answer] = []
        for attempt in range(1 + settings.max_resampled * settings.dynamic_sampling):
            wanted = settings.prompts - len(kept) // size
            numbers = [self._prompt_at(taken + place) for place in range(wanted)]
            answers = self._rollouts.write(
                self._prompts,
                numbers,
                seed=f"{self._seed}:{number}:{attempt}",
                count=size,
                temperature=settings.temperature,
                check=self.check,
            )
            taken += wanted
            tried += answers
            for first in range(0, len(answers), size):
                group = answers[first : first + size]
                teaches = not settings.dynamic_sampling or _differ(group)
                (kept if teaches else spare).extend(group)
            if len(kept) == settings.prompts * size:
                break
        found, most = [*kept, *spare], settings.prompts * size
        answers, unused = found[:most], found[most:]
        if self._settings.mask_truncated:
            answers = [replace(a, learned=a.finish == "stop") for a in answers]
        judged, metrics = self._judged(answers)
        metrics = {
            **reward_metrics(tried),
            "frac_reward_zero_std": _equal_share(tried, size),
            **metrics,
            "rollout_seconds": time.perf_counter() - began,
        }
        if size == 1:
            del metrics["frac_reward_zero_std"]
        assert self._log is not None, "start() comes first"
        self._log.append({"round": number}, self._prompts, judged)
        self._log.append({"round": number, "left_out": True}, self._prompts, unused)
        return Round(number=number, size=size, next_prompt=taken, answers=judged, metrics=metrics)

    def _prompt_at(self, place: int) -> int:
        """The prompt that is taken `place`-th, in each pass over the data in another order."""
        epoch, within = divmod(place, len(self._prompts))
        order = np.random.default_rng([self._seed, 0, epoch]).permutation(len(self._prompts))
        return int(order[within])

    def _judged(self, answers: list[Answer]) -> tuple[list[Answer], dict[str, float]]:
        """The answers with what the objective makes of them, and its metrics."""
        own = [torch.tensor(answer.logprobs, dtype=torch.float32) for answer in answers]
        sampled = Sampled(rewards_tensor(answers), self._settings.generations, own)
        measured = None
        # In a round of one step the ratios are exactly 1, whatever the log-probabilities.
        moves = self._settings.old_logprobs == "trainer" and self._settings.steps > 1
        if self._objective.measures or moves:
            measured = self._measured(answers)
            sampled = Sampled(
                rewards=sampled.rewards,
                size=sampled.size,
                logprobs=measured.logprobs,
                values=measured.values,
                reference=measured.reference,
            )
        judged = self._objective.judge(sampled)
        made = []
        for place, (answer, columns) in enumerate(zip(answers, judged.columns, strict=True)):
            both = dict(columns)
            if self._settings.old_logprobs == "sampler":
                both.setdefault("old_logprobs", list(answer.logprobs))
            else:
                if measured is not None:
                    both.setdefault("old_logprobs", measured.logprobs[place].tolist())
                both["sampler_logprobs"] = list(answer.logprobs)
            made.append(replace(answer, columns=both))
        return made, dict(judged.metrics)

    def _measured(self, answers: Sequence[Answer]) -> _Measured:
        """What the model, which has not learned from them, says of the answers' tokens."""
        measured = _Measured([], [], [])
        every = [replace(answer, learned=True, columns={}) for answer in answers]
        size = self._settings.generations
        groups = [every[first : first + size] for first in range(0, len(every), size)]
        model = self._rollouts.model
        device = next(model.parameters()).device
        for batch in self._batches(groups):
            self.check()
            on_device = batch.to(device)
            with inference(model):
                scores = target_scores(model, on_device, self._objective)
            measured.logprobs.extend(scores.logprobs.cpu().split(batch.target_counts))
            if scores.values is not None:
                measured.values.extend(scores.values.cpu().split(batch.target_counts))
            if self._objective.compares:
                temperature = self._objective.temperature
                reference = reference_logprobs(model, on_device, temperature)
                measured.reference.extend(reference.cpu().split(batch.target_counts))
        return measured

    def _batches(self, groups: Sequence[Sequence[Answer]]) -> list[PackedBatch]:
        packed = packed_groups(
            [[answer.example(self._prompts) for answer in group] for group in groups],
            [len(self._prompts[group[0].prompt]) for group in groups],
            self._tokens_per_batch,
            share_prefixes=self.share_prefixes,
        )
        return [collate(examples, share_prefixes=self.share_prefixes) for examples in packed]


def packed_groups(
    groups: Sequence[Sequence[Example]],
    asked: Sequence[int],
    tokens: int,
    *,
    share_prefixes: bool,
) -> list[list[Example]]:
    """Micro-batches of up to `tokens` rows, in the order of the groups, which may be split.

    asked: tokens of each group's prompt, which are rows once in a batch where prefixes are shared.
    """
    batches: list[list[Example]] = [[]]
    rows = 0
    for group, shared in zip(groups, asked, strict=True):
        begun = False
        for example in group:
            own = len(example) - (shared if begun and share_prefixes else 0)
            if batches[-1] and rows + own > tokens:
                batches.append([])
                rows, own = 0, len(example)
            batches[-1].append(example)
            rows, begun = rows + own, True
    return batches


def _differ(group: Sequence[Answer]) -> bool:
    """Whether the completions of a prompt have rewards that differ."""
    known = [answer.reward for answer in group if answer.reward is not None]
    return len(known) > 1 and max(known) - min(known) > 1e-8


def _equal_share(answers: Sequence[Answer], size: int) -> float:
    groups = [answers[first : first + size] for first in range(0, len(answers), size)]
    return sum(not _differ(group) for group in groups) / len(groups)


def _list(value: object) -> list:
    assert isinstance(value, list | tuple)
    return list(value)
