"""A machine that executes PTX, thread for thread, on the CPU.

    kernel = ptx.Kernel(text)
    kernel.launch(grid, threads, [x, y, n], shared=bytes, completion="late", seed=1)

What a GPU does asynchronously (cp.async, bulk copies, wgmma) finishes as late as the program
allows, so that a missing wait or barrier shows as a wrong number; docs/ptx-machine.md says what
that proves and what it does not.
"""

from ptx import snippet
from ptx.kernel import Argument, Completion, Kernel, core
from ptx.parser import SyntaxFault, entries
from ptx.tensor_map import TensorMap

__all__ = [
    "Argument",
    "Completion",
    "Kernel",
    "SyntaxFault",
    "TensorMap",
    "core",
    "entries",
    "snippet",
]
