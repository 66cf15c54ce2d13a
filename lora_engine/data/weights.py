"""How much a record, and each of its messages, counts in the loss."""

import math
from collections.abc import Mapping, Sequence

from lora_engine.data.fields import kind_of
from lora_engine.errors import UserError


def record_weight(fields: Mapping[str, object], origin: str) -> float:
    """The number in the field `weight`; 1 where there is none."""
    value = fields.get("weight")
    return 1.0 if value is None else _number(value, f"{origin}: 'weight'")


def message_weights(messages: Sequence[Mapping[str, object]], origin: str) -> tuple[float, ...]:
    """The number in `weight` of each message, 1 where there is none; empty if none has one."""
    if all(message.get("weight") is None for message in messages):
        return ()
    return tuple(
        1.0 if m.get("weight") is None else _number(m["weight"], f"{origin}: message {i}: 'weight'")
        for i, m in enumerate(messages, start=1)
    )


def _number(value: object, where: str) -> float:
    if isinstance(value, str):  # of a CSV file
        try:
            value = float(value)
        except ValueError:
            raise UserError(f"{where} must be a number of 0 or more, got a string") from None
    if not isinstance(value, int | float) or not 0 <= value < math.inf:
        what = "a negative or infinite number" if isinstance(value, float | int) else kind_of(value)
        raise UserError(f"{where} must be a number of 0 or more, got {what}")
    return float(value)
