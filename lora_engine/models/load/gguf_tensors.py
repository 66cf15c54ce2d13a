"""The tensors of a GGUF file, read one at a time.

After the head (see gguf_head.py) come metadata entries: key, value type, value; then, for each
tensor, its name, its dimensions from the innermost on, its type and where it begins in the data,
which follows aligned. Strings are a length (uint64) and UTF-8; numbers are little-endian. GGUF's
specification is ggml's docs/gguf.md.
"""

import math
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lora_engine.errors import UserError
from lora_engine.models.load.gguf_head import check_head
from lora_engine.models.load.shards import own_bytes
from lora_engine.quantization.gguf import TYPES

_GET_WHOLE = "get the complete GGUF file"
_SCALARS = ("B", "b", "H", "h", "I", "i", "f", "?", "", "", "Q", "q", "d")  # by value type
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4
_ALIGNMENT = 32

# By the number of a tensor's type in the file.
_PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
_PACKED = {
    2: "q4_0",
    3: "q4_1",
    6: "q5_0",
    7: "q5_1",
    8: "q8_0",
    12: "q4_k",
    13: "q5_k",
    14: "q6_k",
}
_OTHERS = {
    10: "Q2_K",
    11: "Q3_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
}


class GgufTensor(NamedTuple):
    """type: one of `quantization.gguf.TYPES`, or the dtype. shape: outermost dimension first."""

    type: str | torch.dtype
    shape: tuple[int, ...]
    start: int  # byte of the file

    @property
    def nbytes(self) -> int:
        """In the file."""
        values = math.prod(self.shape)
        if isinstance(self.type, torch.dtype):
            return values * self.type.itemsize
        return values // TYPES[self.type].values * TYPES[self.type].bytes


class GgufFile:
    """The tensors of the file at `path`, and those of its metadata that are one number or string.

    Raises UserError for what is no readable GGUF, is cut short, or has a tensor of another type
    than those that are read here.
    """

    def __init__(self, path: Path) -> None:
        check_head(path)
        self.path = path
        self.metadata: dict[str, object] = {}
        self.tensors: dict[str, GgufTensor] = {}
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            try:
                self._read(_Cursor(content))
            except (struct.error, UnicodeDecodeError, IndexError) as error:
                raise UserError(f"{path}: ends within its header; {_GET_WHOLE}") from error
        size = path.stat().st_size
        for name, tensor in self.tensors.items():
            if tensor.start + tensor.nbytes > size:
                raise UserError(f"{path}: ends after {size:,} bytes, within {name}; {_GET_WHOLE}")

    def _read(self, cursor: "_Cursor") -> None:
        cursor.at = 8
        count, entries = cursor.numbers("QQ")
        for _ in range(entries):
            key = cursor.string()
            (kind,) = cursor.numbers("I")
            value = cursor.value(kind)
            if value is not None:
                self.metadata[key] = value
        stored = [(cursor.string(), *self._tensor(cursor)) for _ in range(count)]
        alignment = self.metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise UserError(f"{self.path}: general.alignment is {alignment}; {_GET_WHOLE}")
        data = -(-cursor.at // alignment) * alignment
        for name, kind, shape, offset in stored:
            self.tensors[name] = GgufTensor(self._type(name, kind, shape), shape, data + offset)

    def _tensor(self, cursor: "_Cursor") -> tuple[int, tuple[int, ...], int]:
        (dimensions,) = cursor.numbers("I")
        if dimensions > _MOST_DIMENSIONS:
            raise UserError(f"{self.path}: has a tensor of {dimensions} dimensions; {_GET_WHOLE}")
        shape = cursor.numbers("Q" * dimensions)
        kind, offset = cursor.numbers("IQ")
        return kind, tuple(reversed(shape)), offset

    def _type(self, name: str, kind: int, shape: tuple[int, ...]) -> str | torch.dtype:
        if kind in _PLAIN:
            return _PLAIN[kind]
        if kind not in _PACKED:
            known = ", ".join(type.upper() for type in TYPES)
            raise UserError(
                f"{self.path}: {name} is of type {_OTHERS.get(kind, kind)}, trained on packed are "
                f"{known}; leave model.keep_quantized out"
            )
        if not shape or shape[-1] % TYPES[_PACKED[kind]].values:
            raise UserError(f"{self.path}: {name} {list(shape)} is no {_PACKED[kind].upper()}")
        return _PACKED[kind]

    def read(self, name: str) -> Tensor:
        """The tensor, or of a packed one its bytes [rows, bytes of a row] uint8."""
        tensor = self.tensors[name]
        buffer = own_bytes(tensor.nbytes)
        with self.path.open("rb") as file:
            file.seek(tensor.start)
            if file.readinto(memoryview(buffer.numpy())) != tensor.nbytes:  # type: ignore[arg-type]
                raise UserError(f"{self.path}: ends within {name}; {_GET_WHOLE}")
        if isinstance(tensor.type, torch.dtype):
            return buffer.view(tensor.type).view(tensor.shape)
        return buffer.view(math.prod(tensor.shape[:-1]), -1)


class _Cursor:
    """Values of a mapped file, one after the other."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content, self.at = content, 0

    def numbers(self, format: str) -> tuple[int, ...]:
        """Unaligned, little-endian."""
        found = struct.unpack_from(f"<{format}", self.content, self.at)
        self.at += struct.calcsize(f"<{format}")
        return found

    def string(self) -> str:
        """A length and UTF-8."""
        return self._bytes().decode()

    def _bytes(self) -> bytes:
        (length,) = self.numbers("Q")
        if self.at + length > len(self.content):
            raise IndexError
        self.at += length
        return self.content[self.at - length : self.at]

    def value(self, kind: int) -> object | None:
        """A number or string; arrays are passed over, and None stands for them."""
        if kind == _STRING:
            return self._bytes().decode(errors="replace")
        if kind != _ARRAY:
            return self.numbers(_SCALARS[kind])[0]
        of, count = self.numbers("IQ")
        if of == _STRING:
            for _ in range(count):
                self._bytes()
        elif of == _ARRAY:
            for _ in range(count):
                self.value(of)
        else:
            self.at += struct.calcsize(f"<{_SCALARS[of]}") * count
        return None


def number(metadata: Mapping[str, object], key: str) -> int | None:
    """An integer of the metadata; None where there is none."""
    value = metadata.get(key)
    return value if isinstance(value, int) else None
