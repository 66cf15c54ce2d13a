"""Changes of behaviour on instances, and how to take them back."""

from collections.abc import Callable
from typing import Any

import torch


class Patches:
    """A list of changes to module instances, undone in reverse order."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def set_attribute(self, owner: Any, name: str, value: Any) -> None:
        """Sets `owner.name` on the instance; undone by deleting or restoring it."""
        missing = object()
        before = vars(owner).get(name, missing)
        object.__setattr__(owner, name, value)

        def undo() -> None:
            if before is missing:
                object.__delattr__(owner, name)
            else:
                object.__setattr__(owner, name, before)

        self._undo.append(undo)

    def set_storage(self, parameter: torch.nn.Parameter, view: torch.Tensor) -> None:
        """Lets `parameter` be `view`, which holds the same values; undone by a copy of it.

        Where the parameter has meanwhile been given other storage (`model.to(...)`), that stays.
        """
        parameter.data = view

        def undo() -> None:
            if parameter.data_ptr() == view.data_ptr():
                parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)

        self._undo.append(undo)

    def on_undo(self, action: Callable[[], None]) -> None:
        """Runs `action` when the changes are taken back."""
        self._undo.append(action)

    def undo(self) -> None:
        """Takes every change back, the last first."""
        while self._undo:
            self._undo.pop()()
