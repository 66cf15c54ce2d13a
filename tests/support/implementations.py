"""The implementations that an operation's tests run on."""

from dataclasses import dataclass

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
    """An implementation to test, and where its tensors live."""

    impl: str
    device: torch.device
    isa: str | None = None

    def put(self, *tensors: Tensor) -> list[Tensor]:
        """The tensors on this implementation's device."""
        return [x.to(self.device) for x in tensors]


CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
BACKENDS = {
    **{f"cpu-{isa}": Backend("cpu", CPU, isa) for isa in runnable_isas()},
    "triton-interpreter": Backend("triton", CPU),
    "triton": Backend("triton", GPU),
    "cuda-emulated": Backend("cuda", CPU),
    "cuda": Backend("cuda", GPU),
}
