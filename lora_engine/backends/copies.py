"""Copies between a device's memory and the host's, made beside the device's other work."""

from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from lora_engine.backends.devices import has_own_memory


class Copy(Protocol):
    """A copy that was begun. Until it was waited for, source and target have to stay as they are,
    and alive."""

    def wait(self) -> None:
        """Whatever the device is given from now on comes after the copy; the host goes on."""


class Copies(Protocol):
    """Copies to and from one device, one after the other in the order in which they were begun."""

    def host(self, like: Tensor) -> Tensor:
        """Memory of the host for a tensor of that shape and dtype, contiguous, not set."""

    def begin(self, target: Tensor, source: Tensor) -> Copy:
        """Begins a copy that comes after all that the device was given so far."""

    def finish(self) -> None:
        """The host waits until all copies are made, and may read what they wrote."""


class _Done:
    def wait(self) -> None:
        """Nothing is left to wait for."""


class CopiesAtOnce:
    """Of a device whose memory is the host's: a copy is made when it is begun."""

    def host(self, like: Tensor) -> Tensor:
        """See `Copies`."""
        return torch.empty(like.shape, dtype=like.dtype)

    def begin(self, target: Tensor, source: Tensor) -> Copy:
        """See `Copies`."""
        target.copy_(source)
        return _Done()

    def finish(self) -> None:
        """See `Copies`."""


class CopiesOnStream:
    """Of a GPU: on a CUDA stream of their own, from and to pinned memory, which torch reuses.

    Has never run on a GPU; tests/support/late_copies.py stands for one.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def host(self, like: Tensor) -> Tensor:
        """See `Copies`."""
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)

    def begin(self, target: Tensor, source: Tensor) -> Copy:
        """See `Copies`."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            return _Event(self._stream.record_event(), self._device)

    def finish(self) -> None:
        """See `Copies`."""
        self._stream.synchronize()


class _Event:
    def __init__(self, event: torch.cuda.Event, device: torch.device) -> None:
        self._event, self._device = event, device

    def wait(self) -> None:
        """See `Copy`."""
        torch.cuda.current_stream(self._device).wait_event(self._event)


@cache
def copies(device: torch.device) -> Copies:
    """What copies to and from `device`; one for all who ask."""
    return CopiesOnStream(device) if has_own_memory(device) else CopiesAtOnce()
