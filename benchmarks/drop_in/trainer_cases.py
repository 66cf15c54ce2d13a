"""A trainer on a small random model, run as it is and with the model accelerated, and compared."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lora_engine
from lora_engine.testing import byte_tokenizer, with_lora

STEPS = 5
WHEN = ("before", "after")  # accelerated on which side of building the trainer
TOLERANCE = 1e-5
# The trainers' defaults but for what a quick comparison needs: float32, a learning rate at which a
# wrong update shows in the next loss, an epsilon that does not blow the rounding of gradients near
# zero up to whole updates, every step logged, nothing saved.
SETTINGS = {
    "max_steps": STEPS,
    "learning_rate": 1e-3,
    "adam_epsilon": 1e-4,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}
_TASKS = {"ForCausalLM": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS"}
_OF_TIME = ("runtime", "per_second", "step_time")


@dataclass(frozen=True)
class Case:
    """A trainer of some library on a model.

    build: makes the trainer of a model, a folder and settings.
    kind: the class of model that it trains, without its family's name.
    lora: whether adapters are trained, or all weights.
    but: what it logs that is not compared, by name, or as "name of step 1".
    """

    build: Callable[..., Any]
    kind: str = "ForCausalLM"
    lora: bool = True
    but: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """What a trainer said and left behind.

    logs: every entry of its log, but for times.
    start, end: the trained weights before the first and after the last step.
    """

    logs: list[dict[str, float]]
    start: dict[str, Tensor] = field(repr=False)
    end: dict[str, Tensor] = field(repr=False)


def run(
    case: Case,
    when: str | None,
    folder: Path,
    *,
    family: str = "Llama",
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> Run:
    """Train for STEPS steps; `when` of WHEN says when to accelerate, None not to.

    family: whose classes of transformers the model is of. dtype: of its frozen weights; PEFT's
    adapters stay in float32. The settings are the trainer's own, beside SETTINGS.
    """
    import transformers

    transformers.set_seed(0)
    model = make_model(family, case.kind).to(dtype)
    if case.lora:
        model = with_lora(model, task_type=_TASKS[case.kind])
    if when == "before":
        lora_engine.accelerate(model)
    trainer = case.build(model, folder, **{**SETTINGS, **settings})
    if when == "after":
        lora_engine.accelerate(trainer.model)
    start = trained(trainer.model)
    trainer.train()
    logs = [without_times(entry) for entry in trainer.state.log_history]
    return Run(logs, start, trained(trainer.model))


def trained(model: Any) -> dict[str, Tensor]:
    """Copies of the weights that are trained."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def without_times(entry: dict[str, Any]) -> dict[str, float]:
    """What of an entry does not depend on how fast the machine is."""
    return {key: value for key, value in entry.items() if not key.endswith(_OF_TIME)}


def log_difference(ours: Run, theirs: Run, but: tuple[str, ...] = ()) -> tuple[float, str]:
    """The largest difference of a number logged, and its name and step; not of those in `but`.

    Relative to the value, or to a tenth of the sums of log-probabilities logged beside it, or to 1:
    rewards and KL are differences of such sums, whose rounding does not shrink with them. Infinite
    where one logs what the other does not.
    """
    if [entry.keys() for entry in ours.logs] != [entry.keys() for entry in theirs.logs]:
        return float("inf"), "what is logged"
    differences = []
    for mine, other in zip(ours.logs, theirs.logs, strict=True):
        sums = [abs(value) / 10 for key, value in other.items() if key.startswith("logps/")]
        for key, value in other.items():
            name = f"{key} of step {other['step']}"
            if not {key, name} & {*but}:
                scale = max(1.0, abs(value), *sums)
                differences.append((_or_infinite(abs(mine[key] - value) / scale), name))
    return max(differences)


def _or_infinite(difference: float) -> float:
    return float("inf") if math.isnan(difference) else difference


def weight_difference(ours: Run, theirs: Run) -> tuple[float, str]:
    """The largest ‖ours - theirs‖ / ‖theirs‖ of a trained weight at the end, and its name."""
    if ours.end.keys() != theirs.end.keys():
        return float("inf"), "what is trained"
    return max(
        (_or_infinite(float((ours.end[name] - weight).norm() / weight.norm())), name)
        for name, weight in theirs.end.items()
    )


def moved(of: Run) -> float:
    """The smallest ‖end - start‖ / ‖end‖ of a trained weight."""
    return min(float((w - of.start[name]).norm() / w.norm()) for name, w in of.end.items())


def make_model(family: str, kind: str) -> Any:
    """A model of two layers whose tokens are byte_tokenizer's; with one label if it classifies."""
    import transformers

    tokenizer = byte_tokenizer()
    config = getattr(transformers, f"{family}Config")(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return getattr(transformers, f"{family}{kind}")(config)
