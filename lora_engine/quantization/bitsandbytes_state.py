"""4-bit weights under the names that bitsandbytes' state dicts have for them."""

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from lora_engine.quantization.blockwise_4bit import Blockwise4bit, code_values
from lora_engine.quantization.nested_absmax import NESTED_BLOCK

_STATE = "quant_state.bitsandbytes__"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def to_bitsandbytes(
    tensors: Mapping[str, Tensor],
    format: Blockwise4bit,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """The entries of a state dict, by what follows the weight's name in their keys.

    "" is the weight itself, [ceil(P / 2), 1] uint8. Others: absmax, quant_map, with double
    quantisation nested_absmax and nested_quant_map, and as UTF-8 JSON the rest. `tensors` are those
    of `format.layout`. Raises ValueError for a dtype that bitsandbytes does not know.
    """
    if dtype not in _NAMES:
        raise ValueError(f"bitsandbytes keeps no weights of {dtype}")
    absmax = tensors["absmax"]
    rest: dict[str, object] = {
        "quant_type": format.code,
        "blocksize": format.block,
        "dtype": _NAMES[dtype],
        "shape": list(shape),
    }
    entries = {
        "": tensors["codes"].view(-1, 1),
        ".absmax": absmax,
        ".quant_map": code_values(format.code, absmax.device),
    }
    if format.nested:
        entries[".nested_absmax"] = tensors["nested_absmax"]
        # Weights share this one, and safetensors writes no tensor that is another's memory too.
        entries[".nested_quant_map"] = tensors["nested_code"].clone()
        rest["nested_blocksize"] = NESTED_BLOCK
        rest["nested_dtype"] = "float32"
        rest["nested_offset"] = tensors["offset"].item()
    packed = json.dumps(rest).encode()
    state = torch.tensor(list(packed), dtype=torch.uint8, device=absmax.device)
    return {**entries, f".{_STATE}{format.code}": state}


def from_bitsandbytes(
    entries: Mapping[str, Tensor],
) -> tuple[Blockwise4bit, dict[str, Tensor], tuple[int, int], torch.dtype]:
    """Format, tensors, shape and dtype of a weight, as `to_bitsandbytes` was given them.

    `entries` are the state dict's, by what follows the weight's name in their keys.

    Raises ValueError where an entry is missing, says what this format cannot mean, or is not
    finite.
    """
    states = [key for key in entries if key.startswith(f".{_STATE}")]
    if len(states) != 1:
        raise ValueError(f"expected one entry .{_STATE}nf4 or .{_STATE}fp4, found {len(states)}")
    rest = _json(entries[states[0]], states[0])
    nested = "nested_offset" in rest or ".nested_absmax" in entries
    code, block, shape = rest.get("quant_type"), rest.get("blocksize"), rest.get("shape")
    dtype = _DTYPES.get(str(rest.get("dtype")))
    if code not in ("nf4", "fp4") or not isinstance(block, int) or dtype is None:
        raise ValueError(f"{states[0]}: quant_type, blocksize or dtype is missing or unknown")
    if (
        not isinstance(shape, list)
        or len(shape) != 2
        or not all(type(x) is int and x > 0 for x in shape)
    ):
        raise ValueError(f"{states[0]}: the shape {shape} is no matrix's")
    format = Blockwise4bit("nf4" if code == "nf4" else "fp4", block, nested)
    needed = ["", ".absmax", ".quant_map"]
    for name in [*needed, ".nested_absmax", ".nested_quant_map"] if nested else needed:
        if name not in entries:
            raise ValueError(f"the entry {name or 'of the weight itself'} is missing")
    values = code_values(format.code, torch.device("cpu"))
    if entries[".quant_map"].tolist() != values.tolist():
        raise ValueError(f".quant_map: these are not the values of {code}")
    tensors = {"codes": entries[""].reshape(-1).view(torch.uint8), "absmax": entries[".absmax"]}
    if nested:
        if rest.get("nested_blocksize") != NESTED_BLOCK:
            raise ValueError(f"{states[0]}: nested_blocksize is not {NESTED_BLOCK}")
        offset = rest.get("nested_offset")
        if type(offset) not in (int, float):
            raise ValueError(f"{states[0]}: nested_offset is missing")
        device = entries[".absmax"].device
        tensors["nested_absmax"] = entries[".nested_absmax"]
        tensors["nested_code"] = entries[".nested_quant_map"]
        tensors["offset"] = torch.tensor(offset, dtype=torch.float32, device=device)
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} has values that are not finite")
    return format, tensors, (shape[0], shape[1]), dtype


def _json(packed: Tensor, name: str) -> dict[str, object]:
    try:
        rest = json.loads(bytes(packed.tolist()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: is no JSON") from error
    if not isinstance(rest, dict):
        raise ValueError(f"{name}: is no JSON object")
    return rest
