"""placeholder"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Dropout:
    p: float
    seed: int


def dropout(x, d, stream):
    raise RuntimeError
