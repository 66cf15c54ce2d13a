"""Rewards as they are named: functions of Python, `module:function`, and those of the package."""

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import TypeAlias

from lora_engine.errors import UserError, nearest
from lora_engine.training.online.rewards import OVERLONG, Reward
from lora_engine.training.online.verifiable import BUILT_IN
from lora_engine.user_code import function_of

Named: TypeAlias = "Reward | Callable[..., object] | str | Mapping[str, object]"
_COMMON = ("reward", "name", "weight", "timeout")


def rewards_of(named: Sequence[Named]) -> list[Reward]:
    """The rewards that are meant.

    Each is a Reward, a function, "module:function" ("file.py:function" too), a name of BUILT_IN, or
    a mapping of one of these two as `reward` with a `name`, `weight`, `timeout` in seconds, and the
    settings of a built-in one. Raises UserError "rewards[i]: what is wrong".
    """
    if isinstance(named, str | Mapping) or not isinstance(named, Sequence) or not named:
        raise UserError(
            f"rewards: expected a list of one reward or more, got {named!r:.60}; "
            f"there is {', '.join(BUILT_IN)}, or module:function"
        )
    rewards = []
    for number, one in enumerate(named):
        try:
            rewards.append(_reward(one))
        except (UserError, ValueError) as error:
            raise UserError(f"rewards[{number}]: {error}") from error
    names = [reward.name for reward in rewards]
    if OVERLONG in names:
        raise UserError(
            f"rewards: {OVERLONG!r} is what rollout.overlong_buffer adds; give another `name`"
        )
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"rewards: {twice[0]!r} is there twice; give one of them another `name`")
    return rewards


def _reward(one: object) -> Reward:
    made = _made(one)
    made.parameters()
    return made


def _made(one: object) -> Reward:
    if isinstance(one, Reward):
        return one
    if isinstance(one, str):
        one = {"reward": one}
    if not isinstance(one, Mapping):
        if not callable(one):
            raise UserError(f"expected a function or its name, got {one!r:.60}")
        return Reward(getattr(one, "__name__", type(one).__name__), one)
    what = one.get("reward")
    settings = {key: value for key, value in one.items() if key not in _COMMON}
    if callable(what) or (isinstance(what, str) and ":" in what):
        if settings:
            raise UserError(
                f"unknown key {next(iter(settings))!r}; a function of yours takes "
                f"{', '.join(_COMMON[1:])}"
            )
        function = what if callable(what) else function_of(str(what))
        name = getattr(function, "__name__", type(function).__name__)
    elif isinstance(what, str) and what in BUILT_IN:
        function, name = _built_in(what, settings), what
    else:
        close = nearest(what, BUILT_IN) if isinstance(what, str) else None
        there = f"there is {', '.join(BUILT_IN)}, or module:function of your own"
        raise UserError(f"no reward {what!r:.60}; {f'did you mean {close}?' if close else there}")
    return Reward(
        name=_text(one.get("name", name), "name"),
        function=function,
        weight=_number(one.get("weight", 1.0), "weight"),
        timeout=None
        if one.get("timeout") is None
        else _number(one["timeout"], "timeout", least=0.0),
        settings=settings or getattr(what, "settings", {}),
        positions=getattr(what, "positions", None),
    )


def _built_in(name: str, settings: Mapping[str, object]) -> Callable[..., object]:
    known = signature(BUILT_IN[name]).parameters
    for key in settings:
        if key not in known:
            close = nearest(key, known)
            takes = f"{name} takes {', '.join(known) or 'no settings'}"
            raise UserError(f"unknown key {key!r}; {f'did you mean {close}?' if close else takes}")
    missing = [key for key, p in known.items() if p.default is p.empty and key not in settings]
    if missing:
        raise UserError(f"{name} needs {', '.join(missing)}; give it")
    try:
        return BUILT_IN[name](**settings)
    except Exception as error:  # re.error of a pattern, TypeError of a value
        raise UserError(f"{name}: {error}; mend its settings") from error


def _text(value: object, key: str) -> str:
    if not isinstance(value, str) or not value or not value.isprintable():
        raise UserError(f"{key}: expected a line of text, got {value!r:.60}")
    return value


def _number(value: object, key: str, least: float = float("-inf")) -> float:
    """A number, also as text in a form that YAML takes for text: 1e-2."""
    try:
        number = float("nan") if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = float("nan")
    if not least < number < float("inf"):
        above = "a number above 0" if least == 0 else "a number"
        raise UserError(f"{key}: expected {above}, got {value!r:.60}")
    return number
