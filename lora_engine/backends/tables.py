"""The shipped tables that choices are made by, and how a line of each is found.

lora_strategy.json: rules for the wide products of a LoRA group, the first that fits decides. A
rule's `when` may name device ("cpu", "cuda"), format, dropout, augmentable, dtypes (a
list) and ranges [least, most] of capability, m, n, k and r, null for no bound; what it leaves out
fits anything.
The rules' figures are to be made anew from `benchmarks` on each kind of GPU.

launch_table.json, beside the Triton kernels: for each kernel, entries for a compute capability
("90", or "*" for any; "None" for Triton's interpreter, which is fastest with few and large blocks)
and a dtype ("bfloat16", or "*"): a list of [largest size, parameters], the sizes rising, null for
no limit. What "size" is, each kernel's launcher says. Parameters are the kernel's block sizes and
Triton's own num_warps and num_stages.
"""

import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import NamedTuple, TypedDict

LaunchTable = dict[str, dict[str, dict[str, list[tuple[int | None, dict[str, int]]]]]]


class Rule(TypedDict):
    """A rule of lora_strategy.json."""

    when: dict[str, object]
    strategy: str
    reason: str


@cache
def product_rules() -> list[Rule]:
    """lora_strategy.json."""
    text = resources.files("lora_engine.backends").joinpath("lora_strategy.json").read_text()
    rules: list[Rule] = json.loads(text)["rules"]
    return rules


def find_rule(values: Mapping[str, object], dtype: str) -> Rule | None:
    """The first rule that fits `values`, by the names of a rule's `when`, and `dtype`."""
    return next((rule for rule in product_rules() if _fits(rule["when"], values, dtype)), None)


def _fits(when: Mapping[str, object], values: Mapping[str, object], dtype: str) -> bool:
    for name, wanted in when.items():
        if not isinstance(wanted, list):
            if values[name] != wanted:
                return False
        elif name == "dtypes":
            if dtype not in wanted:
                return False
        else:
            value, (least, most) = values[name], wanted
            if not isinstance(value, int) or value < (least or 0):
                return False
            if most is not None and value > most:
                return False
    return True


@cache
def launch_table() -> LaunchTable:
    """launch_table.json."""
    text = resources.files("lora_engine.backends.triton").joinpath("launch_table.json").read_text()
    table: LaunchTable = json.loads(text)
    return table


class LaunchKey(NamedTuple):
    """A line of the launch table, by the names it stands under."""

    kernel: str
    capability: str
    dtype: str
    limit: int | None


def launch_key(kernel: str, capability: int | None, dtype: str, size: int) -> LaunchKey:
    """The line for a launch: for this capability and dtype before those for any.

    Raises ValueError for a kernel without lines, and a size that none of its lines fits.
    """
    entries = launch_table().get(kernel)
    if entries is None:
        raise ValueError(f"{kernel}: launch_table.json has no such kernel")
    of_capability = str(capability) if str(capability) in entries else "*"
    of_dtype = dtype if dtype in entries[of_capability] else "*"
    for limit, _ in entries[of_capability][of_dtype]:
        if limit is None or size <= limit:
            return LaunchKey(kernel=kernel, capability=of_capability, dtype=of_dtype, limit=limit)
    raise ValueError(f"{kernel}: no launch parameters for size {size}")


def launch_parameters(key: LaunchKey) -> dict[str, int]:
    """A line's parameters, as keyword arguments of the launch."""
    lines = dict(launch_table()[key.kernel][key.capability][key.dtype])
    return {"enable_fp_fusion": True, **lines[key.limit]}
