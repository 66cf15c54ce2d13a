"""The `rewards` of a configuration, checked: functions, and the folders of reward models."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_engine.errors import UserError
from lora_engine.files import user_path
from lora_engine.training.online.named import rewards_of


def check_named(named: Sequence[Any]) -> None:
    """Raises UserError for rewards that are not there; loads no model."""
    rewards_of([_stand_in(one) for one in named])


def folder_of(one: object) -> str | None:
    """The folder that a reward names; None for a function."""
    what = one.get("reward") if isinstance(one, Mapping) else one
    if not isinstance(what, str) or ":" in what:
        return None
    return what if "/" in what or user_path(what).is_dir() else None


def _stand_in(one: object) -> Any:
    """For a reward model a function of its name and weight; another reward as it is."""
    folder = folder_of(one)
    if folder is None:
        return one
    if not user_path(folder).is_dir():
        raise UserError(f"rewards: {folder}: no such folder; give that of a reward model")
    settings = dict(one) if isinstance(one, Mapping) else {}
    settings.pop("base", None)
    return {"name": Path(folder).name, **settings, "reward": _of_a_model}


def _of_a_model(prompt_ids: object, completion_ids: object) -> None:
    """What stands for a reward model that is not loaded yet."""
