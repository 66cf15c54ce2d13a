"""A frozen weight of which each of several processes keeps a part of the bytes."""

import itertools
import math
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lora_engine.distributed.world import World
from lora_engine.ops.quantized_weight import QuantizedWeight
from lora_engine.quantization.format import Format

_ALIGNMENT = 64  # bytes between packed tensors: what any dtype and vector load can start at


class Part(NamedTuple):
    """Where one of a weight's tensors lies in its bytes."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class ShardedWeight:
    """A weight [N, K], dense or in packed bits, as bytes that W processes share.

    shape: (N, K). dtype: of the weight's numbers. format: of packed bits; None: dense.
    parts: where the weight's tensors lie in its `nbytes` bytes.
    shard: uint8 [nbytes // W], this process's part. tail: uint8 [nbytes % W], which all keep.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    format: Format | None
    parts: Mapping[str, Part]
    shard: Tensor
    tail: Tensor
    world: World

    @property
    def nbytes(self) -> int:
        """Of the whole weight."""
        return self.shard.numel() * self.world.size + self.tail.numel()

    @property
    def device(self) -> torch.device:
        """Of the shard, and of the whole."""
        return self.shard.device

    def begin(self, out: Tensor) -> "list[dist.Work | None]":
        """Begins to gather the bytes into `out`, uint8 [nbytes]; all processes call it."""
        whole = self.shard.numel() * self.world.size
        out[whole:].copy_(self.tail)
        if self.world.size == 1:
            out[:whole].copy_(self.shard)
            return []
        return [self.world.begin_gather_(out[:whole], self.shard)] if whole else []

    def over(self, image: Tensor) -> Tensor | QuantizedWeight:
        """The weight whose bytes are `image`, uint8 [nbytes]: a view."""
        tensors = {
            name: image[part.offset : part.offset + part.nbytes].view(part.dtype).view(part.shape)
            for name, part in self.parts.items()
        }
        if self.format is None:
            return tensors["weight"]
        return QuantizedWeight(
            format=self.format, tensors=tensors, shape=self.shape, dtype=self.dtype
        )

    @property
    def kept(self) -> str:
        """How much of it is here, for people."""
        return f"1/{self.world.size} of it"

    def to(self, device: torch.device) -> "ShardedWeight":
        """The same shard on `device`."""
        return replace(self, shard=self.shard.to(device), tail=self.tail.to(device))


def shard_weight(weight: Tensor | QuantizedWeight, world: World) -> ShardedWeight:
    """This process's part of `weight` [N, K], copied. Sends nothing."""
    if isinstance(weight, Tensor):
        format, tensors, align = None, {"weight": weight.detach()}, 1
    else:
        format, tensors, align = weight.format, dict(weight.tensors), _ALIGNMENT
    parts, offset = {}, 0
    for name, tensor in tensors.items():
        offset = -(-offset // align) * align
        parts[name] = Part(offset=offset, shape=tuple(tensor.shape), dtype=tensor.dtype)
        offset += parts[name].nbytes
    each = offset // world.size
    start = world.rank * each
    device = next(iter(tensors.values())).device
    shard, tail = (
        _bytes_between(tensors, parts, a, b, device)
        for a, b in ((start, start + each), (each * world.size, offset))
    )
    shape = (weight.shape[0], weight.shape[1])
    return ShardedWeight(
        shape=shape,
        dtype=weight.dtype,
        format=format,
        parts=parts,
        shard=shard,
        tail=tail,
        world=world,
    )


def _bytes_between(
    tensors: Mapping[str, Tensor],
    parts: Mapping[str, Part],
    start: int,
    stop: int,
    device: torch.device,
) -> Tensor:
    """uint8 [stop - start]: these of the weight's bytes; zeros between its tensors."""
    out = torch.zeros(stop - start, dtype=torch.uint8, device=device)
    for name, part in parts.items():
        first, last = max(start, part.offset), min(stop, part.offset + part.nbytes)
        if first < last:
            image = tensors[name].contiguous().view(-1).view(torch.uint8)
            out[first - start : last - start] = image[first - part.offset : last - part.offset]
    return out


class Gathered(Protocol):
    """What is gathered at once: the sharded weights of a group."""

    serial: int

    @property
    def image_bytes(self) -> int:
        """Of all its weights, and what lies between them."""

    @property
    def device(self) -> torch.device:
        """Where it is gathered."""

    def begin(self, image: Tensor) -> "list[dist.Work | None]":
        """Begins to gather into `image`, uint8 [image_bytes]."""


class _Coming(NamedTuple):
    """What is being gathered into the slot that is not lent."""

    serial: int
    works: "list[dist.Work | None]"


class _Gatherer:
    """Two slots of memory on a device: one for what is lent, one for what comes next.

    What comes next is what came the last time after the same two; where that is wrong, it is
    gathered in vain. All processes ask for the same, one after the other, and so expect the same.
    """

    def __init__(self) -> None:
        self._slots = [torch.empty(0, dtype=torch.uint8)] * 2
        self._lent = (-1, -1)  # serials: before this one, and this one
        self._coming: _Coming | None = None
        self._next: dict[tuple[int, int], weakref.ref[Gathered]] = {}
        self._before = (-1, -1)
        self.lock = threading.Lock()

    def image(self, owner: Gathered, world: World) -> Tensor:
        """The owner's bytes, until another owner's are asked for."""
        if self._lent[1] != owner.serial:
            self._next[self._lent] = weakref.ref(owner)
            coming, self._coming = self._coming, None
            if coming is not None:
                for work in coming.works:
                    world.end(work)
            self._slots.reverse()
            if coming is None or coming.serial != owner.serial:
                for work in owner.begin(self._slot(0, owner)):
                    world.end(work)
            self._lent = (self._lent[1], owner.serial)
            self._expect()
        return self._slots[0][: owner.image_bytes]

    def _expect(self) -> None:
        after = self._next.get(self._lent)
        following = None if after is None else after()
        if following is not None:
            self._coming = _Coming(following.serial, following.begin(self._slot(1, following)))

    def _slot(self, number: int, owner: Gathered) -> Tensor:
        if self._slots[number].numel() < owner.image_bytes:
            self._slots[number] = torch.empty(0, dtype=torch.uint8)  # freed before more is taken
            with torch.inference_mode(False):
                size, device = owner.image_bytes, owner.device
                self._slots[number] = torch.empty(size, dtype=torch.uint8, device=device)
        return self._slots[number][: owner.image_bytes]


_gatherers: dict[torch.device, _Gatherer] = {}
_serials = itertools.count()


class ShardedGroup:
    """Sharded weights that are gathered together."""

    def __init__(self, weights: Sequence[ShardedWeight]) -> None:
        self.weights = tuple(weights)
        self.serial = next(_serials)
        dense = all(weight.format is None for weight in weights)  # then one matrix, row after row
        align, offset = 1 if dense else _ALIGNMENT, 0
        self._places: list[slice] = []
        for weight in weights:
            offset = -(-offset // align) * align
            self._places.append(slice(offset, offset + weight.nbytes))
            offset += weight.nbytes
        self.image_bytes = offset

    @property
    def device(self) -> torch.device:
        return self.weights[0].device

    def begin(self, image: Tensor) -> "list[dist.Work | None]":
        """See `Gathered`."""
        pairs = zip(self.weights, self._places, strict=True)
        return [work for weight, place in pairs for work in weight.begin(image[place])]

    def image(self) -> Tensor:
        """uint8 [image_bytes]: all bytes, valid until another group's are asked for."""
        gatherer = _gatherers.setdefault(self.device, _Gatherer())
        return gatherer.image(self, self.weights[0].world)

    def whole(self) -> list[Tensor | QuantizedWeight]:
        """The weights, valid until another group's are asked for."""
        image = self.image()
        pairs = zip(self.weights, self._places, strict=True)
        return [weight.over(image[place]) for weight, place in pairs]
