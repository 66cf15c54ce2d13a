"""How many launches the thin products of a group take on a GPU, counted without launching any."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lora_engine.backends.lora_parts import AdapterPart, Placing, ScaledColumns, ScaledRows
from lora_engine.values import LoraFactors

pytest.importorskip("triton")

ROWS, COLS, OUTS, RANK = 300, 64, (64, 16, 16), 4
NO_LAUNCH = ("empty", "slice", "split_with_sizes", "as_strided")


class Counted(TorchDispatchMode):
    """The Triton kernels, which do nothing, and torch's operations that would be launched."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        from lora_engine.backends.triton.relaunch import Relaunched

        self.found: list[str] = []

        def launcher(kernel: Relaunched, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *args, **constants: self.found.append(kernel.jit.__name__)

        monkeypatch.setattr(Relaunched, "__getitem__", launcher)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        if not name.startswith(NO_LAUNCH):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def spans() -> list[tuple[slice, slice]]:
    found, row = [], 0
    for i, out in enumerate(OUTS):
        found.append((slice(row, row + out), slice(i * RANK, (i + 1) * RANK)))
        row += out
    return found


def new(*shape: int) -> Tensor:
    return torch.zeros(shape)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


def test_factors_of_a_group_are_placed_by_one(counted: Counted) -> None:
    from lora_engine.backends.triton import lora_linear

    lora_a, lora_b = new(len(OUTS) * RANK, COLS), new(sum(OUTS), len(OUTS) * RANK)
    placings = [
        Placing(
            LoraFactors(new(RANK, COLS), new(out, RANK), 0.5),
            lora_a[columns],
            lora_b[rows, columns],
        )
        for out, (rows, columns) in zip(OUTS, spans(), strict=True)
    ]
    with counted:
        lora_linear.place_factors(lora_a, lora_b, placings)
    assert counted.found == ["_place_factors_kernel"]


def test_each_product_takes_one_and_its_sums_another(counted: Counted) -> None:
    from lora_engine.backends.triton import lora_linear

    ranks, n = len(OUTS) * RANK, sum(OUTS)
    x, dy, s, ds, copy = (new(ROWS, width) for width in (COLS, n, ranks, ranks, ranks))
    lora_a, lora_b = new(ranks, COLS), new(n, ranks)
    parts = [AdapterPart(*span, 0.5) for span in spans()]
    rows, columns = ScaledRows(new(ROWS), copy), ScaledColumns(new(COLS), 1.0)
    d_lora_a, d_lora_b = new(ranks, COLS), new(n * RANK)
    with counted:
        lora_linear.lora_a_fwd(x, lora_a, s, spans(), None, copy)
        lora_linear.lora_b_bwd(dy, lora_b, s, ds, d_lora_b, spans(), parts, rows)
        lora_linear.lora_a_bwd(ds, x, d_lora_a, spans(), None, columns)
    assert counted.found == [
        "_lora_a_fwd_kernel",
        "_lora_b_bwd_kernel",
        "_sum_thin_kernel",
        "_lora_a_bwd_kernel",
        "_sum_chunks_kernel",
    ]


def test_one_chunk_of_rows_needs_no_sums(counted: Counted) -> None:
    from lora_engine.backends.triton import lora_linear

    ranks = len(OUTS) * RANK
    ds, x, d_lora_a = new(8, ranks), new(8, COLS), new(ranks, COLS)
    with counted:
        lora_linear.lora_a_bwd(ds, x, d_lora_a, spans())
    assert counted.found == ["_lora_a_bwd_kernel"]
