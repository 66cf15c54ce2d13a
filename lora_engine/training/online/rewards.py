"""Rewards: functions of what was asked and written, called and checked, and their weighted sum."""

import copy
import inspect
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path

import torch
from torch import Tensor

from lora_engine.data.preferences import Said
from lora_engine.errors import UserError, reason
from lora_engine.training.online.calls import TookTooLong, called

# Of a reward and of a sum of them: the squares of larger ones, which deviations take, leave
# float32.
LARGEST = 1e15
# The part of a reward that `rollout.overlong_buffer` adds; no reward may be called so.
OVERLONG = "overlong"
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
            prompts=self.prompts[part],
            completions=self.completions[part],
            prompt_ids=self.prompt_ids[part],
            completion_ids=self.completion_ids[part],
            columns={name: values[part] for name, values in self.columns.items()},
            origins=self.origins[part],
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
    settings: JSON values that its numbers depend on, by name; a run is resumed with the same ones.
    positions: the most tokens of a prompt and its completion that it can judge; None: any number.
    """

    name: str
    function: Callable[..., object]
    weight: float = 1.0
    timeout: float | None = None
    settings: Mapping[str, object] = field(default_factory=dict)
    positions: int | None = None

    def __call__(self, written: Written) -> Tensor:
        """float64 [n], NaN for None. UserError for whatever is wrong with what it answers."""
        arguments = self._arguments(written)
        try:
            answer = called(self.function, arguments, self.timeout)
        except TookTooLong as error:
            raise UserError(
                f"reward {self.name}: took more than {self.timeout:g} s for "
                f"{len(written.completions)} completions, the first of them "
                f"{written.describe(0)}; give it a longer timeout or make it faster"
            ) from error
        except (UserError, KeyboardInterrupt):
            raise
        except BaseException as error:  # sys.exit and cancelled tasks, too
            raise UserError(self._what_failed(error, written)) from error
        return self._numbers(answer, written)

    def _arguments(self, written: Written) -> dict[str, object]:
        """What of GIVEN and the columns the function takes; its own copies, to change at will."""
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
        taken = self.parameters()
        if any(p.kind is p.VAR_KEYWORD for p in taken):
            return copy.deepcopy(every)
        missing = [p.name for p in taken if p.default is p.empty and p.name not in every]
        if missing:
            has = ", ".join(written.columns) or "none"
            raise UserError(
                f"reward {self.name}: takes {', '.join(map(repr, missing))}, which the records do "
                f"not have (their columns: {has}); name a column so, or give the parameter a "
                "default"
            )
        return copy.deepcopy({p.name: every[p.name] for p in taken if p.name in every})

    def parameters(self) -> list[inspect.Parameter]:
        """What the function takes by name. UserError where Python cannot tell."""
        try:
            found = inspect.signature(self.function).parameters.values()
        except (ValueError, TypeError) as error:
            raise UserError(
                f"reward {self.name}: Python does not know what it takes; give a function that is "
                "written in Python"
            ) from error
        return [p for p in found if p.kind is not p.VAR_POSITIONAL]

    def _what_failed(self, error: BaseException, written: Written) -> str:
        """Names the first completion that alone raises too."""
        name = type(error).__name__
        try:
            told = reason(error)
        except Exception:  # of its own __str__
            told = name
        said = name if told == name else f"{name}: {told}"
        frames = traceback.extract_tb(error.__traceback__)
        place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"
        about = f"{len(written.completions)} completions together"
        for number in range(len(written.completions)):
            one = written.only(number)
            try:
                called(self.function, self._arguments(one), self.timeout)
            except KeyboardInterrupt:
                raise
            except BaseException:
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
        made = []
        for number, value in enumerate(values):
            found = math.nan if value is None else _number(value)
            if found is None:
                raise UserError(
                    f"reward {self.name}: returns {_shown(value)} for {written.describe(number)}; "
                    f"give a number of at most {LARGEST:g}, or None"
                )
            made.append(found)
        return torch.tensor(made, dtype=torch.float64)


def _shown(value: object) -> str:
    """A value for a message, also one that Python does not write out."""
    try:
        return f"{value!r:.60}"
    except Exception:  # 10**5000 has more digits than it may have
        return f"one {type(value).__name__}"


def _number(value: object) -> float | None:
    """A finite number of Python's or of an array's kind, of at most LARGEST; None: it is none."""
    if getattr(value, "shape", None) == ():
        value = value.item()  # type: ignore[attr-defined]
    if not isinstance(value, Real):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if abs(number) <= LARGEST else None


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
    large = (total.abs() > LARGEST).tolist()
    if any(large):
        place = large.index(True)
        raise UserError(
            f"rewards: add up to {float(total[place]):g} for {written.describe(place)}; give "
            f"weights with which they are at most {LARGEST:g}"
        )
    return Rewarded(total, parts)
