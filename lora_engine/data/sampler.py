"""Which examples make up which batch: a plan that depends on the lengths, seed and epoch only."""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np


def pack_best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put every index into one batch of at most `capacity` tokens, in the order given.

    Each goes to the fullest batch with room for it (best-fit online bin packing): at most one
    batch ends up half empty or emptier. One longer than `capacity` gets a batch of its own.
    """
    batches: list[list[int]] = []
    rooms: list[int] = []  # ascending, distinct: the room left in batches that are not full
    batches_with: dict[int, list[int]] = {}  # room -> numbers of the batches with that room
    for index, length in enumerate(lengths):
        place = bisect_left(rooms, length)
        if place == len(rooms):
            number, room = len(batches), capacity
            batches.append([])
        else:
            room = rooms[place]
            number = batches_with[room].pop()
            if not batches_with[room]:
                del batches_with[room], rooms[place]
        batches[number].append(index)
        left = room - length
        if left > 0:
            if left not in batches_with:
                batches_with[left] = []
                insort(rooms, left)
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
        """Share of the batches' room that holds tokens; batches of one long example are full."""
        planned = self.epoch_batches(epoch)
        room = sum(max(self.tokens_per_batch, int(self.lengths[b].sum())) for b in planned)
        return float(self.lengths.sum() / room)

    def _plan(self, epoch: int) -> list[list[int]]:
        if not self.shuffle:
            return pack_best_fit(self.lengths.tolist(), self.tokens_per_batch)
        generator = np.random.default_rng([self.seed, epoch])
        order = generator.permutation(self.lengths.size)
        packed = pack_best_fit(self.lengths[order].tolist(), self.tokens_per_batch)
        # Packing leaves the emptiest batches for last; shuffled, they come at no special time.
        return [order[packed[i]].tolist() for i in generator.permutation(len(packed))]
