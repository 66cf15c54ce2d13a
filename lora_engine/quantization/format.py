"""What a format of packed weights says of itself: its name, its parameters, its tensors."""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch


class Entry(NamedTuple):
    """A tensor of a packed weight."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Format(Protocol):
    """A frozen dataclass whose fields are the format's parameters."""

    @property
    def name(self) -> str:
        """The format's name, as `quantize_weight` takes it."""

    def layout(self, shape: tuple[int, int]) -> Mapping[str, Entry]:
        """The tensors in which a weight [N, K] of this shape is kept."""
