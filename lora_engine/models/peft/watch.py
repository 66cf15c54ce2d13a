"""Whether modules are still what they were when they were last looked at, at a glance."""

from collections.abc import Callable, Mapping
from itertools import repeat
from operator import getitem, is_
from typing import TypeAlias, cast

from torch import nn

Place: TypeAlias = Mapping[str, object]  # a dict; its values may be of a narrower type

_ABSENT = object()
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")

# Fetched from the class, where it is found once.
_in_dict = cast("Callable[[Place, str, object], object]", dict.get)


class Watch:
    """Remembers objects by their places, and tells whether the same ones stand there still.

    A step asks it of thousands of places, and `holds` calls no function of Python for any of them.
    A watch that was shown nothing never holds. Nor does a copy of one, as `copy.deepcopy` makes of
    a model's: the places are the original's.
    """

    def __init__(self) -> None:
        self._modules: list[nn.Module] = []
        self._attributes: list[Place] = []
        self._classed: list[nn.Module] = []
        self._classes: list[type] = []
        self._places: list[Place] = []
        self._keys: list[str] = []
        self._objects: list[object] = []
        self._holders: list[Place] = []
        self._hooks: list[str] = []

    def __reduce__(self) -> tuple[type["Watch"], tuple[()]]:
        return Watch, ()

    def item(self, place: Place, key: str) -> None:
        """`place[key]` shall be the object that it is now, or absent if it is."""
        self._places.append(place)
        self._keys.append(key)
        self._objects.append(place.get(key, _ABSENT))

    def attributes(self, module: nn.Module, *names: str) -> None:
        """Attributes of the module itself shall be the objects that they are now, or absent."""
        for name in names:
            self.item(self._own(module), name)

    def of_class(self, module: nn.Module) -> None:
        """`module` shall be of the class that it is of now."""
        self._classed.append(module)
        self._classes.append(type(module))

    def unaltered(self, module: nn.Module) -> None:
        """`module`, which has no hooks, shall have none, and the forward that it has now."""
        self.attributes(module, "forward")
        self._holders += [self._own(module)] * len(_HOOKS)
        self._hooks += _HOOKS

    def _own(self, module: nn.Module) -> Place:
        """The attributes of `module`, which shall not be exchanged as a whole."""
        if not self._modules or self._modules[-1] is not module:
            self._modules.append(module)
            self._attributes.append(vars(module))
        return self._attributes[-1]

    def holds(self) -> bool:
        """Whether all is as it was."""
        found = map(_in_dict, self._places, self._keys, repeat(_ABSENT))
        return (
            len(self._places) > 0
            and all(map(is_, map(vars, self._modules), self._attributes))
            and all(map(is_, map(type, self._classed), self._classes))
            and all(map(is_, found, self._objects))
            and not any(map(getitem, self._holders, self._hooks))
        )
