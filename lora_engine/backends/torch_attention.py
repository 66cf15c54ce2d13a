"""What PyTorch's attentions need to stand behind the contract of our own kernels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_engine.backends.triton.rope import rope


def heads_of(*tensors: Tensor, head_dim: int) -> list[Tensor]:
    """Tensors [tokens, heads head_dim] as [tokens, heads, head_dim]."""
    return [x.unflatten(1, (-1, head_dim)) for x in tensors]


def rotated(
    q: Tensor,  # [tokens, q_heads, head_dim]
    k: Tensor,  # [tokens, kv_heads, head_dim]
    cos: Tensor | None,  # [tokens, head_dim]
    sin: Tensor | None,  # [tokens, head_dim]
    q_columns: int | None = None,
) -> tuple[Tensor, Tensor]:
    """q and k rotated into memory of their own; themselves without tables.

    Rows of the rotated q are `q_columns` elements apart, if given.
    """
    if cos is None or sin is None:
        return q, k
    tokens, heads, head_dim = q.shape
    columns = heads * head_dim if q_columns is None else q_columns
    buffer = torch.empty(tokens, columns, dtype=q.dtype, device=q.device)
    turned_q = buffer[:, : heads * head_dim].unflatten(1, (heads, head_dim))
    turned_k = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    rope(q, k, turned_q, turned_k, cos, sin, None, interleaved=False, inverse=False)
    return turned_q, turned_k


def copy_rows(source: Tensor, target: Tensor) -> None:
    """target.copy_(source), tensors of one shape and dtype.

    PyTorch copies rows that do not follow each other directly element by element, at a third of
    the memory's rate where an element has 2 bytes: here 16 bytes are one, where rows allow it.
    """
    if all(_in_16_bytes(x) for x in (source, target)):
        source, target = source.view(torch.complex128), target.view(torch.complex128)
    target.copy_(source)


def _in_16_bytes(x: Tensor) -> bool:
    starts = (x.data_ptr(), *(x.element_size() * n for n in (x.shape[-1], *x.stride()[:-1])))
    return x.stride(-1) == 1 and all(n % 16 == 0 for n in starts)


def write_gradients(
    found: Sequence[Tensor],  # of rotated q and k, and of v: [tokens, heads, head_dim]
    wanted: Sequence[Tensor],  # dq, dk, dv [tokens, heads head_dim]
    cos: Tensor | None,  # [tokens, head_dim]
    sin: Tensor | None,  # [tokens, head_dim]
    *,
    head_dim: int,
) -> None:
    """Writes the gradients, those of q and k rotated back."""
    raw_dq, raw_dk, raw_dv = found
    dq, dk, dv = heads_of(*wanted, head_dim=head_dim)
    copy_rows(raw_dv, dv)
    if cos is None or sin is None:
        dq.copy_(raw_dq)
        dk.copy_(raw_dk)
    else:
        rope(raw_dq, raw_dk, dq, dk, cos, sin, None, interleaved=False, inverse=True)
