"""Which examples make up which batch: a plan that depends on the lengths, seed and epoch only."""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np


def pack_best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Puts every index into a batch of at most `capacity` tokens, in the order of `lengths`.

    Each goes to the fullest batch that can still take it (best-fit online bin packing): at most one
    batch ends up half empty or emptier. One longer than `capacity` gets a batch of its own.
    """
    batches: list[list[int]] = []
    free: list[int] = []  # ascending, distinct: the tokens that batches can still take
    batches_with: dict[int, list[int]] = {}  # free tokens -> indices of the batches with as many
    for index, length in enumerate(lengths):
        place = bisect_left(free, length)
        if place == len(free):
            number, tokens = len(batches), capacity
            batches.append([])
        else:
            tokens = free[place]
            number = batches_with[tokens].pop()
            if not batches_with[tokens]:
                del batches_with[tokens], free[place]
        batches[number].append(index)
        left = tokens - length
        if left > 0:
            if left not in batches_with:
                batches_with[left] = []
                insort(free, left)
            batches_with[left].append(number)
    return batches


class PackedSampler:
    """Batches of example indices: each example once per epoch, batches nearly full.

    lengths: tokens per example, each at least 1.
    tokens_per_batch: most tokens in a batch; a longer example is a batch of its own.
    seed: with the epoch, fixes the order. Without `shuffle` every epoch is the same and follows
        the order of the examples as far as the packing allows.

    There is no hidden state: (epoch, index of the batch in it) is all that resuming needs.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        tokens_per_batch: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        if self.lengths.ndim != 1 or self.lengths.size == 0 or self.lengths.min() < 1:
            raise ValueError("lengths must be a non-empty list of positive token counts")
        if tokens_per_batch < 1:
            raise ValueError(f"tokens_per_batch must be positive, got {tokens_per_batch}")
        self.tokens_per_batch = tokens_per_batch
        self.seed = seed
        self.shuffle = shuffle
        self._planned: tuple[int, list[list[int]]] | None = None

    def epoch_batches(self, epoch: int) -> list[list[int]]:
        """All batches of one epoch (from 0), each a list of example indices."""
        if self._planned is None or self._planned[0] != epoch:
            self._planned = (epoch, self._plan(epoch))
        return self._planned[1]

    def num_batches(self, epoch: int = 0) -> int:
        """Batches in one epoch; with `shuffle` it may differ a little between epochs."""
        return len(self.epoch_batches(epoch))

    def fill(self, epoch: int = 0) -> float:
        """Tokens over what the batches could hold; a batch of one long example counts as full."""
        planned = self.epoch_batches(epoch)
        capacity = sum(max(self.tokens_per_batch, int(self.lengths[b].sum())) for b in planned)
        return float(self.lengths.sum() / capacity)

    def _plan(self, epoch: int) -> list[list[int]]:
        if not self.shuffle:
            return pack_best_fit(self.lengths.tolist(), self.tokens_per_batch)
        generator = np.random.default_rng([self.seed, epoch])
        order = generator.permutation(self.lengths.size)
        packed = pack_best_fit(self.lengths[order].tolist(), self.tokens_per_batch)
        # Packing leaves the emptiest batches for last: the batches are shuffled as well.
        return [order[packed[i]].tolist() for i in generator.permutation(len(packed))]
