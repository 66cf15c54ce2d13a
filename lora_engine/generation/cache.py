"""Keys and values of many sequences, in runs of rows of one buffer a layer."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Run:
    """`rows` rows of a cache from `first` on. users: how many sequences read them."""

    first: int
    rows: int
    users: int = 1


@dataclass
class FreeRuns:
    """Which of `size` rows are free: first fit, neighbours joined when they are given back."""

    size: int
    free: list[tuple[int, int]] = field(init=False)  # (first, rows), ascending

    def __post_init__(self) -> None:
        self.free = [(0, self.size)] if self.size else []

    def take(self, rows: int) -> int | None:
        """The first of `rows` free rows in a run, which are free no more; None: there is none."""
        for i, (first, count) in enumerate(self.free):
            if count >= rows:
                rest = [(first + rows, count - rows)] if count > rows else []
                self.free[i : i + 1] = rest
                return first
        return None

    def give_back(self, first: int, rows: int) -> None:
        joined: list[tuple[int, int]] = []
        for begin, count in sorted([*self.free, (first, rows)]):
            if joined and joined[-1][0] + joined[-1][1] == begin:
                begin, count = joined[-1][0], joined[-1][1] + count
                joined.pop()
            joined.append((begin, count))
        self.free = joined

    def grow(self, rows: int) -> None:
        """As many more rows, behind the others."""
        self.give_back(self.size, rows)
        self.size += rows


class KeyValueCache:
    """Rows of keys and of values [rows, Hkv D], a pair of buffers for each layer.

    It has no more rows than `most`, and grows to them as they are needed.
    """

    def __init__(
        self, widths: list[int], most: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.most, self.free = most, FreeRuns(0)
        self.keys = [torch.empty(0, width, dtype=dtype, device=device) for width in widths]
        self.values = [torch.empty(0, width, dtype=dtype, device=device) for width in widths]

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (*self.keys, *self.values))

    def take(self, rows: int) -> Run | None:
        """A run of `rows` rows; None where there is none before others are given back."""
        first = self.free.take(rows)
        if first is None and self._grow(rows):
            first = self.free.take(rows)
        return None if first is None else Run(first, rows)

    def release(self, run: Run) -> None:
        """One user less; the rows are free after the last one."""
        run.users -= 1
        if run.users == 0:
            self.free.give_back(run.first, run.rows)

    def _grow(self, rows: int) -> bool:
        """At least `rows` rows more, or, where these would be too many, all that there may be."""
        more = min(max(rows, self.free.size), self.most - self.free.size)
        if more <= 0:
            return False
        for buffers in (self.keys, self.values):
            for i, old in enumerate(buffers):
                buffers[i] = _longer(old, more)
        self.free.grow(more)
        return True


def _longer(rows: Tensor, more: int) -> Tensor:
    longer = rows.new_empty(rows.shape[0] + more, rows.shape[1])
    longer[: rows.shape[0]] = rows
    return longer
