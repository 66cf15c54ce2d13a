"""Every format by its name: what can be written, and what a file says of the others."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import cast, get_args

from lora_engine.errors import nearest
from lora_engine.quantization import gguf, int4_group
from lora_engine.quantization.blockwise_4bit import Blockwise4bit, Code
from lora_engine.quantization.format import Format
from lora_engine.quantization.fp8 import TILE, Fp8
from lora_engine.quantization.gguf import Gguf
from lora_engine.quantization.int4_group import Int4Group
from lora_engine.quantization.int8 import Int8
from lora_engine.quantization.mxfp4 import Mxfp4
from lora_engine.quantization.nvfp4 import Nvfp4

# Of blocks of a size that the user may choose: the size, or None for the format's own.
_SIZED: dict[str, Callable[[int | None], Format]] = {
    "int8": lambda block: Int8(0 if block is None else block),
    "int4": lambda block: Int4Group(group=int4_group.GROUP if block is None else block),
}
_FIXED: dict[str, Callable[[], Format]] = {
    "fp8": Fp8,
    "fp8_tensor": lambda: Fp8(0, 0),
    "fp8_block": lambda: Fp8(TILE, TILE),
    "mxfp4": Mxfp4,
    "nvfp4": Nvfp4,
    **{name: partial(Gguf, name) for name, of in gguf.TYPES.items() if of.encode},
}
# What `quantize_weight` writes.
WRITABLE: tuple[str, ...] = (*get_args(Code), *_SIZED, *_FIXED)
# The names that a weight's format may have.
NAMES: tuple[str, ...] = (
    *get_args(Code),
    *("int8", "fp8", "mxfp4", "nvfp4", "int4", "int8_packed"),
    *gguf.TYPES,
)

# What files call the classes; a class's fields are its options.
_CLASSES: dict[str, type] = {
    "int8": Int8,
    "fp8": Fp8,
    "mxfp4": Mxfp4,
    "nvfp4": Nvfp4,
    "int4_group": Int4Group,
    "gguf": Gguf,
}
_KINDS = {cls: kind for kind, cls in _CLASSES.items()}


def writable_format(name: str, block: int | None, double_quant: bool) -> Format:
    """The format `name`, one of WRITABLE.

    Raises ValueError for another name, and for a block or double quantisation that it has not.
    """
    if name not in WRITABLE:
        close = nearest(str(name), WRITABLE)
        hint = f"did you mean {close}?" if close else f"expected one of {', '.join(WRITABLE)}"
        raise ValueError(f"format {name!r}: {hint}")
    if name in get_args(Code):
        return Blockwise4bit(cast(Code, name), 64 if block is None else block, double_quant)
    if double_quant:
        raise ValueError(f"{name}: double_quant is of nf4 and fp4 alone; leave it out")
    if name in _SIZED:
        return _SIZED[name](block)
    if block is not None:
        raise ValueError(f"{name}: the size of its blocks is fixed; leave block out")
    return _FIXED[name]()


def format_to_json(format: Format) -> dict[str, object]:
    """`format` as a file's JSON holds it."""
    kind = _KINDS[type(format)]
    return {"kind": kind, **dataclasses.asdict(format)}  # type: ignore[call-overload]


def format_from_json(content: Mapping[str, object]) -> Format:
    """The format that `format_to_json` was given. Raises ValueError for what it never writes."""
    options = dict(content)
    cls = _CLASSES.get(str(options.pop("kind", None)))
    if cls is None:
        raise ValueError(f"format {content.get('kind')!r} is unknown")
    fields = {field.name: field.type for field in dataclasses.fields(cls)}
    for name, value in options.items():
        if name not in fields or type(value) is not fields[name]:
            raise ValueError(
                f"format {content['kind']}: its option {name} is unknown or of another type"
            )
    made: Format = cls(**options)
    return made
