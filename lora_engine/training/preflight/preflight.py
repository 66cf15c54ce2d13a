"""`preflight`: whether a model learns anything, tried on one batch before a run."""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lora_engine.data.batch import PackedBatch
from lora_engine.errors import UserError
from lora_engine.evaluation.batch_loss import with_statistics
from lora_engine.models.quantized.merge_aware_linear import unquantised
from lora_engine.objectives.answers import check_objective
from lora_engine.objectives.base import Objective
from lora_engine.objectives.sft import SFT
from lora_engine.training.optimizer.shared_memory import groups_of_memory
from lora_engine.training.preflight.batch_checks import check_batch, why_not_taken
from lora_engine.training.preflight.causes import (
    Place,
    check_trained,
    check_values,
    place_of,
    why_idle,
    why_independent,
    why_no_gradient,
    why_nonfinite,
    why_nonfinite_gradient,
    why_out_of_range,
    why_out_of_use,
)
from lora_engine.training.preflight.descent import descend, rounding
from lora_engine.training.preflight.slopes import check_slopes
from lora_engine.training.preflight.trial import Gradients, Loss, Trial, on_device, trial


@dataclass(frozen=True)
class PreflightReport:
    """What `preflight` measured.

    loss_before: the batch's mean loss, in the objective's unit. loss_after: after a trial step;
        equal to loss_before where no step lowers the loss, because the batch is learned already.
    parameters: how many tensors are trained. unreached: how many of them this batch does not use
        (experts that no token is routed to, say).
    gradient_norms: Euclidean, by kind of parameter (lora_A, lora_B, weights, …), with several
        adapters by "adapter.kind". Gradients that are zero at first, as A's where B is 0, are
        measured after the trial step.
    seconds: how long all of it took.
    """

    loss_before: float
    loss_after: float
    parameters: int
    unreached: int
    gradient_norms: Mapping[str, float]
    seconds: float

    def __str__(self) -> str:
        falls = self.loss_after < self.loss_before
        if self.unreached == self.parameters:
            return f"loss {self.loss_before:.4g}; the batch reaches nothing that is trained"
        loss = (
            f"loss {self.loss_before:.4g} falls to {self.loss_after:.4g} on one batch"
            if falls
            else f"loss {self.loss_before:.4g}, one batch is learned already"
        )
        norm = math.sqrt(sum(value**2 for value in self.gradient_norms.values()))
        reached = f"{self.parameters - self.unreached:,} of {self.parameters:,} trained tensors"
        return f"{loss}; gradients (norm {norm:.3g}) reach {reached}; {self.seconds:.1f} s"


def preflight(
    model: nn.Module,
    batch: object,
    *,
    loss: Loss | None = None,
    objective: Objective = SFT(),
) -> PreflightReport:
    """Try one training step of `model` on `batch`, and put everything back.

    model: a transformers model, plain, with PEFT adapters, or accelerated.
    batch: what the model takes, with labels, as a mapping of tensors on any device; or a
        PackedBatch.
    loss: called as loss(model, batch), in place of the model's own: a scalar or one loss an
        example, whose mean is tried. It gets the batch as it is, which may be of any type.
    objective: the loss of a PackedBatch, as in training.

    The model runs in training mode, with the same dropout mask in every pass, and merge-aware
    linears without quantising: of that the straight-through gradients are the true ones. On
    return, and after any exception, its values, gradients, modes and buffers and all random
    generators are bit for bit as before, but for frozen parameters that the forward pass itself
    writes into. A model that passes costs two backward passes, six to twelve forward passes, and
    three times the memory of the trained parameters.

    Raises UserError, of one line, where the run would learn nothing or not what it should: nothing
    is trained or supervised; a trained parameter has no gradient though the loss depends on it;
    loss or gradients are not finite; an adapter changes nothing in the output; a gradient is not
    that of the loss; or a frozen parameter changes.
    """
    started = time.perf_counter()
    check_trained(model)
    if loss is not None and not callable(loss):
        raise UserError(
            f"preflight: loss is {type(loss).__name__}, not a function; "
            "give one, loss=lambda model, batch: …"
        )
    if loss is None:
        batch = taken = on_device(model, batch)
        check_objective(objective, "preflight")
        check_batch(model, taken, objective)
        if isinstance(taken, PackedBatch):
            (batch,) = with_statistics(model, [taken], objective)
    frozen = _frozen(model)
    sums = {name: _checksum(p) for name, p in frozen.items()}
    with unquantised(model), trial(model, batch, objective, loss) as tried:
        checks = _Preflight(model, tried)
        _check_unchanged(frozen, sums)  # first: the checks below would name other causes
        report = checks.run()
        _check_unchanged(frozen, sums)
    return replace(report, seconds=time.perf_counter() - started)


class _Preflight:
    """The checks of one trial; each raises UserError that says what is wrong and how to mend it."""

    def __init__(self, model: nn.Module, tried: Trial) -> None:
        self.model, self.trial = model, tried
        self.places = {name: place_of(model, name) for name in tried.trained}
        try:
            self.before = tried.loss()
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            is_range = isinstance(error, IndexError)
            problem = why_out_of_range(model, tried) if is_range else None
            if problem is None and isinstance(tried.batch, Mapping) and not tried.has_own_loss:
                problem = why_not_taken(tried.batch, error)
            if problem is None:
                raise
            raise UserError(problem) from error

    def run(self) -> PreflightReport:
        if not math.isfinite(self.before):
            raise UserError(why_nonfinite(self.model, self.trial, self.before))
        check_values(self.model)
        if not self.trial.reaches_parameters():
            names = list(self.trial.trained)
            self._check_missing(dict.fromkeys(names), names)
            raise UserError(why_independent(names))
        gradients = self._checked(self.trial.gradients())
        missing = [name for name, gradient in gradients.items() if _largest(gradient) == 0]
        is_zero = abs(self.before) <= rounding(self.model, 0.0)[0]
        if len(missing) == len(gradients) and is_zero and self._matters(missing):
            return self._report(self.before, gradients, [])  # all is learned to the last bit
        after, noise = self.before, 0.0
        if len(missing) < len(gradients):
            nonzero = _without(gradients, missing)
            noise, ratio = check_slopes(self.trial, self.before, nonzero, self._kind)
            after = descend(self.trial, self.before, nonzero, noise, ratio)
        if missing and len(missing) < len(gradients):
            gradients, missing = self._after_the_step(gradients, missing, after, noise)
        if missing:
            self._check_missing(gradients, missing)
        if all(gradient is None for gradient in gradients.values()):
            raise UserError(why_independent(missing))
        falls = after < self.before - 3 * noise
        return self._report(after if falls else self.before, gradients, missing)

    def _report(self, after: float, gradients: Gradients, missing: list[str]) -> PreflightReport:
        norms: dict[str, float] = {}
        for name, gradient in gradients.items():
            group = self._group(name)
            norms[group] = math.hypot(norms.get(group, 0.0), _norm(gradient))
        return PreflightReport(
            loss_before=self.before,
            loss_after=after,
            parameters=len(gradients),
            unreached=len(missing),
            gradient_norms=norms,
            seconds=0.0,
        )

    def _checked(self, gradients: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
        """`gradients`; UserError if one is not finite."""
        bad = [name for name, g in gradients.items() if not math.isfinite(_largest(g))]
        if bad:
            raise UserError(why_nonfinite_gradient(self.model, bad))
        return gradients

    def _after_the_step(
        self, gradients: Gradients, missing: list[str], here: float, noise: float
    ) -> tuple[dict[str, Tensor | None], list[str]]:
        """The gradients, and the names of those that are still zero or None.

        Those `missing` before are measured at the values that the trial step led to: A's gradient
        is zero until B is not 0. here: the loss there.
        """
        later = self._checked(self.trial.gradients())
        still = [name for name in missing if _largest(later[name]) == 0]
        if len(still) < len(missing):
            self.trial.stay()
            measured = {name: later[name] for name in missing}
            check_slopes(self.trial, here, _without(measured, still), self._kind, noise)
        return {**gradients, **{name: later[name] for name in missing}}, still

    def _kind(self, name: str) -> object:
        """The same for parameters in the same place of different layers."""
        place = self.places[name]
        return place.adapter or "", place.kind, place.layer.rpartition(".")[2]

    def _group(self, name: str) -> str:
        place = self.places[name]
        adapters = {other.adapter for other in self.places.values()} - {None}
        several = place.adapter is not None and len(adapters) > 1
        return f"{place.adapter}.{place.kind}" if several else place.kind

    def _check_missing(self, gradients: Gradients, missing: list[str]) -> None:
        """Raises UserError if the loss depends on a parameter of `missing`, if PEFT does not run
        its adapter, or if no parameter of an adapter has a gradient."""
        self.trial.reset()
        tolerance = 10 * abs(self.before - self.trial.loss())

        def matter(layers: list[list[str]]) -> bool:
            return self._matters([name for names in layers for name in names], tolerance)

        layers = self._together(missing, lambda place: (place.layer, place.adapter))
        if matter(layers):
            while len(layers) > 1:
                half = len(layers) // 2
                layers = layers[:half] if matter(layers[:half]) else layers[half:]
            name = min(layers[0], key=lambda name: gradients[name] is not None)
            self.trial.reset()
            raise UserError(why_no_gradient(self.model, name, len(missing) - 1, gradients[name]))
        self.trial.reset()
        if (problem := why_out_of_use(self.model, missing)) is not None:
            raise UserError(problem)
        groups = self._together(gradients, lambda place: place.adapter)
        idle = [members for members in groups if set(members) <= set(missing)]
        if (problem := why_idle(self.model, self.trial, layers, idle)) is not None:
            raise UserError(problem)

    def _matters(self, names: list[str], tolerance: float = 0.0) -> bool:
        """Whether the loss depends on these parameters.

        At other values of what else is trained in their layers: A changes nothing while B is 0.
        """
        layers = {self.places[name][::2] for name in names}
        others = [n for n, at in self.places.items() if at[::2] in layers and n not in names]
        self.trial.shake(others)
        before = self.trial.loss() if others else self.before
        self.trial.shake([*others, *names])  # with the same noise on the others
        changed = abs(self.trial.loss() - before)
        self.trial.reset()
        return not changed <= tolerance  # also where it is not finite

    def _together(self, names: Iterable[str], key: Callable[[Place], object]) -> list[list[str]]:
        """The names in groups whose places have the same `key`."""
        groups: dict[object, list[str]] = {}
        for name in names:
            groups.setdefault(key(self.places[name]), []).append(name)
        return list(groups.values())


def _largest(gradient: Tensor | None) -> float:
    if gradient is None or gradient.numel() == 0:
        return 0.0
    return float(torch.linalg.vector_norm(gradient, math.inf))


def _without(gradients: Gradients, missing: list[str]) -> dict[str, Tensor]:
    return {n: g for n, g in gradients.items() if g is not None and n not in missing}


def _norm(gradient: Tensor | None) -> float:
    if gradient is None:
        return 0.0
    return float(torch.linalg.vector_norm(gradient, dtype=torch.float64))


def _frozen(model: nn.Module) -> dict[str, nn.Parameter]:
    """The frozen parameters, without those that share their memory with a trained one."""
    named = list(model.named_parameters())
    tied = {id(p) for group in groups_of_memory(named) for _, p in group}
    return {
        name: p
        for name, p in named
        if not p.requires_grad and id(p) not in tied and p.device.type != "meta"
    }


def _check_unchanged(frozen: Mapping[str, nn.Parameter], sums: Mapping[str, int]) -> None:
    for name, parameter in frozen.items():
        if _checksum(parameter) != sums[name]:
            raise UserError(
                f"preflight: {name} is frozen, yet a training step changes it; something "
                "writes into it in the forward pass, or it shares memory with what is "
                "trained: train it too, or give it memory of its own"
            )


@torch.no_grad()
def _checksum(parameter: nn.Parameter) -> int:
    """A sum of the parameter's bits as integers, in which each row has a weight of its own.

    As 64-bit integers where shape and strides allow it, which is fastest.
    """
    words = parameter.detach()
    narrow = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    try:
        words = words.view(torch.int64)
    except RuntimeError:
        words = words.view(narrow[words.dtype.itemsize])
    if words.dim() > 1:
        words = words.sum(-1, dtype=torch.int64).flatten()
    odd = torch.arange(1, 2 * words.numel(), 2, device=words.device)
    return int((words * odd).sum(dtype=torch.int64))
