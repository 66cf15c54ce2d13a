"""What a run takes of memory, and the settings that fit.

Nothing is loaded: the model's configuration is read, and its modules are made without weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from lora_engine import backends
from lora_engine.app.config import RunConfig
from lora_engine.app.objectives import teacher_of
from lora_engine.distributed.world import ALONE, World, sharing_memory
from lora_engine.errors import UserError, nearest
from lora_engine.memory.plan import (
    CANDIDATES,
    TILED,
    Budget,
    Candidate,
    best,
    budget_of,
    candidates,
)
from lora_engine.memory.policy import Place, policy_of
from lora_engine.memory.sizes import ModelSizes, Storing, sizes_of
from lora_engine.memory.speed import GPUS, Machine, gpu_of, measured_cpu
from lora_engine.memory.timeline import Load, Moment, timeline
from lora_engine.models.load.load import resolve_device, resolve_dtype
from lora_engine.models.load.outline import outline
from lora_engine.models.quantized.quantize import SKIPPED
from lora_engine.quantization.formats import writable_format
from lora_engine.text import parsed_bytes
from lora_engine.training.trainable import trained_names

# Tokens of a sequence where the configuration sets no limit.
USUAL_LENGTH = 2048
SAMPLES_AT_ONCE = 8  # evaluation.samples.BATCH_SIZE

# What may be changed where nothing else fits, from the least to the most of a change.
_SAVINGS = (
    {"optimizer": "adamw_8bit"},
    {"quantize": "nf4"},
    {"optimizer": "adamw_8bit", "quantize": "nf4"},
)


@dataclass(frozen=True)
class Plan:
    """wanted: what is configured. found: each policy. chosen: the best of them; None: none fits.

    modelled: whether the machine is not this one. savings: changes of settings with which the
    wanted tokens fit, each with its candidate; of a plan that has no fitting policy.
    """

    sizes: ModelSizes
    wanted: Load
    budget: Budget
    machine: Machine
    modelled: bool
    found: Sequence[Candidate]
    chosen: Candidate | None
    savings: Sequence[tuple[dict[str, str], Candidate]] = ()

    @property
    def moments(self) -> list[Moment]:
        """Of the run as it is configured."""
        return timeline(self.sizes, self.wanted)


def plan(
    config: RunConfig,
    *,
    gpu: str | None = None,
    budget: str | None = None,
    world: World = ALONE,
) -> Plan:
    """The plan of a run.

    gpu: bytes of memory ("24GB") or a name of `memory.speed.GPUS`, of a GPU that need not be here.
    budget: bytes that may be used ("16GB"), of the device of the configuration, or of that GPU;
    None: all of it. world: of processes that hold the whole model each, of which the plan is for
    one. Raises UserError for what cannot be planned.
    """
    machine = None if gpu is None else _gpu(gpu)
    if machine is not None:
        device = torch.device("cuda")
        dtype = resolve_dtype(
            "bfloat16" if config.model.dtype == "auto" else config.model.dtype, device
        )
    else:
        device = resolve_device(config.model.device)
        dtype = resolve_dtype(config.model.dtype, device)
    memory = machine.memory if machine is not None else backends.memory(device).nbytes
    nbytes = memory if budget is None else _size("--budget", budget)
    nbytes //= sharing_memory(world, device)
    if machine is None:
        machine = gpu_of(memory) if backends.has_own_memory(device) else measured_cpu(dtype)
    limits = budget_of(nbytes, device, backends.resident_bytes())
    sizes, wanted = model_sizes(config, dtype), load_of(config, device)
    length = min(config.data.max_length or USUAL_LENGTH, wanted.rows)
    ways = _ways(config, device)
    found = candidates(sizes, wanted, limits, machine, length, *ways)
    chosen = best(found)
    savings = (
        []
        if any(each.fits for each in found)
        else _savings(config, dtype, wanted, limits, machine, length, ways)
    )
    return Plan(
        sizes=sizes,
        wanted=wanted,
        budget=limits,
        machine=machine,
        modelled=backends.has_own_memory(device),
        found=found,
        chosen=chosen,
        savings=savings,
    )


def model_sizes(config: RunConfig, dtype: torch.dtype) -> ModelSizes:
    """The sizes of the configured model with its adapters and, of a distillation, its teacher."""
    stated = config.model
    of = outline(stated.path, dtype, keep_quantized=stated.keep_quantized)
    format = None
    if stated.quantize is not None:
        format = writable_format(stated.quantize, None, stated.double_quant)
    skip = SKIPPED if stated.quantize_skip is None else stated.quantize_skip
    patterns = config.train.trainable
    names = None if patterns is None else trained_names(of.model, patterns)
    merge_aware = config.lora is not None and config.lora.merge_aware
    storing = Storing(format, skip, merge_aware)
    sizes = sizes_of(of.model, config.lora, dtype, storing, names)
    weights = dict(sizes.weights)
    if of.packed_bytes:
        others = sum(size for part, size in weights.items() if part not in ("linears", "factors"))
        weights["linears"] = max(0, of.packed_bytes - others)
        sizes = replace(sizes, packed=True)
    if teacher := teacher_of(config.objective):
        taught = outline(teacher, dtype).model
        weights["teacher"] = sum(p.numel() * p.element_size() for p in taught.parameters())
    return replace(sizes, weights=weights)


def load_of(config: RunConfig, device: torch.device) -> Load:
    """The largest micro-batch of the configuration, all of its tokens supervised."""
    train = config.train
    rows = train.tokens_per_batch
    length = config.data.max_length or USUAL_LENGTH
    if config.writes:
        rollout = config.rollout
        cached = rollout.prompts * (length + rollout.generations * rollout.max_new_tokens)
    else:
        count = min(config.samples.count, SAMPLES_AT_ONCE)
        cached = count * (length + config.samples.max_new_tokens)
    policy = policy_of(train.checkpointing or "none")
    return Load(
        *(rows, rows, policy, train.optimizer, device, cached),
        layerwise_update=train.layerwise_update,
        masters=train.rounding is None,
        offload=train.offload_activations,
        host_states=train.offload_optimizer is not None,
    )


class _Ways(NamedTuple):
    """What to choose from."""

    policies: Sequence[str]
    places: Sequence[Place | None]
    host_states: Sequence[bool]


def _ways(config: RunConfig, device: torch.device) -> _Ways:
    """What is configured alone, where it is."""
    train, own_memory = config.train, backends.has_own_memory(device)
    policies: Sequence[str] = (*CANDIDATES, *TILED)
    if train.checkpointing is not None:
        policies = (train.checkpointing,)
    elif not config.accelerate:
        policies = tuple(p for p in policies if not policy_of(p).needs_fused_layers)
    places: Sequence[Place | None] = (None, "host", "disk") if own_memory else (None, "disk")
    if train.offload_activations is not None:
        places = (train.offload_activations,)
    stays = train.optimizer == "adafactor" or not own_memory
    states = (False,) if stays else (False, True)
    if train.offload_optimizer is not None:
        states = (True,)
    return _Ways(policies, places, states)


def way_of(candidate: Candidate) -> str:
    """A candidate's settings, for people."""
    parts = [candidate.policy]
    if candidate.load.offload is not None:
        parts.append("on disk" if candidate.load.offload == "disk" else "on the host")
    if candidate.load.host_states:
        parts.append("states on the host")
    return ", ".join(parts)


def _savings(
    config: RunConfig,
    dtype: torch.dtype,
    wanted: Load,
    limits: Budget,
    machine: Machine,
    length: int,
    ways: _Ways,
) -> list[tuple[dict[str, str], Candidate]]:
    found = []
    for changes in _SAVINGS:
        if "quantize" in changes and (config.lora is None or config.model.quantize is not None):
            continue
        model = config.model.model_copy(
            update={k: v for k, v in changes.items() if k == "quantize"}
        )
        changed = config.model_copy(update={"model": model})
        load = replace(wanted, optimizer=changes.get("optimizer", wanted.optimizer))
        sizes = model_sizes(changed, dtype)
        each = best(candidates(sizes, load, limits, machine, length, *ways))
        if each is not None and each.fits:
            found.append((dict(changes), each))
    return found


def _gpu(text: str) -> Machine:
    if text.lower() in GPUS:
        return GPUS[text.lower()]
    try:
        nbytes = parsed_bytes(text)
    except ValueError as error:
        close = nearest(text.lower(), GPUS)
        hint = f"; did you mean {close}?" if close else f", or one of {', '.join(GPUS)}"
        raise UserError(f"--gpu {text!r}: write its memory, as 24GB{hint}") from error
    return gpu_of(nbytes)._replace(memory=nbytes)


def _size(key: str, text: str) -> int:
    try:
        return parsed_bytes(text)
    except ValueError as error:
        raise UserError(f"{key}: {error}") from error


def settings(made: Plan) -> dict[str, Any]:
    """The keys to set, by their names in the configuration; {} where nothing fits."""
    chosen = made.chosen
    if chosen is None:
        return {}
    keys = keys_of(chosen)
    if not chosen.fits:
        keys["train.tokens_per_batch"] = chosen.most_rows
    return keys


def keys_of(candidate: Candidate) -> dict[str, Any]:
    """The settings of a candidate by their names."""
    keys: dict[str, Any] = {"train.checkpointing": candidate.policy}
    if candidate.load.offload is not None:
        keys["train.offload_activations"] = candidate.load.offload
    if candidate.load.host_states:
        keys["train.offload_optimizer"] = "host"
    return keys
