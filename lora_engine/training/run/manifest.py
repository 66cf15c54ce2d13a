"""Which files of a run's folder the run wrote, and so may replace and delete."""

import json
from collections.abc import Iterable
from pathlib import Path

from lora_engine.errors import UserError
from lora_engine.files import write_text


class Manifest:
    """The names of a run's files, in a file of the run's folder.

    Checkpoints are not listed: their names and what they hold tell them.
    """

    def __init__(self, path: Path, adapter: Path) -> None:
        """Reads `path`; a manifest that is missing or damaged names nothing.

        adapter: the run's folder for its adapter, beside `path`.
        """
        self._path = path
        self._folder, self._adapter = path.parent, adapter
        content = _read(self._path)
        self._files = set(map(str, content.get("files") or ()))
        # None while the adapter is being written: everything in its folder is then the run's.
        self._in_adapter: set[str] | None = set()
        if "adapter" in content:
            names = content["adapter"]
            self._in_adapter = None if names is None else set(map(str, names))

    @property
    def exists(self) -> bool:
        """Whether a run has begun here."""
        return self._path.exists()

    def check_files(self, names: Iterable[str]) -> None:
        """Raises UserError if one of the files is there and the run did not write it."""
        for name in names:
            path = self._folder / name
            known = name in self._files and not path.is_dir()
            if path.is_symlink() or (path.exists() and not known):
                raise UserError(f"{path}: {_FOREIGN}")

    def check_adapter(self) -> None:
        """Raises UserError if the adapter's folder holds what the run did not write."""
        adapter = self._adapter
        if adapter.is_symlink() or (adapter.exists() and not adapter.is_dir()):
            raise UserError(f"{adapter}: {_FOREIGN}")
        for path in sorted(adapter.rglob("*")):
            known = self._in_adapter is None or str(path.relative_to(adapter)) in self._in_adapter
            if not known and (path.is_symlink() or not path.is_dir()):
                raise UserError(f"{path}: {_FOREIGN}")

    def add_files(self, names: Iterable[str]) -> None:
        """Note files that the run is about to write."""
        self._files |= set(names)
        self._write()

    def adapter_begins(self) -> None:
        """The adapter is about to be written. Raises UserError as `check_adapter`."""
        self.check_adapter()
        self._in_adapter = None
        self._write()

    def adapter_ends(self) -> None:
        """The adapter has been written."""
        paths = (path for path in self._adapter.rglob("*") if not path.is_dir())
        self._in_adapter = {str(path.relative_to(self._adapter)) for path in paths}
        self._write()

    def _write(self) -> None:
        names = None if self._in_adapter is None else sorted(self._in_adapter)
        content = {"files": sorted(self._files), "adapter": names}
        write_text(self._path, json.dumps(content, indent=1) + "\n")


_FOREIGN = "was not written by this run: move it away, or choose another output_dir"


def _read(path: Path) -> dict[str, list[object] | None]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    lists = isinstance(content, dict) and isinstance(content.get("files"), list)
    return content if lists and isinstance(content.get("adapter"), list | None) else {}
