"""Which settings fit a budget of bytes, and which of them trains the fastest."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

import torch

from lora_engine import backends
from lora_engine.memory.policy import Place, policy_of
from lora_engine.memory.sizes import ModelSizes
from lora_engine.memory.speed import Machine, tokens_per_second
from lora_engine.memory.timeline import Load, Moment, peak, timeline, with_rows

# From the quickest to the one that takes the least memory, by the work they repeat.
CANDIDATES = ("none", "every_4", "every_3", "every_2", "selective", "half", "layer")
TILED = ("tiled_4096", "tiled_1024")  # the same to rounding only
MOST_ROWS = 1 << 24
ROWS = 64  # tokens_per_batch is proposed in these

# Of a GPU's memory: what the driver and torch's context take, and what its allocator loses.
GPU_CONTEXT_BYTES = 600 * 2**20
GPU_FRAGMENTATION = 0.05
# Of a computer's, beside tensors and what the process had before: oneDNN's scratch and compiled
# products, the C library's unused parts, libraries and data. 190 to 280 MB were measured.
CPU_OVERHEAD_BYTES = 300 * 2**20


class Budget(NamedTuple):
    """nbytes: of the device. reserved: of these, what no tensor gets."""

    nbytes: int
    reserved: int

    @property
    def usable(self) -> int:
        """For tensors."""
        return max(0, self.nbytes - self.reserved)


def budget_of(nbytes: int, device: torch.device, process: int | None) -> Budget:
    """A device's bytes less what is not tensors'.

    process: what the process takes on a CPU before there is a model; None: nbytes are compared
        with what it took in all.
    """
    if backends.has_own_memory(device):
        return Budget(nbytes, GPU_CONTEXT_BYTES + int(GPU_FRAGMENTATION * nbytes))
    if process is None:
        return Budget(nbytes, 0)
    return Budget(nbytes, process + CPU_OVERHEAD_BYTES)


@dataclass(frozen=True)
class Candidate:
    """A way to train. load: at the wanted tokens of a micro-batch, or the most that fit.

    highest: its moment with the most bytes. most_rows: the most tokens of a micro-batch that fit; 0
    if none do. fits: whether the wanted ones do. tokens_per_second: predicted, of `load`.
    """

    policy: str
    load: Load
    highest: Moment
    most_rows: int
    fits: bool
    tokens_per_second: float


def candidates(
    sizes: ModelSizes,
    wanted: Load,
    budget: Budget,
    machine: Machine,
    length: int,
    policies: Sequence[str] = CANDIDATES,
    places: Sequence[Place | None] = (None,),
    host_states: Sequence[bool] = (False,),
) -> list[Candidate]:
    """Each way to train with the wanted tokens a micro-batch, and with the most that fit.

    length: tokens of a sequence. places, host_states: of `Load.offload` and `Load.host_states`.
    """
    made = []
    for on_host, place, name in product(host_states, places, policies):
        policy = policy_of(name)
        if policy.needs_fused_layers and not sizes.fused:
            continue
        if place is not None and not policy.every:
            continue
        load = replace(wanted, policy=policy, offload=place, host_states=on_host)
        highest = peak(timeline(sizes, load))
        fits = highest.total <= budget.usable
        most = max(most_rows(sizes, load, budget), load.rows if fits else 0)
        shown = load if fits or not most else with_rows(load, most)
        rate = tokens_per_second(sizes, shown, machine, length)
        made.append(
            Candidate(
                policy=name,
                load=shown,
                highest=highest,
                most_rows=most,
                fits=fits,
                tokens_per_second=rate,
            )
        )
    return made


def best(found: Sequence[Candidate]) -> Candidate | None:
    """The quickest of those that fit the wanted tokens; else of those that fit any; else None."""
    fitting = [each for each in found if each.fits] or [each for each in found if each.most_rows]
    return max(fitting, key=lambda each: each.tokens_per_second, default=None)


def worth_showing(found: Sequence[Candidate], plain: int) -> list[Candidate]:
    """The first `plain`, and of the others that fit (all, where none fits) those that no candidate
    beats in memory without being slower, nor in speed without taking more."""
    fit = [each for each in found if each.fits] or list(found)
    beaten = [each for each in fit if any(_beats(other, each) for other in fit)]
    return [*found[:plain], *(e for e in found[plain:] if e in fit and e not in beaten)]


def _beats(other: Candidate, each: Candidate) -> bool:
    saved = each.highest.total - other.highest.total
    faster = other.tokens_per_second - each.tokens_per_second
    return min(saved, faster) >= 0 and max(saved, faster) > 0


def most_rows(sizes: ModelSizes, load: Load, budget: Budget) -> int:
    """The most tokens of a micro-batch, in steps of ROWS, whose peak is within the budget; 0: none.

    The longest sequence has as many: attention's memory is linear in tokens, however they divide.
    """

    def fits(count: int) -> bool:
        return peak(timeline(sizes, with_rows(load, count * ROWS))).total <= budget.usable

    low, high = 0, 1
    while high * ROWS < MOST_ROWS and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * ROWS
