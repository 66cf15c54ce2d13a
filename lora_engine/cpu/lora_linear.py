"""The low-rank parts of a group of linears, by the vendor library's matrix product."""

from collections.abc import Sequence

import torch
from torch import Tensor


def lora_a_fwd(
    x: Tensor,  # [M, K]
    lora_a: Tensor,  # [R, K]
    s: Tensor,  # [M, R]
    spans: Sequence[tuple[slice, slice]],
    dropout: None = None,
) -> None:
    """Writes `s = x lora_aᵀ`."""
    torch.mm(x, lora_a.t(), out=s)


def lora_b_bwd(
    dy: Tensor,  # [M, N]
    lora_b: Tensor,  # [N, R]
    s: Tensor,  # [M, R]
    ds: Tensor,  # [M, R]
    d_lora_b: Tensor | None,  # [N, R] float32
    spans: Sequence[tuple[slice, slice]],
) -> None:
    """Writes `ds = dy lora_b` and the blocks of `d_lora_b = dyᵀ s`, each linear's by itself."""
    used = 0
    for rows, columns in spans:
        if columns.stop > columns.start:
            torch.mm(dy[:, rows], lora_b[rows, columns], out=ds[:, columns])
            if d_lora_b is not None:
                d_lora_b[rows, columns] = torch.mm(dy[:, rows].t(), s[:, columns])
            used = columns.stop
    ds[:, used:].zero_()


def lora_a_bwd(
    ds: Tensor,  # [M, R]
    x: Tensor,  # [M, K]
    d_lora_a: Tensor,  # [R, K] float32
    spans: Sequence[tuple[slice, slice]],
    dropout: None = None,
) -> None:
    """Writes `d_lora_a = dsᵀ x`, all linears' in one product."""
    d_lora_a.copy_(torch.mm(ds.t(), x))
