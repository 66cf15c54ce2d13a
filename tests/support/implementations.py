"""The implementations that an operation's tests run on."""

from dataclasses import dataclass

import pytest
import tile_model
import torch
from torch import Tensor

from lora_engine import backends


def runnable_isas() -> list[str]:
    """The instruction sets that were built and run here."""
    if not backends.extension_available():
        return []
    return [isa for isa, runs in backends.native().built_isas() if runs]


@dataclass(frozen=True)
class Backend:
    """An implementation to test, and where its tensors live.

    capability: of the GPU whose PTX is executed on the CPU.
    """

    impl: str
    device: torch.device
    isa: str | None = None
    capability: int | None = None

    def put(self, *tensors: Tensor) -> list[Tensor]:
        """The tensors on this implementation's device."""
        return [x.to(self.device) for x in tensors]

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """What it takes."""
        return backends.DTYPES.get(self.impl, backends.DTYPES["cpu"])


CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
REFERENCE = Backend("reference", CPU)
# Every implementation, in every way that it can be run.
BACKENDS = {
    "reference": REFERENCE,
    **{f"cpu-{isa}": Backend("cpu", CPU, isa) for isa in runnable_isas()},
    "cpu-tiles": Backend("cpu", CPU, tile_model.NAME),
    "triton-interpreter": Backend("triton", CPU),
    "triton-ptx-80": Backend("triton", CPU, capability=80),
    "triton-ptx-90": Backend("triton", CPU, capability=90),
    "triton": Backend("triton", GPU),
    "cuda-emulated": Backend("cuda", CPU),
    "cuda-ptx-80": Backend("cuda", CPU, capability=80),
    "cuda-ptx-90": Backend("cuda", CPU, capability=90),
    "cuda": Backend("cuda", GPU),
    "torch": Backend("torch", CPU),
    "torch-gpu": Backend("torch", GPU),
}


# Operations whose CUDA kernels are made of instructions that the emulation has not.
NOT_EMULATED = ("attention",)


def dtypes_of(operation: str, backend: Backend) -> tuple[torch.dtype, ...]:
    """What an implementation takes of an operation, or of a block."""
    return backends.dtypes_of(operation, backend.impl) or backend.dtypes


def implementations(operation: str) -> tuple[str, ...]:
    """Those with kernels for an operation or a block; "torch" where it is made of torch's own."""
    parts = backends.BLOCKS.get(operation, (operation,))
    kernels = {**backends.OPERATIONS, **backends.PASSES}
    found = [kernels.get(part, ("torch",)) for part in parts]
    return tuple(impl for impl in found[0] if all(impl in others for others in found))


def parameters(operation: str, *, with_dtype: bool, with_reference: bool = False) -> list[object]:
    """What a test of the operation is parametrised by: a backend, or a pair of one and a dtype.

    Results of the reference are tested like those of a backend, where the marker asks for it.
    """
    impls = [*implementations(operation), *(["reference"] if with_reference else [])]
    found: list[object] = []
    for name, backend in BACKENDS.items():
        if backend.impl not in impls:
            continue
        if backend.isa == tile_model.NAME and not tile_model.stands_in(operation):
            continue
        if backend == BACKENDS["cuda-emulated"] and operation in NOT_EMULATED:
            continue
        marks = [pytest.mark.gpu] if backend.device.type == "cuda" else []
        marks += [pytest.mark.ptx] if backend.capability else []
        for dtype in dtypes_of(operation, backend) if with_dtype else [None]:
            if backend.isa == tile_model.NAME and dtype not in (torch.bfloat16, None):
                continue
            label = f"{name}-{str(dtype).removeprefix('torch.')}" if with_dtype else name
            values = (backend, dtype) if with_dtype else (backend,)
            found.append(pytest.param(*values, id=label, marks=marks))
    return found
