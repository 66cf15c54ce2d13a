"""The forwards that modules have of their own, in the place of their classes'."""

import inspect
from collections.abc import Callable, Mapping
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

Call = TypeVar("Call", bound=Callable[..., object])


def uncompiled(call: Call) -> Call:
    """Makes a replaced forward, and all that it calls, run under torch.compile as without.

    Tracing our operations gains nothing: they are no part of compiled graphs, and each ends one.
    """
    return cast(Call, torch.compiler.disable(call))


def own_forward(module: nn.Module) -> object:
    """The forward that the module was given; None if it has its class's."""
    return vars(module).get("forward")


def only_argument(original: Callable[..., object], named: Mapping[str, Tensor]) -> Tensor:
    """The argument of a call by the name that `original` has for it; TypeError as `original`'s."""
    bound = inspect.signature(original).bind(**named)
    argument: Tensor = bound.args[0]
    return argument
