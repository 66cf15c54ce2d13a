"""Where a NaN or an infinity came from."""

from collections.abc import Callable, Iterable, Sequence, Set
from pathlib import Path

import torch
from torch import nn

from lora_engine.data.batch import PackedBatch
from lora_engine.errors import UserError
from lora_engine.evaluation.batch_loss import target_scores
from lora_engine.models.attach.head import transformers_model
from lora_engine.models.peft.lora_state import is_lora
from lora_engine.models.peft.routing import is_routed
from lora_engine.objectives.answers import loss_of, terms_of
from lora_engine.objectives.base import Objective, TargetScores

_SHOWN_SAMPLES = 8


class NonFiniteError(UserError):
    """A loss or gradient was NaN or infinite; the step was not applied.

    step: the optimiser step that failed, or None outside training.
    origins: of the samples it was computed from ("file:line").
    layer: the first module or parameter found non-finite, or None.
    checkpoint: folder of the last good state, once written.
    """

    def __init__(
        self, what: str, step: int | None, origins: Sequence[str], layer: str | None
    ) -> None:
        super().__init__(what, step, origins, layer)
        self.what = what
        self.step = step
        self.origins = tuple(origins)
        self.layer = layer
        self.checkpoint: Path | None = None

    def __str__(self) -> str:
        where = "" if self.step is None else f"step {self.step}: "
        samples = ", ".join(self.origins[:_SHOWN_SAMPLES])
        if len(self.origins) > _SHOWN_SAMPLES:
            samples += f" and {len(self.origins) - _SHOWN_SAMPLES} more"
        parts = [f"{where}{self.what}"]
        if self.layer is not None:
            parts.append(f"first bad layer {self.layer}")
        parts.append(f"samples {samples}")
        if self.checkpoint is not None:
            parts.append(f"the last good state is in {self.checkpoint}")
        parts.append("look at these samples, or lower the learning rate")
        return "; ".join(parts)


def first_nonfinite_layer(model: nn.Module, batch: PackedBatch, objective: Objective) -> str | None:
    """`first_nonfinite` of a packed batch's loss; "objective NAME" if the log-probabilities that
    it is made of are finite."""
    # The loss reads the head's weights and would refuse a head that is watched. Rows are routed
    # inside the LoRA layers, which could not run fused if they were.
    head = transformers_model(model).get_output_embeddings()
    unseen = set() if head is None else set(head.modules())
    if is_routed(model, batch):
        unseen |= {part for m in model.modules() if is_lora(m) for part in m.modules()}
    scored: list[TargetScores] = []

    def results() -> tuple[torch.Tensor | None, ...]:
        scores = target_scores(model, batch, objective)
        scored.append(scores)
        return (
            *(scores.logprobs, scores.total, scores.entropy, scores.reference),
            *(scores.divergence, scores.values),
        )

    layer = first_nonfinite(model, results, unseen)
    if layer is not None:
        return layer
    with torch.no_grad():
        terms = terms_of(loss_of(objective, scored[0], batch))
    return None if _is_finite(terms) else f"objective {objective.name}"


def first_nonfinite(
    model: nn.Module, results_of: Callable[[], object], unseen: Set[nn.Module] = frozenset()
) -> str | None:
    """Name of the first module, in order of execution, whose output is not finite.

    Runs one forward pass, `results_of`, which returns tensors, alone or in tuples. "output head" if
    the hidden states are finite and one of these is not; None if all is finite. Modules that a
    fused kernel runs without calling them are seen through the module around them. unseen: modules
    that are not to be watched.
    """
    names: list[str] = []

    def hook(name: str) -> Callable[[nn.Module, object, object], None]:
        def look(module: nn.Module, args: object, output: object) -> None:
            if not names and not _is_finite(output):
                names.append(name + _bad_weight(module))

        return look

    handles = [
        module.register_forward_hook(hook(name))
        for name, module in model.named_modules()
        if name and module not in unseen
    ]
    try:
        with torch.no_grad():
            results = results_of()
    finally:
        for handle in handles:
            handle.remove()
    if not names and not _is_finite(results):
        return "output head"
    return names[0] if names else None


def last_nonfinite_gradient(gradients: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """Name of the last parameter, in the model's order, whose gradient is not finite.

    Backpropagation runs in the opposite order, so this is where it first went wrong.
    """
    bad = [name for name, gradient in gradients if not _is_finite(gradient)]
    return bad[-1] if bad else None


def _is_finite(value: object) -> bool:
    if isinstance(value, torch.Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, dict):
        return all(_is_finite(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return all(_is_finite(item) for item in value)
    return True


def _bad_weight(module: nn.Module) -> str:
    for name, parameter in module.named_parameters():
        if not _is_finite(parameter.detach()):
            return f" (its {name} is not finite)"
    return ""
