"""The sum over processes of gradients that lie in one buffer, begun while they still arrive."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lora_engine.distributed.world import World
from lora_engine.errors import UserError


class GradientSum:
    """Adds up `grad` over the processes of `world`, in place.

    grad: [P] float32, the same layout in every process.
    large: parameters whose part of `grad` is worth a sum of its own, with that part, in the order
        of the buffer. Within `overlapped` the sum of each begins when its gradient has arrived; in
        every process in the same order, from the last one on, as gradients arrive, so that one
        that comes early waits for those after it. The rest is added up at the end.

    A sum of its own pays where it takes long beside a launch: of millions of values. Gradients of
    adapters are small, and added up at once.
    """

    def __init__(
        self, world: World, grad: Tensor, large: Sequence[tuple[nn.Parameter, slice]]
    ) -> None:
        self._world = world
        self._grad = grad
        self._large = [part for _, part in reversed(large)]
        self._rest = _between(grad.numel(), [part for _, part in large])
        self._arrived = [False] * len(large)
        self._begun = 0
        self._works: list[dist.Work | None] = []
        self._on = False
        watched = list(reversed(large)) if world.size > 1 else []
        self._hooks = [self._watch(p, number) for number, (p, _) in enumerate(watched)]

    @contextmanager
    def overlapped(self) -> Iterator[None]:
        """Around the last backward pass of this process's step."""
        self._on = True
        try:
            yield
        finally:
            self._on = False

    def finish(self) -> None:
        """Begin what has not begun, and wait; all processes call it once a step."""
        if self._world.size == 1:
            return
        for part in [*self._large[self._begun :], *self._rest]:
            self._begin(part)
        for work in self._works:
            self._world.end(work)
        self._works.clear()
        self._begun = 0
        self._arrived = [False] * len(self._arrived)

    def close(self) -> None:
        """Watch no parameter any more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _begin(self, part: slice) -> None:
        self._works.append(self._world.begin_add_(self._grad[part]))

    def _watch(self, parameter: nn.Parameter, number: int) -> RemovableHandle:
        def arrived(_: Tensor) -> None:
            if not self._on:
                return
            if self._arrived[number]:
                raise UserError(
                    "a parameter's gradient arrives in several parts, such as reentrant "
                    "checkpointing makes of a shared one; use use_reentrant=False"
                )
            self._arrived[number] = True
            while self._begun < len(self._large) and self._arrived[self._begun]:
                self._begin(self._large[self._begun])
                self._begun += 1

        return parameter.register_post_accumulate_grad_hook(arrived)


def _between(size: int, parts: Sequence[slice]) -> list[slice]:
    """What the ascending `parts` leave of a buffer of `size` elements."""
    starts = [0, *(part.stop for part in parts)]
    ends = [*(part.start for part in parts), size]
    return [slice(a, b) for a, b in zip(starts, ends, strict=True) if a < b]
