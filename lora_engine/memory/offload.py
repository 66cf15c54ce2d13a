"""The inputs of checkpointed layers on disk, from the forward pass until the backward pass."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from lora_engine.files import naming
from lora_engine.scratch_file import ScratchFile, Stored


class ActivationStore:
    """Keeps what checkpointed layers keep in a file in `folder`, which has no name and is bounded
    by the most that one micro-batch keeps.

    The bytes come back as they were. While a layer runs again, the system reads ahead what the
    layer before it keeps.
    """

    def __init__(self, folder: Path) -> None:
        self._file = ScratchFile(folder)
        self._before: Stored | None = None  # the last that was written

    @property
    def nbytes(self) -> int:
        """The file's size: the most that was in it at one time."""
        return self._file.nbytes

    def checkpoint(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """`function(*inputs)`, which runs again in the backward pass; its inputs are in the file
        meanwhile. Raises OSError, naming the folder, where the disk is full."""
        with saved_tensors_hooks(self._pack, _Kept.unpack):
            result: Tensor = checkpoint(function, *inputs, use_reentrant=False)
        return result

    def close(self) -> None:
        """Gives the disk space back; nothing that it keeps can be read any more."""
        self._before = None
        self._file.close()

    def _pack(self, tensor: Tensor) -> "_Kept":
        # A tensor that is a parameter or a view of one is in memory anyway.
        if tensor.is_leaf and tensor.requires_grad:
            return _Kept(tensor, None, None)
        kept = self._file.write(tensor.detach().contiguous().cpu())
        before, self._before = self._before, kept
        return _Kept(torch.empty_like(tensor, device="meta"), kept, before, tensor.device)


class _Kept:
    """A tensor's description and bytes; `before`: those that the backward pass reads after them."""

    def __init__(
        self,
        like: Tensor,
        stored: Stored | None,
        before: Stored | None,
        device: torch.device | None = None,
    ) -> None:
        self.like, self.stored, self.before, self.device = like, stored, before, device

    def unpack(self) -> Tensor:
        """The tensor, in memory of its own."""
        if self.stored is None:
            return self.like
        if self.before is not None:
            self.before.expect()
        values = torch.empty(self.like.shape, dtype=self.like.dtype)
        self.stored.read(values.view(-1).view(torch.uint8))
        return values.to(self.device)


@contextmanager
def activation_store(place: str | None, folder: Path) -> Iterator[ActivationStore | None]:
    """The store of `train.offload_activations`, in `folder`, which is made; None: memory is."""
    if place is None:
        yield None
        return
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
    store = ActivationStore(folder)
    try:
        yield store
    finally:
        store.close()
