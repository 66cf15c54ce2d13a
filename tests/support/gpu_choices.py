"""The choices that are made on a GPU, for tensors on the CPU: Triton's kernels, interpreted."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from lora_engine.backends import selection
from lora_engine.backends.choice import Choice, choose
from lora_engine.backends.request import Extent, Present, Request

CAPABILITY = 90


@contextmanager
def choices_of_a_gpu() -> Iterator[None]:
    """Within this context operations on CPU tensors run as they would on a GPU of CAPABILITY.

    That is everything but the launches' parameters, which are the interpreter's.
    """

    def of_a_gpu(request: Request, present: Present) -> Choice:
        if request.device != "cpu" or request.impl or isinstance(request.sizes, Extent):
            return choose(request, present)
        there = replace(request, device="cuda", capability=CAPABILITY)
        return choose(there, replace(present, gpu=True, architectures=()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "choose", of_a_gpu)
        _forget()
        yield
    _forget()


def _forget() -> None:
    selection._choose_once.cache_clear()
