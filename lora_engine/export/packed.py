"""Weights in packed bits: taken out of a base for a merge, and merged weights put into them."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_engine.errors import UserError
from lora_engine.export.merge import merge_folder
from lora_engine.export.shards import SINGLE, Planned, Shards, write_shard
from lora_engine.export.weights import config_sections, read_config
from lora_engine.models.load.load import load_model
from lora_engine.models.load.streamed import streamed_model
from lora_engine.models.load.transformers_files import quiet_transformers, readable_folder
from lora_engine.models.quantized.linear import QuantizedLinear
from lora_engine.ops.tensors import row_ranges

_BESIDE = ("*.json", "*.jinja", "*.txt", "*.model")


@dataclass(frozen=True)
class Packing:
    """The packed bits that a model's linears are put in: `load_model`'s quantize, double_quant and
    quantize_skip."""

    format: str
    double_quant: bool = False
    skip: str | Sequence[str] | None = None

    def is_in(self, format: str, double_quant: bool) -> bool:
        """Whether these are the bits, whatever is skipped."""
        return (self.format, self.double_quant) == (format, double_quant)

    def options(self) -> dict[str, Any]:
        """As `load_model` takes them."""
        return {
            "quantize": self.format,
            "double_quant": self.double_quant,
            "quantize_skip": self.skip,
        }


@dataclass(frozen=True)
class Packed:
    """What `pack_folder` wrote. linears: how many are packed. bits: of a packed parameter, with its
    scales. error, error_max: |packed - merged| / |merged| of a linear's weight, by the root mean
    square: over all of them, and of the worst."""

    format: str
    linears: int
    bits: float
    error: float
    error_max: float


@contextmanager
def dense_folder(
    base: Path,
    beside: Path,
    packing: Packing | None = None,
    dtype: torch.dtype | None = None,
) -> Iterator[Path]:
    """The model in `base`; where it is in packed bits, or `packing` puts it there, what they decode
    to; where `dtype` is given, its weights rounded to that.

    That is a folder in `beside`, gone at the end, with each weight in the dtype of the model.
    Raises UserError for packed weights that cannot be read.
    """
    packed = bool(read_config(base).get("quantization_config"))
    if packing is None and not packed and (dtype is None or _is_in(base, dtype)):
        yield base
        return
    folder = beside / "unpacked"
    folder.mkdir()
    try:
        if packing is None and not packed:
            merge_folder(base, [], folder, dtype)
            yield folder
            return
        model = _streamed(base, _dtype(base)) if packing is None else _put(base, packing)
        _unpack(model, base, folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def pack_folder(dense: Path, target: Path, packing: Packing) -> Packed:
    """The model in `dense` with its linears in packed bits, as `lora_engine.load_model` reads it.

    Written into `target`, which holds no model. NF4 and FP4 have bitsandbytes' keys, which
    transformers reads too. Memory holds the packed model and two of its tensors. Raises UserError
    as `lora_engine.quantize_model`.
    """
    model = _put(dense, packing)
    packed = _packed_linears(model)
    weights, off, size, worst = Shards(dense), 0.0, 0.0, 0.0
    for name, linear in packed:
        if f"{name}.weight" not in weights:  # kept under another name, or as a part of a tensor
            continue
        a, b = _squares(linear, weights.tensor(f"{name}.weight"))
        off, size = off + a, size + b
        worst = max(worst, (a / b) ** 0.5 if b else 0.0)
    with quiet_transformers():
        model.save_pretrained(target)
    bits = sum(8 * linear.quantized.nbytes for _, linear in packed)
    count = sum(linear.in_features * linear.out_features for _, linear in packed)
    error = (off / size) ** 0.5 if size else 0.0
    return Packed(
        format=packing.format,
        linears=len(packed),
        bits=bits / max(1, count),
        error=error,
        error_max=worst,
    )


def load_packed(folder: Path) -> Any:
    """The model in `folder`, whose linears are packed, computing in float32; evaluation mode."""
    return _streamed(folder, torch.float32).eval()


def _put(dense: Path, packing: Packing) -> Any:
    """The model in `dense` with its linears in packed bits, in memory."""
    return load_model(dense, dtype=_dtype(dense), device="cpu", **packing.options())[0]


def _unpack(model: Any, base: Path, folder: Path) -> None:
    """Writes what the packed `model` of the folder `base` decodes to."""
    planned = [_planned(name, tensor) for name, tensor in _tensors(model)]
    write_shard(folder / SINGLE, planned)
    for pattern in _BESIDE:
        for path in base.glob(pattern):
            if not path.name.endswith(".index.json"):
                shutil.copyfile(path, folder / path.name)
    del model.config.quantization_config
    model.config.save_pretrained(folder)


def _streamed(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoConfig

    with readable_folder(str(folder), str(folder)), quiet_transformers():
        config = AutoConfig.from_pretrained(folder)
    model = streamed_model(str(folder), folder, config, dtype, torch.device("cpu"))
    if model is None:
        raise UserError(
            f"{folder}: its packed weights cannot be read one by one; give the model of 16 bits "
            "that it was made from with --base"
        )
    return model


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor | QuantizedLinear]]:
    """What a file of the unpacked model holds, each tensor once."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        is_packed = isinstance(module, QuantizedLinear)
        own = dict(module.named_parameters(recurse=False))
        passing = module._non_persistent_buffers_set
        own |= {n: b for n, b in module.named_buffers(recurse=False) if n not in passing}
        for name, tensor in own.items():
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            full = f"{prefix}.{name}" if prefix else name
            yield full, module if is_packed and name == "weight" else tensor.detach()


def _planned(name: str, held: Tensor | QuantizedLinear) -> Planned:
    if isinstance(held, Tensor):
        return Planned(name=name, dtype=held.dtype, shape=tuple(held.shape), pieces=lambda: [held])
    weight = held.quantized

    def pieces() -> Iterator[Tensor]:
        for start, stop in row_ranges(weight.shape):
            yield weight.rows(start, stop)

    return Planned(name=name, dtype=weight.dtype, shape=tuple(weight.shape), pieces=pieces)


def _squares(linear: QuantizedLinear, exact: Tensor) -> tuple[float, float]:
    """Sums of squares: of what a packed weight is off from `exact`, and of `exact`."""
    off = size = 0.0
    for start, stop in row_ranges(tuple(exact.shape)):
        wanted = exact[start:stop].float()
        off += (
            (linear.quantized.rows(start, stop).float() - wanted)
            .square()
            .sum(dtype=torch.float64)
            .item()
        )
        size += wanted.square().sum(dtype=torch.float64).item()
    return off, size


def _packed_linears(model: nn.Module) -> list[tuple[str, QuantizedLinear]]:
    return [(n, m) for n, m in model.named_modules() if isinstance(m, QuantizedLinear)]


def _is_in(folder: Path, dtype: torch.dtype) -> bool:
    """Whether rounding to `dtype` changes nothing that the model's files hold."""
    shards = Shards(folder)
    kept = {shards.dtype(name) for name in shards.names()}
    return all(one == dtype for one in kept if one.is_floating_point)


def _dtype(folder: Path) -> torch.dtype:
    """The dtype that a model's configuration states; bfloat16 where it states none."""
    for section in config_sections(read_config(folder)):
        name = section.get("dtype") or section.get("torch_dtype")
        dtype = getattr(torch, str(name).removeprefix("torch."), None) if name else None
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
            return dtype
    return torch.bfloat16
