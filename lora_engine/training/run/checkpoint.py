"""Checkpoints on disk: whole or absent, tensors in safetensors, the rest in JSON.

    checkpoints/step-00000120/
        weights.safetensors  random.safetensors
        exp_avg.safetensors  exp_avg_sq.safetensors  (of the optimiser, those that it has)
        state.json           the loop's state; size and SHA-256 of every other file, and its own

A checkpoint is filled under a temporary name, flushed to the disk and renamed. It is complete if
state.json can be read and every file has the size written there, and sound if what is in the
files has the checksums, too.
"""

import json
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypedDict, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lora_engine.errors import UserError
from lora_engine.files import naming
from lora_engine.training.run.atomic import new_folder, remove_folder, remove_leftovers
from lora_engine.training.run.fingerprint import files_sha256, json_sha256

logger = logging.getLogger(__name__)

FORMAT = 2
STEMS = frozenset(
    {"weights", "exp_avg", "exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_column", "random"}
)
_STATE = "state.json"
_KEYS = frozenset({"format", "step", "files", "state"})
_NAME = r"step-\d{8,}"


class _Seal(TypedDict, total=False):
    """sha256: of all the rest as JSON; format 1 had none."""

    sha256: str


class _Content(_Seal):
    """state.json. files: bytes and SHA-256 of the checkpoint's files, by name."""

    format: int
    step: int
    files: dict[str, tuple[int, str]]
    state: Mapping[str, object]


class CheckpointStore:
    """The checkpoints of one run, in `folder`. Only files that `save` writes are ever deleted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def any(self) -> bool:
        """Whether there are checkpoints, sound or not."""
        return bool(self._numbered())

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return [step for step in self._numbered() if self._is_complete(step)]

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return next((s for s in reversed(self._numbered()) if self._is_complete(s)), None)

    def newest_sound(self) -> int | None:
        """Step of the newest sound checkpoint, or None without any checkpoint; reads all of it.

        Newer ones that are damaged get a line in the log. Raises UserError if all are, or if one
        is of another format.
        """
        damaged: list[str] = []
        for step in reversed(self._numbered()):
            problem = self.problem(step)
            if problem is None:
                for line in damaged:
                    logger.warning("%s; continuing from step %d instead", line, step)
                return step
            damaged.append(problem)
        if damaged:
            raise UserError(
                f"{damaged[0]}, and no other checkpoint is left: bring it back from a copy, or "
                "begin the run again with overwrite"
            )
        return None

    def problem(self, step: int) -> str | None:
        """Which file of a checkpoint is damaged, and how; None if it is sound.

        Raises UserError if it is of another format.
        """
        content, folder = self._content(step), self.path(step)
        if content is None:
            return f"{folder / _STATE}: is missing or damaged"
        if content["format"] != FORMAT:
            raise UserError(
                f"{folder}: checkpoint format {content['format']}, this version reads "
                f"{FORMAT}: continue it with the version that wrote it"
            )
        if content["step"] != step:
            return f"{folder}: holds the checkpoint of step {content['step']}"
        files = content["files"]
        for name, (size, _) in files.items():
            path = folder / name
            if not path.is_file():
                return f"{path}: is missing"
            if path.stat().st_size != size:
                return f"{path}: has {path.stat().st_size} bytes, not {size}"
        return next(
            (
                f"{folder / name}: is damaged, its checksum is not the one saved with it"
                for name, sha256 in zip(files, self._sha256(step, files), strict=True)
                if sha256 != files[name][1]
            ),
            None,
        )

    def save(
        self,
        step: int,
        tensors: Mapping[str, dict[str, torch.Tensor]],
        state: Mapping[str, object],
    ) -> Path:
        """Write a checkpoint; once this returns it survives a crash.

        tensors: per file stem, one of STEMS, names to CPU tensors that share no storage.
        Raises OSError, which names the checkpoint, if it cannot be written.
        """
        target = self.path(step)
        self._refuse_foreign(step)
        with naming(target), new_folder(target) as folder:
            for stem, named in tensors.items():
                save_file(named, folder / f"{stem}.safetensors")
            paths = sorted(folder.iterdir())
            files = {
                path.name: [path.stat().st_size, sha256]
                for path, sha256 in zip(paths, files_sha256(paths), strict=True)
            }
            content = {"format": FORMAT, "step": step, "files": files, "state": state}
            sealed = {**content, "sha256": json_sha256(content)}
            (folder / _STATE).write_text(json.dumps(sealed, indent=1, allow_nan=False))
        return target

    def state(self, step: int) -> Mapping[str, object]:
        """The JSON state of a complete checkpoint."""
        content = self._content(step)
        assert content is not None
        return content["state"]

    def tensors(self, step: int, stem: str) -> dict[str, torch.Tensor]:
        """The tensors of one file of a complete checkpoint, on the CPU; not verified."""
        path = self.path(step) / f"{stem}.safetensors"
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{path}: cannot be read ({error}): delete {path.parent} to continue from the "
                "checkpoint before it"
            ) from error

    def prune(self, newest: int, keep: int, also: Iterable[int]) -> None:
        """Delete complete checkpoints before step `newest`, but for the last `keep` up to there
        and those of the steps `also`. (What is newer is damaged, or it would have been resumed.)
        """
        steps = [step for step in self.steps() if step <= newest]
        for step in set(steps) - set(steps[-keep:]) - set(also):
            self._remove(step)

    def clear(self) -> None:
        """Delete all checkpoints, complete or not."""
        for step in self._numbered():
            self._remove(step)
        self.remove_leftovers()

    def check_removable(self) -> None:
        """Raises UserError if `clear` would delete what no run wrote."""
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"{self.folder}: is a file where a folder belongs: move it away")
        for step in self._numbered():
            self._refuse_foreign(step)

    def remove_leftovers(self) -> None:
        """Delete what killed processes left half written."""
        with naming(self.folder):
            remove_leftovers(self.folder, _NAME)

    def _remove(self, step: int) -> None:
        self._refuse_foreign(step)
        with naming(self.path(step)):
            remove_folder(self.path(step))

    def _refuse_foreign(self, step: int) -> None:
        folder = self.path(step)
        known = {_STATE, *(f"{stem}.safetensors" for stem in STEMS)}
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            raise UserError(f"{folder}: was not made by a run: move it away")
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.name not in known or path.is_dir():
                raise UserError(f"{path}: was not made by a run: move it away")

    def _numbered(self) -> list[int]:
        if not self.folder.is_dir():
            return []
        names = (path.name for path in self.folder.iterdir())
        return sorted(int(name.partition("-")[2]) for name in names if re.fullmatch(_NAME, name))

    def _content(self, step: int) -> _Content | None:
        """What state.json says; None if it is missing or damaged."""
        try:
            read = json.loads((self.path(step) / _STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        if not isinstance(read, dict) or not read.keys() >= _KEYS:
            return None
        content = cast(_Content, read)
        sha256 = content.pop("sha256", None)
        if sha256 is None and content["format"] == 1:  # had none
            return content
        return content if sha256 == json_sha256(content) else None

    def _is_complete(self, step: int) -> bool:
        content = self._content(step)
        if content is None or content["step"] != step:
            return False
        if content["format"] != FORMAT:
            return True
        paths = {self.path(step) / name: size for name, (size, _) in content["files"].items()}
        return all(path.is_file() and path.stat().st_size == size for path, size in paths.items())

    def _sha256(self, step: int, names: Iterable[str]) -> list[str]:
        paths = [self.path(step) / name for name in names]
        try:
            return files_sha256(paths)
        except OSError as error:
            raise UserError(f"{error.filename or self.path(step)}: {error.strerror}") from error
