"""The bytes and the text of files that may be compressed."""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol, cast

from lora_engine.errors import UserError, reason

COMPRESSED = (".gz", ".zst", ".zstd")
# What files begin with that are compressed, or text in another encoding.
_OTHER_FORMATS = {
    b"\x1f\x8b": "is compressed (gzip); let its name end in .gz, or unpack it",
    b"BZh": "is compressed (bzip2); unpack it first",
    b"\xfd7zXZ\x00": "is compressed (xz); unpack it first",
    b"\x28\xb5\x2f\xfd": "is compressed (zstd); let its name end in .zst, or unpack it",
    b"ARROW1": "is an Arrow file; name it .arrow",
    b"PK\x03\x04": "is a zip archive; unpack it first",
    b"PAR1": "is a Parquet file; name it .parquet",
    b"\xff\xfe\0\0": "is UTF-32 text; save it as UTF-8",
    b"\xff\xfe": "is UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "is UTF-16 text; save it as UTF-8",
}


class _Tells(Protocol):
    @property
    def closed(self) -> bool: ...
    def tell(self) -> int: ...


@dataclass
class Meter:
    """How far a file is read, in bytes as it is on disk: `done`, or the place of `file`."""

    done: int = 0
    file: _Tells | None = None

    def tell(self) -> int:
        """The bytes that are read."""
        if self.file is not None and not self.file.closed:
            self.done = self.file.tell()
        return self.done


@contextmanager
def opened(path: Path, meter: Meter | None = None) -> Iterator[BinaryIO]:
    """The bytes of a text file, unpacked. Raises UserError if it is none, or is damaged.

    meter: is told how far the file is read.
    """
    suffix = path.suffix.lower()
    with path.open("rb") as file:
        if meter is not None:
            meter.file = file
        try:
            if suffix == ".gz":
                unpacked = cast(BinaryIO, gzip.GzipFile(fileobj=file))
            elif suffix in COMPRESSED:
                unpacked = _zstd(file)
            else:
                unpacked = file
            _check_format(path, unpacked.peek(8)[:8])  # type: ignore[attr-defined]
            yield unpacked
        except (EOFError, gzip.BadGzipFile, zlib.error, _ZstdError) as error:
            raise UserError(
                f"{path}: is not a readable {suffix} file, get it anew: {reason(error)} (before "
                f"byte {file.tell()})"
            ) from error


class _ZstdError(Exception):
    """A damaged zstd file."""


class _Zstd(io.RawIOBase):
    """The unpacked bytes of a zstd file of any number of frames."""

    def __init__(self, file: BinaryIO) -> None:
        import pyarrow

        self._stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "bytearray | memoryview") -> int:  # type: ignore[override]
        try:
            read = self._stream.read(len(buffer))
        except OSError as error:
            raise _ZstdError(reason(error)) from error
        buffer[: len(read)] = read
        return len(read)


def _zstd(file: BinaryIO) -> BinaryIO:
    return cast(BinaryIO, io.BufferedReader(_Zstd(file), 1 << 20))


def _check_format(path: Path, head: bytes) -> None:
    """Raises UserError if a file begins as no text in UTF-8 does."""
    for magic, problem in _OTHER_FORMATS.items():
        if head.startswith(magic) and path.suffix.lower() in COMPRESSED:
            raise UserError(f"{path}: what it packs {problem.partition(';')[0]}; unpack it first")
        if head.startswith(magic):
            raise UserError(f"{path}: {problem}")


def skip(file: BinaryIO, offset: int) -> None:
    """Goes to `offset` in a file that is at its beginning; what is packed has to be unpacked."""
    if file.seekable():
        file.seek(offset)
        return
    while offset > 0 and (read := file.read(min(offset, 1 << 20))):
        offset -= len(read)
