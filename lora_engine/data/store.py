"""What became of many records, in flat arrays: some 5 bytes a token, and files to keep them in.

A Python list takes about 40 bytes for a token, so that half a gigabyte of text would not fit into
most memories. Examples are made from the arrays when they are asked for.
"""

import json
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, NamedTuple, TypeAlias, TypeVar, overload

import numpy as np

from lora_engine.data.render import Example

KEY_BYTES = 32
Columns: TypeAlias = Mapping[str, float | Sequence[float]]
_TYPES = {
    "ids": np.int32,
    "supervised": np.bool_,
    "sequence_ends": np.int64,
    "sequence_about": np.uint32,
    "example_ends": np.int64,
    "record_ends": np.int64,
    "record_about": np.uint32,
    "keys": np.uint8,
    "groups": np.uint8,
    "group_ends": np.int64,
    "origins": np.uint8,
    "origin_ends": np.int64,
}


@dataclass(frozen=True)
class Outcome:
    """What became of one record.

    key: a digest of its content. group: `Record.group`.
    examples: none where `dropped` says why it is not learned from.
    """

    origin: str
    kind: str
    format: str
    key: bytes
    group: str = ""
    examples: tuple[Example, ...] = ()
    dropped: str = ""
    ignored: tuple[str, ...] = ()


class RecordAbout(NamedTuple):
    """What is said of a record, its tokens aside: see `Outcome`."""

    kind: str
    format: str
    dropped: str
    ignored: tuple[str, ...]


class SequenceAbout(NamedTuple):
    """What is said of a sequence, its tokens aside: see `Example`."""

    truncated: bool
    adapter: str
    role: str
    notes: tuple[str, ...]
    ignored: tuple[str, ...]


About = TypeVar("About", RecordAbout, SequenceAbout)


class _Table(Generic[About]):
    """Distinct values, and which of them each of many has."""

    def __init__(self) -> None:
        self.values: list[About] = []
        self._places: dict[About, int] = {}

    def place(self, value: About) -> int:
        if value not in self._places:
            self._places[value] = len(self.values)
            self.values.append(value)
        return self._places[value]


class OutcomeStore:
    """Outcomes in their order; `write` collects them, `load` reads them from files.

    A record is a run of examples, an example a run of sequences (itself and its `others`), a
    sequence a run of tokens; `ends` are where each run ends.
    """

    def __init__(
        self,
        arrays: Mapping[str, np.ndarray],
        about_sequences: Sequence[SequenceAbout],
        about_records: Sequence[RecordAbout],
        columns: Mapping[int, Columns],
    ) -> None:
        self._arrays = arrays
        self._about_sequences = about_sequences
        self._about_records = about_records
        self._columns = columns
        self.lengths = np.diff(arrays["sequence_ends"], prepend=0)

    def __len__(self) -> int:
        """Number of records."""
        return len(self._arrays["record_ends"])

    @property
    def num_bytes(self) -> int:
        """Bytes of its arrays."""
        return sum(values.nbytes for values in self._arrays.values())

    @property
    def num_examples(self) -> int:
        """Examples of all records."""
        return len(self._arrays["example_ends"])

    def origin(self, record: int) -> str:
        """Where a record stands."""
        return self._text("origin", record)

    def key(self, record: int) -> bytes:
        """The digest of a record's content."""
        return self._arrays["keys"][record].tobytes()

    def group(self, record: int) -> str:
        """A record's group."""
        return self._text("group", record)

    def about(self, record: int) -> RecordAbout:
        """What is said of a record."""
        return self._about_records[self._arrays["record_about"][record]]

    def outcome(self, record: int) -> Outcome:
        """What became of a record, as it was collected."""
        about, origin = self.about(record), self.origin(record)
        return Outcome(
            origin=origin,
            kind=about.kind,
            format=about.format,
            key=self.key(record),
            group=self.group(record),
            examples=tuple(self.example(i, origin) for i in self.examples_of(record)),
            dropped=about.dropped,
            ignored=about.ignored,
        )

    def examples_of(self, record: int) -> range:
        """The examples of a record, by number."""
        return range(*_run(self._arrays["record_ends"], record))

    def example(self, number: int, origin: str) -> Example:
        """An example, made anew. origin: of its record."""
        first, *others = (
            self._sequence(i, origin) for i in range(*_run(self._arrays["example_ends"], number))
        )
        return first if not others else _with_others(first, tuple(others))

    def has_column(self, name: str) -> bool:
        """Whether any sequence has a column of that name."""
        return any(name in columns for columns in self._columns.values())

    def sequence_lengths(self, number: int) -> list[int]:
        """Tokens of each sequence of an example."""
        begin, end = _run(self._arrays["example_ends"], number)
        return self.lengths[begin:end].tolist()

    def _text(self, name: str, record: int) -> str:
        begin, end = _run(self._arrays[f"{name}_ends"], record)
        return self._arrays[f"{name}s"][begin:end].tobytes().decode("utf-8", "surrogatepass")

    def _sequence(self, number: int, origin: str) -> Example:
        begin, end = _run(self._arrays["sequence_ends"], number)
        about = self._about_sequences[self._arrays["sequence_about"][number]]
        return Example(
            input_ids=self._arrays["ids"][begin:end].tolist(),
            supervised=self._arrays["supervised"][begin:end].tolist(),
            origin=origin,
            truncated=about.truncated,
            adapter=about.adapter,
            notes=about.notes,
            ignored=about.ignored,
            role=about.role,
            others=(),
            columns=self._columns.get(number, {}),
        )

    def save(self, folder: Path) -> None:
        """Write its files into `folder`, which exists and is empty."""
        for name, values in self._arrays.items():
            np.save(folder / f"{name}.npy", values)
        about = {
            "sequences": self._about_sequences,
            "records": self._about_records,
            "columns": list(self._columns.items()),
            "sizes": {name: len(values) for name, values in self._arrays.items()},
        }
        (folder / "about.json").write_text(json.dumps(about), encoding="ascii")

    @classmethod
    def load(cls, folder: Path) -> "OutcomeStore":
        """What `save` wrote, its arrays mapped. Raises OSError or ValueError if damaged."""
        about = json.loads((folder / "about.json").read_text(encoding="ascii"))
        arrays = {
            name: np.load(folder / f"{name}.npy", mmap_mode="r" if about["sizes"][name] else None)
            for name in _TYPES
        }
        if any(len(arrays[name]) != size for name, size in about["sizes"].items()):
            raise ValueError(f"{folder}: its arrays have other sizes than they were written with")
        return cls(
            arrays,
            [
                SequenceAbout(
                    truncated=cut,
                    adapter=adapter,
                    role=role,
                    notes=tuple(notes),
                    ignored=tuple(ignored),
                )
                for cut, adapter, role, notes, ignored in about["sequences"]
            ],
            [
                RecordAbout(kind=kind, format=format, dropped=dropped, ignored=tuple(ignored))
                for kind, format, dropped, ignored in about["records"]
            ],
            dict(about["columns"]),
        )


class StoreWriter:
    """Collects outcomes, one by one or from other stores, into a store."""

    def __init__(self) -> None:
        self._parts: list[OutcomeStore] = []
        self._ids, self._supervised = array("i"), bytearray()
        self._ends: dict[str, array[int]] = {
            name: array("q") for name in ("sequence", "example", "record", "origin", "group")
        }
        self._about = {"sequence": array("I"), "record": array("I")}
        self._sequences, self._records = _Table[SequenceAbout](), _Table[RecordAbout]()
        self._keys, self._groups, self._origins = bytearray(), bytearray(), bytearray()
        self._columns: dict[int, Columns] = {}

    def add(self, outcome: Outcome) -> None:
        """Append one outcome."""
        for example in outcome.examples:
            for sequence in example.sequences:
                self._add_sequence(sequence)
            self._ends["example"].append(len(self._ends["sequence"]))
        self._ends["record"].append(len(self._ends["example"]))
        about = RecordAbout(
            kind=outcome.kind,
            format=outcome.format,
            dropped=outcome.dropped,
            ignored=outcome.ignored,
        )
        self._about["record"].append(self._records.place(about))
        self._keys += outcome.key
        self._origins += outcome.origin.encode("utf-8", "surrogatepass")
        self._ends["origin"].append(len(self._origins))
        self._groups += outcome.group.encode("utf-8", "surrogatepass")
        self._ends["group"].append(len(self._groups))

    def _add_sequence(self, sequence: Example) -> None:
        self._ids.fromlist(sequence.input_ids)
        self._supervised += bytes(sequence.supervised)
        if sequence.columns:
            self._columns[len(self._ends["sequence"])] = dict(sequence.columns)
        self._ends["sequence"].append(len(self._ids))
        about = SequenceAbout(
            truncated=sequence.truncated,
            adapter=sequence.adapter,
            role=sequence.role,
            notes=sequence.notes,
            ignored=sequence.ignored,
        )
        self._about["sequence"].append(self._sequences.place(about))

    def store(self) -> OutcomeStore:
        """What was added."""
        arrays = {
            "ids": np.frombuffer(self._ids, np.int32),
            "supervised": np.frombuffer(self._supervised, np.bool_),
            "sequence_ends": np.frombuffer(self._ends["sequence"], np.int64),
            "sequence_about": np.frombuffer(self._about["sequence"], np.uint32),
            "example_ends": np.frombuffer(self._ends["example"], np.int64),
            "record_ends": np.frombuffer(self._ends["record"], np.int64),
            "record_about": np.frombuffer(self._about["record"], np.uint32),
            "keys": np.frombuffer(self._keys, np.uint8).reshape(-1, KEY_BYTES),
            "groups": np.frombuffer(self._groups, np.uint8),
            "group_ends": np.frombuffer(self._ends["group"], np.int64),
            "origins": np.frombuffer(self._origins, np.uint8),
            "origin_ends": np.frombuffer(self._ends["origin"], np.int64),
        }
        return OutcomeStore(arrays, self._sequences.values, self._records.values, self._columns)


def joined(stores: Sequence[OutcomeStore]) -> OutcomeStore:
    """The outcomes of several stores, one behind the other."""
    if len(stores) == 1:
        return stores[0]
    sequences, records = _Table[SequenceAbout](), _Table[RecordAbout]()
    columns: dict[int, Columns] = {}
    parts: dict[str, list[np.ndarray]] = {name: [] for name in _TYPES}
    before = dict.fromkeys(("ids", "sequence_ends", "example_ends", "origins", "groups"), 0)
    counted = {
        "sequence_ends": "ids",
        "example_ends": "sequence_ends",
        "record_ends": "example_ends",
        "origin_ends": "origins",
        "group_ends": "groups",
    }
    for store in stores:
        arrays = store._arrays
        for name, values in arrays.items():
            if name in counted:
                values = values + before[counted[name]]
            elif name == "sequence_about":
                values = _renamed(values, store._about_sequences, sequences)
            elif name == "record_about":
                values = _renamed(values, store._about_records, records)
            parts[name].append(values)
        for number, of_sequence in store._columns.items():
            columns[number + before["sequence_ends"]] = of_sequence
        for name in before:
            before[name] += len(arrays[name])
    arrays = {name: np.concatenate(parts.pop(name)) for name in _TYPES} if stores else {}
    return OutcomeStore(arrays, sequences.values, records.values, columns)


class StoredExamples(Sequence[Example]):
    """Examples of a store, by number, made when they are asked for.

    records: the record of each, for its origin.
    """

    def __init__(self, store: OutcomeStore, examples: np.ndarray, records: np.ndarray) -> None:
        self.store = store
        self.examples = examples
        self.records = records

    def taken(self, places: np.ndarray) -> "StoredExamples":
        """Those at some places, any of them as often as it is named."""
        return StoredExamples(self.store, self.examples[places], self.records[places])

    def __len__(self) -> int:
        return len(self.examples)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> "StoredExamples": ...
    def __getitem__(self, index: int | slice) -> "Example | StoredExamples":
        if isinstance(index, slice):
            return self.taken(np.arange(len(self))[index])
        record = int(self.records[index])
        return self.store.example(int(self.examples[index]), self.store.origin(record))

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


def store_of(outcomes: Iterable[Outcome]) -> OutcomeStore:
    """A store of these outcomes."""
    writer = StoreWriter()
    for outcome in outcomes:
        writer.add(outcome)
    return writer.store()


def _run(ends: np.ndarray, number: int) -> tuple[int, int]:
    return int(ends[number - 1]) if number else 0, int(ends[number])


def _renamed(places: np.ndarray, values: Sequence[About], table: _Table[About]) -> np.ndarray:
    if not len(values):
        return places
    return np.array([table.place(value) for value in values], np.uint32)[places]


def _with_others(first: Example, others: tuple[Example, ...]) -> Example:
    return replace(first, others=others)
