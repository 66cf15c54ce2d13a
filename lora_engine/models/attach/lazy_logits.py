"""The result of a causal language model whose logits are made when somebody reads them."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from lora_engine.errors import UserError


class GivenLogits:
    """The logits of one result that somebody has read, in each dtype."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []

    def add(self, logits: Tensor) -> None:
        """Takes note of `logits`."""
        self._tensors.append(logits)

    def refuse_watchers(self) -> None:
        """UserError where somebody waits for the loss's gradient in the logits: none comes.

        Forgets them all.
        """
        given, self._tensors = self._tensors, []
        if any(logits.retains_grad or logits._backward_hooks for logits in given):
            raise UserError(
                "the loss is not computed from the logits, whose hooks and retain_grad() get no "
                "gradient of it: compute it from them, or call lora_engine.restore(model)"
            )


class LazyLogits:
    """Logits of type `dtype`, made at the first `value()`."""

    def __init__(self, make: Callable[[], Tensor], dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._make: Callable[[], Tensor] | None = make
        self._made: Tensor | None = None
        self.given = GivenLogits()

    def float(self) -> "LazyLogits":
        """The same in float32, made when they are read: accelerate converts results so."""
        converted = LazyLogits(lambda: self.value().float(), torch.float32)
        converted.given = self.given
        return converted

    def value(self) -> Tensor:
        """The logits. Raises UserError after `expire()`, unless they were made before."""
        if self._made is None:
            if self._make is None:
                raise UserError(
                    "logits are read after backward(), and the head that makes them is trained: "
                    "read them before, or call lora_engine.restore(model)"
                )
            self._made = self._make()
            self.given.add(self._made)
        return self._made

    def expire(self) -> None:
        """From now on the logits could be another head's than that of the loss."""
        self._make = None


class CausalLmOutput(CausalLMOutputWithPast):
    """transformers' result; reading `logits`, by name or by place, makes them.

    What walks over all of it by `items()` or `values()` passes LazyLogits on without making them.
    """

    def __getattribute__(self, name: str) -> object:
        value = super().__getattribute__(name)
        return value.value() if isinstance(value, LazyLogits) else value

    def __getitem__(self, key: str | int | slice) -> object:
        if isinstance(key, str):
            value = dict(super().items())[key]
            return value.value() if isinstance(value, LazyLogits) else value
        names = list(super().keys())[key]
        return tuple(self[name] for name in names) if isinstance(names, list) else self[names]

    def get(self, key: str, default: object = None) -> object:
        """As a dictionary's."""
        value = super().get(key, default)
        return value.value() if isinstance(value, LazyLogits) else value

    def to_tuple(self) -> tuple[object, ...]:
        """Every result that there is, logits among them."""
        return tuple(self[name] for name in self)
