"""All trainable parameters in one buffer, their gradients in another.

One optimiser launch and one reduction for the norm then serve any number of parameters.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from lora_engine.errors import UserError

ALIGNMENT = 64  # bytes; every parameter starts on a cache line, as a tensor of its own would
RATE_ALIGNMENT = 1024  # bytes; a block of 256 moments in 8 bits belongs to one learning rate


@dataclasses.dataclass(frozen=True)
class FlatEntry:
    """Where one parameter lies in the flat buffers.

    parameters: the tensors that share this storage, usually one.
    offset: index of its first element in the buffers.
    """

    name: str
    parameters: tuple[nn.Parameter, ...]
    shape: torch.Size
    dtype: torch.dtype
    offset: int

    @property
    def numel(self) -> int:
        return self.shape.numel()

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        """This parameter's part of a flat buffer, in the parameter's shape."""
        return buffer[self.offset : self.offset + self.numel].view(self.shape)


class FlatParameters:
    """Owns the storage of trainable parameters while they are trained.

    data [P] float32: float32 parameters are views into it; for another dtype it holds a float32
        master copy, which `publish` rounds into the parameter.
    grad [P] float32: the `.grad` of float32 parameters are views into it, and autograd adds to
        them in place. Gradients of other dtypes are added to it in float32 after every backward
        pass, so that accumulation over micro-batches does not round to 16 bits.
    P counts a few unused elements, always 0, that align every parameter to 64 bytes.

    rates: the parts of the buffers in order, as slices, and what multiplies the learning rate.

    Parameters that share storage (tied weights) are held once, under the first one's name.
    `release` gives the parameters storage of their own again.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        rate_of: Callable[[str], float] = lambda name: 1.0,
    ) -> None:
        """Takes those that require gradients. `rate_of` a name multiplies its learning rate.

        Raises UserError if there are none, if they are on several devices, or if two of them
        overlap in part.
        """
        trainable = [(name, p) for name, p in named_parameters if p.requires_grad]
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
        self.entries, self.rates, size = _layout(trainable, rate_of)
        self.data = torch.zeros(size, dtype=torch.float32, device=self.device)
        self.grad = torch.zeros_like(self.data)
        self._hooks: list[Any] = []
        self._attach()

    @property
    def numel(self) -> int:
        """Number of trained values, without the padding."""
        return sum(entry.numel for entry in self.entries)

    def zero_grad(self) -> None:
        """Set all gradients to zero and the `.grad` of float32 parameters to views of `grad`."""
        self.grad.zero_()
        for entry in self.entries:
            for parameter in entry.parameters:
                is_view = entry.dtype == torch.float32
                parameter.grad = entry.view(self.grad) if is_view else None

    def publish(self) -> None:
        """Tell the parameters that `data` changed: round masters into parameters of other dtypes
        and bump every parameter's version counter, on which caches are keyed."""
        with torch.no_grad():
            for entry in self.entries:
                if entry.dtype == torch.float32:
                    torch.autograd.graph.increment_version(entry.parameters)
                else:
                    for parameter in entry.parameters:
                        parameter.copy_(entry.view(self.data))

    def named_copies(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """A flat buffer [P] as one CPU tensor of its own per parameter, as files want it."""
        return {e.name: e.view(buffer).detach().to("cpu", copy=True) for e in self.entries}

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
            own = entry.view(self.data).clone() if entry.dtype == torch.float32 else None
            for parameter in entry.parameters:
                parameter.grad = None
                if own is not None:
                    parameter.data = own
            torch.autograd.graph.increment_version(entry.parameters)

    def _attach(self) -> None:
        for entry in self.entries:
            view = entry.view(self.data)
            view.copy_(entry.parameters[0].data)
            for parameter in entry.parameters:
                parameter.grad = None
                if entry.dtype == torch.float32:
                    parameter.data = view
                else:
                    self._hooks.append(self._accumulate_in_float32(entry, parameter))
            torch.autograd.graph.increment_version(entry.parameters)
        self.zero_grad()

    def _accumulate_in_float32(self, entry: FlatEntry, parameter: nn.Parameter) -> Any:
        def add_to_flat(p: torch.Tensor) -> None:
            assert p.grad is not None
            entry.view(self.grad).add_(p.grad)
            p.grad = None

        return parameter.register_post_accumulate_grad_hook(add_to_flat)

    def _check_names_and_shapes(self, tensors: Mapping[str, torch.Tensor]) -> None:
        expected = {entry.name: tuple(entry.shape) for entry in self.entries}
        given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if expected == given:
            return
        problems = [f"{name} is missing" for name in expected.keys() - given.keys()]
        problems += [f"{name} is not a parameter" for name in given.keys() - expected.keys()]
        problems += [
            f"{name} has shape {list(given[name])}, not {list(expected[name])}"
            for name in expected.keys() & given.keys()
            if expected[name] != given[name]
        ]
        shown = "; ".join(sorted(problems)[:3])
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise UserError(f"not the tensors of this model's trainable parameters: {shown}{more}")


def _layout(
    trainable: list[tuple[str, nn.Parameter]], rate_of: Callable[[str], float]
) -> tuple[tuple[FlatEntry, ...], tuple[tuple[slice, float], ...], int]:
    """Aligned offsets for distinct storages, one stretch for each rate, and the buffers' size."""
    groups: dict[object, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in trainable:
        if not parameter.dtype.is_floating_point:
            raise UserError(f"{name}: cannot train parameters of type {parameter.dtype}")
        groups.setdefault(_storage_key(parameter), []).append((name, parameter))
    _refuse_partial_overlap([group[0] for group in groups.values()])
    by_rate: dict[float, list[list[tuple[str, nn.Parameter]]]] = {}
    for group in groups.values():
        by_rate.setdefault(rate_of(group[0][0]), []).append(group)
    entries, rates, offset = [], [], 0
    step, rate_step = (a // torch.float32.itemsize for a in (ALIGNMENT, RATE_ALIGNMENT))
    for rate, members in by_rate.items():
        start = offset
        for group in members:
            name, first = group[0]
            parameters = tuple(parameter for _, parameter in group)
            entries.append(FlatEntry(name, parameters, first.shape, first.dtype, offset))
            offset += -(-first.numel() // step) * step
        if len(by_rate) > 1:
            offset = -(-offset // rate_step) * rate_step
        rates.append((slice(start, offset), rate))
    return tuple(entries), tuple(rates), offset


def _storage_key(p: nn.Parameter) -> object:
    """Equal for parameters that are the same memory; an empty one equals nothing else."""
    if p.numel() == 0:
        return id(p)
    return p.data_ptr(), p.shape, p.stride(), p.dtype


def _refuse_partial_overlap(named: list[tuple[str, nn.Parameter]]) -> None:
    """Two windows on one memory cannot both move into a flat buffer and stay the same values."""
    contiguous = [(n, p) for n, p in named if p.numel() and p.is_contiguous()]
    contiguous.sort(key=lambda item: item[1].data_ptr())
    for (name, p), (other, q) in itertools.pairwise(contiguous):
        if q.data_ptr() < p.data_ptr() + p.numel() * p.element_size():
            raise UserError(f"{name} and {other} share a part of their memory: untie or freeze one")
