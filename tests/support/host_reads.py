"""Where a computation waits for its tensors' values, as the host does for a GPU's.

On a CPU such reads cost nothing and so go unnoticed; here they are counted on every device.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

# Results whose size depends on values, and values themselves.
_READS = frozenset({"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2"})


class HostReads(TorchDispatchMode):
    """Within, `found` collects the names of torch's operations that read values of `device`."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        is_read = name in _READS or (name == "index" and _has_mask(args[1]))
        if is_read and args[0].device == self.device:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def _has_mask(indices: Any) -> bool:
    return any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in indices)


@contextmanager
def waits_for_the_gpu() -> Iterator[list[str]]:
    """Collects where calls within wait for a GPU, as torch says; no dispatch mode is active."""
    found: list[str] = []
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with _disable_current_modes():
                yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for warning in told:
        # The tests' own guard of operands reads them.
        if "synchronizing CUDA operation" in str(warning.message) and not (
            warning.filename.endswith("operand_guard.py")
        ):
            found.append(f"{warning.filename}:{warning.lineno}")
