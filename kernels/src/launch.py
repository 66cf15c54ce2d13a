"""Launch parameters: a table shipped with the package, no tuning while a model trains.

launch_table.json holds, for each kernel, entries for a compute capability ("90", or "*" for any)
and a dtype ("bfloat16", or "*"): a list of [largest size, parameters], the sizes rising, null for
no limit. What "size" is, each kernel's launcher says. Parameters are the kernel's block sizes and
Triton's own num_warps and num_stages.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

TABLE = Path(__file__).with_name("launch_table.json")
Table = dict[str, dict[str, dict[str, list[tuple[int | None, dict[str, int]]]]]]


@cache
def table() -> Table:
    """The whole table."""
    loaded: Table = json.loads(TABLE.read_text())
    return loaded


@cache
def capability(device: torch.device) -> str:
    """`"90"` for a Hopper GPU, and "*" where there is none."""
    if device.type != "cuda":
        return "*"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}{minor}"


def config(kernel: str, device: torch.device, dtype: torch.dtype, size: int) -> dict[str, Any]:
    """The launch parameters of `kernel`, as keyword arguments of its launch."""
    return parameters(kernel, capability(device), str(dtype).removeprefix("torch."), size)


@cache
def parameters(kernel: str, capability: str, dtype: str, size: int) -> dict[str, Any]:
    """`config` by names."""
    line = entry(kernel, capability, dtype, size)
    lines = dict(table()[kernel][line.capability][line.dtype])
    return {"enable_fp_fusion": True, **lines[line.limit]}


class Entry(NamedTuple):
    """A line of the table, by the names it stands under."""

    kernel: str
    capability: str
    dtype: str
    limit: int | None


@cache
def entry(kernel: str, capability: str, dtype: str, size: int) -> Entry:
    """The line that `parameters` takes: for this capability and dtype before those for any."""
    entries = table()[kernel]
    capability = capability if capability in entries else "*"
    dtype = dtype if dtype in entries[capability] else "*"
    for limit, _ in entries[capability][dtype]:
        if limit is None or size <= limit:
            return Entry(kernel, capability, dtype, limit)
    raise ValueError(f"{kernel}: no launch parameters for size {size}")


def vector(dtype: torch.dtype, *extents: int) -> int:
    """How many elements 16 bytes hold, where every extent is a multiple of it; else 1.

    Triton knows that an argument is a multiple of 16, not of 8: rows with eight spare columns would
    be read element by element. Kernels take extents divided by this, and multiply by the constant.
    """
    elements = 16 // dtype.itemsize
    return elements if all(extent % elements == 0 for extent in extents) else 1
