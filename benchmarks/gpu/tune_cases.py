"""What the tuner measures: for each kernel of the launch table a call as models make it.

tune_lora.py and tune_pointwise.py have the calls. A function gives a kernel's: the launcher with
tensors on any device, "meta" for compiling without a GPU. `cases` lists the sizes, the most telling
first; `size` says by which number the launcher finds its line, so that sizes are put together by
line before anything is launched.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.measure import Matmul, Thunk

# What LoRA with the default settings does not launch comes last.
LATER = (
    "lora_linear_fwd",
    "lora_linear_dx",
    "rms_norm_bwd_dw",
    "layer_norm_fwd",
    "layer_norm_bwd",
)


@dataclass(frozen=True)
class Case:
    """A kernel at one size. sizes: keyword arguments of the kernel's call."""

    kernel: str
    dtype: str
    sizes: tuple[tuple[str, int], ...]

    def size(self) -> int:
        """What the launcher finds its line of the launch table by."""
        return KERNELS[self.kernel].size(getattr(torch, self.dtype).itemsize, **dict(self.sizes))

    def call(self, device: torch.device) -> "Call":
        torch.manual_seed(0)
        return KERNELS[self.kernel].call(device, getattr(torch, self.dtype), **dict(self.sizes))

    def tiny(self) -> "Case":
        """The same call at a size that takes no time in Triton's interpreter."""
        return Case(self.kernel, self.dtype, tuple(KERNELS[self.kernel].tiny.items()))

    def fields(self) -> dict[str, Any]:
        return {"kernel": self.kernel, "dtype": self.dtype, "sizes": dict(self.sizes)}

    @staticmethod
    def of(fields: dict[str, Any]) -> "Case":
        """A case from its `fields`."""
        return Case(fields["kernel"], fields["dtype"], tuple(fields["sizes"].items()))

    def __str__(self) -> str:
        return " ".join([self.dtype, *(f"{name}={value}" for name, value in self.sizes)])


@dataclass(frozen=True)
class Call:
    """A launch, what it writes, and what it cannot do without.

    inplace: inputs that it changes. bytes: read and written at least. matmuls: its products, where
    they take longer than the bytes. looser: how many times as far as usual results may be apart:
    sums of rounded terms, which cancel.
    """

    run: Thunk
    outputs: tuple[Tensor, ...]
    bytes: int
    inplace: tuple[Tensor, ...] = ()
    matmuls: tuple[Matmul, ...] = ()
    looser: float = 1.0


# Takes a device, a dtype and the case's sizes by name.
MakeCall = Callable[..., Call]


@dataclass(frozen=True)
class Kernel:
    """A kernel of the launch table: its call, its sizes, and the launch size of one."""

    call: MakeCall
    cases: tuple[Case, ...]
    size: Callable[..., int]
    tiny: dict[str, int] = field(default_factory=dict)


KERNELS: dict[str, Kernel] = {}


def kernel(
    name: str,
    sizes: Iterable[dict[str, int]],
    size: Callable[..., int],
    *,
    tiny: dict[str, int],
    dtype: str = "bfloat16",
    float32: Iterable[dict[str, int]] = (),
) -> Callable[[MakeCall], MakeCall]:
    """Registers a call. float32: sizes at which a line shared by all dtypes is watched."""

    def register(call: MakeCall) -> MakeCall:
        cases = [Case(name, dtype, tuple(x.items())) for x in sizes]
        cases += [Case(name, "float32", tuple(x.items())) for x in float32]
        KERNELS[name] = Kernel(call, tuple(cases), size, tiny)
        return call

    return register


def all_cases(names: Iterable[str] | None = None) -> list[Case]:
    """Cases of the kernels `names`, or of all, those of LATER last."""
    if names is None:
        names = sorted(KERNELS, key=lambda name: name in LATER)  # stable: else as registered
    return [case for name in names for case in KERNELS[name].cases]


def normal(device: torch.device, dtype: torch.dtype, *shape: int, padding: int = 0) -> Tensor:
    """Random numbers [..., n], `padding` columns behind each row."""
    whole = torch.randn(*shape[:-1], shape[-1] + padding, device=device, dtype=dtype)
    return whole[..., : shape[-1]]


def empty(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    """NaN, so that what a kernel leaves out is seen."""
    return torch.full(shape, float("nan"), device=device, dtype=dtype)


def moved(*tensors: Tensor) -> int:
    """Bytes of tensors that are each read or written once."""
    return sum(x.numel() * x.element_size() for x in tensors)


def grid(tokens: Iterable[int], **extents: Iterable[int]) -> Iterator[dict[str, int]]:
    """Every extent with every number of tokens."""
    ((name, values),) = extents.items()
    return ({"tokens": t, name: v} for v in values for t in tokens)


def by_row_bytes(itemsize: int, *, cols: int, **_: int) -> int:
    return cols * itemsize


def by_tokens(itemsize: int, *, tokens: int, **_: int) -> int:
    return tokens


def by_cols(itemsize: int, *, cols: int, **_: int) -> int:
    return cols
