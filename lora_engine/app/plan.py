"""What a run takes of memory, and the settings that fit: `lora-engine plan`, `train.memory`.

Nothing is loaded: the model's configuration is read, and its modules are made without weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lora_engine import backends
from lora_engine.app.config import RunConfig
from lora_engine.app.objectives import ONLINE, name_of, teacher_of
from lora_engine.distributed.world import World
from lora_engine.errors import UserError, nearest
from lora_engine.memory.plan import (
    CANDIDATES,
    ROWS,
    TILED,
    Budget,
    Candidate,
    best,
    budget_of,
    candidates,
    worth_showing,
)
from lora_engine.memory.policy import Place, policy_of
from lora_engine.memory.sizes import ModelSizes, Storing, sizes_of
from lora_engine.memory.speed import GPUS, Machine, gpu_of, measured_cpu
from lora_engine.memory.timeline import Load, Moment, peak, timeline, with_rows
from lora_engine.models.load.load import resolve_device, resolve_dtype
from lora_engine.models.load.outline import outline
from lora_engine.models.quantized.quantize import SKIPPED
from lora_engine.quantization.formats import writable_format
from lora_engine.text import bytes_text, parsed_bytes
from lora_engine.training.trainable import trained_names

if TYPE_CHECKING:
    from rich.console import RenderableType

# Tokens of a sequence where the configuration sets no limit.
USUAL_LENGTH = 2048
_MOST_PARTS = 5
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


def plan(config: RunConfig, *, gpu: str | None = None, budget: str | None = None) -> Plan:
    """The plan of a run.

    gpu: bytes of memory ("24GB") or a name of `memory.speed.GPUS`, of a GPU that need not be here.
    budget: bytes that may be used ("16GB"), of the device of the configuration, or of that GPU;
    None: all of it. Raises UserError for what cannot be planned.
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
        sizes, wanted, limits, machine, backends.has_own_memory(device), found, chosen, savings
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
    sizes = sizes_of(of.model, config.lora, dtype, Storing(format, skip), names)
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
    if name_of(config.objective) in ONLINE:
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


def with_memory(
    config: RunConfig, begun: RunConfig | None, world: World, tell: Callable[[str], None]
) -> RunConfig:
    """`config` with the policy, and where that is not enough the micro-batches, that fit
    `train.memory`.

    begun: of a run that is resumed; its micro-batches remain. tell: takes a line of what was
    chosen. Raises UserError where nothing fits.
    """
    train = config.train
    if world.size > 1:
        raise UserError(
            "train.memory: fits one process; with several set train.checkpointing instead, as "
            "lora-engine plan finds it"
        )
    if begun is not None:
        kept = ("tokens_per_batch", "gradient_accumulation_steps")
        train = train.model_copy(update={key: getattr(begun.train, key) for key in kept})
        config = config.model_copy(update={"train": train})
    made = plan(config, budget=None if train.memory == "auto" else train.memory)
    chosen = made.chosen
    divides = begun is None and not train.layerwise_update  # into smaller micro-batches
    if chosen is None or not (chosen.fits or divides):
        hints = [line for line in conclusion(made) if " fit with other numbers: " in line]
        raise UserError(
            f"train.memory {train.memory}: {_least(made)} "
            + (hints[0] if hints else "Take a smaller model, lora.r or train.tokens_per_batch.")
        )
    update: dict[str, Any] = {
        "checkpointing": chosen.policy,
        "offload_activations": chosen.load.offload,
        "offload_optimizer": "host" if chosen.load.host_states else None,
    }
    line = f"memory: checkpointing {way_of(chosen)}"
    if not chosen.fits:
        parts = -(-train.tokens_per_batch // chosen.most_rows)
        rows = min(chosen.most_rows, -(-train.tokens_per_batch // parts // ROWS) * ROWS)
        update["tokens_per_batch"] = rows
        update["gradient_accumulation_steps"] = parts * train.gradient_accumulation_steps
        line += f", {parts} micro-batches of {rows:,} tokens for one of {train.tokens_per_batch:,}"
    tell(f"{line}, for {bytes_text(made.budget.nbytes)}")
    return config.model_copy(update={"train": train.model_copy(update=update)})


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


def as_json(made: Plan) -> dict[str, Any]:
    """The plan as plain values."""
    chosen = made.chosen
    return {
        "device": made.wanted.device.type,
        "machine": made.machine.name,
        "modelled": made.modelled,
        "budget_bytes": made.budget.nbytes,
        "reserved_bytes": made.budget.reserved,
        "tokens_per_batch": made.wanted.rows,
        "moments": [
            {"moment": m.name, "bytes": m.total, "parts": dict(m.parts)} for m in made.moments
        ],
        "policies": [
            {
                "checkpointing": each.policy,
                "offload_activations": each.load.offload,
                "offload_optimizer": "host" if each.load.host_states else None,
                "peak_bytes": each.highest.total,
                "at": each.highest.name,
                "fits": each.fits,
                "largest_tokens_per_batch": each.most_rows,
                "tokens_per_second": round(each.tokens_per_second, 1),
            }
            for each in made.found
        ],
        "chosen": None if chosen is None else way_of(chosen),
        "settings": settings(made),
    }


def settings(made: Plan) -> dict[str, Any]:
    """The keys to set, by their names in the configuration; {} where nothing fits."""
    chosen = made.chosen
    if chosen is None:
        return {}
    keys = _keys(chosen)
    if not chosen.fits:
        keys["train.tokens_per_batch"] = chosen.most_rows
    return keys


def _keys(candidate: Candidate) -> dict[str, Any]:
    """The settings of a candidate by their names."""
    keys: dict[str, Any] = {"train.checkpointing": candidate.policy}
    if candidate.load.offload is not None:
        keys["train.offload_activations"] = candidate.load.offload
    if candidate.load.host_states:
        keys["train.offload_optimizer"] = "host"
    return keys


def render(made: Plan, name: str) -> "RenderableType":
    """The plan for people."""
    from rich.console import Group
    from rich.text import Text

    budget, wanted = made.budget, made.wanted
    where = f"{made.machine.name}, modelled" if made.modelled else made.machine.name
    head = (
        f"{name}: {wanted.rows:,} tokens a micro-batch, {wanted.optimizer}, on {where}; "
        f"{bytes_text(budget.nbytes)} of memory, {bytes_text(budget.reserved)} of it "
        + (
            "for the driver and what the allocator loses"
            if made.modelled
            else "for this program and its libraries"
        )
    )
    return Group(
        Text(head),
        Text(""),
        _moments_table(made),
        Text(""),
        _policies_table(made),
        Text(""),
        *map(Text, conclusion(made)),
    )


def _moments_table(made: Plan) -> "RenderableType":
    """When how many bytes are alive, of the run as it is configured, and what most of them are."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("when", no_wrap=True)
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("of which")
    highest = peak(made.moments)
    for moment in _shown_moments(made.moments):
        parts = sorted(moment.parts.items(), key=lambda part: -part[1])
        shown = ", ".join(f"{name} {bytes_text(size)}" for name, size in parts[:_MOST_PARTS])
        style = "bold" if moment == highest else ""
        table.add_row(moment.name, bytes_text(moment.total), shown, style=style)
    return table


def _shown_moments(moments: Sequence[Moment]) -> list[Moment]:
    """Of the layers' backward passes the highest alone."""
    layers = [moment for moment in moments if moment.name.startswith("layer ")]
    highest = peak(layers)
    return [moment for moment in moments if moment not in layers or moment is highest]


def _policies_table(made: Plan) -> "RenderableType":
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("checkpointing")
    for title in ("peak", "fits", "longest batch", "tokens/s"):
        table.add_column(title, justify="right")
    plain = sum(not (e.load.offload or e.load.host_states) for e in made.found)
    for each in worth_showing(made.found, plain):
        mark = " ←" if each is made.chosen else ""
        rate = f"{each.tokens_per_second:,.0f}" if each.most_rows else ""
        if each.most_rows and not each.fits:
            rate += f" at {each.most_rows:,}"
        table.add_row(
            way_of(each),
            bytes_text(each.highest.total),
            "yes" if each.fits else "no",
            f"{each.most_rows:,} tokens" if each.most_rows else "none",
            rate + mark,
            style="bold" if each is made.chosen else "",
        )
    return table


def conclusion(made: Plan) -> list[str]:
    """What to do, a line each."""
    chosen = made.chosen
    lines = []
    if chosen is None:
        lines.append(_least(made))
    elif chosen.fits:
        lines.append(f"Best: {_assigned(settings(made))}")
    else:
        lines.append(
            f"{made.wanted.rows:,} tokens a micro-batch fit under no policy. "
            f"Best: {_assigned(settings(made))} (and more train.gradient_accumulation_steps)"
        )
    for changes, each in made.savings:
        keys = {
            ("model.quantize" if k == "quantize" else f"train.{k}"): v for k, v in changes.items()
        }
        keys |= _keys(each)
        lines.append(f"{made.wanted.rows:,} tokens fit with other numbers: {_assigned(keys)}")
    lines.append(
        "A batch's longest sequence may be all of it. Tokens/s are predicted, not measured."
    )
    if made.modelled:
        lines.append("All figures are modelled: no such GPU was asked.")
    return lines


def _least(made: Plan) -> str:
    """Where not even the fewest tokens fit: what the weights, and these with them, take."""
    weights = made.moments[0].parts["weights"]
    least = min(peak(timeline(made.sizes, with_rows(each.load, ROWS))).total for each in made.found)
    return (
        f"Nothing fits: {ROWS} tokens take {bytes_text(least)}, {bytes_text(weights)} of it "
        f"weights, and {bytes_text(made.budget.usable)} are left for them."
    )


def _assigned(keys: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in keys.items())
