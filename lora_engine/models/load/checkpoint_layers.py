"""Linears that a checkpoint keeps in packed bits, by the names their makers give the tensors.

A reader takes one linear's tensors, `Parts`, by what follows the linear's name in their keys, and
gives its weight without changing a code. Which one reads is decided by `quantization_config` in
config.json; the formats of this library and bitsandbytes' 4 bits describe themselves.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lora_engine.ops import QuantizedWeight
from lora_engine.quantization.format import Format
from lora_engine.quantization.fp8 import Fp8
from lora_engine.quantization.int4_group import Int4Group
from lora_engine.quantization.int8 import Int8
from lora_engine.quantization.mxfp4 import Mxfp4
from lora_engine.quantization.nvfp4 import Nvfp4
from lora_engine.quantization.packed_state import STATE


class Parts(NamedTuple):
    """A linear's tensors in a checkpoint.

    name: the linear's. shape: (N, K). dtype: what its weight is to decode to. names: what follows
    the linear's name in its tensors' keys. read: gives the tensor of such a name.
    """

    name: str
    shape: tuple[int, int]
    dtype: torch.dtype
    names: frozenset[str]
    read: Callable[[str], Tensor]

    def get(self, name: str) -> Tensor:
        """The tensor. Raises ValueError where there is none."""
        if name not in self.names:
            raise ValueError(f"{self.name}.{name} is missing")
        return self.read(name)

    def weight(self, format: Format, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        """The weight, of tensors that may be no more than views.

        Raises ValueError where they do not fit, or have values that are not finite.
        """
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        weight = QuantizedWeight(format=format, tensors=whole, shape=self.shape, dtype=self.dtype)
        if not weight.is_finite:
            raise ValueError("has values that are not finite")
        return weight


Reader: TypeAlias = Callable[[Parts, Mapping[str, Any]], QuantizedWeight]


def is_packed(names: frozenset[str], dtype: torch.dtype | None) -> bool:
    """Whether a linear with tensors of such names is kept in packed bits.

    dtype: of the tensor `weight`, None where there is none.
    """
    if dtype is None:
        return bool(names - {"bias"})
    return not dtype.is_floating_point or dtype.itemsize == 1


def reader_of(config: Mapping[str, Any]) -> Reader:
    """What reads the linears of a checkpoint with this `quantization_config`; {} for none.

    Raises ValueError for a method that is not known.
    """
    method = config.get("quant_method", "")
    if hasattr(method, "value"):  # an enumeration of transformers
        method = method.value
    if method not in _READERS:
        known = ", ".join(name for name in _READERS if name)
        raise ValueError(f"quant_method {method!r} is unknown; known are {known}")
    reader = _READERS[method]

    def read(parts: Parts, config: Mapping[str, Any]) -> QuantizedWeight:
        own = any(f"weight{s}" in parts.names for s in (STATE, *_BITSANDBYTES))
        return _self_described(parts) if own else reader(parts, config)

    return read


_BITSANDBYTES = (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")


def _self_described(parts: Parts) -> QuantizedWeight:
    state = {name: parts.read(name) for name in parts.names if name.split(".")[0] == "weight"}
    weight = QuantizedWeight.from_state_dict(state, "weight")
    if weight.shape != parts.shape:
        raise ValueError(f"is {list(weight.shape)}, expected {list(parts.shape)}")
    return replace(weight, dtype=parts.dtype)


def _bitsandbytes(parts: Parts, config: Mapping[str, Any]) -> QuantizedWeight:
    if "SCB" not in parts.names and "weight.absmax" in parts.names:
        raise ValueError(f"{parts.name}.weight{_BITSANDBYTES[0]} is missing")
    scale = parts.get("SCB").view(-1, 1)
    return parts.weight(Int8(absmax=True), {"codes": parts.get("weight"), "scale": scale})


def _bytes_of(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The bits of a tensor of one-byte numbers. Raises ValueError for one of another dtype."""
    if tensor.dtype not in (dtype, torch.uint8):
        raise ValueError(f"{name} is {tensor.dtype}, expected {dtype}")
    return tensor.view(torch.uint8)


def _fp8(parts: Parts, config: Mapping[str, Any]) -> QuantizedWeight:
    """DeepSeek's and transformers' FP8: weight_scale_inv, one for each tile or for the weight."""
    scale = parts.get("weight_scale_inv")
    tile = config.get("weight_block_size")
    rows, cols = (0, 0) if tile is None or scale.numel() == 1 else tuple(tile)
    return _fp8_of(parts, scale, rows, cols)


def _fp8_of(parts: Parts, scale: Tensor, rows: int, cols: int) -> QuantizedWeight:
    scale = _float_scale(scale)
    format = Fp8(rows, cols, _name(scale))
    if scale.numel() == 1 or scale.dim() == 1:
        scale = scale.view(format.layout(parts.shape)["scale"].shape)
    codes = _bytes_of(parts.get("weight"), torch.float8_e4m3fn, "weight")
    return parts.weight(format, {"codes": codes, "scale": scale})


def _float_scale(scale: Tensor) -> Tensor:
    """Scales as floats of 16 or 32 bits; those of exponents alone (e8m0) as float32."""
    return scale.float() if scale.dtype.itemsize == 1 else scale


def _name(scale: Tensor) -> str:
    return str(scale.dtype).removeprefix("torch.")


def _compressed_tensors(parts: Parts, config: Mapping[str, Any]) -> QuantizedWeight:
    arguments = _group_arguments(parts.name, config)
    if "weight_packed" not in parts.names:
        return _compressed_bytes(parts, arguments)
    packed, scale = parts.get("weight_packed"), parts.get("weight_scale")
    if packed.dtype == torch.uint8:
        if "weight_global_scale" not in parts.names:
            return parts.weight(Mxfp4(), {"codes": packed, "scale": scale.view(torch.uint8)})
        tensors = {
            "codes": packed,
            "scale": _bytes_of(scale, torch.float8_e4m3fn, "weight_scale"),
            "global_scale": parts.get("weight_global_scale").float().view(()),
        }
        return parts.weight(Nvfp4(), tensors)
    group = arguments.get("group_size") or 0
    symmetric = arguments.get("symmetric", True)
    ordered = "weight_g_idx" in parts.names
    bits = arguments.get("num_bits", 4)
    format = Int4Group(
        packing="compressed",
        group=max(group, 0),
        zeros=not symmetric,
        ordered=ordered,
        scales=_name(scale),
        bits=bits,
    )
    tensors = {"codes": packed, "scale": scale}
    if not symmetric:
        tensors["zero"] = parts.get("weight_zero_point")
    if ordered:
        tensors["group_of"] = parts.get("weight_g_idx").int()
    return parts.weight(format, tensors)


def _compressed_bytes(parts: Parts, arguments: Mapping[str, Any]) -> QuantizedWeight:
    """Weights of whole bytes: INT8 and FP8."""
    weight, scale = parts.get("weight"), parts.get("weight_scale")
    strategy = arguments.get("strategy")
    if weight.dtype != torch.int8:
        tile = arguments.get("block_structure") if strategy == "block" else None
        rows, cols = tuple(tile) if tile else (0 if scale.numel() == 1 else 1, 0)
        return _fp8_of(parts, scale, rows, cols)
    if not arguments.get("symmetric", True):
        raise ValueError("is of 8-bit integers with zero points, which are not read")
    group = arguments.get("group_size") or 0 if strategy == "group" else 0
    if scale.numel() == 1:
        scale = scale.view(1, 1).expand(parts.shape[0], 1)
    elif scale.dim() == 1:
        scale = scale.view(-1, 1)
    return parts.weight(Int8(group, scales=_name(scale)), {"codes": weight, "scale": scale})


def _group_arguments(name: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments of the group of linears that `name` is in."""
    groups = list((config.get("config_groups") or {}).values())
    for exact in (True, False):  # a target that names a linear goes before one of a class
        for group in groups:
            for target in group.get("targets") or ():
                if _is_target(name, target) if exact else target == "Linear":
                    arguments: Mapping[str, Any] = group.get("weights") or {}
                    return arguments
    raise ValueError("is packed, but no group in config_groups has it as a target")


def _is_target(name: str, target: str) -> bool:
    if target.startswith("re:"):
        return re.match(target[3:], name) is not None
    return name == target or name.endswith(f".{target}")


def _gptq(parts: Parts, config: Mapping[str, Any]) -> QuantizedWeight:
    bits, group = config.get("bits", 4), max(config.get("group_size") or 0, 0)
    packing = "gptq_v2" if config.get("checkpoint_format") == "gptq_v2" else "gptq"
    scale = parts.get("scales")
    tensors = {"codes": parts.get("qweight"), "scale": scale, "zero": parts.get("qzeros")}
    ordered = False
    if "g_idx" in parts.names:
        of = parts.get("g_idx").int()
        size = group or parts.shape[1]
        if of.shape != (parts.shape[1],) or not 0 <= int(of.min()) <= int(of.max()) < len(scale):
            raise ValueError(f"{parts.name}.g_idx does not name a group for each column")
        ordered = not torch.equal(of, torch.arange(len(of), dtype=torch.int32) // size)
        tensors["group_of"] = of
    return parts.weight(
        Int4Group(
            packing=packing,
            group=group,
            zeros=True,
            ordered=ordered,
            scales=_name(scale),
            bits=bits,
        ),
        tensors,
    )


def _awq(parts: Parts, config: Mapping[str, Any]) -> QuantizedWeight:
    version = str(config.get("version", "gemm")).lower()
    if version != "gemm":
        raise ValueError(f"is of AWQ's version {version}; only gemm is read")
    group = max(config.get("group_size", config.get("q_group_size")) or 0, 0)
    scale = parts.get("scales")
    tensors = {"codes": parts.get("qweight"), "scale": scale, "zero": parts.get("qzeros")}
    bits = config.get("bits", config.get("w_bit", 4))
    return parts.weight(
        Int4Group(
            packing="awq", group=group, zeros=True, ordered=False, scales=_name(scale), bits=bits
        ),
        tensors,
    )


def _modelopt(parts: Parts, config: Mapping[str, Any]) -> QuantizedWeight:
    """NVIDIA's ModelOpt: FP8 with one scale, or NVFP4 with weight_scale_2."""
    if "weight_scale_2" not in parts.names:
        return _fp8_of(parts, parts.get("weight_scale"), 0, 0)
    tensors = {
        "codes": parts.get("weight"),
        "scale": _bytes_of(parts.get("weight_scale"), torch.float8_e4m3fn, "weight_scale"),
        "global_scale": parts.get("weight_scale_2").float().view(()),
    }
    return parts.weight(Nvfp4(divides=False), tensors)


def _unstated(parts: Parts, config: Mapping[str, Any]) -> QuantizedWeight:
    raise ValueError("is packed, but config.json has no quantization_config that says how")


_READERS: dict[str, Reader] = {
    "": _unstated,
    "lora_engine": _unstated,
    "bitsandbytes": _bitsandbytes,
    "fp8": _fp8,
    "compressed-tensors": _compressed_tensors,
    "gptq": _gptq,
    "awq": _awq,
    "modelopt": _modelopt,
}
