"""What is asked of `choice.choose`: an operation on operands of a size, on what the machine has."""

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch

from lora_engine.backends import hardware


class Product(NamedTuple):
    """A product Y [m, n] = X [m, k] Wᵀ with r adapter columns, or dX of the same kind.

    dropout: the product itself is masked: that of dX with p > 0. The forward product never is,
        since there only S changes.
    augmentable: the base weight can be lent together with the adapters' factors, as one operand.
    """

    m: int
    n: int
    k: int
    r: int
    dropout: bool = False
    augmentable: bool = True


class Forward(NamedTuple):
    """A product of so many rows that no gradient follows."""

    rows: int


class Factors(NamedTuple):
    """The gradients of a LoRA group's factors, in the backward pass of its product."""


class Matmul(NamedTuple):
    """A product of two large matrices."""


class Head(NamedTuple):
    """A linear head: so many rows of so many logits."""

    rows: int
    classes: int


class Packed(NamedTuple):
    """A packed weight of so many rows, which a product takes in pieces."""

    rows: int


class Queries(NamedTuple):
    """Attention of new tokens, so many in each sequence, with all keys of a cache."""

    queries: int
    dropout: bool


class Decoding(NamedTuple):
    """New tokens of texts that a model goes on with, whose keys and values are kept."""


class Update(NamedTuple):
    """An optimiser's update of all its parameters, which stand one after the other."""


class Activation(NamedTuple):
    """A gated activation of so many columns between adapted linears, in a pass of that kind.

    rank: the largest of a linear whose thin product could be made of the pass's results.
    apart: something else has to happen to them first: dropout, or DoRA's scale.
    """

    cols: int
    rank: int
    backward: bool
    apart: bool


class Heads(NamedTuple):
    """Attention within packed sequences, with heads of this size.

    length: of all sequences alike, where the host knows it; else 0.
    repeatable: whether two runs have to give the same bits.
    """

    head_dim: int
    parents: bool = False
    window: bool = False
    length: int = 0
    repeatable: bool = False


class Extent(NamedTuple):
    """What the launch of a Triton kernel is chosen by; what `size` is, its launcher says."""

    size: int


Sizes: TypeAlias = (
    Product
    | Forward
    | Factors
    | Matmul
    | Head
    | Packed
    | Queries
    | Decoding
    | Update
    | Activation
    | Heads
    | Extent
)


@dataclass(frozen=True)
class Request:
    """What is to be computed, and on what.

    operation: of OPERATIONS or BLOCKS; with an Extent a kernel of launch_table.json.
    device: a torch device's type. capability: of a GPU. dtype: of the operands.
    sizes: where more than the implementation is asked for.
    format: how the base weight of a `lora_linear`, alone or in a block, is stored.
    impl: the implementation that a caller forces.
    """

    operation: str
    device: str
    capability: int | None
    dtype: torch.dtype
    sizes: Sizes | None = None
    format: str = "dense"
    impl: str | None = None

    @property
    def dtype_name(self) -> str:
        """As tables and messages have it: "bfloat16"."""
        return dtype_name(self.dtype)

    @staticmethod
    def on(
        device: torch.device,
        operation: str,
        dtype: torch.dtype,
        sizes: Sizes | None = None,
        impl: str | None = None,
        format: str = "dense",
    ) -> "Request":
        """A request for tensors on `device`, which need not be here."""
        absent = device.type == "cuda" and not torch.cuda.is_available()
        capability = None if absent else hardware.capability(device)
        return Request(
            operation=operation,
            device=device.type,
            capability=capability,
            dtype=dtype,
            sizes=sizes,
            format=format,
            impl=impl,
        )


@dataclass(frozen=True)
class Present:
    """What the machine has.

    isa: the instruction set of the C++ kernels; None: they cannot run. problem: why, if so.
    triton, interpreted: whether it is installed, and interprets its kernels in this process.
    architectures: that the CUDA kernels were built for. emulated: they take CPU tensors.
    gpu: whether torch finds a CUDA device.
    cudnn: whether PyTorch has cuDNN's attention.
    """

    isa: str | None
    problem: str | None
    triton: bool
    interpreted: bool
    architectures: tuple[str, ...]
    emulated: bool
    gpu: bool
    cudnn: bool = False


def dtype_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")
