"""Which adapter each row of a batch uses, as the linears of a model read it."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor


class AdapterRouter:
    """Which adapter each row of the batch uses, for all linears of a model.

    names: the adapters, in the order of their numbers. rows: [tokens of the batch] int64 numbers,
    -1 for none; None: every row uses every active adapter.
    """

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self.rows: Tensor | None = None

    @contextmanager
    def selecting(self, index: Tensor | None) -> Iterator[None]:
        """Within this context the batch is those of its rows alone, [U] int64; None: all of it."""
        before = self.rows
        if before is not None and index is not None:
            self.rows = before.index_select(0, index.to(before.device))
        try:
            yield
        finally:
            self.rows = before
