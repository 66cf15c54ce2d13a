"""The `objective` of a configuration: its name and settings, checked, and what they stand for."""

import types
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lora_engine.errors import nearest
from lora_engine.objectives import (
    CPO,
    DPO,
    GRPO,
    KTO,
    ORPO,
    PPO,
    SFT,
    Distill,
    Domain,
    Objective,
    Reward,
    SimPO,
    Teacher,
)

# Those that learn from records as they stand.
OBJECTIVES: dict[str, type[Any]] = {
    kind.name: kind for kind in (SFT, Domain, DPO, ORPO, SimPO, CPO, KTO, Reward, Distill)
}
# Those that learn from rewarded completions, which the model writes for prompts.
ONLINE: dict[str, type[Any]] = {kind.name: kind for kind in (GRPO, PPO)}
# Settings of these that `rollout` decides.
OF_ROLLOUT = {"temperature": "temperature", "max_completion_length": "max_new_tokens"}
_EVERY = {**OBJECTIVES, **ONLINE}


def objective_of(
    configured: str | Mapping[str, object], teacher: Teacher | None = None
) -> Objective:
    """The objective that a configuration names.

    configured: its name, or `name` and its settings. teacher: the model that `teacher` names; where
    none is given the name stands in its place. Raises ValueError "objective.KEY: what is wrong".
    """
    settings = {"name": configured} if isinstance(configured, str) else dict(configured)
    name = settings.pop("name", None)
    if not isinstance(name, str) or name not in _EVERY:
        close = nearest(name, _EVERY) if isinstance(name, str) else None
        hint = f"did you mean {close}?" if close else f"there is {', '.join(_EVERY)}"
        key = "objective" if isinstance(configured, str) else "objective.name"
        raise ValueError(f"{key}: no objective {name!r}; {hint}")
    kind = _EVERY[name]
    hints = get_type_hints(kind)
    known = {own.name: hints[own.name] for own in fields(kind)}
    read: dict[str, object] = {}
    for key, value in settings.items():
        if name in ONLINE and key in OF_ROLLOUT:
            raise ValueError(f"objective.{key}: is rollout.{OF_ROLLOUT[key]}; set that instead")
        if key not in known:
            close = nearest(key, known)
            takes = f"{name} takes {', '.join(known) or 'no settings'}"
            hint = f"did you mean objective.{close}?" if close else takes
            raise ValueError(f"objective.{key}: unknown key; {hint}")
        read[key] = _value(key, value, known[key])
    if teacher is not None:
        read["teacher"] = teacher
    try:
        objective: Objective = kind(**read)
    except ValueError as error:
        raise ValueError(f"objective.{error}") from error
    return objective


def teacher_of(configured: str | Mapping[str, object]) -> str:
    """The model that a configured objective's `teacher` names, or "" where there is none."""
    return "" if isinstance(configured, str) else str(configured.get("teacher", ""))


def _value(key: str, value: object, hint: Any) -> object:
    """`value` as a field of the type takes it."""
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if value is None and type(None) in members:
        return None
    if any(get_origin(member) is Literal for member in members):
        choices = [c for member in members for c in get_args(member)]
        if value in choices:
            return value
        close = nearest(value, choices) if isinstance(value, str) else None
        hint = f"; did you mean {close}?" if close else ""
        expected = " or ".join(choices)
        raise ValueError(f"objective.{key}: expected {expected}, got {value!r:.60}{hint}")
    if bool in members:
        if isinstance(value, bool):
            return value
        raise ValueError(f"objective.{key}: expected true or false, got {value!r:.60}")
    if str in members:
        if isinstance(value, str):
            return value
        raise ValueError(f"objective.{key}: expected text, got {value!r:.60}")
    number = _number(value)
    if number is None or (int in members and number != int(number)):
        kind = "a whole number" if int in members else "a number"
        raise ValueError(f"objective.{key}: expected {kind}, got {value!r:.60}")
    return int(number) if int in members else number


def _number(value: object) -> float | None:
    """A number, also as text in a form that YAML takes for text: 1e-2."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if abs(number) < float("inf") else None
