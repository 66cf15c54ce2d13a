"""The endless, or epoch-limited, sequence of micro-batches; any position can be returned to."""

import hashlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice

from lora_engine.data.batch import PackedBatch, collate
from lora_engine.data.render import Example, part
from lora_engine.data.sampler import PackedSampler
from lora_engine.training.state import Position

# How many examples with targets `BatchSource.first` chooses among.
_LOOKED_AT = 32


class BatchSource:
    """Micro-batches of packed examples, epoch after epoch, each epoch in its own order.

    It keeps no position of its own: `take` is a pure function of the position that it is given, and
    of what `saved` says.

    share_prefixes: as for `collate`.
    """

    share_prefixes = False

    def __init__(
        self,
        examples: Sequence[Example],
        tokens_per_batch: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        epochs: int | None = None,
    ) -> None:
        """epochs: where the source ends; None never ends."""
        self._examples = examples
        self._epochs = epochs
        self._sampler = PackedSampler(
            [example.num_tokens for example in examples],
            tokens_per_batch,
            seed=seed,
            shuffle=shuffle,
        )

    def take(self, start: Position, count: int) -> tuple[list[PackedBatch], Position]:
        """`count` micro-batches from `start` on (fewer at the end), and the position after."""
        batches: list[PackedBatch] = []
        position = start
        while len(batches) < count:
            plan = self._sampler.epoch_batches(position.epoch)
            if position.batch_index >= len(plan):
                position = Position(position.epoch + 1, 0)
                if self._epochs is not None and position.epoch >= self._epochs:
                    break
                continue
            batches.append(self.batch(*position[:2]))
            position = position._replace(batch_index=position.batch_index + 1)
        return batches, position

    def metrics(self, position: Position) -> Mapping[str, float]:
        """What is told of the step that ended at `position`, beside the objective's own."""
        return {}

    def start(self, saved: Mapping[str, object] | None) -> None:
        """A run begins, or goes on from the checkpoint that holds what `saved` returned."""

    def saved(self, position: Position) -> Mapping[str, object] | None:
        """What `position` alone does not say of the micro-batches to come; JSON."""
        return None

    def close(self) -> None:
        """Nothing more is taken."""

    def num_batches(self, epoch: int) -> int:
        """Micro-batches in an epoch."""
        return self._sampler.num_batches(epoch)

    def batch(self, epoch: int, index: int) -> PackedBatch:
        """One micro-batch of an epoch."""
        return self._collate(self._sampler.epoch_batches(epoch)[index])

    def one_epoch(self) -> Iterator[PackedBatch]:
        """The micro-batches of the first epoch."""
        for indices in self._sampler.epoch_batches(0):
            yield self._collate(indices)

    def first(self, tokens: int) -> PackedBatch:
        """A micro-batch of up to `tokens` tokens, of the first examples that have targets.

        It has an example of each adapter that they name, cut to an equal share of the tokens, and
        further ones as long as they fit. Where no example has targets it is the very first one.
        """
        order = (self._examples[i] for plan in self._sampler.epoch_batches(0) for i in plan)
        taught = (example for example in order if any(example.supervised[1:]))
        candidates = list(islice(taught, _LOOKED_AT)) or [self._examples[0]]
        firsts = {
            example.adapter: index for index, example in reversed(list(enumerate(candidates)))
        }
        share = max(tokens // len(firsts), 2)
        chosen = {index: _cut(candidates[index], share) for index in firsts.values()}
        for index, example in enumerate(candidates):
            taken = sum(each.num_tokens for each in chosen.values())
            if index not in chosen and taken + example.num_tokens <= tokens:
                chosen[index] = example
        kept = [example for _, example in sorted(chosen.items())]
        return collate(kept, share_prefixes=self.share_prefixes)

    def largest(self) -> PackedBatch:
        """The micro-batch of the first epoch with the most tokens."""
        planned, lengths = self._sampler.epoch_batches(0), self._sampler.lengths
        return self._collate(max(planned, key=lambda indices: int(lengths[indices].sum())))

    def count(self, epochs: int) -> int:
        """Number of micro-batches in the first `epochs` epochs; packing may vary per epoch."""
        return sum(self._sampler.num_batches(epoch) for epoch in range(epochs))

    def _collate(self, indices: Sequence[int]) -> PackedBatch:
        examples = [self._examples[index] for index in indices]
        return collate(examples, share_prefixes=self.share_prefixes)


def fingerprint(examples: Sequence[Example]) -> str:
    """SHA-256 of all examples' token ids, supervised positions and adapters."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(len(example).to_bytes(8, "little"))
        digest.update(array("q", example.input_ids).tobytes())
        digest.update(bytes(example.supervised))
        digest.update(example.adapter.encode())
        if example.role or example.columns:
            digest.update(repr((example.role, sorted(example.columns.items()))).encode())
        if example.others:
            digest.update(fingerprint(example.others).encode())
    return digest.hexdigest()


def _cut(example: Example, length: int) -> Example:
    """At most `length` (2 or more) consecutive tokens of an example, with a target if any.

    Of several sequences each has an equal share of them.
    """
    if example.others:
        share = max(length // len(example.sequences), 2)
        others = tuple(_cut(other, share) for other in example.others)
        return replace(_cut(replace(example, others=()), share), others=others)
    if len(example) <= length:
        return example
    first = next((at for at, taught in enumerate(example.supervised) if at and taught), 1)
    begin = max(0, min(first - length // 2, len(example) - length))
    return part(example, range(begin, begin + length))
