"""A frozen weight whose bytes wait in a file or in the host's memory, read for each product."""

import hashlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from lora_engine import backends
from lora_engine.backends import Copy
from lora_engine.distributed.world import ALONE
from lora_engine.ops.quantized_weight import QuantizedWeight
from lora_engine.ops.sharded_weight import Part, ShardedWeight, shard_weight
from lora_engine.scratch_file import ScratchFile, Stored


class Held(NamedTuple):
    """Bytes in the host's memory, uint8 [nbytes]."""

    image: Tensor

    @property
    def nbytes(self) -> int:
        return self.image.nbytes


class HostMemory:
    """Where bytes wait that are copied to `device`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def write(self, tensor: Tensor) -> Held:
        """The bytes of a contiguous tensor on the CPU, copied."""
        image = tensor.detach().view(-1).view(torch.uint8)
        return Held(backends.copies(self._device).host(image).copy_(image))


@dataclass(frozen=True, eq=False)
class StoredWeight(ShardedWeight):
    """A weight [N, K], dense or in packed bits, of which no byte is on the device of products.

    It is gathered as a shard is: into memory that all weights share, the next ones while a product
    is computed. stored: its bytes. where: the device of products. sha256: of the bytes.
    """

    stored: Stored | Held
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
        return "on disk" if isinstance(self.stored, Stored) else "in the host's memory"

    def begin(self, out: Tensor) -> "list[Reading | _Copying]":  # type: ignore[override]
        """Begins to read the bytes into `out`, uint8 [nbytes]."""
        if isinstance(self.stored, Stored):
            return [Reading(self.stored, out)]
        image = self.stored.image
        return [_Copying(backends.copies(self.where).begin(out, image), image)]

    def to(self, device: torch.device) -> "StoredWeight":
        """The same, to be read to `device`."""
        stored = self.stored
        if isinstance(stored, Held):
            stored = HostMemory(device).write(stored.image)
        return replace(self, stored=stored, where=device)


class _Copying(NamedTuple):
    """A copy under way. image: its source, which stays until it is made."""

    copy: Copy
    image: Tensor

    def wait(self) -> None:
        """See `Copy`."""
        self.copy.wait()


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


def store_weight(weight: Tensor | QuantizedWeight, place: ScratchFile | HostMemory) -> StoredWeight:
    """`weight` [N, K], written to `place`; the memory that it is in is the caller's to free."""
    device = weight.device
    whole = shard_weight(weight, ALONE)
    image = whole.shard.cpu()
    empty = image.new_empty(0)
    parts: Mapping[str, Part] = whole.parts
    sha256 = hashlib.sha256(image.numpy()).hexdigest()  # type: ignore[arg-type]
    return StoredWeight(
        shape=whole.shape,
        dtype=whole.dtype,
        format=whole.format,
        parts=parts,
        shard=empty,
        tail=empty,
        world=ALONE,
        stored=place.write(image),
        where=device,
        sha256=sha256,
    )
