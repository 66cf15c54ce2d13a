"""Checkpoints on disk: whole or absent, tensors in safetensors, the rest in JSON.

    checkpoints/step-00000120/
        weights.safetensors  exp_avg.safetensors  exp_avg_sq.safetensors  random.safetensors
        state.json           the loop's state, and the size of every other file

A checkpoint is filled under a temporary name, flushed to the disk and renamed. It counts only if
state.json can be read and every file has the size written there.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lora_engine.errors import UserError
from lora_engine.training.atomic import new_folder, remove_folder, remove_leftovers

FORMAT = 1
_STATE = "state.json"


class CheckpointStore:
    """The checkpoints of one run, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return [step for step in self._numbered() if self._is_complete(step)]

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return next((s for s in reversed(self._numbered()) if self._is_complete(s)), None)

    def save(
        self,
        step: int,
        tensors: Mapping[str, dict[str, torch.Tensor]],
        state: Mapping[str, Any],
    ) -> Path:
        """Write a checkpoint; once this returns it survives a crash.

        tensors: per file stem, names to CPU tensors that share no storage.
        """
        target = self.path(step)
        with new_folder(target) as folder:
            for stem, named in tensors.items():
                save_file(named, folder / f"{stem}.safetensors")
            sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
            content = {"format": FORMAT, "step": step, "files": sizes, "state": state}
            (folder / _STATE).write_text(json.dumps(content, indent=1, allow_nan=False))
        return target

    def state(self, step: int) -> dict[str, Any]:
        """The JSON state of a complete checkpoint. Raises UserError on an unknown format."""
        content = self._content(step)
        assert content is not None
        if content["format"] != FORMAT:
            raise UserError(
                f"{self.path(step)}: checkpoint format {content['format']}, this version reads "
                f"{FORMAT}: continue it with the version that wrote it"
            )
        return content["state"]

    def tensors(self, step: int, stem: str) -> dict[str, torch.Tensor]:
        """The tensors of one file of a complete checkpoint, on the CPU."""
        path = self.path(step) / f"{stem}.safetensors"
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{path}: cannot be read ({error}): delete {path.parent} to continue from the "
                "checkpoint before it"
            ) from error

    def prune(self, keep: int, also: Iterable[int]) -> None:
        """Delete all but the newest `keep` checkpoints and those of the steps `also`."""
        steps = self.steps()
        for step in set(steps) - set(steps[-keep:]) - set(also):
            remove_folder(self.path(step))

    def clear(self) -> None:
        """Delete all checkpoints, complete or not."""
        for step in self._numbered():
            remove_folder(self.path(step))
        self.remove_leftovers()

    def remove_leftovers(self) -> None:
        """Delete what killed processes left half written."""
        remove_leftovers(self.folder)

    def _numbered(self) -> list[int]:
        if not self.folder.is_dir():
            return []
        names = (re.fullmatch(r"step-(\d{8,})", path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in names if match)

    def _content(self, step: int) -> dict[str, Any] | None:
        try:
            content = json.loads((self.path(step) / _STATE).read_text())
        except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
            return None
        known = isinstance(content, dict) and {"format", "step", "files", "state"} <= set(content)
        return content if known else None

    def _is_complete(self, step: int) -> bool:
        content = self._content(step)
        if content is None or content["step"] != step:
            return False
        paths = {self.path(step) / name: size for name, size in content["files"].items()}
        return all(path.is_file() and path.stat().st_size == size for path, size in paths.items())
