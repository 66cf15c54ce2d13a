"""Kernels in PTX, executed on the CPU."""

import struct
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Literal, TypeAlias

import compiled_module
import numpy as np
from torch import Tensor

from ptx.parser import Parameter, parse
from ptx.tensor_map import TensorMap

CORE = Path(__file__).parent / "core"
# Products and sums are not fused unless the program says so.
FLAGS = ["-std=c++17", "-O2", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-g0"]
FLAGS += ["-Wall", "-Wextra", "-Werror"]

Argument: TypeAlias = Tensor | np.ndarray | TensorMap | int | float | bytes | None
Completion: TypeAlias = Literal["late", "early", "random"]


@cache
def core() -> ModuleType:
    """The machine itself. Skips the test where there is no C++ compiler."""
    sources = sorted(CORE.glob("*.cpp"))
    return compiled_module.build("ptx_core", sources, sorted(CORE.glob("*.hpp")), [CORE], FLAGS)


class Kernel:
    """A kernel of a PTX module. Raises `core().Fault` for an instruction that is not known.

    entry: the kernel's name or a part of it that no other has.
    """

    def __init__(self, ptx: str, entry: str = "") -> None:
        self.parsed = parse(ptx, entry)
        p = self.parsed
        self.program = core().Program(
            p.instructions,
            p.constants,
            p.register_bytes,
            p.predicate_bytes,
            p.local_bytes,
            p.specials,
        )

    def launch(
        self,
        grid: Sequence[int],
        block: Sequence[int] | int,
        args: Sequence[Argument],
        *,
        shared: int = 0,
        completion: Completion = "late",
        seed: int = 0,
        residents: int = 2,
        in_order: bool = False,
        copies_need_fence: bool = True,
        memory: Sequence[Tensor] = (),
        most_steps: int = 10**10,
    ) -> int:
        """Runs it to the end; returns how many instructions warps executed.

        args: by the kernel's parameters. A tensor is its address, and the bytes between its first
        and last element may be accessed; so may those of `memory`, for addresses that tensors hold.
        bytes: a struct. None: a null pointer. shared: dynamic, in bytes. completion: asynchronous
        operations finish as late as the program allows, as soon as they are issued, or bulk copies
        at random. residents: CTAs that run at a time, in a drawn order unless `in_order`.
        copies_need_fence: wgmma and bulk copies see what cp.async brought after a fence alone.
        Raises `core().Fault`, which names the instruction, warp and CTA.
        """
        p = self.parsed
        if len(args) != len(p.parameters):
            raise ValueError(f"{p.name} has {len(p.parameters)} parameters, not {len(args)}")
        size = max((x.offset + x.size for x in p.parameters), default=0)
        packed = bytearray(-(-size // 128) * 128)
        ranges = [_extent(x) for x in (*p.variables, *memory)]
        for parameter, arg in zip(p.parameters, args, strict=True):
            packed[parameter.offset : parameter.offset + parameter.size] = _pack(parameter, arg)
            held = arg.tensor if isinstance(arg, TensorMap) else arg
            if isinstance(held, Tensor | np.ndarray):
                ranges.append(_extent(held))
        shape = (block,) if isinstance(block, int) else tuple(block)
        threads = int(np.prod(shape))
        if p.threads not in (None, threads) or threads > (p.most_threads or 1024):
            raise ValueError(f"{p.name} is not for {threads} threads")
        return core().launch(
            self.program,
            _three(grid),
            _three(shape),
            bytes(packed),
            p.shared_bytes,
            shared,
            _merged(ranges),
            completion,
            seed,
            residents,
            in_order,
            copies_need_fence,
            most_steps,
        )

    def counts(self) -> Counter[str]:
        """How often warps executed each opcode, over all launches."""
        total: Counter[str] = Counter()
        for opcode, count in self.program.counts():
            total[opcode] += count
        return total


def _three(shape: Sequence[int]) -> list[int]:
    return [*shape, 1, 1, 1][:3]


def _extent(x: Tensor | np.ndarray) -> tuple[int, int]:
    """First byte of a tensor, and the one after its last."""
    if isinstance(x, np.ndarray):
        begin = int(x.ctypes.data)
        last = sum((n - 1) * s for n, s in zip(x.shape, x.strides, strict=True))
        return (begin, begin + last + x.itemsize) if x.size else (begin, begin)
    begin = x.data_ptr()
    if not x.numel():
        return begin, begin
    last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return begin, begin + (last + 1) * x.element_size()


def _merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ascending, those of one memory as one."""
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(r for r in ranges if r[0] < r[1]):
        if merged and begin < merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((begin, end))
    return merged


def _pack(parameter: Parameter, arg: Argument) -> bytes:
    size = parameter.size
    if isinstance(arg, Tensor):
        data = struct.pack("<Q", arg.data_ptr())
    elif isinstance(arg, np.ndarray):
        data = struct.pack("<Q", arg.ctypes.data)
    elif isinstance(arg, TensorMap | bytes):
        data = bytes(arg)
    elif arg is None:
        data = bytes(size)
    elif isinstance(arg, float):
        data = struct.pack("<d" if size == 8 else "<f", arg)
    else:
        data = (int(arg) & (1 << 8 * size) - 1).to_bytes(size, "little")
    if len(data) != size:
        raise ValueError(f"{parameter.name} has {size} bytes, not {len(data)}")
    return data
