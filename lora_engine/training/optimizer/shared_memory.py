"""Which parameters are the same memory, and how each of them lies in it."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from lora_engine.errors import UserError

NamedParameter = tuple[str, nn.Parameter]


def groups_of_memory(named: Sequence[NamedParameter]) -> list[list[NamedParameter]]:
    """The trainable parameters, those that are the same memory in one group.

    A group's frozen parameters come last. Raises UserError if a trainable parameter shares only a
    part of its memory with another one, trainable or not, or with itself.
    """
    devices = {p.device for _, p in named if p.requires_grad}
    groups: dict[object, list[NamedParameter]] = {}
    for name, parameter in named:
        if parameter.device not in devices:
            continue
        members = groups.setdefault(_memory_key(name, parameter), [])
        if all(parameter is not other for _, other in members):
            members.append((name, parameter))
    for members in groups.values():
        members.sort(key=lambda member: not member[1].requires_grad)
    _refuse_partial_overlap([members[0] for members in groups.values()])
    return [members for members in groups.values() if members[0][1].requires_grad]


def compact_strides(p: torch.Tensor) -> tuple[int, ...]:
    """The strides of a contiguous copy of `p` whose elements keep their order in memory.

    A row-major [3, 4] has (4, 1), its transpose [4, 3] (1, 4); a column slice of a wider matrix has
    those of a matrix of its own.
    """
    runs = _runs(p)
    strides = []
    for stride, size in zip(p.stride(), p.shape, strict=True):
        if size == 1 or p.numel() == 0:
            strides.append(1)
            continue
        inner = 1
        for step, length in reversed(runs):
            if step <= stride < step * length:
                strides.append(inner * (stride // step))
                break
            inner *= length
    return tuple(strides)


def _runs(p: torch.Tensor) -> tuple[tuple[int, int], ...]:
    """The memory of `p` as (stride, size) from the slowest dimension to the fastest.

    Dimensions whose elements are contiguous across both are merged, so that tensors with the same
    address and the same runs have the same elements, whatever their shapes.
    """
    if p.numel() == 0:
        return ()
    dims = sorted(((s, n) for s, n in zip(p.stride(), p.shape, strict=True) if n > 1), reverse=True)
    runs: list[tuple[int, int]] = []
    for step, length in dims:
        if runs and runs[-1][0] == step * length:
            runs[-1] = (step, runs[-1][1] * length)
        else:
            runs.append((step, length))
    return tuple(runs)


def _memory_key(name: str, p: nn.Parameter) -> object:
    """A key that parameters with the same memory share; an empty parameter shares its with none."""
    if p.numel() == 0:
        return id(p)
    runs = _runs(p)
    repeats = any(step == 0 for step, _ in runs)
    folds = any(step * length > slower for (slower, _), (step, length) in pairwise(runs))
    if p.requires_grad and (repeats or folds):
        raise UserError(f"{name}: its elements share memory with each other: clone or freeze it")
    return p.data_ptr(), runs, p.dtype


def _refuse_partial_overlap(named: list[NamedParameter]) -> None:
    """Raises UserError for tensors that share only a part of their memory, one of them trained.

    They could not both move into a flat buffer and still share it.
    """
    placed = sorted(((p.data_ptr(), name, p) for name, p in named if p.numel()), key=lambda x: x[0])
    before: list[tuple[int, str, nn.Parameter]] = []  # those that reach beyond the current start
    for start, name, p in placed:
        before = [(end, n, q) for end, n, q in before if end > start]
        for _, other, q in before:
            if (p.requires_grad or q.requires_grad) and _share_a_byte(q, p):
                raise UserError(
                    f"{other} and {name} share a part of their memory: untie or freeze one"
                )
        before.append((start + _span(p), name, p))


def _span(p: torch.Tensor) -> int:
    """Bytes from the first element of `p` to behind its last."""
    last = sum(stride * (size - 1) for stride, size in zip(p.stride(), p.shape, strict=True))
    return (last + 1) * p.element_size()


def _share_a_byte(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether tensors whose spans overlap, `first` beginning first, have a byte in common.

    Column slices of one matrix have none.
    """
    shift = second.data_ptr() - first.data_ptr()
    used = torch.zeros(max(_span(first), shift + _span(second)), dtype=torch.bool)

    def bytes_of(p: torch.Tensor, start: int) -> torch.Tensor:
        size = p.element_size()
        return used.as_strided((*p.shape, size), (*(s * size for s in p.stride()), 1), start)

    bytes_of(first, 0).fill_(True)
    return bool(bytes_of(second, shift).any())
