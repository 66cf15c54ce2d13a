"""What the processes of one run share: its settings have to let them, and they measure together."""

from collections.abc import Callable, Iterator
from typing import cast

from torch import nn

from lora_engine.data.batch import PackedBatch
from lora_engine.distributed.world import World
from lora_engine.errors import UserError
from lora_engine.evaluation.heldout import HeldoutResult, Sums, measure, result_of
from lora_engine.objectives.base import Objective
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
    accumulated = config.gradient_accumulation_steps
    if accumulated < world.size:
        raise UserError(
            f"gradient_accumulation_steps={accumulated}: a step has too few micro-batches for "
            f"{world.size} processes, which share them; set train.gradient_accumulation_steps to "
            f"{world.size} or a multiple of it (and tokens_per_batch lower for steps of one size)"
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

    def batches() -> Iterator[PackedBatch]:
        for number in range(world.rank, source.num_batches(0), world.size):
            if interrupting(check) is not None:  # what was measured is thrown away
                return
            yield source.batch(0, number)

    def of_step(step: int) -> HeldoutResult:
        own = measure(model, batches(), objective, world=world)
        check_together(world, check)
        return result_of(cast(list[Sums], world.gather(own)), objective, step=step)

    return of_step
