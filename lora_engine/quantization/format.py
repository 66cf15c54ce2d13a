"""What a format of packed weights says of each tensor that it keeps."""

from typing import NamedTuple

import torch


class Entry(NamedTuple):
    """A tensor of a packed weight."""

    shape: tuple[int, ...]
    dtype: torch.dtype
