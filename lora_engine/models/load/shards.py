"""Safetensors files read one tensor at a time: nothing is mapped, and nothing kept."""

import json
import math
import mmap
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_engine.errors import UserError
from lora_engine.files import naming

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_MOST_HEADER_BYTES = 100_000_000  # as safetensors itself has it
_GET_WHOLE = "get the complete file"
_PAGES_FROM = 1 << 20  # bytes

_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Stored(NamedTuple):
    """Where a tensor is."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # byte of the file

    @property
    def nbytes(self) -> int:
        """Of the tensor."""
        return self.dtype.itemsize * math.prod(self.shape)


class Shards:
    """The tensors of a model folder.

    Raises UserError, with the file, where one is missing, cut short or no safetensors file, or has
    not what the index says.
    """

    def __init__(self, folder: Path) -> None:
        self.tensors: dict[str, Stored] = {}
        index = folder / INDEX
        if not index.is_file():
            self._add(folder / SINGLE)
            return
        for file, names in _indexed(index).items():
            self._add(folder / file)
            if absent := [name for name in names if name not in self.tensors]:
                raise UserError(f"{folder / file}: lacks {absent[0]}, which {INDEX} says it has")

    def _add(self, path: Path) -> None:
        if not path.is_file():
            raise UserError(f"{path}: no such file; get the complete model")
        with naming(path):
            self.tensors.update(_header(path))

    def read(self, name: str) -> Tensor:
        """The tensor, in memory of its own. Raises UserError where the file ends before it does."""
        stored = self.tensors[name]
        buffer = own_bytes(stored.nbytes)
        place, count = memoryview(buffer.numpy()), 0  # type: ignore[arg-type]
        with naming(stored.file), stored.file.open("rb") as file:
            file.seek(stored.start)
            while count < stored.nbytes:
                if not (got := file.readinto(place[count:])):
                    raise UserError(f"{stored.file}: ends within {name}; {_GET_WHOLE}")
                count += got
        return buffer.view(stored.dtype).view(stored.shape)


def own_bytes(count: int) -> Tensor:
    """[count] uint8, of which many are returned to the system as soon as they are freed.

    The C library keeps large blocks that were freed for later ones, and what is allocated between
    them, as codes between weights, keeps them from being returned.
    """
    if count < _PAGES_FROM:
        return torch.empty(count, dtype=torch.uint8)
    return torch.frombuffer(mmap.mmap(-1, count), dtype=torch.uint8)


def _indexed(index: Path) -> dict[str, list[str]]:
    """The files that the index names, and what each has."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files: dict[str, list[str]] = {}
        for name, file in weight_map.items():
            files.setdefault(file, []).append(name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: is no index of safetensors files; get the model's") from error
    for file in files:
        if Path(file).name != file:
            raise UserError(f"{index}: names {file!r}, which is not a file beside it")
    return files


def _header(path: Path) -> dict[str, Stored]:
    """The tensors that a file says it has.

    It begins with the size of its header (uint64, little-endian) and the header, JSON: by name,
    dtype, shape, and where the tensor begins and ends after the header.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > _MOST_HEADER_BYTES:
            raise UserError(f"{path}: is no safetensors file; get the model's own")
        if 8 + length > size:
            raise UserError(f"{path}: ends within its header; {_GET_WHOLE}")
        head = file.read(length)
    try:
        content = json.loads(head)
        content.pop("__metadata__", None)
        stored = {name: _stored(path, 8 + length, of) for name, of in content.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is no safetensors file; get the model's own") from error
    for name, of in stored.items():
        if of.start + of.nbytes > size:
            raise UserError(f"{path}: ends after {size:,} bytes, within {name}; {_GET_WHOLE}")
    return stored


def _stored(path: Path, data: int, of: dict[str, Any]) -> Stored:
    start, end = of["data_offsets"]
    shape = tuple(of["shape"])
    stored = Stored(file=path, dtype=_DTYPES[of["dtype"]], shape=shape, start=data + start)
    if end - start != stored.nbytes or start < 0 or any(size < 0 for size in shape):
        raise ValueError("the tensor's bytes are not its shape's")
    return stored
