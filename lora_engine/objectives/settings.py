"""Checks of an objective's own settings, when it is made; each raises ValueError "name: why"."""

import math
from collections.abc import Sequence


def check_positive(**values: float) -> None:
    """Numbers above 0, by their names."""
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name}: expected a number > 0, got {value!r}")


def check_not_negative(**values: float) -> None:
    """Numbers of 0 or more, by their names."""
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}: expected a number ≥ 0, got {value!r}")


def check_share(**values: float) -> None:
    """Numbers from 0 to 1, by their names."""
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name}: expected a number from 0 to 1, got {value!r}")


def check_choice(choices: Sequence[str], **values: str) -> None:
    """One of the choices, by its name."""
    for name, value in values.items():
        if value not in choices:
            raise ValueError(f"{name}: expected {' or '.join(choices)}, got {value!r}")
