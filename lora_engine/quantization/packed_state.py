"""Weights of any format but NF4 and FP4 in a state dict.

The weight's own name has the codes, `.NAME` another tensor of the format's layout, and
`.quant_state.lora_engine`, UTF-8 JSON in bytes, the format, the shape and the dtype it decodes to.
"""

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from lora_engine.quantization.format import Format
from lora_engine.quantization.formats import format_from_json, format_to_json

STATE = ".quant_state.lora_engine"
_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def to_packed_state(
    tensors: Mapping[str, Tensor], format: Format, shape: tuple[int, int], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The entries of a state dict, by what follows the weight's name in their keys.

    Raises ValueError for a dtype that no weight decodes to.
    """
    if dtype not in _NAMES:
        raise ValueError(f"a state dict keeps no packed weights of {dtype}")
    content = {"format": format_to_json(format), "shape": list(shape), "dtype": _NAMES[dtype]}
    packed = torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)
    named = {"" if name == "codes" else f".{name}": tensor for name, tensor in tensors.items()}
    return {**named, STATE: packed.to(tensors["codes"].device)}


def from_packed_state(
    entries: Mapping[str, Tensor],
) -> tuple[Format, dict[str, Tensor], tuple[int, int], torch.dtype]:
    """Format, tensors, shape and dtype of a weight, as `to_packed_state` was given them.

    Raises ValueError where an entry is missing or says what no format means.
    """
    try:
        content = json.loads(bytes(entries[STATE].tolist()))
        format = format_from_json(content["format"])
        shape, dtype = content["shape"], _DTYPES[content["dtype"]]
    except (TypeError, KeyError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{STATE}: does not say what the weight is") from error
    if (
        not isinstance(shape, list)
        or len(shape) != 2
        or not all(type(x) is int and x > 0 for x in shape)
    ):
        raise ValueError(f"{STATE}: the shape {shape} is no matrix's")
    size = (shape[0], shape[1])
    tensors = {}
    for name in format.layout(size):
        key = "" if name == "codes" else f".{name}"
        if key not in entries:
            raise ValueError(f"the entry {key or 'of the weight itself'} is missing")
        tensors[name] = entries[key]
    return format, tensors, size, dtype
