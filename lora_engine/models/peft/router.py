"""Which adapter each row of a batch uses, as the linears of a model read it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lora_engine.errors import UserError


class AdapterRouter:
    """Which adapter each row of the batch uses, for all linears of a model.

    names: the adapters, in the order of their numbers. rows: [tokens of the batch] int64 numbers,
    -1 for none; None: every row uses every active adapter.
    """

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self.rows: Tensor | None = None

    def routes(self, shape: torch.Size, device: torch.device) -> Tensor | None:
        """The adapter of each of a batch's tokens, which have that shape; None if not routed.

        Raises UserError where there are more or fewer rows than tokens.
        """
        if self.rows is None:
            return None
        if self.rows.numel() != shape.numel():
            raise UserError(
                f"route_adapters: {self.rows.numel()} rows for a batch of {shape.numel()} tokens "
                f"{list(shape)}; give one for each token"
            )
        return self.rows.to(device).view(shape)

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
