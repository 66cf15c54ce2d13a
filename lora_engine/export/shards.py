"""A model's safetensors files, read and written a few rows at a time."""

import json
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_engine.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


class Shards:
    """The weights of the model in `folder`; files: those that hold them, in order.

    Raises UserError where a file is missing or broken.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / INDEX
        if index.is_file():
            try:
                names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{index}: is no index of weights; get the model's own") from error
            self.files = sorted({folder / str(name) for name in names})
        else:
            self.files = sorted(folder.glob("*.safetensors"))
        if not self.files:
            raise UserError(f"{folder}: has no weights, *.safetensors; give a complete model")
        self._opened = {path: _open(path) for path in self.files}
        self._file_of = {
            name: p for p, opened in self._opened.items() for name in opened.offset_keys()
        }

    def names(self, file: Path | None = None) -> list[str]:
        """The tensors of one file, or of all, in the order in which they lie there."""
        return [name for name, path in self._file_of.items() if file in (None, path)]

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        kind = self._slice(name).get_dtype()
        if kind not in _DTYPES:
            raise UserError(f"{self._file_of[name]}: tensor {name} has the unknown dtype {kind}")
        return _DTYPES[kind]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start:stop of a tensor of one or more dimensions, as stored."""
        return self._slice(name)[start:stop]

    def tensor(self, name: str) -> Tensor:
        return self._opened[self._file_of[name]].get_tensor(name)

    def _slice(self, name: str) -> Any:
        return self._opened[self._file_of[name]].get_slice(name)


@dataclass(frozen=True)
class Planned:
    """A tensor that is to be written; pieces: gives it in runs of rows, in order."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[Tensor]]

    @property
    def nbytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


def write_shard(path: Path, tensors: Sequence[Planned]) -> None:
    """A safetensors file with `tensors`, of which no more than a piece is in memory at once.

    The format: the length of the header (uint64, little-endian), the header as JSON, then the
    values of all tensors without gaps.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for planned in tensors:
        end = offset + planned.nbytes
        header[planned.name] = {
            "dtype": _NAMES[planned.dtype],
            "shape": list(planned.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for planned in tensors:
            written = 0
            for piece in planned.pieces():
                if piece.dtype != planned.dtype:
                    raise AssertionError(f"{planned.name}: {piece.dtype}, not {planned.dtype}")
                content = piece.contiguous().reshape(-1).view(torch.uint8).numpy()
                written += file.write(content.data)
            if written != planned.nbytes:
                raise AssertionError(f"{planned.name}: {written} bytes, not {planned.nbytes}")


def write_index(folder: Path, names_by_file: dict[str, list[str]], total_bytes: int) -> None:
    """The index of several files, as transformers reads it."""
    weight_map = {name: file for file, names in names_by_file.items() for name in names}
    content = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _open(path: Path) -> Any:
    from safetensors import safe_open

    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise UserError(f"{path}: is missing; get the complete model") from error
    except OSError:
        raise
    except Exception as error:  # SafetensorError, of a file that is cut or is something else
        raise UserError(f"{path}: cannot be read, get the complete file: {error}") from error
