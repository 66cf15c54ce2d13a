"""A run's number of steps, which may grow when it is resumed.

A run that is resumed with more max_steps or epochs goes on from its newest checkpoint. Where the
learning rates of the steps done so far are those of the longer run (a constant schedule, with a
warm-up in steps), its weights are bitwise those of the longer run in one go. Otherwise the steps
to come follow the longer run's schedule, whose rate may be higher than the last one was.
"""

import logging
from pathlib import Path

from lora_engine.errors import UserError
from lora_engine.training.batches import BatchSource
from lora_engine.training.config import TrainConfig
from lora_engine.training.optimizer.schedule import Schedule
from lora_engine.training.run.folder import Length, Loaded

logger = logging.getLogger(__name__)


def check_length(checkpoint: Path, before: Length, now: Length) -> None:
    """Raises UserError if the run was made with more steps than it has now."""
    if before["total_steps"] <= now["total_steps"]:
        return
    settings = (
        ("max_steps", before["max_steps"], now["max_steps"]),
        ("epochs", before["epochs"], now["epochs"]),
    )
    changed = [
        f"{name}={was}, now {name}={is_now}" for name, was, is_now in settings if was != is_now
    ]
    what = "; ".join(changed) or f"{before['total_steps']} steps, now {now['total_steps']}"
    raise UserError(
        f"{checkpoint}: made with {what}: a run can be made longer, not shorter; change it back "
        "to continue, or choose another output_dir"
    )


def tell_extension(
    loaded: Loaded, config: TrainConfig, schedule: Schedule, source: BatchSource
) -> None:
    """Logs whether a run that has become longer has the weights of a longer run in one go."""
    total, step = loaded.of_run["length"]["total_steps"], loaded.state.step
    if total == schedule.total_steps:
        return
    message = f"the run of {total} steps is extended to {schedule.total_steps}"
    before = Schedule.from_config(config, total)
    per_step, epochs = config.gradient_accumulation_steps, loaded.of_run["length"]["epochs"]
    if any(before(i) != schedule(i) for i in range(1, step + 1)):
        message += (
            f"; up to step {step} the learning rate followed the {config.schedule} schedule of "
            f"{total} steps (now at {before(step):.3g}), from here on it follows that of "
            f"{schedule.total_steps} (next {schedule(step + 1):.3g})"
        )
    elif step == total and epochs is not None and source.count(epochs) % per_step:
        message += f"; step {step}, the last of its epoch, had fewer micro-batches than {per_step}"
    else:
        message += ", to the same weights as in one go"
    patience = config.early_stopping_patience
    if patience is not None and loaded.state.evals_since_best >= patience:
        message += (
            f"; it had stopped early at step {step} and does so again: raise "
            f"early_stopping_patience above {loaded.state.evals_since_best} to go on"
        )
    logger.warning("%s", message)
