"""Makes Triton's interpreter right about bfloat16 matrix products and casts, and faster.

The interpreter holds bfloat16 as the 16 bits of a uint16 array. Its `tl.dot` multiplies those bits
as integers, and its cast from float32 cuts bits off where a GPU rounds to the nearest. Seen in
triton 3.6 to 3.9. Other arithmetic in bfloat16 is as wrong, and left so: kernels cast to float32
right after a load, on a GPU too.

It puts its own functions in the place of triton.language's when a kernel starts, and again whenever
a kernel calls another function: two thirds of the time of a kernel with many small functions.
"""

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle


def repair_bfloat16() -> None:
    """Replaces two methods of the interpreter, once for the process."""
    if getattr(InterpreterBuilder.create_dot, "repairs", False):
        return
    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def create_dot(
        self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: Any
    ) -> TensorHandle:
        return dot(self, _widened(a), _widened(b), *rest)

    def cast_impl(self: InterpreterBuilder, src: TensorHandle, dst_type: Any) -> TensorHandle:
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return TensorHandle(rounded_bits(src.data), tl.bfloat16)
        return cast(self, src, dst_type)

    create_dot.repairs = True  # type: ignore[attr-defined]
    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.cast_impl = cast_impl


def replace_functions_once() -> None:
    """A function that a kernel calls finds those of triton.language replaced, or replaces them."""
    if getattr(InterpretedFunction.__call__, "once", False):
        return
    replace = interpreter._patch_lang

    def __call__(self: InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
        modules = [x for x in (tl, tl.core) if any(x is y for y in self.fn.__globals__.values())]
        if any(tl.core.is_builtin(module.load) for module in modules):
            replace(self.fn)
        return self.rewrite()(*args, **kwargs)

    __call__.once = True  # type: ignore[attr-defined]
    InterpretedFunction.__call__ = __call__


def _widened(x: TensorHandle) -> TensorHandle:
    if x.dtype.scalar != tl.bfloat16:
        return x
    bits = x.data.astype(np.uint32) << np.uint32(16)
    return TensorHandle(bits.view(np.float32), tl.float32)


def rounded_bits(x: np.ndarray) -> np.ndarray:
    """float32 to the bits of the nearest bfloat16, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    bias = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    nearest = np.where(np.isnan(x), bits | np.uint32(0x400000), bits + bias)
    return (nearest >> np.uint32(16)).astype(np.uint16)
