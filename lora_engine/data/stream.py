"""Examples of files of any size, a buffer of records at a time.

A buffer's examples are shuffled and packed among themselves. Where a buffer begins is all that is
needed to make it again, so that a run can be resumed in its middle: there is no other state.
"""

import hashlib
import json
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from lora_engine.data.chunks import Chunk
from lora_engine.data.dataset import TokenizedDataset, dataset_of
from lora_engine.data.heldout import digest
from lora_engine.data.listing import raise_listed
from lora_engine.data.recipe import Recipe, Result, Tokenising
from lora_engine.data.store import Outcome, OutcomeStore, joined, store_of
from lora_engine.data.template import Tokenizer
from lora_engine.data.tokenising import pool_of, work
from lora_engine.data.tracks import Reached, Track
from lora_engine.errors import UserError

# Rows that are read of one source before it is another's turn, where they have shares.
_TURN = 16
_CHUNK, _CHUNK_BYTES = 256, 1 << 22
# Of a buffer, whatever its number of records: what is tokenised in a few seconds.
_BYTES = 1 << 23
_EDGE = 1 << 16  # bytes at either end of a file that tell it from others
_EMPTY = 1000  # buffers in a row without an example, after which none is expected
# Records to hold out where no limit is given, and buffers that are looked into for them at most.
_HELDOUT, _LOOKED_INTO = 64, 4


class Place(NamedTuple):
    """Where a buffer begins: its number, and how far each track is read before it."""

    buffer: int
    tracks: tuple[Reached, ...]

    @classmethod
    def of(cls, values: object) -> "Place":
        """The place that JSON made lists of."""
        assert isinstance(values, list | tuple)
        number, tracks = values
        return cls(number, tuple(Reached(*reached) for reached in tracks))


@dataclass(frozen=True)
class StreamPart:
    """Files that are read as one source, how, and how often against others.

    replayed: nothing of it is held out.
    """

    files: tuple[Path, ...]
    recipe: Recipe
    weight: float | None = None
    replayed: bool = False


class _Outcomes(NamedTuple):
    """store: of a buffer's records. parts: of which part each is. after: where the next begins."""

    store: OutcomeStore
    parts: Sequence[int]
    after: Place


class Buffer(NamedTuple):
    """dataset: its examples; None if it has none. after: where the next one begins."""

    dataset: TokenizedDataset | None
    after: Place


class ExampleStream:
    """Buffers of examples, endlessly.

    parts: without weights they are read one after the other; with, in turns as the weights say.
    records: of a buffer, fewer where they have many bytes; of one part, none twice.
    heldout: share of the records that is left out of training.
    helpers: processes that tokenise ahead while a buffer is used; 0 does it when it is asked for.
    """

    def __init__(
        self,
        name: str,
        parts: Sequence[StreamPart],
        tokenizer: Tokenizer,
        *,
        records: int = 2048,
        seed: int = 0,
        heldout: float = 0.0,
        helpers: int = 0,
    ) -> None:
        self.name = name
        self._parts = list(parts)
        self._tokenizer = tokenizer
        self._records = records
        self._seed = seed
        self._heldout = heldout
        self._helpers = helpers
        self._tracks = [Track(part.files, seed, i) for i, part in enumerate(parts)]
        self._here = [Tokenising(part.recipe, tokenizer) for part in parts]
        self._pool: ProcessPoolExecutor | None = None
        self._ahead: tuple[Place, list[tuple[int, Future[Result]]], Place] | None = None
        self._last: tuple[Place, Buffer] | None = None
        self._kept: dict[Place, _Outcomes] = {}  # of buffers that training has not gone past
        self.checks: list[Callable[[TokenizedDataset], None]] = []
        weakref.finalize(self, _close, self._tracks)  # also when Python ends

    @property
    def begin(self) -> Place:
        """Where the first buffer begins."""
        return Place(0, tuple(Reached() for _ in self._parts))

    def buffer(self, place: Place) -> Buffer:
        """The buffer that begins there. Raises UserError for malformed records, all of it listed,
        and what `checks` raise. What is known of buffers before it is given up."""
        if self._last is None or self._last[0] != place:
            outcomes = self._outcomes(place)
            self._kept = {of: kept for of, kept in self._kept.items() if of.buffer >= place.buffer}
            heldout, after = set(self._held_out(outcomes)), outcomes.after
            training = [i for i in range(len(outcomes.store)) if i not in heldout]
            dataset = self._dataset(outcomes.store, training)
            for check in self.checks if dataset is not None else ():
                assert dataset is not None
                check(dataset)
            self._last = (place, Buffer(dataset, after))
        return self._last[1]

    def first(self) -> tuple[TokenizedDataset, Place]:
        """The first buffer that has examples, and where it begins."""
        place = self.begin
        for _ in range(_EMPTY):
            dataset, after = self.buffer(place)
            if dataset is not None:
                return dataset, place
            place = after
        raise UserError(f"{self.name}: no example is left to learn from, give other data")

    def heldout(self, limit: int | None) -> TokenizedDataset:
        """What is held out of the first buffers: of as many as hold out `limit` records, or of a
        few. Raises UserError where that is nothing to learn from."""
        place, read = self.begin, 0
        found: dict[str, Outcome] = {}  # by origin: a short stream begins anew in its first buffer
        for _ in range(_LOOKED_INTO):
            outcomes = self._outcomes(place)
            for record in self._held_out(outcomes):
                found[outcomes.store.origin(record)] = outcomes.store.outcome(record)
            place, read = outcomes.after, read + len(outcomes.store)
            tracks = zip(place.tracks, self._parts, strict=True)
            if any(now.passes > 0 for now, part in tracks if not part.replayed):
                break
            if len(found) >= (limit or _HELDOUT):
                break
        store = store_of(list(found.values())[:limit])
        dataset = self._dataset(store, list(range(len(store))))
        if dataset is None:
            raise UserError(
                f"{self.name}: nothing to learn from is held out of the first {read:,} "
                "records; give an eval file, or another eval_fraction"
            )
        return dataset

    def identity(self) -> str:
        """A digest of what decides the buffers: files by name, size and edges, and settings."""
        made = hashlib.sha256()
        for part in self._parts:
            recipe = json.dumps(asdict(part.recipe), sort_keys=True, default=repr)
            replayed = ("replayed",) if part.replayed else ()
            made.update(repr((recipe, part.weight, *replayed)).encode())
            for path in part.files:
                size = path.stat().st_size
                made.update(f"{path.name}\0{size}\0".encode("utf-8", "surrogateescape"))
                with path.open("rb") as file:
                    made.update(file.read(_EDGE))
                    file.seek(max(size - _EDGE, 0))
                    made.update(file.read(_EDGE))
        made.update(repr((self._records, _BYTES, self._seed, self._heldout)).encode())
        return made.hexdigest()

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool, self._ahead = None, None

    def _dataset(self, store: OutcomeStore, records: list[int]) -> TokenizedDataset | None:
        if not any(len(store.examples_of(record)) for record in records):
            return None
        return dataset_of(self.name, store, records, self._parts[0].recipe.max_length)

    def _held_out(self, outcomes: _Outcomes) -> Iterator[int]:
        """The records of a buffer that are not trained on."""
        store, most = outcomes.store, self._heldout * 16**13
        for record, part in enumerate(outcomes.parts if most else ()):
            key = store.group(record) or store.key(record).hex()
            if not self._parts[part].replayed and int(digest(self._seed, key)[:13], 16) < most:
                yield record

    def _outcomes(self, place: Place) -> _Outcomes:
        """What becomes of the records of a buffer, worked out once."""
        if place not in self._kept:
            self._kept[place] = self._worked_out(place)
        return self._kept[place]

    def _worked_out(self, place: Place) -> _Outcomes:
        """What becomes of the records of a buffer; the next one is begun where processes can."""
        if self._helpers < 1:
            chunks, after = self._read(place)
            parts = [part for part, _ in chunks]
            results = [self._here[part].run(chunk) for part, chunk in chunks]
        else:
            futures, after = self._submitted(place)
            parts = [part for part, _ in futures]
            results = [future.result() for _, future in futures]
            self._ahead = (after, *self._submitted(after))
        listed = (problem for result in results for problem in result.problems)
        problems = list(dict.fromkeys(listed))  # of what is read again, once
        store = joined([result.store for result in results])
        raise_listed(self.name, problems, len(store) + len(problems))
        of_each = zip(parts, results, strict=True)
        owners = [part for part, result in of_each for _ in range(len(result.store))]
        return _Outcomes(store, owners, after)

    def _submitted(self, place: Place) -> tuple[list[tuple[int, Future[Result]]], Place]:
        if self._ahead is not None and self._ahead[0] == place:
            return self._ahead[1], self._ahead[2]
        if self._pool is None:
            recipes = [part.recipe for part in self._parts]
            self._pool = pool_of(self._helpers, recipes, self._tokenizer)
        chunks, after = self._read(place)
        return [(part, self._pool.submit(work, chunk, part)) for part, chunk in chunks], after

    def _read(self, place: Place) -> tuple[list[tuple[int, Chunk]], Place]:
        """The chunks of a buffer, each with the number of its part."""
        reached = list(place.tracks)
        chunks: list[tuple[int, Chunk]] = []
        left, room = self._records, _BYTES
        for part, count in self._turns(reached):
            before, wanted = reached[part].taken, min(count, left)
            track, most = self._tracks[part], min(_CHUNK_BYTES, room)
            some, reached[part] = track.take(reached[part], wanted, most)
            chunks += [(part, chunk) for chunk in some]
            taken, size = reached[part].taken - before, sum(chunk.size for chunk in some)
            left, room = left - taken, room - size
            is_at_end = taken < wanted and size < most
            if left <= 0 or room <= 0 or (is_at_end and len(reached) == 1):
                break
        return chunks, Place(place.buffer + 1, tuple(reached))

    def _turns(self, reached: list[Reached]) -> Iterator[tuple[int, int]]:
        """(part, rows to read of it), endlessly: the part that is furthest behind its share."""
        weights = [part.weight or 1.0 for part in self._parts]
        count = _CHUNK if len(self._parts) == 1 else _TURN
        while True:
            behind = [now.taken / weight for now, weight in zip(reached, weights, strict=True)]
            yield behind.index(min(behind)), count


def _close(tracks: Sequence[Track]) -> None:
    for track in tracks:
        track.close()


@dataclass(frozen=True)
class StreamedDataset(TokenizedDataset):
    """The first buffer of a stream, which stands for the whole where examples are looked at."""

    stream: ExampleStream | None = None


def streamed(stream: ExampleStream) -> StreamedDataset:
    """The stream as a dataset to train on."""
    dataset, _ = stream.first()
    shared = {name: getattr(dataset, name) for name in dataset.__dataclass_fields__}
    return StreamedDataset(**shared, stream=stream)
