"""Launches of a kernel that is compiled already, without Triton's work for every call.

`kernel[grid](...)` binds and specialises the arguments anew at each launch and looks the compiled
kernel up by them: 25 to 40 µs of the processor's time on the machine of an H100, where a training
step of a small model makes hundreds of launches and waits for them. What Triton compiles for
depends on little: dtype and alignment of a tensor, whether an integer is 1 or a multiple of 16, and
on the constants. By that the compiled kernel is kept here, and launched as Triton would.
"""

from typing import Any, TypeAlias

import torch
from torch import Tensor

# The alignment of pointers and the divisor of integers that Triton specialises on.
DIVISOR = 16
Key: TypeAlias = tuple[object, ...]


class Relaunched:
    """A @triton.jit function that keeps what it was compiled to.

    On a GPU `self[grid](*args, **constants)`: `args` are the kernel's first parameters, numbers and
    tensors; `constants` its constexpr parameters and Triton's options. Elsewhere, interpreted or
    compiled for a GPU that is not there, it is Triton's own.
    """

    def __init__(self, jit: Any) -> None:
        self.jit = jit
        # An interpreted function has no such list, and is never kept.
        self.constexprs = frozenset(getattr(jit, "constexprs", ()))
        self.compiled: dict[Key, tuple[Any, tuple[object, ...]]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.jit, name)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **constants: Any) -> None:
            key = self._key(args, constants)
            if key is None:
                self.jit[grid](*args, **constants)
                return
            found = self.compiled.get(key)
            if found is None:
                self._compile(key, grid, args, constants)
                return
            compiled, rest = found
            compiled[(*grid, 1, 1)[:3]](*args, *rest)

        return launch

    def _compile(
        self, key: Key, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]
    ) -> None:
        """Launches by Triton, which gives back what it compiled."""
        compiled = self.jit[grid](*args, **constants)
        names = self.jit.arg_names[len(args) :]
        if all(name in constants for name in names):
            self.compiled[key] = compiled, tuple(constants[name] for name in names)

    def _key(self, args: tuple[Any, ...], constants: dict[str, Any]) -> Key | None:
        """What the compiled kernel depends on; None where nothing is kept."""
        found: list[object] = [_device(args)]
        if found[0] is None:
            return None
        for i, arg in enumerate(args):
            if i in self.constexprs:
                found.append((type(arg), arg))
            elif isinstance(arg, Tensor):
                found.append((arg.dtype, arg.data_ptr() % DIVISOR == 0))
            elif arg is None:
                found.append(None)
            elif type(arg) is int:
                found.append((arg == 1, arg % DIVISOR == 0, -(2**31) <= arg < 2**31, arg < 2**63))
            elif type(arg) is float:
                found.append(float)
            else:
                return None
        return *found, *constants.items()


def _device(args: tuple[Any, ...]) -> int | None:
    """The current GPU, if the tensors are on one."""
    tensor = next((arg for arg in args if isinstance(arg, Tensor)), None)
    return torch.cuda.current_device() if tensor is not None and tensor.is_cuda else None
