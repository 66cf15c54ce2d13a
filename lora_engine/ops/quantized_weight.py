"""A weight kept in packed bits."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, cast

import torch
from torch import Tensor

from lora_engine import backends
from lora_engine.backends import launchers
from lora_engine.ops.blockwise_4bit import dequantize_4bit_, quantize_4bit
from lora_engine.ops.tensors import check, shape_of
from lora_engine.quantization.bitsandbytes_state import from_bitsandbytes, to_bitsandbytes
from lora_engine.quantization.blockwise_4bit import Blockwise4bit
from lora_engine.quantization.format import (
    Blocks,
    Format,
    Scaled,
    TorchFormat,
    WritableFormat,
)
from lora_engine.quantization.formats import WRITABLE, writable_format
from lora_engine.quantization.packed_state import STATE, from_packed_state, to_packed_state

FORMATS = WRITABLE

# Values that PyTorch's operations encode or decode at a time: their float32 intermediates stay in
# a cache, and leave no holes between what is kept.
_VALUES_AT_A_TIME = 1 << 19
_WEIGHTS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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

    format: Format
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
        if out.numel() == 0:
            return out
        if isinstance(self.format, Blockwise4bit):
            dequantize_4bit_(out, self.tensors, self.format, first_row=start, impl=impl)
            return out
        format = cast(TorchFormat, self.format)
        packed = format.packed_rows(self.tensors, start, stop)
        if packed is None:
            _check_impl(self.format, impl)
        elif (chosen := _select(out, impl)) != "reference":
            _decode_by(chosen, packed, out)
            return out
        step = max(1, _VALUES_AT_A_TIME // cols)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            decoded = format.decode(self.tensors, self.shape, first, last)
            out[first - start : last - start].copy_(decoded)
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

    @property
    def is_finite(self) -> bool:
        """Whether no value is NaN or infinite. Waits for the device."""
        if isinstance(self.format, Blockwise4bit):
            return all(bool(tensor.isfinite().all()) for tensor in self.tensors.values())
        return cast(TorchFormat, self.format).is_finite(self.tensors)

    def to(self, device: str | torch.device) -> "QuantizedWeight":
        """The same weight on `device`; itself if it is there."""
        moved = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        if all(moved[name] is tensor for name, tensor in self.tensors.items()):
            return self
        return QuantizedWeight(
            format=self.format, tensors=moved, shape=self.shape, dtype=self.dtype
        )

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
        """Tensors for a safetensors file, by their keys there.

        NF4 and FP4 have the keys that bitsandbytes has for weight `name`; see
        `quantization.packed_state` for the others.
        """
        if isinstance(self.format, Blockwise4bit):
            entries = to_bitsandbytes(self.tensors, self.format, self.shape, self.dtype)
        else:
            entries = to_packed_state(self.tensors, self.format, self.shape, self.dtype)
        return {name + suffix: tensor for suffix, tensor in entries.items()}

    @staticmethod
    def from_state_dict(state: Mapping[str, Tensor], name: str) -> "QuantizedWeight":
        """The weight `name` out of a state dict with the keys of `state_dict`.

        Raises ValueError, with the weight's name, where entries are missing or do not fit.
        """
        entries = {
            key[len(name) :]: tensor
            for key, tensor in state.items()
            if key == name or key.startswith(f"{name}.")
        }
        try:
            if STATE not in entries:
                return QuantizedWeight(*from_bitsandbytes(entries))
            read = QuantizedWeight(*from_packed_state(entries))
            check(read.is_finite, "has values that are not finite")
            return read
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def quantize_weight(
    weight: Tensor,  # [N, K]
    format: str = "nf4",
    *,
    block: int | None = None,
    double_quant: bool = False,
    impl: str | None = None,
) -> QuantizedWeight:
    """`weight` in packed bits; it dequantises to the weight's dtype.

    format: one of FORMATS. fp8 has a scale for each row, fp8_tensor one, fp8_block one for each
        tile of 128 by 128; q4_0 and the like are GGUF's.
    block: so many consecutive values share a scale. nf4, fp4: 32, 64, … 4096, by default 64. int8:
        any number, by default a row. int4: any number, by default 128.
    double_quant: of nf4 and fp4: quantise the scales as well, which saves 0.37 bits a parameter
        with blocks of 64.

    Raises ValueError for another format or block, for a weight that is no matrix, of another dtype
    or not finite, and for columns that are no whole number of the format's blocks.
    """
    return put_in_format(weight, writable_format(format, block, double_quant), impl=impl)


def put_in_format(
    weight: Tensor,  # [N, K]
    format: Format,
    *,
    impl: str | None = None,
) -> QuantizedWeight:
    """`quantize_weight` for a format that is known, one that can be written."""
    if isinstance(format, Blockwise4bit):
        tensors = quantize_4bit(weight, format, impl=impl)
    else:
        _check_impl(format, impl)
        tensors = encode_weight(weight, format)
    return QuantizedWeight(
        format=format, tensors=tensors, shape=(weight.shape[0], weight.shape[1]), dtype=weight.dtype
    )


def encode_weight(weight: Tensor, format: Format) -> dict[str, Tensor]:
    """The tensors of `weight` [N, K] in a format that PyTorch's operations encode.

    Some rows at a time: intermediates stay small. Raises ValueError as `quantize_weight` does.
    """
    check(
        weight.dim() == 2 and weight.dtype in _WEIGHTS and weight.numel() > 0,
        f"{format.name}: the weight is {shape_of(weight)}, expected a matrix of float32, bfloat16, "
        "float16 or float64",
    )
    check(not weight.is_meta, f"{format.name}: the weight is on meta, which holds no numbers")
    rows, cols = weight.shape
    layout = format.layout((rows, cols))
    weight = weight.detach()
    largest = torch.stack(weight.aminmax()).abs().amax().float()
    check(
        bool(largest.isfinite()),
        f"{format.name}: the weight has values that are not finite in float32",
    )
    writable = cast(WritableFormat, format)
    tensors = {
        name: torch.empty(entry.shape, dtype=entry.dtype, device=weight.device)
        for name, entry in layout.items()
    }
    together = writable.rows_together
    step = max(1, _VALUES_AT_A_TIME // (cols * together)) * together
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        part = writable.encode(weight[start:stop].float().contiguous(), largest)
        for name, tensor in tensors.items():
            if tensor.shape == part[name].shape:  # all rows, or what they share
                tensor.copy_(part[name])
            else:
                first = start // together if tensor.shape[0] != rows else start
                tensor[first : first + part[name].shape[0]] = part[name]
    return tensors


def _select(out: Tensor, impl: str | None) -> str:
    """What decodes. Dtypes that it does not write go through float32."""
    return backends.select("packed_weight", out.device, torch.float32, impl)


def _decode_by(impl: str, packed: Scaled | Blocks, out: Tensor) -> None:
    """Writes rows of the weight into `out`, rounded once."""
    fits = out.dtype in backends.DTYPES.get(impl, ())
    place = out if fits else torch.empty_like(out, dtype=torch.float32)
    kernels = launchers.packed_weight(impl)
    if isinstance(packed, Scaled):
        kernels.decode_scaled(packed, place)
    else:
        kernels.decode_blocks(packed, place)
    if place is not out:
        out.copy_(place)
    else:
        torch.autograd.graph.increment_version(out)  # as an operation of torch's in place does


def _check_impl(format: Format, impl: str | None) -> None:
    check(
        impl in (None, "reference"),
        f"{format.name}: impl {impl!r}, expected reference: PyTorch's operations alone do it",
    )
