"""A file without a name for tensors that are written once, read soon, and not kept.

The system frees its disk space when the process ends, however it does.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lora_engine.files import naming

_ALIGNMENT = 4096  # of places in the file: pages


class Stored:
    """Bytes in a ScratchFile; their place is free again when this is gone."""

    def __init__(
        self, file: "ScratchFile", offset: int, nbytes: int, free: Callable[[int, int], None]
    ) -> None:
        self.nbytes = nbytes
        self._file, self._offset, self._free = file, offset, free

    def read(self, out: Tensor) -> None:
        """Reads into `out`, uint8 [nbytes] on the CPU. Raises OSError, naming the folder."""
        self._file.transfer(os.preadv, self._offset, out)

    def expect(self) -> None:
        """Has the system read them ahead, in the background."""
        self._file.expect(self._offset, self.nbytes)

    def __del__(self) -> None:
        self._free(self._offset, self.nbytes)


class ScratchFile:
    """In `folder`, of as many bytes as were in it at most at one time. Not for several threads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with naming(folder):
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - open as long
        self._end = 0
        self._holes: list[tuple[int, int]] = []  # start and end, ascending

    @property
    def nbytes(self) -> int:
        """The file's size."""
        return self._end

    def write(self, tensor: Tensor) -> Stored:
        """The bytes of a contiguous tensor on the CPU. Raises OSError, naming the folder, where
        the disk is full; what was written before stays as it was."""
        nbytes = tensor.nbytes
        offset = self._place(-(-max(1, nbytes) // _ALIGNMENT) * _ALIGNMENT)
        stored = Stored(self, offset, nbytes, self._free)
        self.transfer(os.pwritev, offset, tensor.detach().view(-1).view(torch.uint8))
        return stored

    def transfer(
        self, call: Callable[[int, list[memoryview], int], int], offset: int, image: Tensor
    ) -> None:
        """All bytes of `image`, uint8, in as many calls as it takes."""
        view, done = memoryview(image.numpy()), 0  # type: ignore[arg-type]
        with naming(self.folder):
            while done < len(view):
                count = call(self._file.fileno(), [view[done:]], offset + done)
                if count == 0:
                    raise OSError(f"a file in {self.folder} ended early")
                done += count

    def expect(self, offset: int, nbytes: int) -> None:
        """See `Stored.expect`."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), offset, nbytes, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Gives its disk space back."""
        self._file.close()

    def _place(self, nbytes: int) -> int:
        """A free place: the first hole that is large enough, or the end."""
        for number, (start, end) in enumerate(self._holes):
            if end - start >= nbytes:
                self._holes[number : number + 1] = (
                    [(start + nbytes, end)] if end - start > nbytes else []
                )
                return start
        self._end += nbytes
        return self._end - nbytes

    def _free(self, offset: int, nbytes: int) -> None:
        size = -(-max(1, nbytes) // _ALIGNMENT) * _ALIGNMENT
        merged: list[tuple[int, int]] = []
        for start, end in sorted([*self._holes, (offset, offset + size)]):
            if merged and merged[-1][1] == start:
                merged[-1] = (merged[-1][0], end)
            else:
                merged.append((start, end))
        self._holes = merged
