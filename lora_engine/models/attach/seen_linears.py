"""What linears of a group were when they were last looked at, and whether they are that still."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from lora_engine.models.families.modules import LoraLinear
from lora_engine.models.peft import lora_state
from lora_engine.models.peft.watch import Watch


class Placed(NamedTuple):
    """A linear, its weight, and the memory that the base has of it, which is not to be freed."""

    layer: nn.Linear
    weight: Tensor
    held: Tensor


def place_of(x: Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Which numbers in memory x is, and in which order: its address, shape and strides.

    A slice or a transpose has the address of the whole.
    """
    return x.data_ptr(), x.shape, x.stride()


class Computing(NamedTuple):
    """A module that is called, and what its class had for a forward and a __call__ when taken."""

    part: nn.Module
    forward: object
    call: object


class SeenLinears:
    """All that decides whether a group stands for its layers, and with which adapters.

    Every product of a step asks whether it is still the same.

    adapted: PEFT's layers. hookable: those of `computing` that are to have no hooks and their own
    forward; they have not now. names: the adapters that rows are routed to.
    """

    def __init__(
        self,
        *,
        adapted: Sequence[LoraLinear],
        placed: Iterable[Placed],
        computing: Iterable[Computing],
        hookable: Iterable[nn.Module],
        names: tuple[str, ...],
    ) -> None:
        self._watch = Watch()
        for part, _, _ in computing:
            self._watch.of_class(part)
        for part in hookable:
            self._watch.unaltered(part)
        for layer, _, _ in placed:
            lora_state.watch_tensors(self._watch, layer)
        for module in adapted:
            lora_state.watch_adapters(self._watch, module)
        self._names, self._adapted = names, adapted
        self._switches = [lora_state.switches(module) for module in adapted]
        self._factors = [f for module in adapted for f in lora_state.running_factors(module)]
        self._shapes = [factor.shape for factor in self._factors]
        self._classes = {(type(part), forward, call) for part, forward, call in computing}
        self._places = [(weight, place_of(held)) for _, weight, held in placed]

    def stand(self, names: tuple[str, ...]) -> bool:
        """Whether nothing has changed; names: as they are now."""
        return (
            self._watch.holds()
            and names is self._names
            and [lora_state.switches(module) for module in self._adapted] == self._switches
            and [factor.shape for factor in self._factors] == self._shapes
            and all(
                place_of(weight) == place and not weight.requires_grad
                for weight, place in self._places
            )
            and all(
                kind.forward is forward and kind.__call__ is call
                for kind, forward, call in self._classes
            )
        )
