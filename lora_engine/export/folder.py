"""The folder that a merge or an export writes: whole or not there, and nobody's files replaced."""

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_engine.errors import UserError
from lora_engine.files import naming, user_path
from lora_engine.text import bytes_text
from lora_engine.training.run.atomic import new_folder, remove_leftovers
from lora_engine.training.run.lock import locked


@contextmanager
def result_folder(
    target: str | Path, report: str, *, overwrite: bool, sources: Sequence[Path] = ()
) -> Iterator[Path]:
    """Yields an empty folder to fill, which becomes `target` once the context ends well.

    report: the name of the file written by `write_report`, which lists all others. With `overwrite`
    a folder of such a result is replaced; whoever reads it sees the old or the new at any moment.
    sources: folders that it is made from. Raises UserError for a folder that holds anything else,
    for a source, a place in an adapter's folder, and if another process writes there.
    """
    try:
        path = user_path(target)
    except ValueError as error:
        raise UserError(f"--to {str(target)!r}: {error}") from error
    path = path.absolute()
    if ".." in path.parts:  # a name is needed that can be taken away from the folder
        path = Path(os.path.realpath(path))
    lock = path.parent / f".lora-engine-{path.name}.lock"
    with naming(path):
        _check_place(path, sources)
    with naming(path), locked(lock):
        _check(path, report, overwrite)
        remove_leftovers(path.parent, re.escape(path.name))
        with new_folder(path) as folder:
            yield folder


def write_report(folder: Path, name: str, content: dict[str, Any]) -> None:
    """`content`, with the names of the folder's files as "files", as JSON in the file `name`."""
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    text = json.dumps({**content, "files": [*files, name]}, indent=2, ensure_ascii=False)
    # A name that is no UTF-8 has lone surrogates, which become their escapes in JSON.
    (folder / name).write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def check_space(folder: Path, nbytes: int) -> None:
    """Raises UserError if the disk of `folder`, which may be unfinished, has no room for that many
    bytes."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < nbytes:
        raise UserError(
            f"{folder.parent}: the disk has {bytes_text(free)} free and {bytes_text(nbytes)} are "
            "to be written; free some space, or take a folder on another disk"
        )


def _check_place(path: Path, sources: Sequence[Path]) -> None:
    place = Path(os.path.realpath(path))
    for source in sources:
        # A model may have folders in its own; in an adapter's they would be more adapters.
        whole = Path(os.path.realpath(source))
        is_model = (source / "config.json").is_file()
        if place == whole or (place.is_relative_to(whole) and not is_model):
            raise UserError(f"{path}: {source} is what is read; give a folder outside of it")
    if Path.cwd().is_relative_to(place):
        raise UserError(f"{path}: is the working folder, or holds it; give a folder in it")


def _check(path: Path, report: str, overwrite: bool) -> None:
    if path.is_symlink():
        raise UserError(f"{path}: is a link; give the folder that it leads to")
    if os.path.lexists(path) and not path.is_dir():
        raise UserError(f"{path}: is a file, --to must be a folder; give another")
    if path.is_mount():
        raise UserError(f"{path}: is where a disk is mounted; give a folder in it")
    known = _known(path / report) if overwrite else set()
    # None where there is no folder. A link to a folder is somebody's file.
    for name in (p for p in path.rglob("*") if p.is_symlink() or not p.is_dir()):
        if not overwrite:
            raise UserError(
                f"{path}: is not empty; give another folder, or --overwrite to replace it"
            )
        if str(name.relative_to(path)) not in known:
            raise UserError(
                f"{name}: was not written by this command; move it away, or give another folder"
            )


def _known(report: Path) -> set[str]:
    try:
        return set(map(str, json.loads(report.read_text(encoding="utf-8"))["files"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return set()
