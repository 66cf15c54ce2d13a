"""Tensors in the host's memory, copied there and back while a GPU computes."""

import weakref
from collections import deque

import torch
from torch import Tensor

from lora_engine.backends import Copies, Copy

# Tensors whose copies to the host may be under way at once: one is copied, one is made.
LEAVING = 2


class HostActivations:
    """Keeps tensors in the host's memory, for a backward pass that reads the last one first.

    A tensor's own memory is free again when the second one after it is kept, and the device then
    waits for its copy. While a layer computes with what came back, what was kept before is on its
    way. So the device holds two tensors at most, whatever the number of layers.
    """

    def __init__(self, copies: Copies) -> None:
        self._copies = copies
        self._leaving: deque[OnHost] = deque()
        self._coming: _Coming | None = None
        self._before: weakref.ref[OnHost] | None = None  # the last that was kept

    def keep(self, tensor: Tensor) -> "OnHost":
        """The tensor's values, until the result is gone; they must not change meanwhile."""
        while len(self._leaving) >= LEAVING:
            self._leaving.popleft().leave()
        source = tensor.detach()
        kept = OnHost(self, source, self._copies, self._before)
        self._leaving.append(kept)
        self._before = weakref.ref(kept)
        return kept

    def close(self) -> None:
        """Waits for the copies that are under way."""
        while self._leaving:
            self._leaving.popleft().leave()
        self._arrived()
        self._before = None

    def values(self, kept: "OnHost") -> Tensor:
        """What is kept, on the device; what was kept before it begins to come back."""
        if kept.source is not None:  # it has not left yet
            values = kept.source
            self._leaving.remove(kept)
            kept.leave()
        else:
            coming = self._arrived()
            if coming is None or coming.kept() is not kept:
                self._begin(kept)
                coming = self._arrived()
                assert coming is not None
            values = coming.values
        before = None if kept.before is None else kept.before()
        if before is not None and before.source is None and self._coming is None:
            self._begin(before)
        return values

    def _begin(self, kept: "OnHost") -> None:
        values = torch.empty_like(kept.host, device=kept.device)
        copy = self._copies.begin(values, kept.host)
        self._coming = _Coming(weakref.ref(kept), kept.host, values, copy)

    def _arrived(self) -> "_Coming | None":
        """What was on its way, when its copy is made."""
        coming, self._coming = self._coming, None
        if coming is not None:
            coming.copy.wait()
        return coming


class _Coming:
    """On its way to the device. host: kept until the copy is made, should `kept` go before."""

    def __init__(
        self, kept: "weakref.ref[OnHost]", host: Tensor, values: Tensor, copy: Copy
    ) -> None:
        self.kept, self.host, self.values, self.copy = kept, host, values, copy


class OnHost:
    """A tensor on the host.

    source: itself, until it has left. before: what was kept before it, which the backward pass
    reads after it.
    """

    def __init__(
        self,
        owner: HostActivations,
        source: Tensor,
        copies: Copies,
        before: "weakref.ref[OnHost] | None",
    ) -> None:
        self.owner, self.device, self.before = owner, source.device, before
        self.source: Tensor | None = source
        self.host = copies.host(source)
        self._version = source._version
        self._copy = copies.begin(self.host, source)

    def unpack(self) -> Tensor:
        """Its values on the device. Raises RuntimeError where they changed before they had left."""
        return self.owner.values(self)

    def leave(self) -> None:
        """Lets go of the device's memory, after the copy."""
        self._copy.wait()
        assert self.source is not None
        changed = self.source._version != self._version
        self.source = None
        if changed:
            raise RuntimeError(
                "the input of a checkpointed layer was changed in place before it was on the host; "
                "leave train.offload_activations out"
            )
