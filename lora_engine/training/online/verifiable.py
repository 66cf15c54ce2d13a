"""Rewards that come with the package, each of what can be checked without another model."""

import json
import re
from collections.abc import Callable, Mapping, Sequence

from lora_engine.errors import UserError
from lora_engine.training.online.rewards import GIVEN

Numbers = list[float | None]
Function = Callable[..., Numbers]


def exact_match(*, column: str = "answer", ignore_case: bool = False) -> Function:
    """1 where the completion is the record's `column`, but for white space around it; else 0."""

    def plain(value: object) -> str:
        text = str(value).strip()
        return text.casefold() if ignore_case else text

    def match(completions: Sequence[str], **columns: Sequence[object]) -> Numbers:
        expected = _column(column, columns)
        return [
            None if answer is None else float(plain(completion) == plain(answer))
            for completion, answer in zip(completions, expected, strict=True)
        ]

    return match


def regex(*, pattern: str) -> Function:
    """1 where the pattern is found in the completion, else 0."""
    compiled = re.compile(pattern)

    def found(completions: Sequence[str]) -> Numbers:
        return [float(compiled.search(text) is not None) for text in completions]

    return found


def format_match(*, pattern: str) -> Function:
    """1 where the whole completion is of the pattern (in which . is a line break too), else 0."""
    compiled = re.compile(pattern, re.DOTALL)

    def matches(completions: Sequence[str]) -> Numbers:
        return [float(compiled.fullmatch(text.strip()) is not None) for text in completions]

    return matches


def length(*, target: int, spread: int = 0) -> Function:
    """Minus how many tokens the completion's length is off `target`, over `target`, but for up to
    `spread` of them."""
    if target < 1 or spread < 0:
        raise ValueError(f"target must be at least 1 and spread at least 0: {target}, {spread}")

    def near(completion_ids: Sequence[Sequence[int]]) -> Numbers:
        return [-max(abs(len(ids) - target) - spread, 0) / target for ids in completion_ids]

    return near


def json_valid() -> Function:
    """1 where the completion is JSON, else 0."""

    def valid(completions: Sequence[str]) -> Numbers:
        return [float(_is_json(text)) for text in completions]

    return valid


# By the name that a configuration gives; the parameters are its settings.
BUILT_IN: dict[str, Callable[..., Function]] = {
    "exact_match": exact_match,
    "regex": regex,
    "format": format_match,
    "length": length,
    "json_valid": json_valid,
}


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _column(name: str, columns: Mapping[str, Sequence[object]]) -> Sequence[object]:
    """A column of the records; UserError that names those there are."""
    if name not in columns:
        there = ", ".join(key for key in columns if key not in GIVEN) or "no columns"
        raise UserError(
            f"reward exact_match: the records have {there}, and no {name!r}; give the reward's "
            "column"
        )
    return columns[name]
