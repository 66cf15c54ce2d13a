"""Whether a run's largest micro-batches fit the memory, tried before its first step."""

import gc
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Final, Literal, cast

import torch
from torch import nn

from lora_engine import backends
from lora_engine.data.batch import PackedBatch
from lora_engine.distributed.world import ALONE, World, sharing_memory
from lora_engine.errors import UserError, is_out_of_memory
from lora_engine.evaluation.batch_loss import target_scores
from lora_engine.evaluation.modes import inference
from lora_engine.memory.checkpointing import can_follow, checkpointing
from lora_engine.memory.offload import ActivationStore
from lora_engine.memory.plan import CANDIDATES, budget_of
from lora_engine.objectives.base import Objective
from lora_engine.text import bytes_text, parsed_bytes
from lora_engine.training.config import TrainConfig

logger = logging.getLogger(__name__)

# What a try came to that has no peak.
_NO_MEMORY: Final = "no memory"
_NOT_FOLLOWED: Final = "not followed"


def fitting_policy(
    model: nn.Module,
    config: TrainConfig,
    try_out: Callable[[PackedBatch], None],
    largest: PackedBatch,
    largest_heldout: PackedBatch | None,
    objective: Objective,
    offloading: Callable[[], AbstractContextManager[ActivationStore | None]],
    world: World = ALONE,
) -> str:
    """The first policy from config.checkpointing on, to those that keep less, that fits.

    try_out: runs both passes of a micro-batch, as a step would, and leaves no trace. largest,
    largest_heldout: the run's largest micro-batches; the second is measured as held-out data are.
    offloading: gives the store that the run will have. world: all its processes try each policy,
    and take the same one.
    Fits: what was taken is within config.memory (on a CPU the process's resident size, and the
    process's part of the memory). Raises UserError where none does, in all processes, and where
    they share weights or tokens.
    """
    if world.in_step:
        raise UserError(
            "train.memory: is for processes that hold the whole model each; with model.shard or "
            "train.sequence_parallel set train.checkpointing instead"
        )
    device = next(model.parameters()).device
    assert config.memory is not None
    nbytes = (
        backends.memory(device).nbytes if config.memory == "auto" else parsed_bytes(config.memory)
    )
    own = nbytes // sharing_memory(world, device)
    usable = budget_of(own, device, process=None).usable
    taken = ""
    for policy in _policies(model, first_policy(model, config) or "none"):
        found: str | int
        try:
            found = _peak(
                model, policy, try_out, largest, largest_heldout, objective, offloading, device
            )
        except UserError:  # attention cannot be kept by itself
            if policy == config.checkpointing or policy != "selective":
                raise
            found = _NOT_FOLLOWED
        of_all = world.gather(found)
        if _NOT_FOLLOWED in of_all:
            continue
        if _NO_MEMORY in of_all:
            taken = f"more than there is with checkpointing {policy}"
            continue
        peak = max(cast("list[int]", of_all))
        if peak <= usable:
            _tell(policy, largest, peak)
            return policy
        taken = f"{bytes_text(peak)} with checkpointing {policy}"
    raise UserError(
        f"train.memory {config.memory}: a step on the largest batch, of {largest.num_rows:,} "
        f"tokens, takes {taken}, and {bytes_text(usable)} may be used; lower "
        "train.tokens_per_batch or data.max_length, or set model.quantize or "
        "train.optimizer=adamw_8bit"
    )


def _peak(
    model: nn.Module,
    policy: str,
    try_out: Callable[[PackedBatch], None],
    largest: PackedBatch,
    largest_heldout: PackedBatch | None,
    objective: Objective,
    offloading: Callable[[], AbstractContextManager[ActivationStore | None]],
    device: torch.device,
) -> int | Literal["no memory"]:
    """The most bytes that the batches take under the policy."""
    gc.collect()  # what a failed try left behind its traceback
    backends.release_freed_memory(device)
    backends.reset_peak_memory(device)
    try:
        with offloading() as store, checkpointing(model, policy, store):
            try_out(largest)
        if largest_heldout is not None:
            with inference(model):
                target_scores(model, largest_heldout.to(device), objective)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return _NO_MEMORY
    return backends.peak_memory_bytes(device)


def first_policy(model: nn.Module, config: TrainConfig) -> str | None:
    """config.checkpointing; where it was chosen for config.memory, and the model's layers cannot be
    taken apart, as without the engine's kernels, "layer"."""
    policy = config.checkpointing
    if config.memory is None or policy is None or can_follow(model, policy):
        return policy
    return "layer"


def _policies(model: nn.Module, first: str) -> list[str]:
    """`first`, and of CANDIDATES those that keep less and that the model's layers can follow."""
    if first.startswith("tiled_"):
        return [first]
    begin = "every_4" if first.startswith("every_") and first not in CANDIDATES else first
    less = CANDIDATES[CANDIDATES.index(begin) + 1 :]
    return [first, *(policy for policy in less if can_follow(model, policy))]


def _tell(policy: str, batch: PackedBatch, peak: int) -> None:
    logger.info(
        "the largest batch, of %s tokens, takes %s with checkpointing %s",
        f"{batch.num_rows:,}",
        bytes_text(peak),
        policy,
    )
