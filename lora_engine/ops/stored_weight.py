"""A frozen weight whose bytes wait in a file, read for each product."""

import hashlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lora_engine import backends
from lora_engine.distributed.world import ALONE
from lora_engine.ops.quantized_weight import QuantizedWeight
from lora_engine.ops.sharded_weight import Part, ShardedWeight, shard_weight
from lora_engine.scratch_file import ScratchFile, Stored


@dataclass(frozen=True, eq=False)
class StoredWeight(ShardedWeight):
    """A weight [N, K], dense or in packed bits, of which no byte is in memory.

    It is gathered as a shard is: into memory that all weights share, the next ones while a product
    is computed. stored: its bytes. where: the device of products. sha256: of the bytes.
    """

    stored: Stored
    where: torch.device
    sha256: str

    @property
    def nbytes(self) -> int:
        """Of the whole weight."""
        return self.stored.nbytes

    @property
    def device(self) -> torch.device:
        """Where it is read to."""
        return self.where

    @property
    def kept(self) -> str:
        """Where it is, for people."""
        return "on disk"

    def begin(self, out: Tensor) -> "list[Reading]":  # type: ignore[override]
        """Begins to read the bytes into `out`, uint8 [nbytes]."""
        return [Reading(self.stored, out)]

    def to(self, device: torch.device) -> "StoredWeight":
        """The same, to be read to `device`."""
        return StoredWeight(
            *(self.shape, self.dtype, self.format, self.parts, self.shard, self.tail, ALONE),
            *(self.stored, device, self.sha256),
        )


class Reading:
    """Bytes that a thread reads into `out`, which may be on another device."""

    def __init__(self, stored: Stored, out: Tensor) -> None:
        elsewhere = backends.has_own_memory(out.device)
        self._out = out
        self._read = torch.empty(out.shape, dtype=out.dtype) if elsewhere else out
        self._done: Future[None] = _reader().submit(stored.read, self._read)

    def wait(self) -> None:
        """Until they are there. Raises OSError, naming the file's folder, where they are not."""
        self._done.result()
        if self._read is not self._out:
            self._out.copy_(self._read)


@cache
def _reader() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "lora_engine-reader")


def store_weight(weight: Tensor | QuantizedWeight, file: ScratchFile) -> StoredWeight:
    """`weight` [N, K], written to `file`; the memory that it is in is the caller's to free."""
    device = weight.device
    whole = shard_weight(weight, ALONE)
    image = whole.shard.cpu()
    empty = image.new_empty(0)
    parts: Mapping[str, Part] = whole.parts
    sha256 = hashlib.sha256(image.numpy()).hexdigest()  # type: ignore[arg-type]
    return StoredWeight(
        *(whole.shape, whole.dtype, whole.format, parts, empty, empty, ALONE),
        *(file.write(image), device, sha256),
    )
