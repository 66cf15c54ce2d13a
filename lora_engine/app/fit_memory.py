"""`train.memory`: the settings of a run that fit its memory."""

from collections.abc import Callable
from typing import Any, cast

from lora_engine.app.config import RunConfig
from lora_engine.app.plan import plan, way_of
from lora_engine.app.plan_text import conclusion, least
from lora_engine.distributed.world import World
from lora_engine.errors import UserError
from lora_engine.memory.plan import ROWS
from lora_engine.text import bytes_text


def with_memory(
    config: RunConfig, begun: RunConfig | None, world: World, tell: Callable[[str], None]
) -> RunConfig:
    """`config` with the policy, and where that is not enough the micro-batches, that fit
    `train.memory`.

    begun: of a run that is resumed; its micro-batches remain. tell: takes a line of what was
    chosen. world: its first process chooses for all, and alone is given what was begun. Raises
    UserError where nothing fits, and where processes share weights or tokens.
    """
    train = config.train
    if world.size > 1 and (config.model.shard or train.sequence_parallel):
        raise UserError(
            "train.memory: is for processes that hold the whole model each; with model.shard or "
            "train.sequence_parallel set train.checkpointing instead"
        )
    own = _fitting(config, begun, world, tell) if world.is_first else None
    update = cast("dict[str, Any]", world.of_first(own))
    return config.model_copy(update={"train": train.model_copy(update=update)})


def _fitting(
    config: RunConfig, begun: RunConfig | None, world: World, tell: Callable[[str], None]
) -> dict[str, Any]:
    """What of `train` changes, by its keys; see `with_memory`."""
    update: dict[str, Any] = {}
    if begun is not None:
        kept = ("tokens_per_batch", "gradient_accumulation_steps")
        update = {key: getattr(begun.train, key) for key in kept}
    train = config.train.model_copy(update=update)
    config = config.model_copy(update={"train": train})
    made = plan(config, budget=None if train.memory == "auto" else train.memory, world=world)
    chosen = made.chosen
    divides = begun is None and not train.layerwise_update  # into smaller micro-batches
    if chosen is None or not (chosen.fits or divides):
        hints = [line for line in conclusion(made) if " fit with other numbers: " in line]
        raise UserError(
            f"train.memory {train.memory}: {least(made)} "
            + (hints[0] if hints else "Take a smaller model, lora.r or train.tokens_per_batch.")
        )
    update["checkpointing"] = chosen.policy
    update["offload_activations"] = chosen.load.offload
    update["offload_optimizer"] = "host" if chosen.load.host_states else None
    line = f"memory: checkpointing {way_of(chosen)}"
    if not chosen.fits:
        parts = -(-train.tokens_per_batch // chosen.most_rows)
        rows = min(chosen.most_rows, -(-train.tokens_per_batch // parts // ROWS) * ROWS)
        update["tokens_per_batch"] = rows
        update["gradient_accumulation_steps"] = parts * train.gradient_accumulation_steps
        line += f", {parts} micro-batches of {rows:,} tokens for one of {train.tokens_per_batch:,}"
    tell(f"{line}, for {bytes_text(made.budget.nbytes)}")
    return update
