"""All trainable parameters in one buffer, their gradients in another.

One optimiser launch and one reduction for the norm then serve any number of parameters.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lora_engine import ops
from lora_engine.errors import UserError
from lora_engine.training.optimizer.shared_memory import compact_strides, groups_of_memory

ALIGNMENT = 64  # bytes; every parameter starts on a cache line, as a tensor of its own would
RATE_ALIGNMENT = 1024  # bytes, 256 values: a block of 8-bit moments never spans two learning rates
MOST_COLLECTED = 2**20  # values of a parameter whose gradient may be held twice


@dataclasses.dataclass(frozen=True)
class FlatEntry:
    """Where one parameter lies in the flat buffers.

    parameters: all tensors with this memory, usually one; the first gives name and shape.
    strides: of each of them in the buffers. Tied tensors may be transposes of each other.
    offset: index of its first element in the buffers. rate: what multiplies its learning rate.
    """

    name: str
    parameters: tuple[nn.Parameter, ...]
    strides: tuple[tuple[int, ...], ...]
    offset: int
    rate: float = 1.0

    @property
    def shape(self) -> torch.Size:
        return self.parameters[0].shape

    @property
    def dtype(self) -> torch.dtype:
        return self.parameters[0].dtype

    @property
    def numel(self) -> int:
        return self.shape.numel()

    @property
    def part(self) -> slice:
        """Its elements of the buffers, without padding."""
        return slice(self.offset, self.offset + self.numel)

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        """The first parameter's part of a flat buffer, in its shape."""
        return next(self.views(buffer))[1]

    def views(self, buffer: torch.Tensor) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
        """Each parameter with its part of a flat buffer, all of the same elements."""
        start = buffer.storage_offset() + self.offset
        for parameter, stride in zip(self.parameters, self.strides, strict=True):
            yield parameter, buffer.as_strided(parameter.shape, stride, start)


class FlatParameters:
    """Owns the storage of trainable parameters while they are trained.

    data [P] float32: float32 parameters are views into it; for another dtype it holds a float32
        master copy, which `publish` rounds into the parameter. Without masters it is bfloat16, and
        all parameters are views into it.
    grad [P] float32: the `.grad` of float32 parameters are views into it, and autograd adds to
        them in place. Gradients of other dtypes are added to it in float32 after every backward
        pass, so that accumulation over micro-batches does not round to 16 bits. Where gradients are
        not gathered, it is empty, and `on_arrival` is called with each one within the backward
        pass, which then ends it.
    P counts a few unused elements, always 0, that align every parameter to 64 bytes (of `by_entry`
    to 256 elements).

    rates: the parts of the buffers in order, as slices, and what multiplies the learning rate.
    by_entry: whether updates go from entry to entry, not over a whole part at once.

    Parameters that are the same memory are held once, under the first one's name, and stay the
    same memory, here and after `release`: tied weights, PEFT's tied adapters (one the transpose of
    the other), a frozen parameter that views a trained one. Their gradients add up.
    `release` gives the parameters storage of their own again.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        rate_of: Callable[[str], float] = lambda name: 1.0,
        *,
        masters: bool = True,
        gathered: bool = True,
    ) -> None:
        """Takes those that require gradients. `rate_of` a name multiplies its learning rate.

        masters: whether parameters of 16 bits have float32 masters; gathered: whether gradients
        have a buffer. Raises UserError if there are none, if they are on several devices, if one of
        them shares a part of its memory with another, and for what cannot be trained without
        masters or ungathered.
        """
        named = list(named_parameters)
        trainable = [(name, p) for name, p in named if p.requires_grad]
        if not trainable:
            raise UserError(
                "the model has no trainable parameters: add an adapter with peft.get_peft_model, "
                "or set requires_grad on what should be trained"
            )
        devices = {p.device for _, p in trainable}
        if len(devices) > 1:
            raise UserError(
                "the trainable parameters are on several devices "
                f"({', '.join(sorted(map(str, devices)))}): move the model to one"
            )
        self.device = devices.pop()
        self.gathered, self.by_entry = gathered, not (masters and gathered)
        self.on_arrival: Callable[[FlatEntry, torch.Tensor], None] | None = None
        self.entries, self.rates, size = _layout(
            named, rate_of, RATE_ALIGNMENT if self.by_entry else ALIGNMENT
        )
        if not masters:
            self._check_needs_no_masters()
        dtype = torch.float32 if masters else torch.bfloat16
        self.data = torch.zeros(size, dtype=dtype, device=self.device)
        self._hooks: list[RemovableHandle] = []
        if not gathered:
            self.grad = torch.zeros(0, device=self.device)
            self._grad_views, self._collected, self._added = [], [], []
            self._attach()
            return
        self.grad = torch.zeros(size, device=self.device)
        self._grad_views = [list(entry.views(self.grad)) for entry in self.entries]
        self._collected = [
            views[0]
            for entry, views in zip(self.entries, self._grad_views, strict=True)
            if entry.dtype == torch.float32
            and len(entry.parameters) == 1
            and entry.numel <= MOST_COLLECTED
        ]
        self._added = [
            views[0]
            for entry, views in zip(self.entries, self._grad_views, strict=True)
            if entry.dtype == torch.float32
            and len(entry.parameters) == 1
            and views[0][1].is_contiguous()
        ]
        self._attach()

    @property
    def numel(self) -> int:
        """Number of trained values, without the padding."""
        return sum(entry.numel for entry in self.entries)

    def large(self) -> list[tuple[nn.Parameter, slice]]:
        """Parameters whose gradients autograd adds where they lie, and their parts of the buffers.

        Their `.grad` is done with a backward pass; those of others are collected after it, or come
        from several parameters.
        """
        ends = [*(entry.offset for entry in self.entries[1:]), self.grad.numel()]
        return [
            (entry.parameters[0], slice(entry.offset, end))
            for entry, end in zip(self.entries, ends, strict=True)
            if len(entry.parameters) == 1 and entry.numel > MOST_COLLECTED
        ]

    def zero_grad(self) -> None:
        """Set all gradients to zero and the `.grad` of float32 parameters to views of `grad`."""
        self.grad.zero_()
        for entry, views in zip(self.entries, self._grad_views, strict=self.gathered):
            for parameter, grad in views:
                is_view = entry.dtype == torch.float32 and parameter.requires_grad
                parameter.grad = grad if is_view else None

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """For a backward pass: its gradients are added to `grad`, with few calls of PyTorch.

        Products of adapters add theirs as they make them (`ops.adding_gradients`), but for those of
        parameters that have hooks, which autograd calls. What arrives through autograd is added
        after the pass, all in a few launches; meanwhile the `.grad` of float32 parameters hold this
        pass's alone. The additions that autograd would make one by one cost a launch for each
        parameter. Large gradients and those of tied parameters are added by autograd: a second
        tensor of all of the first would cost memory, and of tied ones memory is the same.
        """
        collected = self._collected
        for parameter, _ in collected:
            parameter.grad = None
        try:
            with ops.adding_gradients(pair for pair in self._added if not _has_hooks(pair[0])):
                yield
            arrived = [(view, p.grad) for p, view in collected if p.grad is not None]
            if arrived:
                with torch.no_grad():
                    torch._foreach_add_([view for view, _ in arrived], [g for _, g in arrived])
        finally:
            for parameter, view in collected:
                parameter.grad = view

    def publish(self) -> None:
        """Tell the parameters that `data` changed: round masters into parameters of other dtypes
        and bump every parameter's version counter, on which caches are keyed."""
        views = [entry for entry in self.entries if entry.dtype == self.data.dtype]
        torch.autograd.graph.increment_version([p for entry in views for p in entry.parameters])
        if len(views) < len(self.entries):
            for entry in self.entries:
                if entry.dtype != self.data.dtype:
                    self.publish_entry(entry)

    @torch.no_grad()
    def publish_entry(self, entry: FlatEntry) -> None:
        """The same of one entry."""
        if entry.dtype == self.data.dtype:
            torch.autograd.graph.increment_version(entry.parameters)
        else:
            for parameter, master in entry.views(self.data):
                parameter.copy_(master)

    def named_copies(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """A flat buffer [P] as one CPU tensor of its own per parameter, as files want it."""
        copies = {e.name: e.view(buffer).detach().to("cpu", copy=True) for e in self.entries}
        return {name: copy.contiguous() for name, copy in copies.items()}

    @torch.no_grad()
    def load_named(self, buffer: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> None:
        """The inverse of `named_copies`. Raises UserError on other names or shapes."""
        self._check_names_and_shapes(tensors)
        for entry in self.entries:
            entry.view(buffer).copy_(tensors[entry.name])

    def release(self) -> None:
        """Give every parameter storage of its own, with its current values, and drop gradients.

        Saving, merging and other libraries then meet ordinary parameters.
        """
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for entry in self.entries:
            own = self.data[entry.part].clone()
            for parameter, values in dataclasses.replace(entry, offset=0).views(own):
                parameter.grad = None
                if entry.dtype == self.data.dtype:
                    parameter.data = values
            torch.autograd.graph.increment_version(entry.parameters)

    def _attach(self) -> None:
        for entry in self.entries:
            entry.view(self.data).copy_(entry.parameters[0].data)
            for parameter, values in entry.views(self.data):
                parameter.grad = None
                if entry.dtype == self.data.dtype:
                    parameter.data = values
            if not self.gathered:
                self._hooks.append(self._watch(entry))
            elif entry.dtype != torch.float32:
                trained = [(p, g) for p, g in entry.views(self.grad) if p.requires_grad]
                self._hooks += [_accumulate_in_float32(p, grad) for p, grad in trained]
            torch.autograd.graph.increment_version(entry.parameters)
        self.zero_grad()

    def _watch(self, entry: FlatEntry) -> RemovableHandle:
        """Hands the entry's gradient to `on_arrival`, and lets go of it."""
        trained = [parameter for parameter in entry.parameters if parameter.requires_grad]
        if len(trained) > 1:
            raise UserError(
                f"train.layerwise_update: {entry.name} is the memory of {len(trained)} parameters "
                "(PEFT's tied adapters), whose gradients add up after the backward pass; leave "
                "layerwise_update out"
            )

        def arrived(parameter: torch.Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            if self.on_arrival is not None:
                self.on_arrival(entry, gradient)

        return trained[0].register_post_accumulate_grad_hook(arrived)

    def _check_needs_no_masters(self) -> None:
        for entry in self.entries:
            if entry.dtype != torch.bfloat16:
                dtype = str(entry.dtype).removeprefix("torch.")
                raise UserError(
                    f"train.rounding stochastic: {entry.name} is {dtype}, and weights that are "
                    "rounded at random are bfloat16: set model.dtype=bfloat16, or leave rounding "
                    "out"
                )

    def _check_names_and_shapes(self, tensors: Mapping[str, torch.Tensor]) -> None:
        expected = {entry.name: tuple(entry.shape) for entry in self.entries}
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if expected == shapes:
            return
        problems = [f"{name} is missing" for name in expected.keys() - shapes.keys()]
        problems += [f"{name} is not a parameter" for name in shapes.keys() - expected.keys()]
        problems += [
            f"{name} has shape {list(shapes[name])}, not {list(expected[name])}"
            for name in expected.keys() & shapes.keys()
            if expected[name] != shapes[name]
        ]
        shown = "; ".join(sorted(problems)[:3])
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise UserError(f"not the tensors of this model's trainable parameters: {shown}{more}")


def _has_hooks(parameter: nn.Parameter) -> bool:
    """Whether autograd calls someone with this parameter's gradient."""
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)


def _accumulate_in_float32(parameter: nn.Parameter, grad: torch.Tensor) -> RemovableHandle:
    def add_to_flat(p: torch.Tensor) -> None:
        assert p.grad is not None
        grad.add_(p.grad)
        p.grad = None

    return parameter.register_post_accumulate_grad_hook(add_to_flat)


def _layout(
    named: list[tuple[str, nn.Parameter]], rate_of: Callable[[str], float], alignment: int
) -> tuple[tuple[FlatEntry, ...], tuple[tuple[slice, float], ...], int]:
    """An aligned entry for each distinct memory, the slice of each rate, and the buffers' size."""
    by_rate: dict[float, list[list[tuple[str, nn.Parameter]]]] = {}
    for group in groups_of_memory(named):
        name, first = group[0]
        if not first.dtype.is_floating_point:
            raise UserError(f"{name}: cannot train parameters of type {first.dtype}")
        by_rate.setdefault(rate_of(name), []).append(group)
    entries, rates, offset = [], [], 0
    step, rate_step = (a // torch.float32.itemsize for a in (alignment, RATE_ALIGNMENT))
    for rate, members in by_rate.items():
        start = offset
        for group in members:
            parameters = tuple(parameter for _, parameter in group)
            strides = tuple(map(compact_strides, parameters))
            entries.append(
                FlatEntry(
                    name=group[0][0],
                    parameters=parameters,
                    strides=strides,
                    offset=offset,
                    rate=rate,
                )
            )
            offset += -(-parameters[0].numel() // step) * step
        if len(by_rate) > 1:
            offset = -(-offset // rate_step) * rate_step
        rates.append((slice(start, offset), rate))
    return tuple(entries), tuple(rates), offset
