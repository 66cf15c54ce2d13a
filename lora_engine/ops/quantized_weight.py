"""A weight kept in packed bits."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, cast, get_args

import torch
from torch import Tensor

from lora_engine.errors import nearest
from lora_engine.ops.blockwise_4bit import dequantize_4bit_, quantize_4bit
from lora_engine.ops.tensors import check, shape_of
from lora_engine.quantization.bitsandbytes_state import from_bitsandbytes, to_bitsandbytes
from lora_engine.quantization.blockwise_4bit import Blockwise4bit, Code

FORMATS: tuple[str, ...] = get_args(Code)


class QuantizationError(NamedTuple):
    """How far a quantised weight is from the one that it stands for.

    relative: root of the mean squared error, over the root mean square of the weight.
    largest: the largest error of one value.
    """

    relative: float
    largest: float


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A frozen weight [N, K] in a format of packed bits.

    tensors: the packed weight, those of `format.layout(shape)`, on one device.
    shape: (N, K). dtype: what it dequantises to.

    Raises ValueError where a tensor is missing or has another shape or dtype.
    """

    format: Blockwise4bit
    tensors: Mapping[str, Tensor]
    shape: tuple[int, int]
    dtype: torch.dtype

    def __post_init__(self) -> None:
        layout = self.format.layout(self.shape)
        for name, (shape, dtype) in layout.items():
            check(name in self.tensors, f"{self.format.name}: the tensor {name} is missing")
            tensor = self.tensors[name]
            check(
                tensor.shape == shape and tensor.dtype == dtype and tensor.is_contiguous(),
                f"{self.format.name}: {name} is {shape_of(tensor)}, expected {list(shape)} "
                f"{str(dtype).removeprefix('torch.')}, contiguous, for a weight {list(self.shape)}",
            )
            check(
                tensor.device == self.device,
                f"{self.format.name}: {name} is on {tensor.device}, others on {self.device}",
            )
        kept = {name: self.tensors[name] for name in layout}
        object.__setattr__(self, "tensors", MappingProxyType(kept))

    def __reduce__(self) -> tuple[object, ...]:
        # For copy.deepcopy and pickle, which cannot copy a mapping that is read-only.
        return QuantizedWeight, (self.format, dict(self.tensors), self.shape, self.dtype)

    @property
    def device(self) -> torch.device:
        """Of all tensors."""
        return next(iter(self.tensors.values())).device

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def bits_per_parameter(self) -> float:
        """Scales included."""
        return 8 * self.nbytes / max(1, self.shape[0] * self.shape[1])

    def dequantize(self, *, impl: str | None = None) -> Tensor:
        """The weight [N, K] in `dtype`."""
        return self.rows(0, self.shape[0], impl=impl)

    def rows(
        self,
        start: int,
        stop: int,
        *,
        out: Tensor | None = None,  # [stop - start, K], columns one apart
        impl: str | None = None,
    ) -> Tensor:
        """Rows [stop - start, K] of the weight; in `out`, of any float dtype, if it is given.

        Raises ValueError for rows that the weight does not have, or an `out` that does not fit.
        """
        rows, cols = stop - start, self.shape[1]
        check(
            0 <= start <= stop <= self.shape[0],
            f"rows {start} to {stop} of a weight {list(self.shape)}",
        )
        if out is None:
            out = torch.empty(rows, cols, dtype=self.dtype, device=self.device)
        elif problem := self._why_not_into(out, rows):
            raise ValueError(f"out is {shape_of(out)} on {out.device}, {problem}")
        if out.numel():
            dequantize_4bit_(out, self.tensors, self.format, first_row=start, impl=impl)
        return out

    def _why_not_into(self, out: Tensor, rows: int) -> str | None:
        """Why so many rows cannot be written into `out`; None if they can."""
        cols = self.shape[1]
        if out.shape != (rows, cols) or (out.stride(1) != 1 and cols != 1):
            return f"expected [{rows}, {cols}] with columns one apart"
        if not out.is_floating_point() or out.device != self.device:
            return f"expected floating point on {self.device}"
        if out.requires_grad and torch.is_grad_enabled():
            return "which requires a gradient, and decoding has none"
        return None

    def to(self, device: str | torch.device) -> "QuantizedWeight":
        """The same weight on `device`; itself if it is there."""
        moved = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        if all(moved[name] is tensor for name, tensor in self.tensors.items()):
            return self
        return QuantizedWeight(self.format, moved, self.shape, self.dtype)

    def error(
        self,
        weight: Tensor,  # [N, K]
    ) -> QuantizationError:
        """How far this is from `weight`."""
        check(weight.shape == self.shape, f"the weight is {shape_of(weight)}, not {self.shape}")
        exact = weight.detach().double()
        off = self.dequantize().to(exact) - exact
        if not off.numel():
            return QuantizationError(0.0, 0.0)
        size = exact.square().mean().sqrt().clamp(min=torch.finfo(torch.float64).tiny)
        return QuantizationError((off.square().mean().sqrt() / size).item(), off.abs().max().item())

    def state_dict(self, name: str) -> dict[str, Tensor]:
        """Tensors for a safetensors file, by the keys that bitsandbytes has for weight `name`."""
        entries = to_bitsandbytes(self.tensors, self.format, self.shape, self.dtype)
        return {name + suffix: tensor for suffix, tensor in entries.items()}

    @staticmethod
    def from_state_dict(state: Mapping[str, Tensor], name: str) -> "QuantizedWeight":
        """The weight `name` out of a state dict with bitsandbytes' keys.

        Raises ValueError, with the weight's name, where entries are missing or do not fit.
        """
        entries = {
            key[len(name) :]: tensor
            for key, tensor in state.items()
            if key == name or key.startswith(f"{name}.")
        }
        try:
            return QuantizedWeight(*from_bitsandbytes(entries))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def quantize_weight(
    weight: Tensor,  # [N, K]
    format: str = "nf4",
    *,
    block: int = 64,
    double_quant: bool = False,
    impl: str | None = None,
) -> QuantizedWeight:
    """`weight` in packed bits; it dequantises to the weight's dtype.

    format: one of FORMATS. block: so many consecutive values share a scale; 32, 64, … 4096.
    double_quant: quantise the scales as well, which saves 0.37 bits a parameter with blocks of 64.

    Raises ValueError for another format or block, and for a weight that is no matrix or not finite.
    """
    if format not in FORMATS:
        close = nearest(str(format), FORMATS)
        hint = f"did you mean {close}?" if close else f"expected one of {', '.join(FORMATS)}"
        raise ValueError(f"format {format!r}: {hint}")
    wanted = Blockwise4bit(cast(Code, format), block, double_quant)
    tensors = quantize_4bit(weight, wanted, impl=impl)
    return QuantizedWeight(wanted, tensors, (weight.shape[0], weight.shape[1]), weight.dtype)
