"""Checks of an objective's own settings, when it is made."""

import math
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints


def check_settings(
    objective: Any, *, positive: Iterable[str] = (), not_negative: Iterable[str] = ()
) -> None:
    """Raises ValueError "field: expected …, got …" for a number out of range, or a choice that is
    none of a field's Literal."""
    for name in positive:
        value = getattr(objective, name)
        if not 0 < value < math.inf:
            raise ValueError(f"{name}: expected a number > 0, got {value!r}")
    for name in not_negative:
        value = getattr(objective, name)
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}: expected a number ≥ 0, got {value!r}")
    hints = get_type_hints(type(objective))
    for own in fields(objective):
        if get_origin(hints[own.name]) is not Literal:
            continue
        value, choices = getattr(objective, own.name), get_args(hints[own.name])
        if value not in choices:
            raise ValueError(f"{own.name}: expected {' or '.join(choices)}, got {value!r}")
