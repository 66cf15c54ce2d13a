"""Loss and gradients of one batch at changed parameters, which get their own values back."""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor, nn

from lora_engine.data.batch import PackedBatch
from lora_engine.errors import UserError
from lora_engine.evaluation.batch_loss import batch_loss
from lora_engine.models.attach.head import transformers_model
from lora_engine.models.peft.routing import adapters_of
from lora_engine.objectives.answers import mean_of, weight_of
from lora_engine.objectives.base import Objective
from lora_engine.training import random_state

Gradients = Mapping[str, Tensor | None]
Loss: TypeAlias = Callable[..., Tensor]  # of the model and the batch

# The first is GradScaler's: without a scale, small gradients of float16 would be zero.
_LOSS_SCALES = (2.0**16, 2.0**12, 2.0**8, 2.0**4, 1.0)
# `Trial.move` can move every eighth element alone.
PARTS = 8
# A buffer of integers with more elements is taken for packed weights, which no pass changes.
_SMALL = 65_536
_PLAIN = (bool, int, float, str, type(None))


class Trial:
    """A model in training on one batch, which draws the same random numbers in every pass.

    trained: the parameters that require gradients, by name. objective: of packed batches. loss: a
    function that stands for the model's, or the objective's, own. has_own_loss: whether there is
    such a function.
    """

    def __init__(
        self, model: nn.Module, batch: object, objective: Objective, loss: Loss | None = None
    ) -> None:
        self.model = model
        self.batch = batch
        self.has_own_loss = loss is not None
        self.objective = objective
        if loss is not None:
            self._loss_of = _mean_of(loss)
        elif isinstance(batch, PackedBatch):
            self._loss_of = _of_objective(objective, batch)
        else:
            self._loss_of = _own_loss
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._values = {name: p.detach().clone() for name, p in self.trained.items()}
        self._base = self._values
        self._draws = random_state.capture()
        self._loss: Tensor | None = None
        has_half = any(p.dtype == torch.float16 for p in model.parameters())
        self._scales = _LOSS_SCALES if has_half else (1.0,)

    def loss(self) -> float:
        """The mean loss of the batch; its graph is kept for `gradients`."""
        self._loss = None  # frees the graph of the last pass
        random_state.restore(*self._draws)
        torch.clear_autocast_cache()  # which holds casts of the parameters' earlier values
        self._loss = self._loss_of(self.model, self.batch)
        return self._loss.item()

    def reaches_parameters(self) -> bool:
        """Whether the last `loss` can be differentiated at all."""
        return self._loss is not None and self._loss.requires_grad

    def gradients(self) -> dict[str, Tensor | None]:
        """The gradients of the last `loss`; None for parameters outside its graph.

        Where weights are float16 the loss is scaled up, by the largest scale of _LOSS_SCALES with
        which all gradients are finite.
        """
        for scale in self._scales:
            if self._loss is None:
                self.loss()
            assert self._loss is not None
            for parameter in self.trained.values():
                parameter.grad = None
            (self._loss * scale).backward()
            self._loss = None
            gradients = {name: _taken(p, scale) for name, p in self.trained.items()}
            if all(g is None or bool(g.isfinite().all()) for g in gradients.values()):
                break
        return gradients

    @torch.no_grad()
    def reset(self) -> None:
        """Put back the parameters' own values."""
        self._base = self._values
        self._put(self._values)

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.trained.items():
            parameter.copy_(values[name])

    @torch.no_grad()
    def move(
        self,
        gradients: Gradients,
        lengths: Mapping[str, float],
        *,
        by_sign: bool = False,
        part: int | None = None,
    ) -> float:
        """Sets each parameter of `lengths` to its base value − length · unit; returns the loss's
        change to first order.

        The base values are the model's own, or those at the last `stay`. unit is the gradient over
        its largest absolute value, which must not be 0, or with by_sign the gradient's sign, as in
        Adam's first step; with `part` only elements part, part + PARTS, … of it. 16-bit parameters
        are rounded up or down at random, since rounding to nearest would undo all small steps; the
        change is that of the rounded steps.
        """
        self._put(self._base)
        for name, length in lengths.items():
            unit, _ = unit_of(gradients[name])
            step = unit.sign() if by_sign else unit
            if part is not None:
                only = torch.zeros_like(step).flatten()
                only[part::PARTS] = step.flatten()[part::PARTS]
                step = only.view_as(step)
            parameter = self.trained[name]
            moved = parameter.to(step.dtype).sub_(step, alpha=length)
            if moved.dtype != parameter.dtype:
                moved = _dithered(moved, parameter.dtype)
            parameter.copy_(moved)
        change = 0.0
        for name in lengths:  # after all moves: parameters may share memory
            unit, largest = unit_of(gradients[name])
            moved = self.trained[name].to(unit.dtype) - self._base[name]
            change += largest * float(torch.dot(unit.flatten(), moved.flatten()))
        return change

    def stay(self) -> None:
        """Makes the present values the base values of `move`."""
        self._base = {name: p.detach().clone() for name, p in self.trained.items()}

    @torch.no_grad()
    def shake(self, names: list[str]) -> None:
        """Restores the model's own values, and adds noise of their own size to those of `names`."""
        self.reset()
        random_state.restore(*self._draws)
        for name in names:
            parameter = self.trained[name]
            wide = parameter.float()
            size = wide.square().mean().sqrt().clamp(min=0.1)
            parameter.copy_(wide + size * torch.randn_like(wide))


@contextmanager
def trial(
    model: nn.Module, batch: object, objective: Objective, loss: Loss | None = None
) -> Iterator[Trial]:
    """A Trial of the model; on leaving, by an exception too, everything is as it was.

    That is: values, gradients and gradient hooks of the trained parameters, buffers, the modes and
    plain attributes of the modules, and the generators of torch, numpy and Python.
    """
    with _kept_random_state(), _kept_modules(model), torch.inference_mode(False):
        made = Trial(model, batch, objective, loss)
        routed = adapters_of(model, batch) if isinstance(batch, PackedBatch) else None
        with torch.enable_grad(), _kept_gradients(made.trained):
            model.train()
            try:
                if routed is None:
                    yield made
                else:
                    with routed:
                        yield made
            finally:
                _surely(made.reset)


@contextmanager
def with_values(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Within, the parameters of these names have these values, rounded to their dtypes; each gets
    its own back on leaving."""
    named = dict(model.named_parameters())
    own = {name: named[name].detach().clone() for name in values}

    def put(values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in values.items():
                named[name].copy_(value)

    try:
        put(values)
        yield
    finally:
        _surely(lambda: put(own))


def on_device(model: nn.Module, batch: object) -> PackedBatch | Mapping[str, object]:
    """The batch with its tensors on the device of the model's first parameter."""
    device = next(model.parameters()).device
    if isinstance(batch, PackedBatch):
        return batch.to(device)
    if not isinstance(batch, Mapping):
        raise UserError(
            f"preflight: the batch is {type(batch).__name__}; give a mapping that the model takes "
            "(input_ids, attention_mask, labels), or a packed batch"
        )
    return {key: x.to(device) if isinstance(x, Tensor) else x for key, x in batch.items()}


def _of_objective(objective: Objective, batch: PackedBatch) -> Loss:
    weight = weight_of(objective, batch.to("cpu"))
    return lambda model, batch: mean_of(objective, batch_loss(model, batch, objective), weight)


def _own_loss(model: nn.Module, batch: Mapping[str, object]) -> Tensor:
    taken = inspect.signature(transformers_model(model).forward).parameters
    some = any(p.kind == inspect.Parameter.VAR_KEYWORD for p in taken.values())
    if not some and (unknown := [name for name in batch if name not in taken]):
        raise UserError(
            f"preflight: {type(model).__name__} takes no {', '.join(unknown)}; leave it out of the "
            "batch, or give preflight the loss as a function, loss=f(model, batch)"
        )
    output = model(**batch)
    loss = output[0] if isinstance(output, tuple) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor) or (isinstance(output, tuple) and loss.dim() > 1):
        keys = ", ".join(map(str, batch))
        raise UserError(
            f"preflight: the model returns no loss for the batch of {keys}; give it labels, or "
            "preflight the loss as a function, loss=f(model, batch)"
        )
    return loss.mean()


def _mean_of(loss: Loss) -> Loss:
    def mean(model: nn.Module, batch: object) -> Tensor:
        value = loss(model, batch)
        if not isinstance(value, Tensor) or not value.is_floating_point() or not value.numel():
            kind = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else value
            raise UserError(
                f"preflight: the loss function returned {kind!r:.60}; let it return a tensor of "
                "floating-point numbers, a scalar or one an example"
            )
        return value.mean()

    return mean


def unit_of(gradient: Tensor | None) -> tuple[Tensor, float]:
    """A gradient over its largest absolute value, in at least float32, and that value.

    So powers of it neither overflow nor vanish.
    """
    assert gradient is not None
    wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    largest = float(torch.linalg.vector_norm(wide, float("inf")))
    return wide / largest, largest


def _taken(parameter: nn.Parameter, scale: float) -> Tensor | None:
    gradient, parameter.grad = parameter.grad, None
    if gradient is None:
        return None
    gradient = gradient.detach()
    if gradient.layout != torch.strided:
        gradient = gradient.to_dense()
    return gradient if scale == 1 else gradient.float() / scale


def _dithered(values: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 values rounded to `dtype` up or down at random, right on average, in place.

    Values that `dtype` has stay as they are. All rows are rounded by the same random numbers.
    """
    bits = 23 - round(-math.log2(torch.finfo(dtype).eps))  # of the mantissa that `dtype` lacks
    draws = torch.randint(1 << bits, values.shape[-1:], dtype=torch.int32, device=values.device)
    values.view(torch.int32).add_(draws).bitwise_and_(-1 << bits)
    return values


@contextmanager
def _kept_random_state() -> Iterator[None]:
    before = random_state.capture()
    try:
        yield
    finally:
        _surely(lambda: random_state.restore(*before))


@contextmanager
def _kept_gradients(trained: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Gradients and the hooks that act on accumulated ones (optimisers in the backward pass)."""
    gradients = {name: p.grad for name, p in trained.items()}
    hooks = [h for p in trained.values() if (h := p._post_accumulate_grad_hooks) is not None]
    kept = [dict(each) for each in hooks]

    def put_back() -> None:
        for each, before in zip(hooks, kept, strict=True):
            each.update(before)
        for name, parameter in trained.items():
            parameter.grad = gradients[name]

    try:
        for each in hooks:
            each.clear()
        yield
    finally:
        _surely(put_back)


@contextmanager
def _kept_modules(model: nn.Module) -> Iterator[None]:
    """Modes and plain attributes of the modules, buffers, and which parameters require gradients.

    Buffers of packed weights are not copied: no pass changes them.
    """
    modules = list(model.modules())
    plain = [_plain(module) for module in modules]
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    buffers = [dict(module._buffers) for module in modules]
    values = [
        (buffer, buffer.clone())
        for own in buffers
        for buffer in own.values()
        if buffer is not None and (buffer.is_floating_point() or buffer.numel() <= _SMALL)
    ]

    def put_back() -> None:
        for module, before, own in zip(modules, plain, buffers, strict=True):
            for name in _plain(module).keys() - before.keys():
                del vars(module)[name]
            vars(module).update(before)
            module._buffers.clear()
            module._buffers.update(own)
        for parameter, wanted in required:
            parameter.requires_grad_(wanted)
        with torch.no_grad():
            for buffer, value in values:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)

    try:
        yield
    finally:
        _surely(put_back)


def _surely(put_back: Callable[[], None]) -> None:
    """Calls `put_back`; once more where Ctrl-C interrupts it."""
    try:
        put_back()
    except KeyboardInterrupt:
        put_back()
        raise


def _plain(module: nn.Module) -> dict[str, object]:
    return {name: value for name, value in vars(module).items() if isinstance(value, _PLAIN)}
