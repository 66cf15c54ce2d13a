"""Changes of behaviour on instances, and how to take them back."""

import functools
from collections.abc import Callable
from enum import Enum

import torch
from torch import nn

from lora_engine.models.attach.forwards import ReplacedForward


class _Before(Enum):
    """Of an attribute that an instance had none of: the same object after pickling."""

    MISSING = "missing"


class Patches:
    """A list of changes to module instances, undone in reverse order."""

    def __init__(self) -> None:
        # Functions and arguments rather than closures: these are copied with the model.
        self._undo: list[tuple[Callable[..., None], tuple[object, ...]]] = []

    def set_attribute(self, owner: object, name: str, value: object) -> None:
        """Sets `owner.name` on the instance; undone by deleting or restoring it.

        Where somebody has meanwhile put something else there, that stays.
        """
        before = vars(owner).get(name, _Before.MISSING)
        object.__setattr__(owner, name, value)
        self.on_undo(_reset_attribute, owner, name, value, before)

    def set_forward(self, module: nn.Module, forward: Callable[..., object]) -> None:
        """Sets the module's forward, which shows the signature, name and docstring of its own."""
        functools.update_wrapper(forward, module.forward, updated=())
        if isinstance(forward, ReplacedForward):
            forward.replaces_class = "forward" not in vars(module)
            forward.called_by = type(module).__call__
        self.set_attribute(module, "forward", forward)

    def set_storage(self, parameter: torch.Tensor, view: torch.Tensor) -> None:
        """Lets `parameter` be `view`, which holds the same values; undone by a copy of it.

        Where the parameter has meanwhile been given other storage (`model.to(...)`), that stays.
        """
        parameter.data = view
        self.on_undo(_own_storage, parameter, view)

    def places(self, parameter: torch.Tensor) -> bool:
        """Whether `set_storage` was called for `parameter`."""
        return any(action is _own_storage and args[0] is parameter for action, args in self._undo)

    def on_undo(self, action: Callable[..., None], *args: object) -> None:
        """Calls `action(*args)` when the changes are taken back."""
        self._undo.append((action, args))

    def undo(self) -> None:
        """Takes every change back, the last first."""
        while self._undo:
            action, args = self._undo.pop()
            action(*args)


def _reset_attribute(owner: object, name: str, value: object, before: object) -> None:
    if vars(owner).get(name) is not value:
        return
    if before is _Before.MISSING:
        object.__delattr__(owner, name)
    else:
        object.__setattr__(owner, name, before)


def _own_storage(parameter: torch.Tensor, view: torch.Tensor) -> None:
    if parameter.data_ptr() == view.data_ptr():
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
