"""Rewards: functions of what was asked and written, called and checked, and their weighted sum."""

import asyncio
import inspect
import math
import threading
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path

import torch
from torch import Tensor

from lora_engine.data.preferences import Said
from lora_engine.errors import UserError

# Of a reward: the squares of larger ones, which deviations take, leave float32.
LARGEST = 1e15
# What a reward function is called with beside the records' columns.
GIVEN = ("prompts", "completions", "prompt_ids", "completion_ids")


@dataclass(frozen=True)
class Written:
    """n completions, as reward functions are given them.

    prompts: of each, text or messages as the record has it. columns: the records' other fields,
    None for a record without one. origins: where the records stand.
    """

    prompts: Sequence[Said]
    completions: Sequence[str]
    prompt_ids: Sequence[Sequence[int]]
    completion_ids: Sequence[Sequence[int]]
    columns: Mapping[str, Sequence[object]]
    origins: Sequence[str]

    def only(self, place: int) -> "Written":
        """One of them."""
        part = slice(place, place + 1)
        return Written(
            self.prompts[part],
            self.completions[part],
            self.prompt_ids[part],
            self.completion_ids[part],
            {name: values[part] for name, values in self.columns.items()},
            self.origins[part],
        )

    def describe(self, place: int) -> str:
        """One of them for a message."""
        text = self.completions[place]
        shown = text if len(text) <= 60 else f"{text[:59]}…"
        return f"the completion {shown!r} of {self.origins[place]}"


@dataclass(frozen=True)
class Reward:
    """A reward function with its place in the sum.

    function: called with GIVEN and the columns that it takes, each a list of n, by name; answers n
        numbers, None for a completion that it says nothing of. It may be a coroutine function.
    timeout: seconds that a call may take.
    """

    name: str
    function: Callable[..., object]
    weight: float = 1.0
    timeout: float | None = None

    def __call__(self, written: Written) -> Tensor:
        """float64 [n], NaN for None. UserError for whatever is wrong with what it answers."""
        arguments = self._arguments(written)
        try:
            answer = _called(self.function, arguments, self.timeout)
        except _TimeOut as error:
            raise UserError(
                f"reward {self.name}: took more than {self.timeout:g} s for "
                f"{len(written.completions)} completions, the first of them "
                f"{written.describe(0)}; give it a longer timeout or make it faster"
            ) from error
        except UserError:
            raise
        except Exception as error:
            raise UserError(self._what_failed(error, written)) from error
        return self._numbers(answer, written)

    def _arguments(self, written: Written) -> dict[str, object]:
        """What of GIVEN and the columns the function takes."""
        if taken_names := written.columns.keys() & set(GIVEN):
            raise UserError(
                f"the records have a column {sorted(taken_names)[0]!r}, as reward functions are "
                "given what is written; call the column something else"
            )
        every: dict[str, object] = {
            **written.columns,
            "prompts": list(written.prompts),
            "completions": list(written.completions),
            "prompt_ids": [list(ids) for ids in written.prompt_ids],
            "completion_ids": [list(ids) for ids in written.completion_ids],
        }
        taken = inspect.signature(self.function).parameters.values()
        if any(p.kind is p.VAR_KEYWORD for p in taken):
            return every
        missing = [p.name for p in taken if p.default is p.empty and p.name not in every]
        if missing:
            has = ", ".join(written.columns) or "none"
            raise UserError(
                f"reward {self.name}: takes {', '.join(map(repr, missing))}, which the records do "
                f"not have (their columns: {has}); name a column so, or give the parameter a "
                "default"
            )
        return {p.name: every[p.name] for p in taken if p.name in every}

    def _what_failed(self, error: Exception, written: Written) -> str:
        """Names the first completion that alone raises too."""
        said = f"{type(error).__name__}: {error}".split("\n")[0]
        frames = traceback.extract_tb(error.__traceback__)
        place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"
        about = f"{len(written.completions)} completions together"
        for number in range(len(written.completions)):
            one = written.only(number)
            try:
                _called(self.function, self._arguments(one), self.timeout)
            except Exception:
                about = written.describe(number)
                break
        return f"reward {self.name}: raises {said} ({place}) for {about}"

    def _numbers(self, answer: object, written: Written) -> Tensor:
        count = len(written.completions)
        values = answer.tolist() if hasattr(answer, "tolist") else answer
        if not isinstance(values, list | tuple):
            raise UserError(
                f"reward {self.name}: returns {type(values).__name__}, expected a list of "
                f"{count} numbers, one a completion (None where it says nothing)"
            )
        if len(values) != count:
            raise UserError(
                f"reward {self.name}: returns {len(values)} numbers for {count} completions; give "
                "one a completion, None where it says nothing"
            )
        for number, value in enumerate(values):
            if value is None:
                continue
            if not isinstance(value, Real) or not math.fabs(value) <= LARGEST:
                raise UserError(
                    f"reward {self.name}: returns {value!r:.60} for {written.describe(number)}; "
                    f"give a number of at most {LARGEST:g}, or None"
                )
        made = [math.nan if value is None else float(value) for value in values]
        return torch.tensor(made, dtype=torch.float64)


@dataclass(frozen=True)
class Rewarded:
    """total: float64 [n], Σ weight × reward over those that say something; NaN where none does.
    parts: of each reward by its name, unweighted, NaN where it says nothing."""

    total: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)


def rewarded(rewards: Sequence[Reward], written: Written) -> Rewarded:
    """What all rewards together say. Raises UserError as they do."""
    parts = {reward.name: reward(written) for reward in rewards}
    weighted = torch.stack([reward.weight * parts[reward.name] for reward in rewards])
    nothing = torch.isnan(weighted).all(0)
    total = torch.where(nothing, math.nan, torch.nansum(weighted, 0))
    return Rewarded(total, parts)


class _TimeOut(Exception):
    """A call took too long."""


def _called(
    function: Callable[..., object], arguments: Mapping[str, object], timeout: float | None
) -> object:
    """The function's answer, awaited where it is a coroutine.

    A call that takes too long is left behind in a thread of its own.
    """

    def call() -> object:
        answer = function(**arguments)
        return asyncio.run(_awaited(answer)) if inspect.isawaitable(answer) else answer

    if timeout is None:
        return call()
    answers: list[object] = []
    errors: list[Exception] = []

    def work() -> None:
        try:
            answers.append(call())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        raise _TimeOut
    if errors:
        raise errors[0]
    return answers[0]


async def _awaited(answer: Awaitable[object]) -> object:
    return await answer
