"""Which way a LoRA group's wide products are taken, from a table that measurements refresh.

augmented    one product of the vendor library over [X | S] (in the backward pass [dY | dS]) and
             the buffer W̃; see ops/lora_linear.py
two_segment  our kernel: one accumulator over two stretches of the inner dimension, the second
             masked where there is dropout
base_add     the base product, then each linear's share masked and added
"""

import json
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch

from lora_engine import backends

TABLE = Path(__file__).with_name("lora_strategy.json")
STRATEGIES = ("augmented", "two_segment", "base_add")


@dataclass(frozen=True)
class Strategy:
    """What is done, and why."""

    name: str
    reason: str


@cache
def table() -> list[dict[str, Any]]:
    """The shipped rules, the first that fits decides.

    A rule's `when` may name device ("cpu", "cuda"), dropout, aligned, dtypes (a list) and ranges
    [least, most] of capability, m, n, k and r, null for no bound; what it leaves out fits anything.
    The rules' figures are to be made anew from `benchmarks` on each kind of GPU.
    """
    rules: list[dict[str, Any]] = json.loads(TABLE.read_text())["rules"]
    return rules


def choose_strategy(
    *,
    device_type: str,
    capability: int | None,
    dtype: torch.dtype,
    m: int,
    n: int,
    k: int,
    r: int,
    dropout: bool,
    aligned: bool,
) -> Strategy:
    """The strategy for Y [m, n] = X [m, k] Wᵀ with r adapter columns, or for dX of the same kind.

    `capability` is 90 for a Hopper GPU, None without a GPU. `dropout`: the product itself is
    masked: that of dX with p > 0. The forward product never is, since there only S changes.
    `aligned`: rows of the operands start at multiples of 16 bytes.

    Raises ValueError for a device that no rule fits.
    """
    values = {"capability": capability, "m": m, "n": n, "k": k, "r": r}
    flags = {"device": device_type, "dropout": dropout, "aligned": aligned}
    for rule in table():
        if _fits(rule["when"], flags, values, str(dtype).removeprefix("torch.")):
            return Strategy(rule["strategy"], rule["reason"])
    raise ValueError(f"lora_strategy: no rule fits a {device_type} device")


@lru_cache(4096)
def strategy_of(
    device: torch.device, dtype: torch.dtype, m: int, n: int, k: int, r: int, masked: bool
) -> str:
    """`choose_strategy` by name for W̃, whose rows are aligned, and operands made to go with it."""
    capability = None
    if device.type == "cuda":
        major, minor = backends.capability(device)
        capability = 10 * major + minor
    return choose_strategy(
        device_type=device.type,
        capability=capability,
        dtype=dtype,
        m=m,
        n=n,
        k=k,
        r=r,
        dropout=masked,
        aligned=True,
    ).name


def _fits(
    when: dict[str, Any], flags: dict[str, Any], values: dict[str, int | None], dtype: str
) -> bool:
    for name, wanted in when.items():
        if name == "dtypes":
            if dtype not in wanted:
                return False
        elif name in flags:
            if flags[name] != wanted:
                return False
        else:
            value = values[name]
            least, most = wanted
            if value is None or value < (least or 0) or (most is not None and value > most):
                return False
    return True
