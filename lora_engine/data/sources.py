"""Where records come from: files, folders, globs, datasets on disk or on the hub, memory.

A folder's files are read in the order of their names. Where their names tell splits apart
(train-00.jsonl, test.jsonl) only those of one are: `split`, or else the one for training.
"""

import glob
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypeVar, cast

from lora_engine.data.fields import kind_of
from lora_engine.data.readers import (
    Row,
    RowError,
    is_readable,
    num_rows,
    read_file,
    readable_suffixes,
)
from lora_engine.data.strings import without_nulls
from lora_engine.errors import UserError, nearest, reason

if TYPE_CHECKING:
    import datasets

Dataset = TypeVar("Dataset")
# A file, or the rows of what is none.
Part: TypeAlias = "Path | Iterable[Row | RowError]"
# Sources that come with the package, by name.
BUILT_IN = ("docstrings", "docstring_pairs", "docstring_labels", "sums")
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}
# Of a folder's files these are about the data, unless there are no others.
_ABOUT = ("readme", "license", "licence", "changelog", "citation")
_ON_DISK = ("dataset_dict.json", "dataset_info.json")


def open_source(source: object, split: str | None) -> tuple[str, Iterator[Row | RowError]]:
    """What the source is called in messages, and its rows. Raises as `open_parts`."""
    name, parts = open_parts(source, split)
    return name, (row for part in parts for row in _rows(part))


def _rows(part: Part) -> Iterable[Row | RowError]:
    return read_file(part) if isinstance(part, Path) else part


def open_parts(source: object, split: str | None) -> tuple[str, list[Part]]:
    """What the source is called in messages, and its files, or rows of what is none.

    source: a file, folder, glob, hub id or built-in name; several of them; or rows in memory.
    Raises UserError for what is not there or cannot be read.
    """
    if isinstance(source, str | Path):
        return str(source), _parts(source, split)
    if _is_paths(source):
        paths = cast("Sequence[str | Path]", source)
        names = ", ".join(map(str, paths[:2]))
        name = names if len(paths) < 3 else f"{names} and {len(paths) - 2:,} more"
        return name, [part for path in paths for part in _parts(path, split)]
    return "data", [rows_in_memory(source, split)]


def files_of(source: str | Path, split: str | None = None) -> list[Path] | None:
    """The files that a path, folder or glob stands for; None if it is none of these.

    Raises UserError for a path that cannot be read and for one that holds no data.
    """
    try:
        path = Path(source).expanduser()
        is_file, exists = path.is_file(), path.exists() or path.is_symlink()
    except (OSError, RuntimeError, ValueError) as error:  # a name too long; no such home
        raise UserError(f"{source}: is not a path that can be read: {reason(error)}") from error
    if is_file:
        if not is_readable(path):
            raise UserError(
                f"{source}: cannot read {path.suffix or 'a file without a suffix'}; "
                f"use {readable_suffixes()}"
            )
        return [path]
    if path.is_dir():
        return None if _dataset_on_disk(path) else _folder(path, split)
    if exists:
        raise UserError(f"{source}: is neither a file nor a link to one; save the data to a file")
    if glob.has_magic(str(source)):
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
        if not (found := [name for name in found if name.is_file() and is_readable(name)]):
            raise UserError(f"{source}: matches no file that can be read ({readable_suffixes()})")
        return found
    if isinstance(source, Path) or is_readable(path) or not _looks_like_hub_id(source):
        raise UserError(f"{source}: no such file{_alternative(path) or '; check the path'}")
    return None


def files_to_stream(source: str | Path, split: str | None) -> list[Path] | None:
    """`files_of`, and the Arrow files of a dataset on disk or on the hub, which is then copied to
    the disk by `datasets`; None for a name that comes with the package.

    Raises UserError for a dataset that is not all rows of its files.
    """
    if str(source) in BUILT_IN:
        return None
    if (files := files_of(source, split)) is not None:
        return files
    path = Path(source).expanduser()
    dataset = _load_on_disk(path) if path.is_dir() else _load_hub(str(source), split)
    if isinstance(dataset, Mapping):
        dataset = _of_split(dataset, split)
    found = [Path(part["filename"]) for part in dataset.cache_files]
    if not found or sum(map(num_rows, found)) != len(dataset):
        raise UserError(
            f"{source}: is a part of a dataset, which data.stream cannot read; save it by itself "
            "(dataset.flatten_indices().save_to_disk), or set data.stream: false"
        )
    return found


def files_among(source: str | Path, split: str | None) -> list[Path] | None:
    """`files_of`, None also for a name that comes with the package."""
    return None if str(source) in BUILT_IN else files_of(source, split)


def rows_in_memory(
    source: object, split: str | None, prefix: str = "record"
) -> Iterator[Row | RowError]:
    """Rows of a list or dataset; origins count from 0. split: of a mapping of several."""
    if isinstance(source, Mapping):  # datasets.DatasetDict
        source = _of_split(source, split)
    try:
        rows = enumerate(cast("Iterable[object]", source))
    except TypeError as error:
        what = kind_of(source)
        raise UserError(f"expected records, or where to read them, got {what}") from error
    is_columnar = hasattr(source, "features")  # a datasets.Dataset
    for number, value in rows:
        value = without_nulls(value) if is_columnar else value
        yield Row(value, getattr(value, "origin", "") or f"{prefix}:{number}")


def _of_split(splits: Mapping[str, Dataset], split: str | None) -> Dataset:
    if (split := split or "train") not in splits:
        raise UserError(f"the data has no split {split!r}; it has {', '.join(splits)}")
    return splits[split]


def _parts(source: str | Path, split: str | None) -> list[Part]:
    if str(source) in BUILT_IN:
        return [_built_in(str(source), split)]
    files = files_among(source, split)
    if files is not None:
        return list(files)
    source = str(source)
    path = Path(source).expanduser()
    if path.is_dir():
        return [rows_in_memory(_load_on_disk(path), split, prefix=source)]
    if "/" not in source and (close := nearest(source, BUILT_IN)):
        raise UserError(f"{source}: no such file; did you mean {close}?")
    return [rows_in_memory(_load_hub(source, split), split, prefix=source)]


def _is_paths(source: object) -> bool:
    return (
        isinstance(source, list | tuple)
        and len(source) > 0
        and all(isinstance(part, str | Path) for part in source)
    )


def _built_in(name: str, split: str | None) -> Iterator[Row]:
    from lora_engine.data.docstrings import docstring_records
    from lora_engine.data.preferred_docstrings import docstring_labels, docstring_pairs
    from lora_engine.data.sums import sum_records

    if split is not None:
        raise UserError(f"{name}: has no split {split!r}; leave the split out")
    made = {
        "docstrings": docstring_records,
        "docstring_pairs": docstring_pairs,
        "docstring_labels": docstring_labels,
        "sums": sum_records,
    }
    make = made[name]
    return (Row(record, record.origin) for record in make())


def _folder(folder: Path, split: str | None) -> list[Path]:
    """The folder's files to read, of one split where names tell splits apart."""
    try:
        below = (path for path in folder.rglob("*") if path.is_file() and is_readable(path))
        files = sorted(p for p in below if not _is_hidden(p.relative_to(folder)))
    except OSError as error:
        raise UserError(f"{folder}: cannot be looked into: {reason(error)}") from error
    files = [p for p in files if not p.name.lower().startswith(_ABOUT)] or files
    if not files:
        raise UserError(f"{folder}: is a folder without data ({readable_suffixes()})")
    splits = {path: _split_of(path.relative_to(folder)) for path in files}
    if split is None and not {"test", "validation"} & set(splits.values()):
        return files
    wanted = split or "train"
    if not (chosen := [path for path in files if splits[path] == _canonical(wanted)]):
        there = sorted({name for name in splits.values() if name}) or ["none that a name tells"]
        raise UserError(
            f"{folder}: has no files of the split {wanted!r}; there is {', '.join(there)}"
        )
    return chosen


def _is_hidden(path: Path) -> bool:
    return any(part.startswith((".", "__")) for part in path.parts)


def _split_of(path: Path) -> str | None:
    """The split that a file's name, or its folder's, tells; None: no name does."""
    for part in reversed(path.parts):
        words = re.split(r"[^a-z]+", part.lower())
        for split, names in _SPLITS.items():
            if any(word in names for word in words):
                return split
    return None


def _canonical(split: str) -> str:
    return next((name for name, words in _SPLITS.items() if split in words), split)


def _looks_like_hub_id(source: str) -> bool:
    return source.count("/") <= 1 and not source.startswith((".", "/", "~"))


def _alternative(path: Path) -> str:
    try:
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    except OSError:  # a folder that may not be listed
        beside = []
    close = nearest(path.name, beside)
    return f"; did you mean {path.parent / close}?" if close else ""


def _dataset_on_disk(folder: Path) -> bool:
    """Whether `datasets` saved the folder (save_to_disk)."""
    return (folder / _ON_DISK[0]).is_file() or all(
        (folder / name).is_file() for name in (_ON_DISK[1], "state.json")
    )


def _load_on_disk(folder: Path) -> "datasets.Dataset | datasets.DatasetDict":
    import datasets

    try:
        return datasets.load_from_disk(str(folder))
    except Exception as error:  # of whatever a damaged file makes it raise
        raise UserError(
            f"{folder}: is not a readable dataset, save it anew: {reason(error)}"
        ) from error


def _load_hub(name: str, split: str | None) -> "datasets.Dataset":
    import datasets

    try:
        return datasets.load_dataset(name, split=split or "train")
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"{name}: no such file, and not loadable from the Hugging Face hub: {reason(error)}"
        ) from error
