"""What the norms' launchers share: tiles of rows, and gradients that are sums over all rows."""

from lora_engine.backends.triton import launch
from torch import Tensor

from lora_engine.backends.hardware import multiprocessors


def tile_of(kernel: str, x: Tensor, *others: Tensor | None) -> tuple[dict[str, int], int]:
    """The kernel's launch parameters for rows like x's, and how many programs run at a time.

    x and `others` are [rows, cols], or [tokens, heads, cols] with heads side by side.

    Launch size: the bytes of a row. The table's BLOCK_N is the most columns that a program holds.
    Where a kernel sums over rows, PROGRAMS is how many of its programs a multiprocessor has
    registers for: each takes its share of the rows, all at once. ALIGN is what every row of x and
    `others` starts at a multiple of, in elements: a stride that Triton does not find divisible by
    16 (rows with padding columns, say) may still allow 16-byte accesses.
    """
    cols, heads = x.shape[-1], x.shape[1] if x.dim() == 3 else 1
    config = dict(launch.config(kernel, x.device, x.dtype, cols * x.element_size()))
    programs = config.pop("PROGRAMS", 1) * multiprocessors(x.device)
    align = 16
    for rows in (x, *others):
        while rows is not None and (rows.stride(0) % align or (heads > 1 and cols % align)):
            align //= 2
    block_n = min(launch.next_power_of_2(cols), config["BLOCK_N"])
    return {**config, "N": cols, "BLOCK_N": block_n, "ALIGN": align}, programs


def rows_per_program(rows: int, block_m: int, programs: int) -> int:
    """A multiple of block_m such that at most `programs` programs share the rows."""
    return launch.cdiv(launch.cdiv(rows, programs), block_m) * block_m
