"""The forwards that modules have of their own, in the place of their classes'."""

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from types import CodeType, FunctionType, MethodType
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack
from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode

from lora_engine.errors import UserError

P = ParamSpec("P")
R = TypeVar("R")

_MEND = "call lora_engine.restore(model) before"


def uncompiled(call: Callable[P, R]) -> Callable[P, R]:
    """Makes a replaced forward, and all that it calls, run under torch.compile as without.

    Tracing our operations gains nothing: they are no part of compiled graphs, and each ends one.
    Where the whole model is to be one graph, the forward raises UserError (`torch.export`,
    `torch.jit.trace`), or torch.compile says why (`fullgraph=True`).
    """

    @wraps(call)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        instead = _exchanged(args[0] if args else None)
        if instead is not None:
            result: R = instead(*args[1:], **kwargs)
            return result
        for x in (*args[1:2], kwargs.get("hidden_states")):
            if isinstance(x, Tensor) and not _has_memory(x):
                raise UserError(
                    f"an accelerated model cannot compute with a {type(x).__name__} on {x.device}, "
                    f"which has no memory of its own: {_MEND}"
                )
        if torch.compiler.is_exporting():
            raise UserError(f"torch.export cannot record an accelerated model: {_MEND}")
        if torch.jit.is_tracing():
            raise UserError(f"torch.jit.trace cannot record an accelerated model: {_MEND}")
        with unrecorded():
            return call(*args, **kwargs)

    why = f"an accelerated model has no full graph, and cannot be exported: {_MEND}"
    uncompiled_run: Callable[P, R] = torch.compiler.disable(run, reason=why)
    return uncompiled_run


def unrecorded() -> AbstractContextManager[object]:
    """Within: policies of selective checkpointing are not asked, and all is computed again.

    They keep results of PyTorch's operations, which kernels write into before and after.
    """
    if torch._C._len_torch_dispatch_stack() and any(
        isinstance(mode, _CachingTorchDispatchMode | _CachedTorchDispatchMode)
        for mode in _get_current_dispatch_mode_stack()
    ):
        modes: AbstractContextManager[object] = _disable_current_modes()
        return modes
    return nullcontext()


def _has_memory(x: Tensor) -> bool:
    """Whether kernels can read x: not what only wraps other tensors, nor a fake or meta tensor."""
    try:
        return x.numel() == 0 or x.data_ptr() != 0
    except RuntimeError:
        return False


class ReplacedForward:
    """A forward of ours in the place of a method, whose code tools look at beside its signature."""

    __wrapped__: FunctionType  # or a bound method, which has all that its function has
    replaces_class = False  # whether what it replaced was the forward of the module's class
    called_by: object = nn.Module.__call__  # the __call__ of the module's class then

    @property
    def __code__(self) -> CodeType:
        return self.__wrapped__.__code__


def own_forward(module: nn.Module) -> object:
    """The forward that the module was given; None if it has its class's.

    Where somebody has exchanged the class, or its forward, since ours replaced it: the new one; or
    its `__call__`: that.
    """
    forward = vars(module).get("forward")
    if isinstance(forward, ReplacedForward) and forward.called_by is not type(module).__call__:
        return type(module).__call__
    return _exchanged(forward) or forward


def _exchanged(forward: object) -> Callable[..., R] | None:
    """The forward that the class of the module has by now; None if ours replaced that very one."""
    if not isinstance(forward, ReplacedForward) or not forward.replaces_class:
        return None
    replaced: object = forward.__wrapped__
    if not isinstance(replaced, MethodType):
        return None
    module = replaced.__self__
    assert isinstance(module, nn.Module)
    now = type(module).forward
    return None if now is replaced.__func__ else MethodType(now, module)


def only_argument(original: Callable[..., object], named: Mapping[str, Tensor]) -> Tensor:
    """The argument of a call by the name that `original` has for it; TypeError as `original`'s."""
    bound = inspect.signature(original).bind(**named)
    argument: Tensor = bound.args[0]
    return argument
