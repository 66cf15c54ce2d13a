"""The inputs of checkpointed layers elsewhere, from the forward pass until the backward pass."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from lora_engine import backends
from lora_engine.files import naming
from lora_engine.memory.host_activations import HostActivations
from lora_engine.memory.policy import Place
from lora_engine.scratch_file import ScratchFile, Stored


class Kept(Protocol):
    """A tensor that is elsewhere."""

    def unpack(self) -> Tensor:
        """Its values, where they were."""


class Keeper(Protocol):
    """What keeps tensors elsewhere."""

    def keep(self, tensor: Tensor) -> Kept:
        """The tensor's values, until the result is gone. Raises OSError where there is no room."""

    def close(self) -> None:
        """Nothing that it keeps can be read any more."""


class ActivationStore:
    """Runs layers again in the backward pass, whose inputs `keeper` keeps until then.

    The bytes come back as they were.
    """

    def __init__(self, keeper: Keeper) -> None:
        self.keeper = keeper

    def checkpoint(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """`function(*inputs)`, which runs again in the backward pass; its inputs are elsewhere
        meanwhile. Raises OSError, naming the folder, where the disk is full."""
        with saved_tensors_hooks(self._pack, _unpack):
            result: Tensor = checkpoint(function, *inputs, use_reentrant=False)
        return result

    def close(self) -> None:
        """Gives the memory or disk space back."""
        self.keeper.close()

    def _pack(self, tensor: Tensor) -> "Tensor | Kept":
        # A tensor that is a parameter or a view of one is in memory anyway.
        return tensor if tensor.is_leaf and tensor.requires_grad else self.keeper.keep(tensor)


def _unpack(kept: "Tensor | Kept") -> Tensor:
    return kept if isinstance(kept, Tensor) else kept.unpack()


class DiskActivations:
    """Keeps tensors in a file in `folder`, which has no name and is bounded by the most that one
    micro-batch keeps.

    While a layer runs again, the system reads ahead what the layer before it keeps.
    """

    def __init__(self, folder: Path) -> None:
        self._file = ScratchFile(folder)
        self._before: Stored | None = None  # the last that was written

    @property
    def nbytes(self) -> int:
        """The file's size: the most that was in it at one time."""
        return self._file.nbytes

    def keep(self, tensor: Tensor) -> "_OnDisk":
        """See `Keeper`."""
        kept = self._file.write(tensor.detach().contiguous().cpu())
        before, self._before = self._before, kept
        return _OnDisk(torch.empty_like(tensor, device="meta"), kept, before, tensor.device)

    def close(self) -> None:
        """See `Keeper`."""
        self._before = None
        self._file.close()


class _OnDisk:
    """A tensor's description and bytes; `before`: those that the backward pass reads after them."""

    def __init__(
        self, like: Tensor, stored: Stored, before: Stored | None, device: torch.device
    ) -> None:
        self.like, self.stored, self.before, self.device = like, stored, before, device

    def unpack(self) -> Tensor:
        """The tensor, in memory of its own."""
        if self.before is not None:
            self.before.expect()
        values = torch.empty(self.like.shape, dtype=self.like.dtype)
        self.stored.read(values.view(-1).view(torch.uint8))
        return values.to(self.device)


@contextmanager
def activation_store(
    place: Place | None, folder: Path, device: torch.device
) -> Iterator[ActivationStore | None]:
    """The store of `train.offload_activations`; None: the model's device keeps them.

    folder: of a file on disk, which is made. device: the model's.
    """
    if place is None:
        yield None
        return
    keeper: Keeper
    if place == "disk":
        with naming(folder):
            folder.mkdir(parents=True, exist_ok=True)
        keeper = DiskActivations(folder)
    else:
        keeper = HostActivations(backends.copies(device))
    store = ActivationStore(keeper)
    try:
        yield store
    finally:
        store.close()
