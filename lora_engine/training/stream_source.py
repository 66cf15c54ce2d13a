"""Micro-batches of a stream, buffer after buffer; any position can be returned to."""

from collections.abc import Iterator

from lora_engine.data.batch import PackedBatch
from lora_engine.data.stream import ExampleStream, Place
from lora_engine.errors import UserError
from lora_engine.training.batches import BatchSource
from lora_engine.training.state import Position

_EMPTY = 1000  # buffers in a row without an example, after which none is expected


class StreamSource(BatchSource):
    """As `BatchSource`, with a buffer of the stream for an epoch. It never ends."""

    def __init__(self, stream: ExampleStream, tokens_per_batch: int, *, seed: int = 0) -> None:
        self._stream = stream
        self._tokens_per_batch = tokens_per_batch
        self._seed = seed
        self._packed: tuple[Place, BatchSource] | None = None

    def take(self, start: Position, count: int) -> tuple[list[PackedBatch], Position]:
        """`count` micro-batches from `start` on, and the position after.

        Raises UserError for malformed records.
        """
        batches: list[PackedBatch] = []
        position, empty = start, 0
        while len(batches) < count:
            place = position.place or self._stream.begin
            dataset, after = self._stream.buffer(place)
            number = 0 if dataset is None else self._source(place).num_batches(place.buffer)
            if position.batch_index >= number:
                position = Position(after.buffer, 0, after)
                empty = empty + 1 if dataset is None else 0
                if empty == _EMPTY:
                    raise UserError(f"{self._stream.name}: nothing to learn from comes any more")
                continue
            batches.append(self._source(place).batch(place.buffer, position.batch_index))
            position = Position(place.buffer, position.batch_index + 1, place)
        return batches, position

    def one_epoch(self) -> Iterator[PackedBatch]:
        """The micro-batches of the first buffer."""
        return self._source(self._stream.first()[1]).one_epoch()

    def first(self, tokens: int) -> PackedBatch:
        """As of a BatchSource, of the first buffer."""
        return self._source(self._stream.first()[1]).first(tokens)

    def largest(self) -> PackedBatch:
        """As of a BatchSource, of the first buffer."""
        return self._source(self._stream.first()[1]).largest()

    def count(self, epochs: int) -> int:
        """A stream is not counted."""
        raise NotImplementedError

    def _source(self, place: Place) -> BatchSource:
        """The buffer that begins at `place`, packed."""
        if self._packed is None or self._packed[0] != place:
            dataset, _ = self._stream.buffer(place)
            assert dataset is not None
            source = BatchSource(dataset.examples, self._tokens_per_batch, seed=self._seed)
            self._packed = (place, source)
        source = self._packed[1]
        source.share_prefixes = self.share_prefixes
        return source
