"""What the processes of one run share: its settings have to let them, and they measure together."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import cast

from torch import nn

from lora_engine.data.batch import PackedBatch
from lora_engine.distributed.world import World
from lora_engine.errors import UserError
from lora_engine.evaluation.heldout import HeldoutResult, Sums, measure, result_of
from lora_engine.models.attach.head import transformers_model
from lora_engine.models.attach.packed import can_share_prefixes
from lora_engine.models.peft.routing import active_adapters
from lora_engine.models.sharded.shard import is_sharded
from lora_engine.objectives.answers import has_weight
from lora_engine.objectives.base import NATS_PER_TARGET, Objective, Reads
from lora_engine.training.batches import BatchSource
from lora_engine.training.config import TrainConfig
from lora_engine.training.signals import check_together, interrupting


def check_share(world: World, config: TrainConfig, *, writes: bool) -> None:
    """Raises UserError for a run that the processes cannot share.

    writes: the run writes its own completions.
    """
    if world.size == 1:
        return
    if writes:
        raise UserError(
            f"{world.size} processes: a run that writes its own completions trains in one process; "
            "start it without torchrun or --nproc"
        )
    if config.layerwise_update:
        raise UserError(
            f"{world.size} processes: train.layerwise_update has no gradients that processes could "
            "add up; start it without torchrun or --nproc"
        )
    accumulated = config.gradient_accumulation_steps
    if accumulated < world.size and not config.sequence_parallel:
        raise UserError(
            f"gradient_accumulation_steps={accumulated}: a step has too few micro-batches for "
            f"{world.size} processes, which share them; set train.gradient_accumulation_steps to "
            f"{world.size} or a multiple of it (and tokens_per_batch lower for steps of one size)"
        )


def in_step(
    world: World, model: nn.Module, objective: Objective, config: TrainConfig, origin: bool
) -> World:
    """`world` as it is for the model: in step where processes share its weights, or tokens.

    origin: whether it is said what the model was made from. Raises UserError for what cannot be
    trained so.
    """
    if config.sequence_parallel and world.size > 1:
        _check_heads(world, model)
        world = replace(world, in_step=True, shares_tokens=True)
    if not is_sharded(model) or world.size == 1:
        return world
    if objective.reads.mismatched:
        raise UserError(
            f"objective {objective.name} compares with answers to other prompts, which processes "
            "that share a model's weights do not do in step; leave model.shard out"
        )
    if not origin:
        raise UserError(
            "Trainer: the model's weights are in several processes and cannot be told from "
            "another model's; give origin={'weights': a hash of the model's files}"
        )
    return replace(world, in_step=True)


def check_shared_tokens(world: World, model: nn.Module, objective: Objective) -> None:
    """Raises UserError where processes cannot share the tokens of what is minimised."""
    if not world.shares_tokens:
        return
    what = "train.sequence_parallel"
    if objective.unit != NATS_PER_TARGET or objective.reads != Reads():
        raise UserError(
            f"{what}: is for supervised fine-tuning without weights, whose loss is a sum over "
            f"tokens, not {objective.name}; leave it out"
        )
    if len(active_adapters(model)) > 1:
        raise UserError(f"{what}: trains one adapter; leave it out to train several")
    if not can_share_prefixes(model, training=True):
        raise UserError(
            f"{what}: needs lora_engine's attention in every layer, and no dropout; accelerate the "
            "model and set lora.dropout=0"
        )


def _check_heads(world: World, model: nn.Module) -> None:
    config = transformers_model(model).config
    heads: int = getattr(config, "num_attention_heads", 1)
    of_keys: int = getattr(config, "num_key_value_heads", None) or heads
    if heads % world.size or of_keys % world.size:
        raise UserError(
            f"train.sequence_parallel: {world.size} processes cannot share the model's {heads} "
            f"attention heads, {of_keys} of keys and values; take a number of processes that "
            "divides both"
        )


def measured_together(
    model: nn.Module,
    source: BatchSource,
    objective: Objective,
    check: Callable[[], None],
    world: World,
) -> Callable[[int], HeldoutResult]:
    """What measures the first epoch of `source` with the weights of a step, each process a share.

    check: called before each batch; Interrupted that it raises in one process is so in all.
    """

    def batches(numbers: Sequence[int]) -> Iterator[PackedBatch]:
        for number in numbers:
            if interrupting(check) is not None and not world.in_step:
                return  # what was measured is thrown away
            yield source.batch(0, number)

    def of_step(step: int) -> HeldoutResult:
        every = range(source.num_batches(0))
        if not world.in_step:
            own = measure(model, batches(every[world.rank :: world.size]), objective, world=world)
        else:
            weighty = [n for n in every if has_weight(objective, source.batch(0, n))]
            rest = [n for n in every if n not in weighty]  # which are counted, and not run
            share = weighty[world.rank :: world.size]
            mine = [*share, *rest[world.rank :: world.size]]
            own = measure(model, batches(mine), objective, world=world)
            if len(share) < -(-len(weighty) // world.size):  # a pass with the others
                measure(model, [source.batch(0, weighty[0])], objective, world=world)
        check_together(world, check)
        return result_of(cast(list[Sums], world.gather(own)), objective, step=step)

    return of_step
