"""A GPU's copies on a CPU, made as late as they may be."""

from collections import deque

import torch
from torch.multiprocessing.reductions import StorageWeakRef


class LateCopies:
    """`backends.copies` for tests: a copy is made when it, or a later one, is waited for.

    Until then its target holds NaN (all bits set), unless an earlier copy has yet to read it. Who
    computes with a target, or writes to a source, before the wait gets other bits; who lets go of
    one before the wait gets an AssertionError. log: "begin 0", "wait 0", … by the numbers of
    copies. forget: the number of a wait that does nothing.
    """

    def __init__(self, forget=None):
        self.log, self.sources, self.waits = [], [], 0
        self._forget, self._pending = forget, deque()

    def host(self, like):
        return torch.empty(like.shape, dtype=like.dtype)

    def begin(self, target, source):
        assert target.is_contiguous() and target.shape == source.shape
        if not any(_same_memory(target, copy.source) for copy in self._pending):
            _set_all_bits(target)
        copy = _Late(self, len(self.sources), target.detach(), source.detach())
        self.sources.append(StorageWeakRef(source.untyped_storage()))
        self._pending.append(copy)
        self.log.append(f"begin {copy.number}")
        return copy

    def finish(self):
        self._make(len(self.sources))

    def waited(self, number):
        self.log.append(f"wait {number}")
        self.waits += 1
        if self._forget != self.waits - 1:
            self._make(number)

    def _make(self, number):
        while self._pending and self._pending[0].number <= number:
            copy = self._pending.popleft()
            for name, tensor in (("source", copy.source), ("target", copy.target)):
                others = any(
                    _same_memory(tensor, each)
                    for other in self._pending
                    for each in (other.source, other.target)
                )
                assert others or not _is_last(tensor), f"the {name} is gone before its copy"
            _set_all_bits(copy.target)
            copy.target.copy_(copy.source)
            copy.target = copy.source = None


class _Late:
    def __init__(self, owner, number, target, source):
        self.owner, self.number, self.target, self.source = owner, number, target, source

    def wait(self):
        self.owner.waited(self.number)


def _set_all_bits(tensor):
    tensor.detach().view(-1).view(torch.uint8).fill_(255)


def _same_memory(a, b):
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _uses(tensor):
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


def _is_last(tensor):
    """Whether no other tensor has its memory."""
    return _uses(tensor) <= _uses(torch.empty(1))
