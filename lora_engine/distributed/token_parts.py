"""The tokens of one batch in parts, one for each process, and attention's heads in their place.

Between attention layers a process has all heads of its own tokens, within them all tokens of its
own heads (Jacobs and others 2023, DeepSpeed-Ulysses, arXiv:2309.14509).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor

from lora_engine.distributed.world import World


@dataclass(frozen=True)
class TokenParts:
    """T tokens in W parts one after the other, of which each process of `world` has one."""

    tokens: int
    world: World

    @property
    def counts(self) -> list[int]:
        """Tokens of each part; they differ by one at most."""
        each, more = divmod(self.tokens, self.world.size)
        return [each + (rank < more) for rank in range(self.world.size)]

    @property
    def own(self) -> slice:
        """This process's part of the tokens."""
        counts = self.counts
        start = sum(counts[: self.world.rank])
        return slice(start, start + counts[self.world.rank])

    def to_heads(self, x: Tensor) -> Tensor:
        """Of x [t, W, C], this process's tokens, [T, C]: all tokens, and of dimension 1 what is
        this process's. All processes call it."""
        width, counts = x.shape[2], self.counts
        sent = [counts[self.world.rank] * width] * self.world.size
        received = [count * width for count in counts]
        flat = self.world.exchanged(x.transpose(0, 1).contiguous(), sent, received)
        return flat.view(self.tokens, width)

    def to_tokens(self, x: Tensor) -> Tensor:
        """The inverse: of x [T, C] this process's tokens, [t, W, C]."""
        width, counts = x.shape[1], self.counts
        sent = [count * width for count in counts]
        received = [counts[self.world.rank] * width] * self.world.size
        flat = self.world.exchanged(x.contiguous(), sent, received)
        return flat.view(self.world.size, counts[self.world.rank], width).transpose(0, 1)


_parts: ContextVar[TokenParts | None] = ContextVar("token_parts", default=None)


def token_parts() -> TokenParts | None:
    """Those of the batch that runs, whose tokens processes share; None: each runs all of them."""
    return _parts.get()


@contextmanager
def sharing_tokens(parts: TokenParts | None) -> Iterator[None]:
    """Within, models run this process's part of a batch."""
    token = _parts.set(parts)
    try:
        yield
    finally:
        _parts.reset(token)
