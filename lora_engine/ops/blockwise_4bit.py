"""NF4 and FP4: weights as codes of four bits with a scale for each block of values.

A dtype that an implementation does not take goes through float32, in which codes are found and
values are rounded in any case.
"""

import math
from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from lora_engine import backends, reference
from lora_engine.backends import launchers
from lora_engine.ops.tensors import check, shape_of
from lora_engine.quantization.blockwise_4bit import (
    Blockwise4bit,
    Code,
    ascending_codes,
    code_bounds,
    code_values,
)
from lora_engine.quantization.format import BlockScales
from lora_engine.quantization.nested_absmax import (
    dequantize_absmax,
    nested_code,
    quantize_absmax,
)

_WEIGHTS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def quantize_4bit(
    w: Tensor,  # [N, K] float32, bfloat16, float16 or float64
    format: Blockwise4bit,
    *,
    impl: str | None = None,
) -> dict[str, Tensor]:
    """w as the tensors of `format.layout`, each value as the code that is nearest to w / absmax.

    With `format.nested` the absmax are quantised in PyTorch: they are few. Raises ValueError where
    w is no matrix, has another dtype, is empty or on meta, or has values that are not finite in
    float32, or whose scales have no mean in it.
    """
    check(
        w.dim() == 2 and w.dtype in _WEIGHTS and w.numel() > 0,
        f"quantize_4bit: the weight is {shape_of(w)}, expected a matrix of float32, bfloat16, "
        "float16 or float64",
    )
    check(not w.is_meta, "quantize_4bit: the weight is on meta, which holds no numbers")
    w = w.detach().contiguous()
    impl = _select(w, impl)
    w = w if w.dtype in _dtypes(impl) else w.float()
    if impl == "reference":
        codes, absmax = reference.quantize_4bit(w, code=format.code, block=format.block)
    else:
        layout = Blockwise4bit(format.code, format.block).layout((w.shape[0], w.shape[1]))
        codes, absmax = (
            torch.empty(entry.shape, dtype=entry.dtype, device=w.device)
            for entry in (layout["codes"], layout["absmax"])
        )
        launchers.blockwise_4bit(impl).quantize_4bit(
            w,
            _bounds(format.code, w.device),
            _ascending(format.code, w.device),
            codes,
            absmax,
            format.block,
        )
    check(
        bool(absmax.isfinite().all()),
        "quantize_4bit: the weight has values that are not finite in float32",
    )
    if not format.nested:
        return {"codes": codes, "absmax": absmax}
    absmax_codes, nested_absmax, offset = quantize_absmax(absmax)
    check(bool(offset.isfinite()), "quantize_4bit: the mean of the scales is not finite in float32")
    return {
        "codes": codes,
        "absmax": absmax_codes,
        "nested_absmax": nested_absmax,
        "nested_code": _nested_code(w.device),
        "offset": offset,
    }


def dequantize_4bit_(
    out: Tensor,  # [rows, K]; columns are one apart
    tensors: Mapping[str, Tensor],
    format: Blockwise4bit,
    *,
    first_row: int = 0,
    impl: str | None = None,
) -> None:
    """Writes rows of the weight, from `first_row` on, into `out`, rounded once to its dtype.

    `tensors` are those of `format.layout` for the whole weight, [N, K]. All implementations give
    the same bits. Raises ValueError where rows are asked for that the weight does not have.
    """
    rows, cols = out.shape
    layout = format.layout((first_row + rows, cols))
    for name, (shape, dtype) in layout.items():
        tensor = tensors.get(name)
        fits = tensor is not None and tensor.dtype == dtype and tensor.numel() >= math.prod(shape)
        if first_row < 0 or not fits:  # the message is made where it is needed: see check
            raise ValueError(
                f"dequantize_4bit_: rows {first_row} to {first_row + rows} of {cols} values do "
                f"not lie within {name} {'(missing)' if tensor is None else shape_of(tensor)}"
            )
    scales = BlockScales(*(tensors[name] for name in layout if name != "codes"))
    impl = _select(out, impl)
    if impl == "reference":
        absmax = scales.absmax
        if scales.nested_absmax is not None:
            absmax = dequantize_absmax(*scales)  # type: ignore[arg-type]
        values = reference.dequantize_4bit(
            tensors["codes"],
            absmax,
            first=first_row * cols,
            count=rows * cols,
            code=format.code,
            block=format.block,
        )
        out.copy_(values.view(rows, cols))
        return
    place = out if out.dtype in _dtypes(impl) else torch.empty_like(out, dtype=torch.float32)
    launchers.blockwise_4bit(impl).dequantize_4bit(
        tensors["codes"],
        scales,
        _values(format.code, out.device),
        place,
        first_row * cols,
        format.block,
    )
    if place is not out:
        out.copy_(place)
    else:
        torch.autograd.graph.increment_version(out)  # as an operation of torch's in place does


def _select(w: Tensor, impl: str | None) -> str:
    """What runs. Every implementation takes float32; other dtypes go through it where they must."""
    return backends.select("blockwise_4bit", w.device, torch.float32, impl)


def _dtypes(impl: str) -> tuple[torch.dtype, ...]:
    return backends.DTYPES.get(impl, ())


# Tables are copied to a device once: the host waits for the device where it copies.


@cache
def _values(code: Code, device: torch.device) -> Tensor:
    return code_values(code, device)


@cache
def _bounds(code: Code, device: torch.device) -> Tensor:
    return code_bounds(code, device)


@cache
def _ascending(code: Code, device: torch.device) -> Tensor:
    return ascending_codes(code, device)


@cache
def _nested_code(device: torch.device) -> Tensor:
    return nested_code().to(device)
